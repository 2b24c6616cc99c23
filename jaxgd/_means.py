"""Whether an objective is a mean over rows, so that parts of a batch may be averaged.

This room owns the question that must be settled before a batch is split where the user
has not asked for it: over devices, or into blocks that fit a cache. Two things must say
yes. The program of the objective, traced for two numbers of rows, is followed operation
by operation: the axis of the rows is never looked across until it is summed over, and
of such sums only linear functions are taken. An operation that is not known here counts
as one that looks across. And on a few of the user's rows, value and gradient of two
sets together are the means of those of each, which tells a mean from a sum.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# What a value in the program is. A number is the axis of the rows in an array that has
# a part for each of them.
_FIXED = "the same for all rows"
_SIZE = "a function of the number of rows"
_SUMS = "a linear function of sums over rows"
_COUPLED = "anything else"

_ENTRY_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg
nextafter not or pow real rem round rsqrt select_n sign sin sinh sqrt square
stop_gradient sub tan tanh xor
"""
_LINEAR_NAMES = """
add add_any broadcast_in_dim concatenate convert_element_type copy imag neg real
reduce_sum reshape slice squeeze sub transpose
"""
_BY_ENTRY = frozenset(_ENTRY_NAMES.split())
_LINEAR = frozenset(_LINEAR_NAMES.split())
_REDUCE = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and"}
_REDUCE |= {"reduce_or", "argmax", "argmin"}
_ALONG_ONE = {"cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis"}
_ALONG_ONE |= {"cumlogsumexp": "axis", "sort": "dimension", "concatenate": "dimension"}
_CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call"}


def is_mean_over_rows(objective, params, data, sizes) -> bool:
    """Whether the mean over parts of a batch is that of the batch.

    ``objective``: an ``Objective`` without keys and auxiliary output. ``sizes``: rows
    of a part and of the batch.
    """
    rows: Any = jax.tree.map(_some_rows, data)
    places = np.arange(16), np.full(16, 16)
    sets = [jax.tree.map(lambda x, at=at: x[at], rows) for at in places]
    both = jax.tree.map(lambda *parts: np.concatenate(parts), *sets)

    def value(params, rows):
        return objective.value(params, rows, None)

    def traced(size):
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows
        )
        return jax.make_jaxpr(value)(params, batch).jaxpr

    kinds: list[Any] = [_FIXED] * len(jax.tree.leaves(params))
    kinds += [0] * len(jax.tree.leaves(data))
    few, many = map(traced, sizes)
    if _kinds(few, many, kinds, sizes)[0] != _SUMS:
        return False
    return _is_mean_of_parts(objective, params, sets[0], sets[1], both)


def _kinds(one, two, kinds, sizes) -> list:
    """What the results of two traces of one program are, given what enters it."""
    if len(one.eqns) != len(two.eqns):
        return [_COUPLED] * len(one.outvars)  # the number of rows decides about it
    known: dict[Any, Any] = dict(zip(one.invars, kinds, strict=True))
    for a, b in zip(one.constvars, two.constvars, strict=True):
        known[a] = _FIXED if a.aval.shape == b.aval.shape else _COUPLED

    def kind(x, other):
        if not isinstance(x, Literal):
            return known[x]
        same = isinstance(other, Literal) and bool(np.all(x.val == other.val))
        return _FIXED if same else _SIZE

    for eqn, other in zip(one.eqns, two.eqns, strict=True):
        given = list(map(kind, eqn.invars, other.invars))
        found = [_COUPLED] * len(eqn.outvars)
        if eqn.primitive is other.primitive and _COUPLED not in given:
            found = _results(eqn, other, given, sizes)
        known |= dict(zip(eqn.outvars, found, strict=True))
    return list(map(kind, one.outvars, two.outvars))


