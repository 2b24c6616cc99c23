"""Rows from outside the device: files, big arrays, or a function that yields blocks.

This room owns ``Stream``, the order in which it reads, and the thread that reads ahead.
What it hands over are windows: buffers of rows for a range of steps, or for some blocks
of a full pass, which are written again only when the run is done with them.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._checks import describe, short, whole
from jaxgd._rows.order import Place, as_key, rows_of_steps, shuffled_rows
from jaxgd._rows.resident import chunk_size
from jaxgd._rows.sample import as_on_device, mark_of, sample_places
from jaxgd._tree import dtype_of

_MOST_ROWS = 2**31 - 1
_BLOCK_BYTES = 2**20
_MIXED = 16
# Bytes of indices and their intermediate results that a row costs while it is read.
_INDEX_BYTES = 32
# Windows alive at once: one used and one ready for the steps, the same for a pass; and
# as much again as two of them for what a device and its copies take.
_WINDOWS = 6
_LONGEST_WINDOW = 2**14
# Nothing hides the reading of the first window: it leads over a part of the steps, the
# next ones over more and more.
_FIRST = 8
# Streams of keys of the block order, beside those of the strata.
_VISITS, _MIXES = 0xFFFFFFFD, 0xFFFFFFFC


class StreamError(RuntimeError):
    """A source failed while a run read from it.

    The exception of the source is its ``__cause__``.

    Attributes:
      block: the index of the block that failed: of the blocks that a function yields
        or a block order visits, else of the windows that this call read.
      state: what the run had reached, to go on from with
        ``minimize(..., state=error.state)``.
    """

    def __init__(self, message: str, block: int | None = None):
        super().__init__(message)
        self.block = block
        self.state: Any = None


class Form(NamedTuple):
    """What rows look like, wherever they come from."""

    n: int
    treedef: Any
    shapes: tuple
    dtypes: tuple

    def zeros(self, rows: int = 1):
        """So many rows that stand for others where only their form counts."""
        pairs = zip(self.shapes, self.on_device().dtypes, strict=True)
        return self.treedef.unflatten(
            [jnp.zeros((rows, *shape), dtype) for shape, dtype in pairs]
        )

    def abstract(self):
        """All rows, as shapes."""
        pairs = zip(self.shapes, self.on_device().dtypes, strict=True)
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct((self.n, *shape), dtype) for shape, dtype in pairs]
        )

    def on_device(self) -> "Form":
        """With the dtypes that rows have there: of 64 bits only where JAX has them."""
        dtypes = map(_tree.dtype_on_device, self.dtypes)
        return self._replace(dtypes=tuple(dtypes))

    def empty(self, rows: int) -> list[np.ndarray]:
        """Fresh memory for so many rows."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [_aligned((rows, *shape), dtype) for shape, dtype in pairs]

    def name(self, leaf: int) -> str:
        """A leaf of the source as errors call it."""
        leaves = self.treedef.unflatten(range(len(self.shapes)))
        path, _ = jax.tree_util.tree_flatten_with_path(leaves)[0][leaf]
        return "source" + jax.tree_util.keystr(path)

    @property
    def row_bytes(self) -> int:
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in pairs)


