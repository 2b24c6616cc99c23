"""Too small, good, at the edge, too large, and no learning rate at all.

What it shows: linear regression on scikit-learn's diabetes data, whose largest
curvature ``jaxgd.sharpness`` tells: rates below 2 / sharpness are stable. Five
runs of the same call, four with a fraction of that limit and one with no rate, say for
themselves what was wrong with theirs; the picture shows how far each comes.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes

import jaxgd

SHARES = {"too small": 0.002, "good": 0.5, "edge": 0.99, "too large": 1.1}


def load_problem():
    """Ridge regression on standardized columns, its minimum known in closed form."""
    x, y = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return jaxgd.problems.ridge(x, y - y.mean(), penalty=0.01)


def main(output="learning_rates.png", max_steps=300):
    problem = load_problem()
    call = problem.fun, problem.init, problem.data
    sharpness = float(jaxgd.sharpness(*call))
    print(f"sharpness {sharpness:.4g}: rates up to {2 / sharpness:.4g} are stable\n")
    results = {}
    for name, share in SHARES.items():
        rate = share * 2 / sharpness
        results[name] = jaxgd.minimize(*call, learning_rate=rate, max_steps=max_steps)
    results["no rate given"] = jaxgd.minimize(*call, max_steps=max_steps)

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, result in results.items():
        print(f"{name} ({result.steps} steps)\n  {result.diagnosis}\n")
        excess = np.append(result.history.value, result.value) - problem.value
        verdict = result.diagnosis.verdict
        label = (
            name if name not in SHARES else f"{SHARES[name]} of the limit: {verdict}"
        )
        ax.semilogy(np.maximum(excess, 1e-5), label=label, lw=1.8)
    ax.set_ylim(3e-4, 3e6)
    ax.set_xlabel("steps")
    ax.set_ylabel("objective above its minimum")
    ax.set_title(f"One problem, five runs (stable below {2 / sharpness:.3g})")
    ax.legend(loc="upper right", framealpha=0.9)
    fig.savefig(output, dpi=120)
    plt.close(fig)
    print(f"wrote {output}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="learning_rates.png")
    main(parser.parse_args().output)