def _results(eqn, other, given, sizes) -> list:
    """What the results of one operation are."""
    name = eqn.primitive.name
    if name in _CALLS:
        few, many = (_inner(e, "jaxpr", "call_jaxpr") for e in (eqn, other))
        return _kinds(few, many, given, sizes)
    if name == "scan":
        return _of_scan(eqn, other, given, sizes)
    pairs = zip(eqn.outvars, other.outvars, strict=True)
    axes = [_axis_of_rows(a.aval.shape, b.aval.shape, sizes) for a, b in pairs]
    return [_result(eqn, given, axis) for axis in axes]


def _inner(eqn, *names):
    found: Any = next(eqn.params[name] for name in names if name in eqn.params)
    return getattr(found, "jaxpr", found)


def _axis_of_rows(shape, other, sizes):
    """The one axis in which two shapes differ, None if there is none."""
    if shape == other:
        return None
    if len(shape) != len(other):
        return _COUPLED
    pairs = list(zip(shape, other, strict=True))
    axes = [i for i, (a, b) in enumerate(pairs) if a != b]
    return axes[0] if len(axes) == 1 and pairs[axes[0]] == sizes else _COUPLED


def _result(eqn, given, axis):
    name = eqn.primitive.name
    rows = [kind for kind in given if isinstance(kind, int)]
    if axis is _COUPLED or (rows and (_SUMS in given or _SIZE in given)):
        return _COUPLED
    if rows:
        if axis is None:
            return _SUMS if _sums_over_rows(eqn, given) else _COUPLED
        return axis if _keeps_rows_apart(eqn, given, axis) else _COUPLED
    if axis is not None:  # as many as rows, and all the same
        alike = name == "broadcast_in_dim" and given == [_FIXED]
        iota = name == "iota" and eqn.params["dimension"] != axis
        return axis if alike or iota else _COUPLED
    if _SUMS in given:
        return _SUMS if _is_linear(eqn, given) else _COUPLED
    return _SIZE if _SIZE in given else _FIXED


def _is_linear(eqn, given) -> bool:
    name = eqn.primitive.name
    if name in ("mul", "dot_general"):
        return given.count(_SUMS) == 1
    if name == "div":
        return given[1] != _SUMS
    if _SIZE in given or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return False
    return name in _LINEAR or (name == "select_n" and given[0] == _FIXED)


def _sums_over_rows(eqn, given) -> bool:
    if eqn.primitive.name == "reduce_sum":
        return given[0] in eqn.params["axes"]
    if eqn.primitive.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0]
        pairs = list(zip(*contracted, strict=True))
        return _plain(eqn) and tuple(given) in pairs
    return False


def _plain(eqn) -> bool:
    return eqn.params.get("out_sharding") is None and eqn.params.get("sharding") is None


