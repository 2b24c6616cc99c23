"""Whether an objective is a mean over rows, so that parts of a batch may be averaged.

This room owns the question that must be settled before a batch is split where the user
has not asked for it: over devices, or into blocks that fit a cache. The answer is yes
only if two things say so. The program of the objective, traced for two numbers of rows,
ends in sums over rows of which only linear functions are taken; that excludes, for all
parameters and rows, roots and clips of a mean, ratios of sums, penalties on statistics
of a batch, and normalization by them. And on a few of the user's rows, value and
gradient of two sets together are the means of those of each; that excludes sums in
place of means, and whatever else brings rows together before they are added up.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# What a value in the program is: the same for all rows; one part for each row, as its
# shape tells; a linear function of sums over rows; or anything else.
_FIXED, _BY_ROW, _SUMS, _COUPLED = range(4)

_SUMMING = {"reduce_sum", "dot_general"}
_LINEAR = {
    *("add", "add_any", "sub", "neg", "reduce_sum", "convert_element_type"),
    *("reshape", "squeeze", "broadcast_in_dim", "transpose", "concatenate", "slice"),
    *("copy", "real", "imag", "select_n", "mul", "div", "dot_general"),
}
_CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}


def is_mean_over_rows(objective, params, data) -> bool:
    """Whether the mean over parts of a batch is that of the batch.

    ``objective``: an ``Objective`` without keys and auxiliary output.
    """
    rows: Any = jax.tree.map(_some_rows, data)
    places = np.arange(16), np.full(16, 16)
    sets = [jax.tree.map(lambda x, at=at: x[at], rows) for at in places]
    both = jax.tree.map(lambda *parts: np.concatenate(parts), *sets)

    def value(params, rows):
        return objective.value(params, rows, None)

    few, many = (jax.make_jaxpr(value)(params, part).jaxpr for part in (sets[0], both))
    kinds = [_FIXED] * len(jax.tree.leaves(params))
    kinds += [_BY_ROW] * len(jax.tree.leaves(data))
    if _kinds(few, many, kinds)[0] != _SUMS:
        return False
    return _is_mean_of_parts(objective, params, sets[0], sets[1], both)


def _kinds(one, two, kinds) -> list:
    """What the results of two traces of one program are, given what enters it."""
    if len(one.eqns) != len(two.eqns):
        return [_COUPLED] * len(one.outvars)  # the number of rows decides about it
    known: dict[Any, int] = dict(zip(one.invars, kinds, strict=True))

    def kind(x):
        return _FIXED if isinstance(x, Literal) else known.get(x, _FIXED)

    for eqn, other in zip(one.eqns, two.eqns, strict=True):
        given = list(map(kind, eqn.invars))
        if eqn.primitive is not other.primitive:
            found = [_COUPLED] * len(eqn.outvars)
        elif eqn.primitive.name in _CALLS:
            found = _kinds(_within(eqn), _within(other), given)
        else:
            pairs = zip(eqn.outvars, other.outvars, strict=True)
            found = [_kind_of(eqn, given, a.aval, b.aval) for a, b in pairs]
        known |= dict(zip(eqn.outvars, found, strict=True))
    return list(map(kind, one.outvars))


def _within(eqn):
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)


def _kind_of(eqn, given, aval, other) -> int:
    """What a result of one operation is, whose shape depends on the rows or not."""
    if _COUPLED in given:
        return _COUPLED
    if aval.shape != other.shape:
        return _COUPLED if _SUMS in given else _BY_ROW
    if _BY_ROW in given:
        summing = eqn.primitive.name in _SUMMING and _SUMS not in given
        return _SUMS if summing else _COUPLED
    if _SUMS not in given:
        return _FIXED
    return _SUMS if _is_linear(eqn, given, aval) else _COUPLED


def _is_linear(eqn, given, aval) -> bool:
    name = eqn.primitive.name
    if name in ("mul", "dot_general"):
        return given.count(_SUMS) == 1
    if name in ("div", "select_n"):  # by the same for all, chosen by the same for all
        return given[1 if name == "div" else 0] == _FIXED
    return name in _LINEAR and jnp.issubdtype(aval.dtype, jnp.inexact)


def _is_mean_of_parts(objective, params, first, second, both) -> bool:
    """Whether value and gradient of both sets of rows are the means of those of each.

    Up to rounding: for deep networks, a recurrence of 100 steps and features far from
    zero that is up to 3 eps, while a penalty of 0.001 on a variance over rows is 70.
    The second set is a single row again and again, for sets of one kind show little of
    a function that is nearly linear in their mean, such as its root.
    """
    rng = np.random.default_rng(0)
    fun = jax.jit(objective.value_and_grad)

    def near(x):
        noise = rng.normal(size=np.shape(x)) * (0.1 + 0.1 * np.abs(x))
        return np.asarray(x + noise, x.dtype)

    def of(params, rows):
        (value, _), grad = fun(params, rows, None)
        flat = [np.ravel(g) for g in jax.tree.leaves(grad)]
        return np.atleast_1d(value), np.concatenate(flat)

    for start in (params, jax.tree.map(near, params)):
        found = [of(start, rows) for rows in (first, second, both)]
        for a, b, c in zip(*found, strict=True):
            apart, size = np.linalg.norm(a - b), np.linalg.norm(a) + np.linalg.norm(b)
            off = np.linalg.norm(c - (a + b) / 2)
            if not off <= 16 * np.finfo(c.dtype).eps * size:
                return False
        if not apart > 1e-3 * size:  # of the gradients: no row is to be seen in them
            return False
    return True


def _some_rows(x) -> np.ndarray:
    """17 rows of an array, of those that are within reach of this process."""
    if isinstance(x, jax.Array):
        x = x.addressable_shards[0].data
    return np.asarray(x)[np.linspace(0, x.shape[0] - 1, 17).astype(int)]
