"""The order in which a stream reads its rows: of all rows, or of blocks and mixtures.

This room owns which rows a step takes where they are not on the device.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd._rows.order import Place, rows_of_steps, shuffled_rows

if TYPE_CHECKING:
    from jaxgd._rows.stream import Stream


# Streams of keys of the block order, beside those of the strata.
_VISITS, _MIXES = 0xFFFFFFFD, 0xFFFFFFFC


class KeyData(NamedTuple):
    """A PRNG key as another thread may hold it: on no device."""

    words: np.ndarray
    impl: str

    @staticmethod
    def of(key) -> "KeyData":
        return KeyData(
            np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))
        )

    def key(self):
        return jax.random.wrap_key_data(jnp.asarray(self.words), impl=self.impl)


class Order(NamedTuple):
    """Which rows the steps of a run take."""

    key: KeyData
    n: int
    batch_size: int
    strata: int = 1
    since: np.ndarray = np.zeros(len(Place._fields), np.uint32)

    def position(self, step: int) -> int:
        """Rows of the endless stream of epochs that come before those of a step."""
        since = Place(*self.since.tolist())
        before = since.epoch * self.n + since.place * self.strata
        return before + (step - since.step) * self.batch_size

    def last_step(self, position: int) -> int:
        """The last step up to which no row from ``position`` on is taken."""
        step = int(self.since[0])
        return step + (position - self.position(step)) // self.batch_size


def window_rows(order: Order, count, step) -> np.ndarray:
    """The rows that ``count`` steps from ``step`` on take."""
    step = np.int32(step)
    (words, impl), *sizes, since = order
    return np.asarray(_rows(words, impl, *sizes, count, step, since))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _rows(words, impl, n, batch_size, strata, count, step, since):
    key = jax.random.wrap_key_data(words, impl=impl)
    return rows_of_steps(key, n, batch_size, strata, step, count, since)


def mixed_groups(stream: "Stream", key: KeyData, position: int):
    """(blocks, their rows in the order they are taken) from ``position`` on."""
    n, size, most = stream.n, stream.block_rows, stream.mixed_blocks
    count = -(-n // size)
    epoch, place = divmod(position, n)
    while True:
        blocks = _permutation(key, _VISITS, 0, count, epoch)
        for group, start in enumerate(range(0, count, most)):
            taken = blocks[start : start + most]
            ranges = [block_range(stream, block) for block in taken]
            length = sum(stop - start for start, stop in ranges)
            if place >= length:
                place -= length
                continue
            rows = np.concatenate([np.arange(*r) for r in ranges])
            order = _permutation(key, _MIXES, group, length, epoch)
            yield taken, rows[order][place:]
            place = 0
        epoch += 1


def mixed_rows(stream: "Stream", order: Order, step) -> np.ndarray:
    """The rows of one step in the block order."""
    found = []
    for _, rows in mixed_groups(stream, order.key, order.position(step)):
        found.append(rows)
        if sum(map(len, found)) >= order.batch_size:
            return np.concatenate(found)[: order.batch_size]
    raise AssertionError("the groups have no end")


def block_range(stream: "Stream", block) -> tuple[int, int]:
    """The first row of a block, and the one behind its last."""
    start = int(block) * stream.block_rows
    return start, min(stream.n, start + stream.block_rows)


def _permutation(key: KeyData, stream, number, n, epoch) -> np.ndarray:
    fold = jax.random.fold_in
    own = fold(fold(key.key(), np.uint32(stream)), np.uint32(number))
    return np.asarray(shuffled_rows(own, n, np.uint32(epoch), np.arange(n)))
