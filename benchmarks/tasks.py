"""Stochastic tasks on which rates and parameter-free rules are judged.

Each task is a ``Problem`` with rows, and the best objective known for it: in closed
form for least squares, by L-BFGS in float64 for convex losses, 0 for the network.
Data sets are scikit-learn's own, read without a network.
"""

from functools import cache

import numpy as np

from benchmarks._measure import needs
from jaxgd import problems

NAMES = (
    "digits",
    "breast_cancer_raw",
    "breast_cancer",
    "diabetes_raw",
    "diabetes",
    "mlp",
    "badly_scaled",
)
PENALTY = 1e-3  # makes the minimum of every convex task unique


@cache
def task(name: str) -> problems.Problem:
    """The problem, float32, its ``value`` the best objective known."""
    found = _MAKERS[name]()
    if found.value is None:
        found = found._replace(value=0.0 if name == "mlp" else _minimum(found))
    return found._replace(name=name)


def start(found: problems.Problem, seed: int):
    """Where a run with this seed starts: the network's weights differ."""
    if found.name == "mlp":
        return _mlp(seed).init
    return found.init


def _digits():
    x, y = needs("sklearn.datasets").load_digits(return_X_y=True)
    return problems.multinomial(x / 16.0, y, penalty=PENALTY)


def _breast_cancer(standardize):
    x, y = needs("sklearn.datasets").load_breast_cancer(return_X_y=True)
    return problems.logistic(_standardized(x) if standardize else x, y, PENALTY)


def _diabetes(standardize):
    x, y = needs("sklearn.datasets").load_diabetes(return_X_y=True, scaled=False)
    return problems.ridge(_standardized(x) if standardize else x, y, PENALTY)


def _mlp(seed=0):
    x, y = needs("sklearn.datasets").load_digits(return_X_y=True)
    return problems.mlp(x / 16.0, y, (64, 32, 10), seed)


def _badly_scaled():
    """Columns that differ in size by up to a factor of 1e4, 2000 x 20."""
    x, y = problems.linear_data(2000, 20, seed=1, noise=1.0, dtype=np.float64)
    return problems.least_squares(x * np.geomspace(1e-2, 1e2, 20), y)


_MAKERS = {
    "digits": _digits,
    "breast_cancer_raw": lambda: _breast_cancer(False),
    "breast_cancer": lambda: _breast_cancer(True),
    "diabetes_raw": lambda: _diabetes(False),
    "diabetes": lambda: _diabetes(True),
    "mlp": _mlp,
    "badly_scaled": _badly_scaled,
}


def _standardized(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


def _minimum(found) -> float:
    """The minimum of a convex problem, columns scaled for the sake of L-BFGS."""
    optimize = needs("scipy.optimize")
    x, y = (np.asarray(leaf, np.float64) for leaf in found.data)
    shift, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    classes = found.init["weights"].shape[1:]
    shape = (x.shape[1], *classes)
    cut = int(np.prod(shape))
    x = (x - shift) / scale
    inverse = (1 / scale).reshape(-1, *[1] * len(classes))

    def value_and_grad(flat):
        weights, intercept = flat[:cut].reshape(shape), flat[cut:].reshape(classes)
        z = x @ weights + intercept
        own = weights * inverse  # the weights of the columns as they come
        if classes:
            top = z.max(axis=1, keepdims=True)
            e = np.exp(z - top)
            p = e / e.sum(axis=1, keepdims=True)
            rows, labels = np.arange(len(y)), y.astype(int)
            losses = np.log(e.sum(axis=1)) + top[:, 0] - z[rows, labels]
            p[rows, labels] -= 1
        else:
            losses = np.logaddexp(z, 0) - y * z
            p = 1 / (1 + np.exp(-z)) - y
        grad = x.T @ p / len(y) + PENALTY * own * inverse
        value = losses.mean() + 0.5 * PENALTY * np.sum(own**2)
        return value, np.concatenate([grad.ravel(), np.ravel(p.mean(axis=0))])

    size = cut + int(np.prod(classes, dtype=int))
    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10}
    end = optimize.minimize(
        value_and_grad, np.zeros(size), jac=True, method="L-BFGS-B", options=options
    )
    return float(end.fun)
