"""One hundred starts at once on a function with many minima.

What it shows: Himmelblau's function has four minima, all of value 0, and gradient
descent ends in the one whose basin it started in. A hundred random starts run as lanes
of one program, without a learning rate; the script counts how many ended in each
minimum and draws some of the paths over the contours.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jaxgd

# Himmelblau, Applied Nonlinear Programming (1972).
MINIMA = np.array(
    [[3.0, 2.0], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848127]]
)


def himmelblau(x):
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def main(output=Path("many_starts.png"), count=100, drawn=8):
    starts = np.random.default_rng(0).uniform(-5, 5, (count, 2)).astype(np.float32)
    sweep = jaxgd.sweep(himmelblau, None, over={"params": starts})
    ends = np.asarray(sweep.results.params)
    distance = np.linalg.norm(ends[:, None] - MINIMA, axis=-1)
    nearest = distance.argmin(axis=1)
    steps = np.asarray(sweep.results.steps)
    converged = int(sweep.results.converged.sum())
    print(f"{converged} of {count} starts converged, after {steps.min()} to")
    print(f"{steps.max()} steps (median {np.median(steps):.0f}). Where they ended:")
    for i, (first, second) in enumerate(MINIMA):
        here = nearest == i
        off = distance[here, i].max(initial=0)
        print(
            f"  ({first:9.6f}, {second:9.6f})  {here.sum():3} starts, "
            f"at most {off:.1e} away"
        )
    paths = [
        [start, *jaxgd.iterate(himmelblau, start, every=1)] for start in starts[:drawn]
    ]
    figure, axes = plt.subplots(layout="constrained")
    jaxgd.plot_paths(himmelblau, paths, ax=axes)
    axes.set_title(f"{drawn} of {count} starts of Barzilai-Borwein descent")
    figure.savefig(output, dpi=110)
    print(f"A picture of some paths is in {output}.")
    return sweep, nearest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("many_starts.png"))
    main(parser.parse_args().output)
