"""Windows of rows: buffers for a range of steps, or for some blocks of a full pass.

A buffer is written again only when the run is done with what is in it.
"""

import contextlib
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxgd._rows.block_order import (
    KeyData,
    Order,
    block_range,
    mixed_groups,
    mixed_rows,
    window_rows,
)
from jaxgd._rows.resident import chunk_size
from jaxgd._rows.source import (
    Form,
    Named,
    NamedSource,
    StreamError,
    assign,
    check_files,
    closed,
    leaves_like,
    require_fit,
    require_readable,
    take_rows,
)
from jaxgd._rows.stream import Stream

# Bytes of indices and their intermediate results that a row costs while it is read.
_INDEX_BYTES = 32


# Windows alive at once: one used and one ready for the steps, the same for a pass; and
# as much again as two of them for what a device and its copies take.
_WINDOWS = 6


_LONGEST_WINDOW = 2**14


# Nothing hides the reading of the first window: it leads over a part of the steps, the
# next ones over more and more.
_FIRST = 8


class Plan(NamedTuple):
    """What a window holds."""

    steps: int  # those it leads over; it has the batch of one more
    blocks: int  # of a full pass
    block: int  # rows of each of these


def plan_of(stream: Stream, batch_size: int, block: int, work) -> Plan:
    """Windows that stay within the budget, or a ValueError."""
    chunk = chunk_size(stream.form.abstract(), batch_size, work)
    row = stream.form.on_device().row_bytes + _INDEX_BYTES
    mixed = 0
    if stream.shuffle == "blocks":
        mixed = row * min(stream.n, stream.block_rows * stream.mixed_blocks)
    share = max(0, stream.budget_bytes - mixed) // (_WINDOWS * row)
    least = max(2 * batch_size, block)
    if share < least:
        held = "" if not mixed else f", and {stream.mixed_blocks} mixed blocks"
        raise ValueError(
            f"budget_bytes must be at least {_WINDOWS * row * least + mixed} for "
            f"batch_size={batch_size} ({_WINDOWS} windows of {least} rows{held}), got "
            f"{stream.budget_bytes}: pass more."
        )
    steps = min(share // batch_size - 1, _LONGEST_WINDOW, 2**30 // batch_size)
    if steps > chunk:
        steps -= steps % chunk
    return Plan(steps, min(share // block, max(1, stream.n // block)), block)


def step_windows(
    stream: Stream, form: Form, memory, plan, order: Order, first, limit, may_read
):
    """Windows from step ``first`` on: each begins with the last batch of the other.

    That batch is there for the look at an iterate that is perhaps the last. Of a
    function the look makes do with the batch before, where its own would open an epoch
    that perhaps no step takes rows of; then the next window reads its own.
    """
    with _filler(stream, form, order, first, plan.steps + 1) as fill:
        yield from _filled(fill, stream, memory, plan, order, first, limit, may_read)


def _filled(fill, stream, memory, plan, order: Order, first, limit, may_read):
    """The windows of ``step_windows``, by a function that fills them in turn."""
    batch_size = order.batch_size
    last, steps = None, max(1, plan.steps // _FIRST)
    for window in range(2**31):
        sure = may_read()
        until = min(first + steps, max(first, sure))
        out = memory((plan.steps + 1) * batch_size)
        begin = 0
        if last is not None:
            assign(out, 0, last)
            begin = 1
        again = first < until == sure and _opens_an_epoch(stream, order, until)
        end = until - 1 if again else until
        what = f"window {window} (the rows of steps {first + begin} to {end})"
        stop = (until - first + 1) * batch_size
        with Named(what, window):
            check_files(stream)
            if again:
                look = stop - batch_size
                fill(out, begin * batch_size, look, first + begin)
                assign(out, look, [x[look - batch_size : look] for x in out])
            elif until == limit and stream.shuffle == "blocks":
                look = stop - batch_size
                fill(out, begin * batch_size, look, first + begin)
                rows = mixed_rows(stream, order, until)  # and no block more
                take_rows(stream, rows, [y[look:stop] for y in out])
            else:
                fill(out, begin * batch_size, stop, first + begin)
        if until == limit:
            yield first, until, out
            return
        last = None if again else [x[stop - batch_size : stop].copy() for x in out]
        yield first, until, out
        del out
        first, steps = until, min(2 * steps, plan.steps)


def _opens_an_epoch(stream: Stream, order: Order, step: int) -> bool:
    """Whether a function has not been asked yet for an epoch that this step needs."""
    first, n = order.position(step), stream.n
    asked, needed = (first - 1) // n, (first + order.batch_size - 1) // n
    return stream._factory is not None and needed > asked


def pass_windows(stream: Stream, form: Form, memory, plan: Plan):
    """All rows in their order: windows of whole blocks, then what is left."""
    pieces = _Pieces(_natural(stream, form))
    try:
        whole, rest = divmod(stream.n, plan.block)
        for window, done in enumerate(range(0, whole, plan.blocks)):
            count = min(plan.blocks, whole - done)
            rows = count * plan.block
            first = done * plan.block
            # A pass of one block may hand its very rows on, as auxiliary output.
            alone = stream.n <= plan.block
            out = (form.empty if alone else memory)(plan.blocks * plan.block)
            with Named(f"window {window} (rows {first} to {first + rows - 1})", window):
                check_files(stream)
                pieces.fill(out, 0, rows)
            yield count, out
            del out
        if rest:
            out = form.empty(rest)
            with Named(f"the last window (rows {stream.n - rest} and on)", whole):
                check_files(stream)
                pieces.fill(out, 0, rest)
            yield 0, out
    finally:
        pieces.close()


@contextlib.contextmanager
def _filler(stream: Stream, form: Form, order: Order, step, most):
    """(out, start, stop, step): puts the rows from ``step`` on in out[start:stop]."""
    if stream.shuffle == "rows":

        def fill(out, start, stop, step):
            rows = window_rows(order, most, step)
            rows = rows.reshape(-1)[: stop - start]
            take_rows(stream, rows, [y[start:stop] for y in out])

        yield fill
        return
    position = order.position(step)
    if stream.shuffle == "blocks":
        pieces = _Pieces(_mixed(stream, form, order.key, position))
    else:
        pieces = _Pieces(_natural(stream, form, position))

    def go_on(out, start, stop, step):
        pieces.fill(out, start, stop)

    with contextlib.closing(pieces):
        yield go_on


class _Pieces:
    """Rows in a row, out of an endless sequence of pieces (length, how to copy)."""

    def __init__(self, pieces: Generator):
        self._pieces = pieces
        self._at = self._length = 0
        self._copy: Any = None

    def fill(self, out, start, stop):
        while start < stop:
            if self._at == self._length:
                self._copy = None  # the memory of a piece that is used up
                self._length, self._copy = next(self._pieces)
                self._at = 0
            size = min(stop - start, self._length - self._at)
            self._copy(
                [y[start : start + size] for y in out], self._at, self._at + size
            )
            self._at, start = self._at + size, start + size

    def close(self):
        self._pieces.close()


def _natural(stream: Stream, form: Form, position: int = 0):
    """Pieces in the order of the source, epoch after epoch, from ``position`` on."""
    if stream._arrays is None:
        return _yielded(stream, form.dtypes, *divmod(position, stream.n))
    return _slices(stream, position % stream.n)


def _slices(stream: Stream, start: int):
    while True:
        yield stream.n - start, partial(_read_slice, stream, start)
        start = 0


def _read_slice(stream: Stream, offset, out, start, stop):
    for leaf, (x, y) in enumerate(zip(stream._arrays or (), out, strict=True)):
        rows = x[offset + start : offset + stop]
        require_fit(stream.form, leaf, rows, y.dtype)
        y[...] = rows


def _copy_slice(arrays, offset, out, start, stop):
    for x, y in zip(arrays, out, strict=True):
        y[...] = x[offset + start : offset + stop]


def _copy_rows(arrays, rows, out, start, stop):
    for x, y in zip(arrays, out, strict=True):
        np.take(x, rows[start:stop], axis=0, out=y, mode="clip")


def _mixed(stream: Stream, form: Form, key: KeyData, position: int):
    """Pieces of the block order: groups of blocks, their rows shuffled."""
    most = min(stream.n, stream.block_rows * stream.mixed_blocks)
    held = form.empty(most)
    for blocks, rows in mixed_groups(stream, key, position):
        sizes = [block_range(stream, block) for block in blocks]
        offsets = np.cumsum([0, *(stop - start for start, stop in sizes)])
        at = np.empty(len(blocks), np.int64)
        for i, (block, (start, stop)) in enumerate(zip(blocks, sizes, strict=True)):
            with Named(f"block {block} (rows {start} to {stop - 1})", int(block)):
                here = [y[offsets[i] : offsets[i + 1]] for y in held]
                _read_slice(stream, start, here, 0, stop - start)
            at[i] = offsets[i] - start
        order = np.argsort(blocks)
        places = (
            rows + at[order][np.searchsorted(blocks[order], rows // stream.block_rows)]
        )
        yield len(rows), partial(_copy_rows, held, places)


def _yielded(stream: Stream, dtypes: tuple, epoch: int, place: int):
    """Pieces that a function yields, from row ``place`` of ``epoch`` on."""
    n, form = stream.n, stream.form
    while True:
        done, index, blocks = 0, 0, None
        try:
            with NamedSource(f"the start of epoch {epoch}", 0):
                blocks = _blocks_of(stream)
            while True:
                name = f"block {index} (rows from {done} on, epoch {epoch})"
                with NamedSource(name, index):
                    block = next(blocks, None)
                    if block is None:
                        break
                    leaves, complaint = leaves_like(form, block)
                    if not complaint:
                        require_readable(form, leaves, dtypes)
                if complaint:
                    raise StreamError(f"{name} {complaint}.", index)
                size = len(leaves[0])
                if done + size > n:
                    raise StreamError(
                        f"{name} has {size} rows, more than the {n} of the source: "
                        "yield the same rows in every epoch.",
                        index,
                    )
                skip = max(0, min(size, place - done))
                done, index = done + size, index + 1
                if skip < size:
                    yield size - skip, partial(_copy_slice, leaves, skip)
        except StreamError:
            with contextlib.suppress(Exception):  # it would hide what came first
                closed(blocks)
            blocks = None
            raise
        finally:
            with NamedSource(f"the end of epoch {epoch}", index):
                closed(blocks)
        if done < n:
            raise StreamError(
                f"The source ended after {done} rows of {n} in epoch {epoch} (before "
                f"block {index}): yield the same rows in every epoch.",
                index,
            )
        epoch, place = epoch + 1, 0


def _blocks_of(stream: Stream) -> Iterator:
    """A new iterator over the blocks of a function, or the one that is open."""
    try:
        return stream._begun.pop()
    except IndexError:
        return iter(stream._factory())  # type: ignore[misc]
