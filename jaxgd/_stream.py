"""Rows from outside the device: files, big arrays, or a function that yields blocks.

This room owns ``Stream``, the order in which it reads, and the thread that reads ahead.
What it hands over are windows: buffers of rows for a range of steps, or for some blocks
of a full pass, which are written again only when the run is done with them.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._rows import as_key, rows_of_steps, shuffled_rows
from jaxgd._rules import describe
from jaxgd._source import chunk_size
from jaxgd._spec import Spec, block_of_pass, dtype_of
from jaxgd._tree import short

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
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct((self.n, *shape), dtype) for shape, dtype in pairs]
        )

    def on_device(self) -> "Form":
        """With the dtypes that rows have there: of 64 bits only where JAX has them."""
        dtypes = (np.dtype(jax.dtypes.canonicalize_dtype(x)) for x in self.dtypes)
        return self._replace(dtypes=tuple(dtypes))

    def empty(self, rows: int) -> list[np.ndarray]:
        """Fresh memory for so many rows."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [_aligned((rows, *shape), dtype) for shape, dtype in pairs]

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
    blocks is row ``p``. It is called once for each epoch and each full pass.

    Args:
      source: a pytree of NumPy arrays, ``np.memmap`` or paths of ``.npy`` files, which
        share a leading axis of ``n`` rows; or a function of no arguments that returns
        a new iterator over blocks of rows, pytrees of arrays of one form with any
        number of rows each. Writing to arrays during a run changes only rows that
        are not read yet.
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
      ValueError: different numbers of rows, no rows, or an option out of place.
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
        self.budget_bytes = _count("budget_bytes", budget_bytes)
        self._arrays: list | None = None
        self._factory: Callable | None = None
        if callable(source):
            _refuse_for_function("shuffle", shuffle)
            _refuse_for_function("block_rows", block_rows)
            _refuse_for_function("mixed_blocks", mixed_blocks)
            self._factory = source
            said = None if rows is None else _count("rows", rows)
            self.form = _form_of_blocks(source, said)
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
            self.n, default if block_rows is None else _count("block_rows", block_rows)
        )
        self.mixed_blocks = _count(
            "mixed_blocks", _MIXED if mixed_blocks is None else mixed_blocks
        )

    @property
    def n(self) -> int:
        return self.form.n

    def __repr__(self) -> str:
        form = zip(self.form.dtypes, self.form.shapes, strict=True)
        leaves = ", ".join(f"{dtype}{[self.n, *shape]}" for dtype, shape in form)
        return f"Stream({short(leaves)}, budget_bytes={self.budget_bytes})"

    def batch_rows(self, key, batch_size: int, step: int) -> np.ndarray:
        """The rows that ``minimize`` takes of this stream at step ``step``.

        Args:
          key: a JAX PRNG key or an int seed.
          batch_size: rows per step.
          step: the step number, a Python int.

        Returns:
          int array of shape (batch_size,).
        """
        data, batch_size = KeyData.of(as_key(key)), _count("batch_size", batch_size)
        if self.shuffle == "rows":
            return _window_rows(data, self.n, batch_size, 1, 1, step)[0]
        if self.shuffle is None:
            return (step * batch_size + np.arange(batch_size)) % self.n
        found, position = [], step * batch_size
        for _, rows in _mixed_groups(self, data, position):
            found.append(rows)
            if sum(map(len, found)) >= batch_size:
                return np.concatenate(found)[:batch_size]
        raise AssertionError("the groups have no end")


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


class Plan(NamedTuple):
    """What a window holds."""

    steps: int  # those it leads over; it has the batch of one more
    blocks: int  # of a full pass
    block: int  # rows of each of these


