r"""Problems with known answers, shared by tests, examples and benchmarks.

This room owns objectives, their starts, their data and what is known of their minima;
it imports nothing of jaxgd, and a ``Problem`` plugs into any optimizer. Functions stand
at module level and hold numbers in a ``jax.tree_util.Partial``, so that two calls of a
maker share one compiled program. Synthetic data is NumPy and seeded.

Example:
  >>> import jaxgd
  >>> ridge = jaxgd.problems.ridge()
  >>> result = jaxgd.minimize(
  ...     ridge.fun, ridge.init, ridge.data, learning_rate=0.5
  ... )
  >>> abs(float(result.value) - ridge.value) < 1e-6
  True

References:
  [MGH] Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM
  TOMS 7 (1981). A hundred more are in ``benchmarks/classical_problems.py``.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


class Problem(NamedTuple):
    """An objective, where to start, and what is known of the answer."""

    name: str
    fun: Callable[..., Any]  # fun(params), or fun(params, batch): a mean over rows
    init: Any  # pytree of NumPy arrays
    data: Any = None  # (x, y) with a leading axis of rows
    solution: Any = None  # a minimizer, shaped like init; None: not known, not unique
    value: float | None = None  # fun(solution)


# Without data.


def quadratic(n=10, condition=100.0, seed=0, *, dtype=np.float32) -> Problem:
    r""":math:`\tfrac12 (x - s)^T A (x - s)` from 0, with a random s of shape (n,).

    The eigenvalues of A, shape (n, n), are evenly spaced in the logarithm from 1 down
    to 1 / condition, in a random orthogonal basis: the largest curvature is 1, so plain
    descent is stable below a rate of 2.
    """
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    matrix = (basis * np.geomspace(1.0, 1.0 / condition, n)) @ basis.T
    matrix = ((matrix + matrix.T) / 2).astype(dtype)
    center = rng.normal(size=n).astype(dtype)
    fun = Partial(_quadratic, matrix, center)
    return Problem("quadratic", fun, np.zeros(n, dtype), None, center, 0.0)


def rosenbrock(n=2, *, dtype=np.float32) -> Problem:
    """The valley of n / 2 independent pairs, n even: MGH 1 and, extended, MGH 21."""
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and positive, got {n}: take n + 1.")
    init = np.tile(np.array([-1.2, 1.0], dtype), n // 2)
    return Problem(f"rosenbrock_{n}", _rosenbrock, init, None, np.ones(n, dtype), 0.0)


# With data.


def linear_data(n=200, d=5, seed=0, noise=0.1, *, dtype: Any = np.float32):
    """Rows of a linear model: x of shape (n, d), standard normal, and y of shape (n,).

    y = x @ weights + intercept + noise * normal, with random weights and intercept.
    """
    rng = np.random.default_rng(seed)
    weights, intercept = rng.normal(size=d), rng.normal()
    x = rng.normal(size=(n, d))
    y = x @ weights + intercept + noise * rng.normal(size=n)
    return x.astype(dtype), y.astype(dtype)


def blobs(n=300, d=2, classes=3, seed=0, *, dtype=np.float32):
    """Overlapping clouds: x of shape (n, d) and labels 0 ... classes - 1, int32 (n,).

    Classes are equally frequent, each a unit normal around a center of scale 2.
    """
    rng = np.random.default_rng(seed)
    centers = 2.0 * rng.normal(size=(classes, d))
    y = rng.permutation(np.arange(n) % classes)
    x = centers[y] + rng.normal(size=(n, d))
    return x.astype(dtype), y.astype(np.int32)


def least_squares(x=None, y=None, *, dtype=np.float32) -> Problem:
    r""":math:`\tfrac12` mean((x w + b - y)^2): ``ridge`` without a penalty.

    With dependent columns the solution is the one of smallest norm of the weights.
    """
    return ridge(x, y, 0.0, dtype=dtype)._replace(name="least_squares")


def ridge(x=None, y=None, penalty=0.1, *, dtype=np.float32) -> Problem:
    r""":math:`\tfrac12` mean((x w + b - y)^2) :math:`+ \tfrac12` penalty |w|^2.

    x (n, d) and y (n,) default to ``linear_data()``; params are {"weights": (d,),
    "intercept": ()}, the intercept free of penalty. The solution is in closed form, in
    float64 (scikit-learn's Ridge with alpha = n * penalty).
    """
    x, y = _rows(x, y, dtype, linear_data)
    y = y.astype(dtype)
    weights, intercept, value = _solve_ridge(x, y, penalty)
    solution = {"weights": weights, "intercept": intercept}
    solution = {name: np.asarray(leaf, dtype) for name, leaf in solution.items()}
    fun = Partial(_ridge, np.asarray(penalty, dtype))
    return Problem("ridge", fun, _linear_init(x, (), dtype), (x, y), solution, value)


def logistic(x=None, y=None, penalty=0.1, *, dtype=np.float32) -> Problem:
    r"""mean(log(1 + exp(z)) - y z) :math:`+ \tfrac12` penalty |w|^2, z = x w + b.

    x (n, d) and labels y (n,) in {0, 1} default to two ``blobs()``; params are as for
    ``ridge`` (scikit-learn's LogisticRegression with C = 1 / (n * penalty)).
    """
    x, y = _rows(x, y, dtype, partial(blobs, classes=2))
    _check_labels(y, 2)
    fun = Partial(_logistic, np.asarray(penalty, dtype))
    data = x, y.astype(dtype)
    return Problem("logistic", fun, _linear_init(x, (), dtype), data)


def multinomial(
    x=None, y=None, classes=None, penalty=0.1, *, dtype=np.float32
) -> Problem:
    r"""mean(logsumexp(z) - z[y]) :math:`+ \tfrac12` penalty |w|^2, z = x w + b.

    x (n, d) and integer labels y (n,) default to ``blobs()``, classes to the largest
    label + 1; params are {"weights": (d, classes), "intercept": (classes,)}. The
    intercept is unique up to a constant.
    """
    x, y = _rows(x, y, dtype, partial(blobs, classes=classes or 3))
    classes = int(y.max()) + 1 if classes is None else classes
    _check_labels(y, classes)
    fun = Partial(_multinomial, np.asarray(penalty, dtype))
    data = x, y.astype(np.int32)
    return Problem("multinomial", fun, _linear_init(x, (classes,), dtype), data)


def mlp(
    x=None, y=None, sizes=None, seed=0, *, activation="tanh", dtype=np.float32
) -> Problem:
    """Mean cross entropy of a fully connected classifier.

    x (n, d) and integer labels y (n,) default to ``blobs()``. ``sizes`` are the widths
    of all layers, (d, ..., classes), by default (d, 32, classes); params are a tuple of
    {"weights": (in, out), "bias": (out,)}, one a layer. Weights start normal, with
    variance 2 / (in + out) for "tanh" (Glorot and Bengio, 2010) and 2 / in for "relu"
    (He et al., 2015); biases start at 0.
    """
    if activation not in _MLP:
        raise ValueError(
            f'activation must be "tanh" or "relu", got {activation!r}: choose one.'
        )
    d, classes = (2, 3) if sizes is None else (sizes[0], sizes[-1])
    x, y = _rows(x, y, dtype, partial(blobs, d=d, classes=classes))
    sizes = (x.shape[1], 32, int(y.max()) + 1) if sizes is None else tuple(sizes)
    if len(sizes) < 2 or sizes[0] != x.shape[1]:
        raise ValueError(
            f"sizes must be ({x.shape[1]}, ..., classes), got {sizes}: name every "
            "layer, from the columns of x to the classes."
        )
    _check_labels(y, sizes[-1])
    rng = np.random.default_rng(seed)
    init = []
    for fan_in, fan_out in pairwise(sizes):
        fans = fan_in if activation == "relu" else fan_in + fan_out
        weights = rng.normal(scale=np.sqrt(2 / fans), size=(fan_in, fan_out))
        init.append(
            {"weights": weights.astype(dtype), "bias": np.zeros(fan_out, dtype)}
        )
    data = x, y.astype(np.int32)
    return Problem(f"mlp_{activation}", _MLP[activation], tuple(init), data)


# Objectives without data: params of shape (n,).


def _quadratic(matrix, center, params):
    r = params - center
    return 0.5 * jnp.vdot(r, matrix @ r)


# Objectives with data: means over the rows of a batch.


def _rosenbrock(params):
    x, y = params[0::2], params[1::2]
    return jnp.sum((10.0 * (y - x**2)) ** 2) + jnp.sum((1.0 - x) ** 2)


def _penalty(penalty, params):
    return 0.5 * (penalty * jnp.sum(params["weights"] ** 2))


def _affine(params, x):
    return _shifted(x @ params["weights"], params["intercept"])


def _shifted(rows, by):
    return rows + (by[None] if jnp.ndim(by) else by)


def _ridge(penalty, params, batch):
    x, y = batch
    return 0.5 * jnp.mean((_affine(params, x) - y) ** 2) + _penalty(penalty, params)


def _logistic(penalty, params, batch):
    x, y = batch
    z = _affine(params, x)
    return jnp.mean(jnp.logaddexp(z, 0.0) - y * z) + _penalty(penalty, params)


def _multinomial(penalty, params, batch):
    x, y = batch
    return _cross_entropy(_affine(params, x), y) + _penalty(penalty, params)


def _cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def _perceptron(activation, params, batch):
    x, y = batch
    *hidden, last = params
    for layer in hidden:
        x = activation(_shifted(x @ layer["weights"], layer["bias"]))
    return _cross_entropy(_shifted(x @ last["weights"], last["bias"]), y)


def _mlp_tanh(params, batch):
    return _perceptron(jnp.tanh, params, batch)


def _mlp_relu(params, batch):
    return _perceptron(jax.nn.relu, params, batch)


_MLP = {"tanh": _mlp_tanh, "relu": _mlp_relu}


# Data and answers, in NumPy.


def _rows(x, y, dtype, synthetic):
    """(x, y), checked, x in ``dtype``; ``synthetic`` where neither is given."""
    if x is None and y is None:
        return synthetic(dtype=dtype)
    if x is None or y is None:
        raise ValueError("x and y must come together, got one: pass both, or neither.")
    x, y = np.asarray(x, dtype), np.asarray(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or x.size == 0:
        raise ValueError(
            "x must have shape (n, d) and y (n,), neither empty, got "
            f"{x.shape} and {y.shape}: reshape them."
        )
    return x, y


def _check_labels(y, classes):
    if not np.isin(y, np.arange(classes)).all():
        raise ValueError(
            f"y must hold whole numbers from 0 to {classes - 1}, got labels such as "
            f"{np.setdiff1d(y, np.arange(classes))[0]}: number the classes from 0."
        )


def _linear_init(x, outputs, dtype):
    weights = np.zeros((x.shape[1], *outputs), dtype)
    return {"weights": weights, "intercept": np.zeros(outputs, dtype)}


def _solve_ridge(x, y, penalty):
    """(weights, intercept, minimum): least squares of the centered rows, in float64."""
    n, d = x.shape
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean()
    root = np.sqrt(n * float(penalty)) * np.eye(d)
    left, right = np.vstack([x - x_mean, root]), np.append(y - y_mean, np.zeros(d))
    weights = np.linalg.lstsq(left, right)[0]
    value = 0.5 * np.sum((left @ weights - right) ** 2) / n
    return weights, y_mean - x_mean @ weights, float(value)
