"""Where the inputs of a chunk of steps come from.

This room owns how rows reach the step: gathered for a whole chunk before its inner
loop, or one batch at a time where a chunk of them is too large. It plugs into the loop
as two functions: ``inputs(step, closing)`` for the next chunk, and ``batch(x)`` which
turns the input of one step into its ``Batch``. Every source has this form, wherever its
rows live.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxgd._devices.layout import split_on
from jaxgd._problem.objective import Batch, in_pieces
from jaxgd._rows.order import rows_in_strata, rows_of_steps
from jaxgd._tree import dtype_on_device

# Bytes of rows gathered ahead of a chunk's inner loop. Small batches gain most from it
# (batch 8 of 20 features: 1000 ns a step gathered inside the step, 350 before it).
_AHEAD_BYTES = 2**20
_LONGEST_CHUNK = 2048
_LONGEST_BATCH_CHUNK = 256  # its steps are long enough, and its records short
_SHORTEST_CHUNK = 4
# Intermediate bytes a chunk may compute in vain when something happens in it.
_CHUNK_WORK = 2**26
# Intermediate bytes one block of a full pass may need.
_PASS_BYTES = 2**25
# Bytes of the rows themselves there, where those of a step are no more.
_PASS_ROWS = 2**20

# Streams of keys beside the strata's, which are below 2**31.
_STEP_KEYS = 0xFFFFFFFF
_PASS_KEY = 0xFFFFFFFE


class Source(NamedTuple):
    """Where a run takes the inputs of its steps from."""

    inputs: Callable  # (step, closing) -> inputs of the next `size` steps
    batch: Callable  # input of one step -> Batch


def resident(
    data,
    key,
    *,
    batch_size,
    strata,
    size,
    with_key,
    since=None,
    pieces=1,
    layout=None,
    first=None,
) -> Source:
    """Rows of arrays on the device; ``batch_size=None`` takes all rows every step.

    ``first``: ``data`` are no shuffled rows but those of the steps from ``first`` on,
    in their order.
    ``since``: the ``Place`` that their order is counted from.
    ``pieces``: of the rows, which may lie on different devices: one for each stratum,
    so that no device looks for rows of another. ``layout``: where they do lie.
    """

    def keys(step, closing):
        if not with_key:
            return None
        stream = jax.random.fold_in(key, _STEP_KEYS)
        own = jax.vmap(lambda t: jax.random.fold_in(stream, t))(
            step + jnp.arange(size, dtype=jnp.int32)
        )
        if batch_size is not None:
            return own
        # The last iterate of a batch run is judged like any full pass.
        return jnp.where(closing, pass_key(key), own)

    if batch_size is None:
        return Source(
            inputs=lambda step, closing: Batch(None, keys(step, closing)),
            batch=lambda x: Batch(data, x.key),
        )
    n = jax.tree.leaves(data)[0].shape[0]

    def get(x, rows):
        # Every row is in bounds, so XLA need not guard the gather.
        return x.at[rows].get(mode="promise_in_bounds")

    def take(rows):
        if pieces == 1:
            return jax.tree.map(lambda x: get(x, rows), data)
        axis = rows.ndim - 2  # of the strata; the batch comes in their order

        def in_order(x):
            take = jax.vmap(get, in_axes=(0, axis), out_axes=axis)
            own = take(in_pieces(x, pieces), rows)
            return own.reshape(*rows.shape[:-2], batch_size, *x.shape[1:])

        return jax.tree.map(in_order, data)

    def order(step):
        if pieces > 1:
            rows = rows_in_strata(key, n, batch_size, strata, step, size, since)
            return split_on(layout, rows, 1)
        if first is None:
            return rows_of_steps(key, n, batch_size, strata, step, size, since)
        places = jnp.arange(size * batch_size, dtype=jnp.int32).reshape(size, -1)
        # Steps beyond the last, which a chunk prepares and never takes.
        return jnp.minimum((step - first) * batch_size + places, n - 1)

    def inputs(step, closing):
        rows = order(step)
        return Batch(take(rows) if ahead else rows, keys(step, closing))

    ahead = size * batch_size * _row_bytes(data) <= _AHEAD_BYTES
    if ahead:
        return Source(inputs, lambda x: x)
    return Source(inputs, lambda x: Batch(take(x.rows), x.key))


def pass_key(key):
    """The one key of all full passes over the data."""
    return jax.random.fold_in(key, _PASS_KEY)


def chunk_size(data, batch_size, work: int) -> int:
    """Steps in a chunk: a power of two, from shapes alone; a matter of speed only.

    ``work``: bytes of intermediate results in one step, which stand for its cost.
    """
    size = _LONGEST_BATCH_CHUNK if batch_size is None else _LONGEST_CHUNK
    if batch_size is not None:
        fits = _AHEAD_BYTES // max(1, batch_size * _row_bytes(data))
        size = min(size, max(fits, 64))
    size = min(size, _CHUNK_WORK // max(work, 1))
    return 2 ** (max(size, _SHORTEST_CHUNK).bit_length() - 1)


def pass_block(batch_size: int, work: int, n: int, data=None) -> int:
    """Rows in a block of a full pass: those of a step, or more where memory is ample.

    ``work``: bytes of intermediate results in a step of ``batch_size`` rows. ``data``:
    bounds the rows themselves as well, for they may come from outside.
    """
    ample = batch_size * _PASS_BYTES // max(work, 1)
    if data is not None:
        ample = min(ample, _PASS_ROWS // max(_row_bytes(data), 1))
    return min(n, max(batch_size, ample))


def bytes_computed(jaxpr) -> int:
    """Bytes of all results within a jaxpr, those of inner loops included."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [bytes_computed(sub) for sub in jaxprs_in_params(eqn.params)]
        if inner:
            total += sum(inner) * eqn.params.get("length", 1)
        else:
            total += sum(_bytes(v.aval) for v in eqn.outvars)
    return total


def coarsest(jaxpr) -> float:
    """The largest rounding of any floating result within a jaxpr."""
    found = [
        coarsest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)
    ]
    for eqn in jaxpr.eqns:
        for x in eqn.outvars:
            if jnp.issubdtype(getattr(x.aval, "dtype", np.int32), jnp.inexact):
                found.append(float(jnp.finfo(x.aval.dtype).eps))
    return max(found, default=0.0)


def pairs_rows(jaxpr, n: int) -> bool:
    """Whether some result within a jaxpr has two axes as long as there are rows."""
    return any(
        any(pairs_rows(sub, n) for sub in jaxprs_in_params(eqn.params))
        or any(getattr(v.aval, "shape", ()).count(n) > 1 for v in eqn.outvars)
        for eqn in jaxpr.eqns
    )


def _row_bytes(data) -> int:
    return sum(_bytes(x) // max(1, x.shape[0]) for x in jax.tree.leaves(data))


def _bytes(aval: Any) -> int:
    if not hasattr(aval, "shape") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return 16
    return int(np.prod(aval.shape)) * dtype_on_device(aval.dtype).itemsize
