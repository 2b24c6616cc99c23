"""From a user's function to the value and gradient of a batch.

This room owns how the objective is called: data or none, auxiliary output, keys of
random objectives, complex leaves, blocks of rows. It plugs into the step as an
``Objective``: two functions of ``(params, batch, key)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._devices.layout import pinned


class Batch(NamedTuple):
    """What the objective is evaluated on: rows of the data, and a key."""

    rows: Any = None
    key: Any = None


class Objective(NamedTuple):
    """The objective on a batch; ``batch`` and ``key`` are None where there is none."""

    value: Callable[[Any, Any, Any], jax.Array]
    value_and_grad: Callable[[Any, Any, Any], tuple[tuple[jax.Array, Any], Any]]

    def value_fn(self, batch, key) -> Callable[[Any], jax.Array]:
        """The value as a function of the parameters, as line searches want it.

        Its derivative is that of ``value_and_grad``: taken block by block, where
        differentiating a sum over blocks would remember the inside of all of them.
        """

        @jax.custom_jvp
        def value(params):
            return self.value(params, batch, key)

        @value.defjvp
        def _(primals, tangents):
            (params,), (toward,) = primals, tangents
            (value, _), grad = self.value_and_grad(params, batch, key)
            slope = _tree.dot(grad, toward, _sum_dtype(value.dtype))
            return value, slope.astype(value.dtype)

        return value


def make_objective(
    bind,
    given,
    *,
    has_aux=False,
    block=None,
    pieces=1,
    places=None,
) -> Objective:
    """The objective with its gradient in descent direction.

    ``bind(*given)``: the function of the user and its extra arguments; ``given`` are
    all arrays that they hold.
    ``block``: rows to evaluate at once; None for the whole batch. The blocks' means
    are weighted by their rows, so the sum is the mean over the batch. ``pieces``: a
    block takes equally many rows of each of so many consecutive pieces of a batch,
    which may lie on different devices. ``places``: those of parameters that are split;
    the gradient is nowhere whole either.
    """

    def call(params, given, batch, key):
        fun, args = bind(*given)
        positional = (params, *args) if batch is None else (params, batch, *args)
        out = fun(*positional) if key is None else fun(*positional, key=key)
        return out if has_aux else (out, None)

    # Traced once, however many loops it stands in.
    whole = jax.jit(jax.value_and_grad(call, has_aux=True), inline=True)

    def value_and_grad(params, batch, key):
        def of_rows(rows):
            (value, aux), grad = whole(params, given, rows, key)
            return (value, pinned(places, grad, params)), aux

        (value, grad), aux = _over_blocks(of_rows, batch, block, pieces)
        # jax.grad of a real function of z is conjugate to the steepest ascent.
        grad = jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grad)
        return (value, aux), grad

    def value(params, batch, key):
        def of_rows(rows):
            return call(params, given, rows, key)[0], None

        return _over_blocks(of_rows, batch, block, pieces)[0]

    return Objective(value, value_and_grad)


def count_rows(batch) -> int:
    """The length of the common leading axis."""
    return jax.tree.leaves(batch)[0].shape[0]


def even_block(n: int, at_most: int) -> int:
    """A block of at most ``at_most`` rows, one that divides ``n`` if one is near."""
    at_most = min(n, at_most)
    near = range(at_most, max(at_most // 2, 1) - 1, -1)
    return next((size for size in near if n % size == 0), at_most)


def _over_blocks(of_rows, batch, block, pieces=1):
    """Row-weighted means of ``of_rows(rows) -> (means, aux)`` over blocks of rows."""
    if batch is None or block is None or count_rows(batch) <= block:
        return of_rows(batch)
    n = count_rows(batch) // pieces
    block = max(1, block // pieces)
    whole, rest = divmod(n, block)
    forms = block_forms(of_rows, batch, block, pieces)

    def body(total, i):
        means, aux = of_rows(block_of(batch, i * block, block, pieces))
        return add_block(total, means, block / n), aux

    total, aux = lax.scan(body, forms.zeros(), jnp.arange(whole, dtype=jnp.int32))
    last = None
    if rest:
        means, last = of_rows(block_of(batch, whole * block, rest, pieces))
        total = add_block(total, means, rest / n)
    return forms.joined(total, aux, last, rest / n)


class BlockForms(NamedTuple):
    """What a block of rows gives: shapes, and which auxiliary leaves have its rows."""

    means: Any
    aux: Any
    by_row: Any
    pieces: int = 1

    def zeros(self):
        return jax.tree.map(
            lambda s: jnp.zeros(s.shape, _sum_dtype(s.dtype)), self.means
        )

    def joined(self, total, aux, last, share):
        """(means, aux) of all rows: ``aux`` stacked, ``last`` of a shorter block."""
        total = jax.tree.map(lambda x, s: x.astype(s.dtype), total, self.means)
        return total, _join_aux(aux, last, self, share)


def block_forms(of_rows, batch, block: int, pieces: int = 1) -> BlockForms:
    """What ``of_rows`` gives for ``block`` rows of each piece of ``batch``."""

    def of(size):
        return jax.eval_shape(lambda: of_rows(block_of(batch, 0, size, pieces)))

    means, aux = of(block)
    other = 1 if block > 1 else 2
    other_aux = of(other)[1] if jax.tree.leaves(aux) else aux
    rows = (block * pieces,), (other * pieces,)
    by_row = jax.tree.map(
        lambda a, b: (a.shape[:1], b.shape[:1]) == rows, aux, other_aux
    )
    return BlockForms(means, aux, by_row, pieces)


def block_of(batch, start, size: int, pieces: int = 1):
    """``size`` rows from row ``start`` on, of each of the pieces of ``batch``."""

    def cut(x):
        if pieces == 1:
            return lax.dynamic_slice_in_dim(x, start, size)
        own = lax.dynamic_slice_in_dim(in_pieces(x, pieces), start, size, axis=1)
        return own.reshape(pieces * size, *x.shape[1:])

    return jax.tree.map(cut, batch)


def in_pieces(x, pieces: int):
    """``x`` of n rows as (pieces, n / pieces, ...): no device has parts of two."""
    return x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])


def add_block(total, means, share):
    """``total`` with the means of a block that has this share of the rows."""
    return jax.tree.map(
        lambda t, x: jnp.add(t, x.astype(_sum_dtype(x.dtype)) * share), total, means
    )


def _sum_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _join_aux(aux, last, forms: BlockForms, weight):
    """Auxiliary output of all blocks as one call over all rows would give it.

    A leaf with a row axis is joined along it; else a floating leaf is the row-weighted
    mean, an integer leaf the sum (a count), a boolean leaf whether all hold.
    """
    shapes, pieces = forms.aux, forms.pieces
    if last is None:
        last = jax.tree.map(lambda _: None, shapes)

    def join(x, end, shape, rows):
        if rows:
            one = shape.shape[1:]
            x = x.reshape(-1, pieces, shape.shape[0] // pieces, *one).swapaxes(0, 1)
            x = x.reshape(pieces, -1, *one)
            if end is not None:
                x = jnp.concatenate([x, in_pieces(end, pieces)], axis=1)
            return x.reshape(-1, *one)
        if jnp.issubdtype(shape.dtype, jnp.inexact):
            mean = jnp.mean(x.astype(_sum_dtype(shape.dtype)), axis=0)
            mean = mean if end is None else mean * (1 - weight) + end * weight
            return mean.astype(shape.dtype)
        if shape.dtype == bool:
            x = jnp.all(x, axis=0)
            return x if end is None else x & end
        x = jnp.sum(x, axis=0, dtype=shape.dtype)
        return x if end is None else x + end

    leaves, treedef = jax.tree.flatten(shapes)
    ends = treedef.flatten_up_to(last)
    columns = (jax.tree.leaves(aux), ends, leaves, jax.tree.leaves(forms.by_row))
    return jax.tree.unflatten(treedef, list(map(join, *columns)))
