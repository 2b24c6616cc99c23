"""Arithmetic on pytrees, and the split of a pytree into numbers and structure.

This room owns what the loop asks of a whole pytree at once (norms, selection, casts)
and ``split``/``join``, by which callables, hyperparameters and rules enter a compiled
program: their numbers as data, all the rest as its static key.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


def is_traced(x) -> bool:
    """Whether ``x`` is a value inside jit, vmap or grad."""
    return isinstance(x, Tracer)


def dtype_on_device(dtype) -> Any:
    """The dtype that an array has on a device: of 64 bits only where JAX has them."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def dtype_of(leaf) -> Any:
    """The dtype of numbers that JAX knows, or None."""
    if isinstance(leaf, bool | int | float | complex):
        return np.dtype(type(leaf))
    if not isinstance(leaf, np.generic | np.ndarray | jax.Array):
        return None
    dtype = leaf.dtype
    if isinstance(leaf, np.ndarray):
        dtype = native(dtype)
    if jnp.issubdtype(dtype, jax.dtypes.extended) or dtype == np.bool_:
        return dtype
    widest = 16 if dtype.kind == "c" else 8  # no long double
    known = jnp.issubdtype(dtype, jnp.number) and dtype.itemsize <= widest
    return dtype if known else None


def is_real(dtype) -> bool:
    """Whether a dtype is of integers or floating numbers."""
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )


def is_batched(tree) -> bool:
    """Whether some leaf has a lane for each of many inside a vmap.

    ``custom_vmap`` tells: its rule is called for such leaves alone, and at once.
    """
    found = []
    look = jax.custom_batching.custom_vmap(lambda *leaves: leaves)

    @look.def_vmap
    def _(_, batched, *leaves):
        found.append(True)
        return leaves, tuple(batched)

    leaves = map(lax.stop_gradient, filter(is_traced, jax.tree.leaves(tree)))
    traced = [leaf for leaf in leaves if is_traced(leaf)]  # by more than a derivative
    if traced:
        look(*traced)
    return bool(found)


def real_dtype(tree) -> np.dtype:
    """The dtype of reported numbers: float32, or float64 if a leaf is that wide."""
    wide = any(
        leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(tree)
    )
    return np.dtype(np.float64 if wide else np.float32)


def quick_norm(tree, dtype) -> jax.Array:
    """The 2-norm over all leaves; carries no derivative.

    In float32 it is infinite above 1.8e19, and 0 below 1e-23: for a record.
    """
    return jnp.sqrt(_sum_of_squares(tree, dtype))


