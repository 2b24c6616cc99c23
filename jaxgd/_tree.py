"""Arithmetic on pytrees, and the split of a pytree into numbers and structure.

This room owns what the loop asks of a whole pytree at once (norms, selection, casts)
and ``split``/``join``, by which callables, hyperparameters and rules enter a compiled
program: their numbers as data, all the rest as its static key.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


def is_traced(x) -> bool:
    """Whether ``x`` is a value inside jit, vmap or grad."""
    return isinstance(x, Tracer)


def real_dtype(tree) -> np.dtype:
    """The dtype of reported numbers: float32, or float64 if a leaf is that wide."""
    wide = any(
        leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(tree)
    )
    return np.dtype(np.float64 if wide else np.float32)


def norm(tree, dtype) -> jax.Array:
    """The 2-norm over all leaves; carries no derivative."""
    return jnp.sqrt(_sum_of_squares(tree, dtype))


def safe_norm(tree, dtype) -> jax.Array:
    """``norm`` where squares leave the range of ``dtype`` but their root does not.

    Two passes, the second over entries divided by the largest, so it serves where a
    gradient norm decides about stopping.
    """
    most = largest(tree, dtype)
    scale = jnp.where((most > 0) & (most < jnp.inf), most, 1)
    scaled = scale * jnp.sqrt(_sum_of_squares(tree, dtype, scale))
    return jnp.where(most > 0, scaled, most)  # 0, or NaN


def _sum_of_squares(tree, dtype, scale=None):
    parts = []
    for leaf in jax.tree.leaves(tree):
        leaf = lax.stop_gradient(leaf)
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            part = part.astype(dtype)
            parts.append(part if scale is None else part / scale)
    if sum(part.size for part in parts) <= _ONE_KERNEL:
        parts = [jnp.concatenate([part.reshape(-1) for part in parts])]
    # Column by column, which a CPU does several at a time. A product of a leaf with
    # itself is as fast for gradients, which are there, but updates would have to be
    # written down for it (Adam on 100,000 parameters: 30 us a step).
    squares = [jnp.sum(jnp.sum(part * part, axis=0)) for part in parts]
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
        self.fun = fun

    def __call__(self, *args, **kwargs):
        return self.fun(*args, **kwargs)

    def __hash__(self):
        return id(self.fun)

    def __eq__(self, other):
        return isinstance(other, _ById) and self.fun is other.fun


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
    return leaf


def _fixed(leaf) -> _Fixed:
    try:
        hash(leaf)
    except TypeError:
        leaf = _ById(leaf)
    return _Fixed(leaf, type(leaf))


def short(text, most=150) -> str:
    """A text cut to a length that an error can show."""
    return text if len(text) <= most else text[: most - 3] + "..."