def plan_of(spec: Spec, stream: Stream) -> Plan:
    """Windows that stay within the budget, or a ValueError."""
    rows, batch_size = stream.form.abstract(), spec.batch_size
    block = block_of_pass(spec, rows)
    chunk = chunk_size(rows, batch_size, spec.work)
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

    def __init__(self, stream: Stream, plan: Plan, key, batch_size: int, strata: int):
        self._stream, self._plan = stream, plan
        # Settled here: whether JAX has 64 bits may be a matter of the thread.
        self._form = stream.form.on_device()
        self._key, self._batch_size, self._strata = KeyData.of(key), batch_size, strata
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxgd-stream")
        self._open: list[Generator] = []
        self._spare: dict[int, list] = {}
        self._lent: set[int] = set()  # what goes back to the spare ones

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for windows in self._open:
            windows.close()

    def steps(self, step: int, limit: int) -> Iterator:
        """(first step, last, the rows of their batches) up to ``limit``.

        Each begins with the step that the one before ended with.
        """
        how = (self._key, self._batch_size, self._strata, step, limit)
        form = self._form
        return self._ahead(
            _step_windows(self._stream, form, self._memory, self._plan, *how)
        )

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

    def _ahead(self, windows: Generator) -> Iterator:
        """Windows in turn; whoever asks for the next is done with the one before."""
        self._open.append(windows)
        future = self._pool.submit(_next, windows)
        while True:
            window = future.result()
            if window is None:
                return
            future = self._pool.submit(_next, windows)
            yield window
            out = window[-1]
            if id(out) in self._lent:
                self._lent.discard(id(out))
                self._spare.setdefault(len(out[0]), []).append(out)
            del window, out


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
    stream: Stream, form: Form, memory, plan, key, batch_size, strata, first, limit
):
    """Windows from step ``first`` on: each begins with the last batch of the other."""
    fill = _filler(stream, form, key, batch_size, strata, first, plan.steps + 1)
    last, steps = None, max(1, plan.steps // _FIRST)
    for window in range(2**31):
        until = min(first + steps, limit)
        out = memory((plan.steps + 1) * batch_size)
        begin = 0
        if last is not None:
            _assign(out, 0, last)
            begin = 1
        what = f"window {window} (the rows of steps {first + begin} to {until})"
        with _named(what, window):
            stop = (until - first + 1) * batch_size
            fill(out, begin * batch_size, stop, first + begin)
        if until == limit:
            yield first, until, out
            return
        last = [x[stop - batch_size : stop].copy() for x in out]
        yield first, until, out
        del out
        first, steps = until, min(2 * steps, plan.steps)


def _pass_windows(stream: Stream, form: Form, memory, plan: Plan):
    """All rows in their order: windows of whole blocks, then what is left."""
    pieces = _Pieces(_natural(stream))
    try:
        whole, rest = divmod(stream.n, plan.block)
        for window, done in enumerate(range(0, whole, plan.blocks)):
            count = min(plan.blocks, whole - done)
            rows = count * plan.block
            first = done * plan.block
            # A pass of one block may hand its very rows on, as auxiliary output.
            alone = stream.n <= plan.block
            out = (form.empty if alone else memory)(plan.blocks * plan.block)
            with _named(
                f"window {window} (rows {first} to {first + rows - 1})", window
            ):
                pieces.fill(out, 0, rows)
            yield count, out
            del out
        if rest:
            out = form.empty(rest)
            with _named(f"the last window (rows {stream.n - rest} and on)", whole):
                pieces.fill(out, 0, rest)
            yield 0, out
    finally:
        pieces.close()


def _filler(stream: Stream, form: Form, key, batch_size, strata, step, most):
    """(out, start, stop, step): puts the rows from ``step`` on in out[start:stop]."""
    if stream.shuffle == "rows":

        def fill(out, start, stop, step):
            rows = _window_rows(key, stream.n, batch_size, strata, most, step)
            rows = rows.reshape(-1)[: stop - start]
            for x, y in zip(stream._arrays or (), out, strict=True):
                _take(x, rows, y[start:stop])

        return fill
    position = step * batch_size
    if stream.shuffle == "blocks":
        pieces = _Pieces(_mixed(stream, form, key, position))
    else:
        pieces = _Pieces(_natural(stream, position))

    def go_on(out, start, stop, step):
        pieces.fill(out, start, stop)

    return go_on


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


def _natural(stream: Stream, position: int = 0):
    """Pieces in the order of the source, epoch after epoch, from ``position`` on."""
    if stream._arrays is None:
        return _yielded(stream, *divmod(position, stream.n))
    return _slices(stream, position % stream.n)


def _slices(stream: Stream, start: int):
    while True:
        yield stream.n - start, partial(_copy_slice, stream._arrays, start)
        start = 0


def _copy_slice(arrays, offset, out, start, stop):
    for x, y in zip(arrays, out, strict=True):
        y[...] = x[offset + start : offset + stop]


def _copy_rows(arrays, rows, out, start, stop):
    for x, y in zip(arrays, out, strict=True):
        _take(x, rows[start:stop], y)


def _mixed(stream: Stream, form: Form, key: KeyData, position: int):
    """Pieces of the block order: groups of blocks, their rows shuffled."""
    most = min(stream.n, stream.block_rows * stream.mixed_blocks)
    held = form.empty(most)
    for blocks, rows in _mixed_groups(stream, key, position):
        sizes = [_block_range(stream, block) for block in blocks]
        offsets = np.cumsum([0, *(stop - start for start, stop in sizes)])
        at = np.empty(len(blocks), np.int64)
        for i, (block, (start, stop)) in enumerate(zip(blocks, sizes, strict=True)):
            with _named(f"block {block} (rows {start} to {stop - 1})", int(block)):
                here = [y[offsets[i] : offsets[i + 1]] for y in held]
                _copy_slice(stream._arrays, start, here, 0, stop - start)
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


def _block_range(stream: Stream, block) -> tuple[int, int]:
    start = int(block) * stream.block_rows
    return start, min(stream.n, start + stream.block_rows)


def _permutation(key: KeyData, stream, number, n, epoch) -> np.ndarray:
    fold = jax.random.fold_in
    own = fold(fold(key.key(), np.uint32(stream)), np.uint32(number))
    return np.asarray(shuffled_rows(own, n, np.uint32(epoch), np.arange(n)))


def _yielded(stream: Stream, epoch: int, place: int):
    """Pieces that a function yields, from row ``place`` of ``epoch`` on."""
    n, form = stream.n, stream.form
    while True:
        done, index = 0, 0
        blocks = None
        try:
            with _named(f"the start of epoch {epoch}", 0):
                blocks = iter(stream._factory())  # type: ignore[misc]
            while True:
                name = f"block {index} (rows from {done} on, epoch {epoch})"
                with _named(name, index):
                    block = next(blocks, None)
                if block is None:
                    break
                leaves, complaint = _leaves_like(form, block)
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
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()
        if done < n:
            raise StreamError(
                f"The source ended after {done} rows of {n} in epoch {epoch} (before "
                f"block {index}): yield the same rows in every epoch.",
                index,
            )
        epoch, place = epoch + 1, 0


@contextlib.contextmanager
def _named(what: str, block: int):
    """An exception of the source becomes a StreamError that says where."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        raise StreamError(
            f"The source failed at {what}: {type(error).__name__}: {error}", block
        ) from error


def _window_rows(key: KeyData, n, batch_size, strata, count, step) -> np.ndarray:
    step = np.int32(step)
    return np.asarray(_rows(key.words, key.impl, n, batch_size, strata, count, step))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _rows(words, impl, n, batch_size, strata, count, step):
    key = jax.random.wrap_key_data(words, impl=impl)
    return rows_of_steps(key, n, batch_size, strata, step, count)


def _take(x, rows, out) -> None:
    """``out[...] = x[rows]``."""
    if x.flags.c_contiguous and x.dtype == out.dtype:
        # Checked indices would pass through a buffer; of any other array, ``take``
        # copies the whole.
        np.take(x, rows, axis=0, out=out, mode="clip")
    else:
        out[...] = x[rows]


def _assign(out, start, rows) -> None:
    for x, y in zip(rows, out, strict=True):
        y[start : start + len(x)] = x


def _aligned(shape, dtype) -> np.ndarray:
    """Memory that a device of the CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _native(dtype) -> np.dtype:
    return dtype.newbyteorder("=")


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
    return Form(n, treedef, shapes, tuple(_native(x.dtype) for x in arrays))


def _form_of_blocks(source, rows: int | None) -> Form:
    """The form of the blocks of a function, counted if ``rows`` is None."""
    blocks = source()
    if not hasattr(blocks, "__iter__"):
        raise TypeError(
            "source as a function must return an iterator of blocks of rows, got "
            f"{describe(blocks)}: write it with yield, or return iter(...)."
        )
    form, total = None, 0
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
        if rows is not None:
            break
    if form is None:
        raise ValueError("source must yield rows, got no block: yield at least one.")
    close = getattr(blocks, "close", None)
    if close is not None:
        close()
    return form._replace(n=_form(form.treedef, [], total if rows is None else rows).n)


def _leaves_like(form: Form, block) -> tuple[list, str]:
    """The arrays of a block, and what is wrong with them."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(block)
    if treedef != form.treedef:
        return [], f"has the structure {treedef}, the first block {form.treedef}"
    leaves = [np.asarray(leaf) for _, leaf in paths]
    for (path, _), leaf, shape, dtype in zip(
        paths, leaves, form.shapes, form.dtypes, strict=True
    ):
        if leaf.ndim == 0 or leaf.shape[1:] != shape or _native(leaf.dtype) != dtype:
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


def _count(name, value) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}: pass an int.")
    if int(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: pass 1 or more.")
    return int(value)
