"""No learning rate anywhere: batch and mini-batch descent that choose their own.

What it shows: three very different objectives, one of them badly scaled, each minimized
by ``jaxgd.minimize(fun, params, data)`` and nothing else, then by mini-batches with
``batch_size`` alone; beside them plain descent with the rate that a colleague used on
the first of them. Nothing is tuned, and every run says how it went.
"""

import argparse

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

import jaxgd
from jaxgd import problems


def load_problems():
    """(name, problem): digits, tumors in raw units, blood values in raw units."""
    x, y = load_digits(return_X_y=True)
    yield "digits, softmax", problems.multinomial(x / 16, y, penalty=1e-3)
    x, y = load_breast_cancer(return_X_y=True)
    yield "tumors, logistic, raw", problems.logistic(x, y, penalty=1e-3)
    x, y = load_diabetes(return_X_y=True, scaled=False)
    yield "diabetes, linear, raw", problems.ridge(x, y, penalty=1e-3)


def main(max_steps=2000, epochs=20):
    results = {}
    for name, problem in load_problems():
        call = problem.fun, problem.init, problem.data
        results[name] = runs = {
            "no rate, all rows": jaxgd.minimize(*call, max_steps=max_steps),
            "no rate, batches of 32": jaxgd.minimize(
                *call, batch_size=32, epochs=epochs
            ),
            "rate 1, batches of 32": jaxgd.minimize(
                *call, batch_size=32, epochs=epochs, learning_rate=1.0
            ),
        }
        print(name)
        for kind, result in runs.items():
            value = float(result.value)
            print(f"  {kind:24}{value:14.6g}  {result.message}")
        worst = max(runs.values(), key=lambda r: np.nan_to_num(r.value, nan=np.inf))
        print(f"  its worst run: {worst.diagnosis}\n")
    return results


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