def _keeps_rows_apart(eqn, given, axis) -> bool:
    """Whether a row of the result, along ``axis``, is a function of that row alone."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [x.aval.shape for x in eqn.invars]
    own = given[0]
    if name in _BY_ENTRY:
        return {kind for kind in given if isinstance(kind, int)} == {axis}
    if name == "dot_general":
        return _plain(eqn) and _product_axis(eqn, given) == axis
    if name == "gather":
        return _gathered_axis(eqn, given) == axis
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        alone = given[1] == _FIXED and params["batch_group_count"] == 1
        return alone and (own, axis) == (numbers.lhs_spec[0], numbers.out_spec[0])
    if name in _ALONG_ONE:
        along = params[_ALONG_ONE[name]]
        return along != axis and set(given) == {axis}
    if any(isinstance(kind, int) for kind in given[1:]) or not isinstance(own, int):
        return False
    if name in _REDUCE:
        gone = params["axes"]
        return own not in gone and axis == own - sum(a < own for a in gone)
    if name == "broadcast_in_dim":
        return _plain(eqn) and params["broadcast_dimensions"][own] == axis
    if name in ("reshape", "squeeze", "expand_dims"):
        shape = eqn.outvars[0].aval.shape
        before = math.prod(shapes[0][:own]), math.prod(shape[:axis])
        return _plain(eqn) and before[0] == before[1]
    if name == "transpose":
        return params["permutation"][axis] == own
    if name == "slice":
        ends = params["start_indices"][own], params["limit_indices"][own]
        whole = ends == (0, shapes[0][own])
        return whole and (params["strides"] is None or params["strides"][own] == 1)
    if name == "dynamic_slice":
        return own == axis and params["slice_sizes"][own] == shapes[0][own]
    if name == "rev":
        return own not in params["dimensions"]
    if name == "pad":
        return own == axis and params["padding_config"][own] == (0, 0, 0)
    if name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min"):
        return own == axis and params["window_dimensions"][own] == 1
    return False


def _product_axis(eqn, given):
    """Where the rows are in a product of which they are no part of the sum."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    if all(isinstance(kind, int) for kind in given):
        pairs = list(zip(left_batch, right_batch, strict=True))
        return pairs.index(tuple(given)) if tuple(given) in pairs else None
    mine = 0 if isinstance(given[0], int) else 1
    taken = {*(left, right)[mine], *(left_batch, right_batch)[mine]}
    if given[mine] in taken or given[1 - mine] != _FIXED:
        return None
    free = [sum(a not in taken for a in range(given[mine]))]
    if mine == 1:
        used = len(left) + len(left_batch)
        free.append(len(eqn.invars[0].aval.shape) - used)
    return len(left_batch) + sum(free)


def _gathered_axis(eqn, given):
    """Where the rows are in what was gathered, None where they may be mixed."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices = given[:2]
    result = range(len(eqn.outvars[0].aval.shape))
    batch = [a for a in result if a not in numbers.offset_dims]
    if isinstance(operand, int) and isinstance(indices, int):
        pairs = zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
        return batch[indices] if (operand, indices) in pairs else None
    if isinstance(indices, int):  # rows of a table that all have
        return batch[indices] if indices < len(batch) else None
    collapsed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shape = eqn.invars[0].aval.shape
    whole = eqn.params["slice_sizes"][operand] == shape[operand]
    if operand in collapsed or operand in numbers.start_index_map or not whole:
        return None
    return numbers.offset_dims[sum(a not in collapsed for a in range(operand))]


def _of_scan(eqn, other, given, sizes) -> list:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    few, many = (_inner(e, "jaxpr") for e in (eqn, other))
    coupled = [_COUPLED] * len(eqn.outvars)
    if _SUMS in given or _SIZE in given:
        return coupled
    if eqn.params["length"] != other.params["length"]:  # one row after the other
        apart = carries == 0 and set(given[:consts]) <= {_FIXED}
        apart = apart and set(given[consts:]) <= {0}
        apart = apart and (eqn.params["length"], other.params["length"]) == sizes
        return [0] * len(eqn.outvars) if apart else coupled
    if 0 in given[consts + carries :]:
        return coupled
    carry = given[consts : consts + carries]
    slices = [
        kind - 1 if isinstance(kind, int) else kind
        for kind in given[consts + carries :]
    ]
    for _ in range(carries + 1):
        found = _kinds(few, many, [*given[:consts], *carry, *slices], sizes)
        if found[:carries] == carry:
            stacked = [k + 1 if isinstance(k, int) else k for k in found[carries:]]
            return [*carry, *stacked]
        carry = [
            b if a in (_FIXED, b) else _COUPLED
            for a, b in zip(carry, found[:carries], strict=True)
        ]
    return coupled


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
        # Of the gradients, which come last: no row is to be seen in them.
        if not apart > 1e-3 * size:
            return False
    return True


def _some_rows(x) -> np.ndarray:
    """17 rows of an array, of those that are within reach of this process."""
    if isinstance(x, jax.Array):
        x = x.addressable_shards[0].data
    return np.asarray(x)[np.linspace(0, x.shape[0] - 1, 17).astype(int)]