class Stream:
    r"""Data larger than memory, as the ``data`` of ``minimize``.

    The run takes the rows that it would take of resident arrays, in the same order,
    and ends at the same bits: row order, steps, checks and final evaluation are those
    of the resident run, fed from outside by a thread that reads ahead. It may be cut
    and gone on with resident data, and the other way round.

    With ``shuffle="blocks"`` only whole blocks of consecutive rows are read, for disks
    on which random rows are slow. Each epoch visits the blocks of ``block_rows`` rows
    in a random order, ``mixed_blocks`` of them at a time, whose rows are shuffled
    uniformly. Every row comes exactly once per epoch, but rows of one block come close
    together. Where blocks are no samples of the whole, a batch is no uniform sample
    either: of a quantity with variance :math:`s^2` within blocks and :math:`S^2`
    between them, the mean over a batch of :math:`b` rows has the variance
    :math:`s^2 / b + S^2 (1 / b + (1 - m / B) / m)` with :math:`m` of :math:`B` blocks
    mixed, where a uniform one has :math:`(s^2 + S^2) / b`. So ``mixed_blocks`` well
    above the batch size loses little even for rows sorted by label, and a file that was
    shuffled once loses nothing.

    A function as source decides the order by itself: in each epoch, row ``p`` of its
    blocks is row ``p``. It is called once for each epoch that steps take rows of and
    once for each full pass, and before that for counting, unless ``rows`` is given. The
    iterator that shows the first block is then read on by the first run, in a thread.

    Args:
      source: a pytree of NumPy arrays, ``np.memmap`` or paths of ``.npy`` files, which
        share a leading axis of ``n`` rows; or a function of no arguments that returns
        a new iterator over blocks of rows, pytrees of arrays of one form with any
        number of rows each. Bytes may be in either order. Integers of 64 bits must
        fit in those that JAX has. Writing to arrays during a run changes only rows
        that are not read yet.
      budget_bytes: upper bound on the memory of all rows held at a time, read ahead
        included (not of the blocks that a function makes). It changes no bit.
      shuffle: ``"rows"`` (default of arrays), the order of a resident run; or
        ``"blocks"``, where ``block_rows`` and ``mixed_blocks`` are part of the order.
      block_rows: rows of a block; default 1 MiB of them.
      mixed_blocks: blocks that are mixed at a time; default 16.
      rows: the number of rows that a function yields; default: counted in a first
        reading.

    Attributes:
      n: the number of rows.

    Raises:
      TypeError: a leaf is neither array nor path, or its dtype holds no numbers.
      ValueError: different numbers of rows, no rows, an option out of place, or a
        memory-mapped file that has been cut.
      FileNotFoundError: a file is missing.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxgd
      >>> x = np.arange(1000.0, dtype=np.float32).reshape(500, 2) / 1000
      >>> stream = jaxgd.Stream({"x": x, "y": x @ np.array([1, -1], np.float32)})
      >>> def loss(theta, batch):
      ...     return jnp.mean((batch["x"] @ theta - batch["y"]) ** 2) / 2
      >>> start = jnp.zeros(2)
      >>> streamed = jaxgd.minimize(loss, start, stream, batch_size=32, epochs=3)
      >>> int(streamed.steps)
      47
    """

    def __init__(
        self,
        source: Any,
        *,
        budget_bytes: int = 2**28,
        shuffle: Literal["rows", "blocks"] | None = None,
        block_rows: int | None = None,
        mixed_blocks: int | None = None,
        rows: int | None = None,
    ):
        self.budget_bytes = whole("budget_bytes", budget_bytes)
        self._arrays: list | None = None
        self._factory: Callable | None = None
        # Of a function that was not counted: its blocks, for whoever reads first.
        self._begun: list[Iterator] = []
        self._first: list | None = None  # and some rows of its first block
        if callable(source):
            _refuse_for_function("shuffle", shuffle)
            _refuse_for_function("block_rows", block_rows)
            _refuse_for_function("mixed_blocks", mixed_blocks)
            self._factory = source
            said = None if rows is None else whole("rows", rows)
            self.form, self._begun, self._first = _form_of_blocks(source, said)
        else:
            if rows is not None:
                raise ValueError(
                    f"rows is for a function as source, got {rows!r}: arrays tell their"
                    " number of rows, leave it out."
                )
            self._arrays, self.form = _opened(source)
        if shuffle not in (None, "rows", "blocks"):
            raise ValueError(
                f'shuffle must be "rows" or "blocks", got {shuffle!r}: pass one of '
                "them."
            )
        self.shuffle = shuffle or ("rows" if self._factory is None else None)
        for name, given in (("block_rows", block_rows), ("mixed_blocks", mixed_blocks)):
            if self.shuffle != "blocks" and given is not None:
                raise ValueError(
                    f'{name} is for shuffle="blocks", got {given!r}: pass both, or '
                    "leave it out."
                )
        default = max(1, _BLOCK_BYTES // max(1, self.form.row_bytes))
        self.block_rows = min(
            self.n, default if block_rows is None else whole("block_rows", block_rows)
        )
        self.mixed_blocks = whole(
            "mixed_blocks", _MIXED if mixed_blocks is None else mixed_blocks
        )

    @property
    def n(self) -> int:
        return self.form.n

    def arrays(self) -> Any:
        """The arrays that the rows come from; None where a function gives them."""
        if self._arrays is None:
            return None
        return self.form.treedef.unflatten(self._arrays)

    def __getstate__(self) -> dict:
        """A copy has no part in an iterator that is open, and opens its own."""
        return self.__dict__ | {"_begun": []}

    def __repr__(self) -> str:
        form = zip(self.form.dtypes, self.form.shapes, strict=True)
        leaves = ", ".join(f"{dtype}{[self.n, *shape]}" for dtype, shape in form)
        return f"Stream({short(leaves)}, budget_bytes={self.budget_bytes})"

    def batch_rows(self, key, batch_size: int, step: int) -> np.ndarray:
        """The rows that ``minimize`` takes of this stream at step ``step``.

        That is so in a run with this stream and this ``batch_size`` from its start on.

        Args:
          key: a JAX PRNG key or an int seed.
          batch_size: rows per step.
          step: the step number, a Python int.

        Returns:
          int array of shape (batch_size,).
        """
        order = Order(KeyData.of(as_key(key)), self.n, whole("batch_size", batch_size))
        if self.shuffle == "rows":
            return _window_rows(order, 1, step)[0]
        if self.shuffle is None:
            return (order.position(step) + np.arange(batch_size)) % self.n
        return _mixed_rows(self, order, step)

    def sample(self) -> Any:
        """A few rows, in the dtypes they have on a device; of a function the first."""
        rows = self._first
        if self._arrays is not None:
            _check_files(self)
            rows = [x[sample_places(self.n)] for x in self._arrays]
        return self.form.treedef.unflatten([as_on_device(x) for x in rows or ()])

    def mark(self) -> np.uint32:
        """What tells these rows from others; 0 of a function, which may tell anew."""
        return mark_of(None if self._arrays is None else self.sample())


# A Stream is structure, and equal to others of its form: it never decides about a
# compilation. What a traced function sees of it is its form.
_form_alone: Any = lambda form, _: form  # noqa: E731
jax.tree_util.register_pytree_node(
    Stream, lambda stream: ((), stream.form), _form_alone
)


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


class Reader:
    """Windows, read ahead by one thread that ends with the ``with`` statement."""

    def __init__(self, stream: Stream, plan: Plan, order: Order):
        self._stream, self._plan, self._order = stream, plan, order
        # Settled here: whether JAX has 64 bits may be a matter of the thread.
        self._form = stream.form.on_device()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxgd-stream")
        self._open: list[Generator] = []
        self._spare: dict[int, list] = {}
        self._lent: set[int] = set()  # what goes back to the spare ones
        self._wanted = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, failed, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        errors = []
        for windows in self._open:
            try:
                windows.close()
            except StreamError as error:
                errors.append(error)
        if errors and failed is None:  # else it would hide what came before
            raise errors[0]

    def want(self, goal: int) -> None:
        """The run may take the steps up to ``goal``; before it asks for a window."""
        self._wanted = max(self._wanted, goal)

    def steps(self, step: int, limit: int) -> Iterator:
        """(first step, last, the rows of their batches) up to ``limit``.

        Each begins with the step that the one before ended with.
        """

        def may_read() -> int:
            return self._may_read(limit)

        given = self._stream, self._form, self._memory, self._plan, self._order
        windows = _step_windows(*given, step, limit, may_read)
        return self._ahead(windows, lambda window: window[1] < may_read())

    def _may_read(self, limit: int) -> int:
        """The step up to which rows may be read ahead of the steps.

        Arrays are read ahead to the end. A function is asked for no epoch of which no
        step is sure to take rows, so where it stops depends on the run's goal alone.
        """
        if self._stream._factory is None:
            return limit
        n, rows = self._stream.n, self._order.position(self._wanted)
        return min(limit, self._order.last_step(-(-rows // n) * n))

    def blocks(self) -> Iterator:
        """(number of whole blocks, rows); last, if any, (0, the rows that are left)."""
        return self._ahead(
            _pass_windows(self._stream, self._form, self._memory, self._plan)
        )

    def _memory(self, rows: int) -> list[np.ndarray]:
        """Memory of a window that is done with, or new.

        The pages of new memory come one fault at a time: 0.92 of the resident speed
        with, 0.8 without this (MLP 784-128-10, batches of 128).
        """
        spare = self._spare.get(rows)
        out = spare.pop() if spare else self._form.empty(rows)
        self._lent.add(id(out))
        return out

    def _ahead(self, windows: Generator, more=lambda _: True) -> Iterator:
        """Windows in turn; whoever asks for the next is done with the one before.

        ``more(window)``: whether the next one may be read before it is asked for.
        """
        self._open.append(windows)
        future = self._pool.submit(_next, windows)
        while True:
            window = future.result()
            if window is None:
                return
            at_once = more(window)
            if at_once:
                future = self._pool.submit(_next, windows)
            yield window
            out = window[-1]
            if id(out) in self._lent:
                self._lent.discard(id(out))
                self._spare.setdefault(len(out[0]), []).append(out)
            del window, out
            if not at_once:
                future = self._pool.submit(_next, windows)


def _next(windows):
    with _on_cpu(), np.errstate(over="ignore"):  # rows of fewer bits, as in NumPy
        return next(windows, None)


def _on_cpu():
    """Indices are computed where the rows are: a busy accelerator would keep them."""
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # a process without that backend
        return contextlib.nullcontext()


def _step_windows(
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
    """The windows of ``_step_windows``, by a function that fills them in turn."""
    batch_size = order.batch_size
    last, steps = None, max(1, plan.steps // _FIRST)
    for window in range(2**31):
        sure = may_read()
        until = min(first + steps, max(first, sure))
        out = memory((plan.steps + 1) * batch_size)
        begin = 0
        if last is not None:
            _assign(out, 0, last)
            begin = 1
        again = first < until == sure and _opens_an_epoch(stream, order, until)
        end = until - 1 if again else until
        what = f"window {window} (the rows of steps {first + begin} to {end})"
        stop = (until - first + 1) * batch_size
        with _Named(what, window):
            _check_files(stream)
            if again:
                look = stop - batch_size
                fill(out, begin * batch_size, look, first + begin)
                _assign(out, look, [x[look - batch_size : look] for x in out])
            elif until == limit and stream.shuffle == "blocks":
                look = stop - batch_size
                fill(out, begin * batch_size, look, first + begin)
                rows = _mixed_rows(stream, order, until)  # and no block more
                _take_rows(stream, rows, [y[look:stop] for y in out])
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


def _pass_windows(stream: Stream, form: Form, memory, plan: Plan):
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
            with _Named(
                f"window {window} (rows {first} to {first + rows - 1})", window
            ):
                _check_files(stream)
                pieces.fill(out, 0, rows)
            yield count, out
            del out
        if rest:
            out = form.empty(rest)
            with _Named(f"the last window (rows {stream.n - rest} and on)", whole):
                _check_files(stream)
                pieces.fill(out, 0, rest)
            yield 0, out
    finally:
        pieces.close()


@contextlib.contextmanager
def _filler(stream: Stream, form: Form, order: Order, step, most):
    """(out, start, stop, step): puts the rows from ``step`` on in out[start:stop]."""
    if stream.shuffle == "rows":

        def fill(out, start, stop, step):
            rows = _window_rows(order, most, step)
            rows = rows.reshape(-1)[: stop - start]
            _take_rows(stream, rows, [y[start:stop] for y in out])

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
        _require_fit(stream.form, leaf, rows, y.dtype)
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
    for blocks, rows in _mixed_groups(stream, key, position):
        sizes = [_block_range(stream, block) for block in blocks]
        offsets = np.cumsum([0, *(stop - start for start, stop in sizes)])
        at = np.empty(len(blocks), np.int64)
        for i, (block, (start, stop)) in enumerate(zip(blocks, sizes, strict=True)):
            with _Named(f"block {block} (rows {start} to {stop - 1})", int(block)):
                here = [y[offsets[i] : offsets[i + 1]] for y in held]
                _read_slice(stream, start, here, 0, stop - start)
            at[i] = offsets[i] - start
        order = np.argsort(blocks)
        places = (
            rows + at[order][np.searchsorted(blocks[order], rows // stream.block_rows)]
        )
        yield len(rows), partial(_copy_rows, held, places)


def _mixed_groups(stream: Stream, key: KeyData, position: int):
    """(blocks, their rows in the order they are taken) from ``position`` on."""
    n, size, most = stream.n, stream.block_rows, stream.mixed_blocks
    count = -(-n // size)
    epoch, place = divmod(position, n)
    while True:
        blocks = _permutation(key, _VISITS, 0, count, epoch)
        for group, start in enumerate(range(0, count, most)):
            taken = blocks[start : start + most]
            ranges = [_block_range(stream, block) for block in taken]
            length = sum(stop - start for start, stop in ranges)
            if place >= length:
                place -= length
                continue
            rows = np.concatenate([np.arange(*r) for r in ranges])
            order = _permutation(key, _MIXES, group, length, epoch)
            yield taken, rows[order][place:]
            place = 0
        epoch += 1


def _mixed_rows(stream: Stream, order: Order, step) -> np.ndarray:
    """The rows of one step in the block order."""
    found = []
    for _, rows in _mixed_groups(stream, order.key, order.position(step)):
        found.append(rows)
        if sum(map(len, found)) >= order.batch_size:
            return np.concatenate(found)[: order.batch_size]
    raise AssertionError("the groups have no end")


def _block_range(stream: Stream, block) -> tuple[int, int]:
    start = int(block) * stream.block_rows
    return start, min(stream.n, start + stream.block_rows)


def _permutation(key: KeyData, stream, number, n, epoch) -> np.ndarray:
    fold = jax.random.fold_in
    own = fold(fold(key.key(), np.uint32(stream)), np.uint32(number))
    return np.asarray(shuffled_rows(own, n, np.uint32(epoch), np.arange(n)))


def _yielded(stream: Stream, dtypes: tuple, epoch: int, place: int):
    """Pieces that a function yields, from row ``place`` of ``epoch`` on."""
    n, form = stream.n, stream.form
    while True:
        done, index, blocks = 0, 0, None
        try:
            with _NamedSource(f"the start of epoch {epoch}", 0):
                blocks = _blocks_of(stream)
            while True:
                name = f"block {index} (rows from {done} on, epoch {epoch})"
                with _NamedSource(name, index):
                    block = next(blocks, None)
                    if block is None:
                        break
                    leaves, complaint = _leaves_like(form, block)
                    if not complaint:
                        _require_readable(form, leaves, dtypes)
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
                _close(blocks)
            blocks = None
            raise
        finally:
            with _NamedSource(f"the end of epoch {epoch}", index):
                _close(blocks)
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


def _close(blocks) -> None:
    close = getattr(blocks, "close", None)
    if close is not None:
        close()


class _Begun:
    """An iterator over blocks of which the first has been seen already."""

    def __init__(self, first, others: Iterator):
        self._first: list = [first]
        self._others = others

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self._first.pop() if self._first else next(self._others)

    def close(self) -> None:
        _close(self._others)


class _Named:
    """An exception of the source becomes a StreamError that says where.

    Not a ``contextmanager``, which would let a StopIteration through as it is.
    """

    own = False  # whether a StreamError, too, is one of the source

    def __init__(self, what: str, block: int):
        self._what, self._block = what, block

    def __enter__(self) -> None:
        pass

    def __exit__(self, _, error, __) -> bool:
        known = isinstance(error, StreamError) and not self.own
        if known or not isinstance(error, Exception):
            return False
        raise StreamError(
            f"The source failed at {self._what}: {type(error).__name__}: {error}",
            self._block,
        ) from error


class _NamedSource(_Named):
    """The same around the user's function alone."""

    own = True


def _window_rows(order: Order, count, step) -> np.ndarray:
    step = np.int32(step)
    (words, impl), *sizes, since = order
    return np.asarray(_rows(words, impl, *sizes, count, step, since))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _rows(words, impl, n, batch_size, strata, count, step, since):
    key = jax.random.wrap_key_data(words, impl=impl)
    return rows_of_steps(key, n, batch_size, strata, step, count, since)


def _take_rows(stream: Stream, rows, out) -> None:
    """``out[...] = x[rows]`` for the arrays of a stream."""
    for leaf, (x, y) in enumerate(zip(stream._arrays or (), out, strict=True)):
        if x.flags.c_contiguous and x.dtype == y.dtype:
            # Checked indices would pass through a buffer; of any other array, ``take``
            # copies the whole.
            np.take(x, rows, axis=0, out=y, mode="clip")
            continue
        found = x[rows]
        _require_fit(stream.form, leaf, found, y.dtype)
        y[...] = found


def _require_fit(form: Form, leaf: int, rows, dtype) -> None:
    """A ValueError where integers of 64 bits do not fit in those that JAX has."""
    narrows = dtype.kind in "iu" and rows.dtype.itemsize > dtype.itemsize
    if not narrows or not rows.size:
        return
    limits = np.iinfo(dtype)
    for value in (rows.min(), rows.max()):
        if not limits.min <= value <= limits.max:
            raise ValueError(
                f"{form.name(leaf)} must hold integers that fit in {dtype}, got {value}"
                f" of {_tree.native(rows.dtype)}: enable 64 bits in JAX"
                " (jax_enable_x64), or number the ids anew."
            )


def _assign(out, start, rows) -> None:
    for x, y in zip(rows, out, strict=True):
        y[start : start + len(x)] = x


def _aligned(shape, dtype) -> np.ndarray:
    """Memory that a device of the CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _require_readable(form: Form, leaves, dtypes) -> None:
    """A ValueError where rows of a block cannot be copied as they are."""
    for leaf, (x, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        _require_file(partial(form.name, leaf), x)
        _require_fit(form, leaf, x, dtype)


def _check_files(stream: Stream) -> None:
    """A ValueError where reading would end the process: a mapped file is cut."""
    for leaf, x in enumerate(stream._arrays or ()):
        _require_file(partial(stream.form.name, leaf), x)


def _require_file(name: Callable[[], str], array) -> None:
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    # The mapping knows its file even where another has taken its name.
    if not isinstance(root, np.memmap) or not isinstance(root.base, mmap.mmap):
        return
    expected, found = root.offset + root.nbytes, root.base.size()
    if found < expected:
        raise ValueError(
            f"{name()} must have its file whole, {str(root.filename)!r} should have "
            f"{expected} bytes, got {found}: write it anew, and open it again."
        )


def _opened(source) -> tuple[list, Form]:
    """The arrays of a source, and their form."""
    if hasattr(source, "__next__"):
        raise TypeError(
            f"source must be arrays or a function, got a {type(source).__name__}, "
            "which can be read only once: pass a function that returns a new one."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(source)
    if not paths:
        raise ValueError(
            f"source must hold at least one array, got {source!r}: pass arrays, paths "
            "or a function."
        )
    arrays, rows = [], {}
    for path, leaf in paths:
        name = "source" + jax.tree_util.keystr(path)
        array = _array(name, leaf)
        _check_leaf(name, array)
        _require_file(lambda name=name: name, array)
        arrays.append(array)
        rows[name] = len(array)
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(
            "source must have equally many rows in every array, got different lengths "
            f"({short(lengths)}): cut them to one length."
        )
    return arrays, _form(treedef, arrays, len(arrays[0]))


def _array(name, leaf) -> np.ndarray:
    if _tree.is_traced(leaf):
        raise TypeError(
            f"{name} must be an array outside of jit, vmap and grad, got a traced "
            "value: pass arrays to minimize itself there."
        )
    if isinstance(leaf, np.ndarray):
        return leaf
    if isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not isinstance(leaf, str | os.PathLike):
        raise TypeError(
            f"{name} must be a NumPy array or the path of a .npy file, got "
            f"{describe(leaf)}: open it as an array first, or pass a function that "
            "yields blocks of rows."
        )
    try:
        found = np.load(leaf, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{name} must be a .npy file of numbers, got {os.fspath(leaf)!r} "
            f"({error}): write it with numpy.save."
        ) from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(
            f"{name} must be a .npy file, got {os.fspath(leaf)!r}, an archive of "
            "several: save each array to a file of its own with numpy.save."
        )
    return found


def _check_leaf(name, array) -> None:
    if dtype_of(array) is None:
        raise TypeError(
            f"{name} must be an array of numbers, got dtype {array.dtype}: encode it "
            "as numbers."
        )
    if array.ndim == 0:
        raise ValueError(
            f"{name} must have a leading axis of rows, got a scalar: pass it in args."
        )


def _form(treedef, arrays, n) -> Form:
    if not 1 <= n <= _MOST_ROWS:
        raise ValueError(
            f"source must have 1 to 2**31 - 1 rows, got {n}: pass "
            f"{'fewer' if n else 'more'} rows."
        )
    shapes = tuple(x.shape[1:] for x in arrays)
    return Form(n, treedef, shapes, tuple(_tree.native(x.dtype) for x in arrays))


def _form_of_blocks(source, rows: int | None) -> tuple[Form, list, list]:
    """The form of the blocks of a function, counted if ``rows`` is None.

    Else the iterator that showed it comes along, to be read from the start. And some
    rows of the first block.
    """
    blocks = source()
    if not hasattr(blocks, "__iter__"):
        raise TypeError(
            "source as a function must return an iterator of blocks of rows, got "
            f"{describe(blocks)}: write it with yield, or return iter(...)."
        )
    blocks = iter(blocks)
    form, total, begun, some = None, 0, [], []
    for index, block in enumerate(blocks):
        if form is None:
            paths, treedef = jax.tree_util.tree_flatten_with_path(block)
            leaves = [np.asarray(leaf) for _, leaf in paths]
            for (path, _), leaf in zip(paths, leaves, strict=True):
                _check_leaf(f"block {index}{jax.tree_util.keystr(path)}", leaf)
            if not leaves:
                raise ValueError(
                    f"source must yield arrays, block {index} is {block!r}: yield "
                    "pytrees of arrays."
                )
            form = _form(treedef, leaves, _MOST_ROWS)
        leaves, complaint = _leaves_like(form, block)
        if complaint:
            raise ValueError(f"source: block {index} {complaint}.")
        total += len(leaves[0])
        if not some and total:
            some = [np.array(leaf[sample_places(total)]) for leaf in leaves]
        if rows is not None:
            begun.append(_Begun(block, blocks))
            break
    if form is None:
        raise ValueError("source must yield rows, got no block: yield at least one.")
    if not begun:
        _close(blocks)
    n = _form(form.treedef, [], total if rows is None else rows).n
    return form._replace(n=n), begun, some


def _leaves_like(form: Form, block) -> tuple[list, str]:
    """The arrays of a block, and what is wrong with them."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(block)
    if treedef != form.treedef:
        return [], f"has the structure {treedef}, the first block {form.treedef}"
    leaves = [np.asarray(leaf) for _, leaf in paths]
    for (path, _), leaf, shape, dtype in zip(
        paths, leaves, form.shapes, form.dtypes, strict=True
    ):
        if (
            leaf.ndim == 0
            or leaf.shape[1:] != shape
            or _tree.native(leaf.dtype) != dtype
        ):
            return [], (
                f"has {leaf.dtype}{list(leaf.shape)} as {jax.tree_util.keystr(path)} "
                f"where the first block has rows of {dtype}{list(shape)}"
            )
    lengths = sorted({len(leaf) for leaf in leaves})
    if len(lengths) > 1:
        return [], f"has arrays of different lengths ({lengths})"
    return leaves, ""


def _refuse_for_function(name, value) -> None:
    if value is not None:
        raise ValueError(
            f"{name} is for arrays as source, a function yields rows in its own order, "
            f"got {value!r}: leave it out and shuffle in the function."
        )