def norm(tree, dtype) -> jax.Array:
    """``quick_norm``, and right where squares leave the range of ``dtype``.

    It is finite if and only if every entry is: a norm beyond the range is its largest
    number. One pass, of three sums, and no choice that a GPU or lanes would pay for.
    """
    limits, total = jnp.finfo(dtype), _sum_of_squares(tree, dtype)
    high, low = 2.0 ** (limits.maxexp * 5 // 8), 2.0 ** -(limits.maxexp * 45 // 64)

    # For sums too large and too small. Each bound is beyond what matters there;
    # it keeps XLA from squaring the factor by itself, which would leave the range.
    def large(x):
        return jnp.maximum(jnp.abs(x) / high, 2.0**20 / high)

    def small(x):
        return jnp.minimum(jnp.abs(x) / low, 2.0**-20 / low)

    over = jnp.sqrt(_sum_of_squares(tree, dtype, large))
    under = jnp.sqrt(_sum_of_squares(tree, dtype, small)) * low
    over = jnp.where(over < jnp.inf, jnp.fmin(over * high, limits.max), over)
    other = jnp.where(total > 1, over, under)
    return jnp.where(_is_resolved(total), jnp.sqrt(total), other)


def step_norm(tree, dtype) -> jax.Array:
    """``norm``, for each step of a run that is no lane: on a CPU as fast as one sum."""
    tree = lax.stop_gradient(tree)
    total = _sum_of_squares(tree, dtype)

    def on_cpu(total, tree):  # a loop of no turns costs less than a choice
        def again(_):
            return safe_norm(tree, dtype), jnp.bool_(True)

        known = jnp.sqrt(total), _is_resolved(total)
        return lax.while_loop(lambda x: ~x[1], again, known)[0]

    def elsewhere(total, tree):
        del total
        return norm(tree, dtype)

    return lax.platform_dependent(total, tree, cpu=on_cpu, default=elsewhere)


def _is_resolved(total) -> jax.Array:
    """Whether a sum of squares is within its range; NaN is what it is."""
    limits = jnp.finfo(total.dtype)
    return ((total > limits.tiny / limits.eps) & (total < jnp.inf)) | jnp.isnan(total)


def safe_norm(tree, dtype) -> jax.Array:
    """The 2-norm where squares leave the range of ``dtype``.

    Two passes, the second over entries divided by the largest, so it serves where a
    gradient norm decides about stopping. It is finite if and only if every entry is: a
    norm beyond the range of ``dtype`` is its largest number.
    """
    most = largest(tree, dtype)
    finite = most < jnp.inf
    # Its reciprocal must not leave the range either: XLA multiplies by that.
    scale = jnp.where((most > 0) & finite, jnp.fmin(most, jnp.finfo(dtype).max / 64), 1)
    scaled = scale * jnp.sqrt(_sum_of_squares(tree, dtype, lambda x: x / scale))
    scaled = jnp.where(finite, jnp.fmin(scaled, jnp.finfo(dtype).max), scaled)
    return jnp.where(most > 0, scaled, most)  # 0, or NaN


def _sum_of_squares(tree, dtype, entry=lambda x: x):
    parts = []
    for leaf in jax.tree.leaves(tree):
        leaf = lax.stop_gradient(leaf)
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            parts.append(entry(part.astype(dtype)))
    if sum(part.size for part in parts) <= _ONE_KERNEL:
        parts = [jnp.concatenate([part.reshape(-1) for part in parts])]
    # Column by column, which a CPU does several at a time. A product of a leaf with
    # itself is as fast for gradients, which are there, but updates would have to be
    # written down for it (Adam on 100,000 parameters: 30 us a step).
    squares = [jnp.sum(jnp.sum(jnp.atleast_1d(x * x), axis=0)) for x in parts]
    return sum(squares, jnp.zeros((), dtype))


def dot(a, b, dtype) -> jax.Array:
    """The real inner product of two pytrees, products in at least float32."""

    def part(x, y):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.sum((x.astype(wide).conj() * y.astype(wide)).real.astype(dtype))

    parts = jax.tree.map(part, a, b)
    return sum(jax.tree.leaves(parts), jnp.zeros((), dtype))


def largest(tree, dtype) -> jax.Array:
    """The largest absolute value of any entry."""
    sizes = [
        jnp.max(jnp.abs(lax.stop_gradient(leaf)), initial=0.0).astype(dtype)
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.max(jnp.stack(sizes))


def all_finite(tree) -> jax.Array:
    """Whether every entry is finite."""
    return jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    )


def select(condition, new, old):
    """``new`` where the scalar ``condition`` holds, else ``old``, leaf by leaf."""
    return jax.tree.map(
        lambda a, b: a if a is b else lax.select_n(condition, b, a), new, old
    )


def either(condition, new, old):
    """``select`` of whole states: on a CPU one branch, where that is a kernel a leaf.

    XLA compiles a kernel in 10 ms, and there were a hundred of them in a small run.
    """

    def on_cpu(condition, new, old):
        return lax.cond(condition, lambda a, _: a, lambda _, b: b, new, old)

    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    apart = [pair for pair in pairs if pair[0] is not pair[1]]
    a, b = ([pair[i] for pair in apart] for i in (0, 1))
    chosen = iter(lax.platform_dependent(condition, a, b, cpu=on_cpu, default=select))
    leaves = [a if a is b else next(chosen) for a, b in pairs]
    return jax.tree.unflatten(jax.tree.structure(new), leaves)


def differ(a, b) -> jax.Array:
    """Whether any entry differs."""
    return jnp.any(
        jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.any(x != y), a, b)))
    )


