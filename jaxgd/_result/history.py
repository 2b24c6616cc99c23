"""A bounded record of a run of any length: every k-th row, k a power of two.

This room owns the thinning. The loop offers the rows of each chunk to ``extend``, a
pure function; the result turns the record into ``History``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class History(NamedTuple):
    """Equal-length arrays of shape (rows,), one row for each recorded step.

    Row i describes the update leaving the iterate ``step[i]``. In ``Result.checks`` it
    describes a check of the full objective at the iterate ``step[i]`` instead.

    Attributes:
      step: int32; -1 in a row that is not used (inside jit).
      value: the objective there, of its batch where ``batch_size`` is set.
      grad_norm: the 2-norm of its gradient there.
      learning_rate: the rate the update used; NaN where the rule does not tell.
      update_norm: the 2-norm of the update. For a check: of the change of the
        parameters since the check before, NaN where no stop rule asked for it.
    """

    step: Any
    value: Any
    grad_norm: Any
    learning_rate: Any
    update_norm: Any


COLUMNS = History._fields[1:]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """A history being written: ``count`` rows offered, every ``stride``-th kept."""

    count: Any  # int32
    step: Any  # int32[rows]
    numbers: Any  # float[rows, columns], in the order of COLUMNS


def empty_record(rows: int, dtype) -> Record:
    """A record with room for ``rows`` rows."""
    return Record(
        jnp.int32(0),
        jnp.full((rows,), -1, jnp.int32),
        jnp.full((rows, len(COLUMNS)), jnp.nan, dtype),
    )


def side_by_side(columns: dict[str, Any], dtype) -> jax.Array:
    """Columns by name as rows of a record, float[..., columns]; NaN where none is."""
    nan = jnp.full((), jnp.nan, dtype)
    found = [columns.get(name, nan) for name in COLUMNS]
    numbers = jnp.stack(jnp.broadcast_arrays(*found), axis=-1)
    return jax.lax.stop_gradient(numbers).astype(dtype)


def stride(count, rows: int) -> jax.Array:
    """The smallest power of two k with ``ceil(count / k) <= rows``, uint32."""
    needed = jnp.maximum((count.astype(jnp.uint32) + (rows - 1)) // rows, 1)
    return jnp.uint32(1) << (jnp.uint32(32) - jax.lax.clz(needed - 1))


def extend(record: Record, steps, numbers, count) -> Record:
    """The record with the first ``count`` of the offered rows.

    Args:
      steps: int32[K]; numbers: float[K, columns]; count: int32, at most K.
    """
    rows = record.step.shape[0]
    if rows == 0:
        return Record(record.count + count, record.step, record.numbers)
    before, after = record.count, record.count + count
    old, new = stride(before, rows), stride(after, rows)
    slots = jnp.arange(rows, dtype=jnp.uint32)
    index = slots * new  # of the offered row that belongs in each slot
    kept = jnp.minimum(slots * (new // old), rows - 1)
    fresh = jnp.minimum(index - before.astype(jnp.uint32), steps.shape[0] - 1)
    is_old = index < before.astype(jnp.uint32)
    used = index < after.astype(jnp.uint32)
    step = jnp.where(is_old, record.step[kept], jnp.where(used, steps[fresh], -1))
    number = jnp.where(
        is_old[:, None],
        record.numbers[kept],
        jnp.where(used[:, None], numbers[fresh], jnp.nan),
    )
    return Record(after, step, number)


def history_of(record: Record) -> History:
    """The columns of a record, unused rows included."""
    columns = (record.numbers[..., i] for i in range(len(COLUMNS)))
    return History(record.step, *columns)


def trimmed(history: History) -> History:
    """On the host: NumPy arrays without the unused rows."""
    columns = [np.asarray(column) for column in history]
    used = columns[0] >= 0
    return History(*(column[used] for column in columns))
