"""192 runs as one program: learning rates, momenta and seeds compared on equal terms.

What it shows: handwritten digits by softmax regression, mini-batches of 32, for every
pair of 8 rates and 6 momenta, with 4 seeds each. All lanes with the same seed see the
same batches, so two settings are compared on the same luck. The table is sorted by the
mean over seeds; the picture is a heat map, with a cross where a lane diverged.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxgd
from jaxgd import problems


def main(output=Path("sweep.png"), epochs=3, seeds=4):
    x, y = load_digits(return_X_y=True)
    problem = problems.multinomial(x / 16, y, penalty=1e-3)
    start = time.perf_counter()
    sweep = jaxgd.sweep(
        problem.fun,
        problem.init,
        problem.data,
        over={
            "learning_rate": np.geomspace(1e-3, 30, 8),
            "momentum": np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95]),
        },
        optimizer=optax.sgd,
        seeds=seeds,
        batch_size=32,
        epochs=epochs,
    )
    seconds = time.perf_counter() - start
    count = sweep.results.status.size
    print(
        f"{count} runs of {epochs} epochs in {seconds:.1f} s, compilation included.\n"
    )
    lines = sweep.table().splitlines()
    print("\n".join(lines[:9]))
    print(f"... and {len(lines) - 9} more settings, the last of them:")
    print(lines[-1])
    print("\nThe best lane:", sweep.best_settings)
    print(sweep.best)
    figure, axes = plt.subplots(layout="constrained")
    sweep.plot(axes)
    figure.savefig(output, dpi=110)
    print(f"\nA picture of the grid is in {output}.")
    return sweep


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("sweep.png"))
    main(parser.parse_args().output)