def subtract(a, b):
    """``a - b``, leaf by leaf."""
    return jax.tree.map(lambda x, y: x - y, a, b)


def cast_like(tree, like):
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x).astype(jnp.asarray(y).dtype), tree, like
    )


# Up to so many numbers, one kernel over all leaves beats one kernel for each.
_ONE_KERNEL = 2**14


@dataclass(frozen=True)
class Split:
    """What is left of a pytree when its numbers are taken out: a hashable key."""

    treedef: Any
    rest: tuple  # one entry a leaf; None where the leaf is a number

    def join(self, numbers) -> Any:
        numbers = iter(numbers)
        leaves = [next(numbers) if r is _NUMBER else r.value for r in self.rest]
        return jax.tree.unflatten(self.treedef, leaves)


@dataclass(frozen=True)
class _Fixed:
    """A leaf that is structure, compared by value and type (1, 1.0 and True differ)."""

    value: Any
    kind: type


class _ById:
    """Makes an unhashable callable a static argument, equal to itself only."""

    def __init__(self, fun):
        self.__wrapped__ = fun  # as functools.wraps calls it

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)

    def __hash__(self):
        return id(self.__wrapped__)

    def __eq__(self, other):
        return isinstance(other, _ById) and self.__wrapped__ is other.__wrapped__


_NUMBER = _Fixed(None, type(None).__class__)


def split(tree, dtype, *, arrays_too=True) -> tuple[list, Split]:
    """Numbers (floats, and arrays of any kind) apart from everything else.

    Floating scalars of every spelling become arrays of ``dtype``, so that the spelling
    of a number never decides about a compilation; with ``arrays_too=False`` scalar
    arrays keep their own.
    """
    leaves, treedef = jax.tree.flatten(tree)
    numbers, rest = [], []
    for leaf in leaves:
        if is_number(leaf):
            number = as_number(leaf, dtype)
            floating = jnp.issubdtype(number.dtype, jnp.floating)
            scalar = arrays_too and number.ndim == 0 and floating
            if scalar and number.dtype != dtype:
                traced = is_traced(number)
                number = number.astype(dtype) if traced else np.asarray(number, dtype)
            numbers.append(number)
            rest.append(_NUMBER)
        else:
            rest.append(_fixed(leaf))
    return numbers, Split(treedef, tuple(rest))


def is_number(leaf) -> bool:
    """Whether a leaf is data: a floating number, or an array of any kind."""
    if isinstance(leaf, np.ndarray | jax.Array):
        return True
    return isinstance(leaf, float | complex | np.inexact) and not isinstance(leaf, bool)


def as_number(leaf, dtype):
    """A number as a strongly typed array; floating scalars in ``dtype``."""
    if isinstance(leaf, float | np.floating):
        return np.asarray(leaf, dtype)
    if isinstance(leaf, complex | np.complexfloating):
        return np.asarray(leaf, np.result_type(dtype, np.complex64))
    if isinstance(leaf, bool | np.bool_):
        return np.asarray(leaf)
    if isinstance(leaf, int | np.integer):
        return np.asarray(leaf, np.int32)
    if isinstance(leaf, jax.Array) and getattr(leaf, "weak_type", False):
        traced = is_traced(leaf)
        return (
            lax.convert_element_type(leaf, leaf.dtype) if traced else np.asarray(leaf)
        )
    if isinstance(leaf, np.ndarray):
        return leaf.astype(native(leaf.dtype), copy=False)
    return leaf


def native(dtype) -> np.dtype:
    """The dtype in the byte order of this machine: files may come in another."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _fixed(leaf) -> _Fixed:
    try:
        hash(leaf)
    except TypeError:
        leaf = _ById(leaf)
    return _Fixed(leaf, type(leaf))
