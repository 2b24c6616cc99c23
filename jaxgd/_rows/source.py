"""Sources of rows: files, big arrays, or a function that yields blocks.

This room owns how a source is opened and what each part of it has to be; an error of
it names what was being read.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._checks import LAST_STEP, describe, short
from jaxgd._rows.sample import sample_places
from jaxgd._tree import dtype_of

if TYPE_CHECKING:
    from jaxgd._rows.stream import Stream


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


def _aligned(shape, dtype) -> np.ndarray:
    """Memory that a device of the CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def opened(source) -> tuple[list, Form]:
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
    return arrays, form_of_leaves(treedef, arrays, len(arrays[0]))


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


def check_files(stream: "Stream") -> None:
    """A ValueError where reading would end the process: a mapped file is cut."""
    for leaf, x in enumerate(stream._arrays or ()):
        _require_file(partial(stream.form.name, leaf), x)


def require_readable(form: Form, leaves, dtypes) -> None:
    """A ValueError where rows of a block cannot be copied as they are."""
    for leaf, (x, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        _require_file(partial(form.name, leaf), x)
        require_fit(form, leaf, x, dtype)


def require_fit(form: Form, leaf: int, rows, dtype) -> None:
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


def form_of_leaves(treedef, arrays, n) -> Form:
    """The form of rows in these arrays, ``n`` of them; or an error."""
    if not 1 <= n <= LAST_STEP:
        raise ValueError(
            f"source must have 1 to 2**31 - 1 rows, got {n}: pass "
            f"{'fewer' if n else 'more'} rows."
        )
    shapes = tuple(x.shape[1:] for x in arrays)
    return Form(n, treedef, shapes, tuple(_tree.native(x.dtype) for x in arrays))


def form_of_blocks(source, rows: int | None) -> tuple[Form, list, list]:
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
            form = form_of_leaves(treedef, leaves, LAST_STEP)
        leaves, complaint = leaves_like(form, block)
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
        closed(blocks)
    n = form_of_leaves(form.treedef, [], total if rows is None else rows).n
    return form._replace(n=n), begun, some


def leaves_like(form: Form, block) -> tuple[list, str]:
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
        closed(self._others)


def closed(blocks) -> None:
    close = getattr(blocks, "close", None)
    if close is not None:
        close()


class Named:
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


class NamedSource(Named):
    """The same around the user's function alone."""

    own = True


def take_rows(stream: "Stream", rows, out) -> None:
    """``out[...] = x[rows]`` for the arrays of a stream."""
    for leaf, (x, y) in enumerate(zip(stream._arrays or (), out, strict=True)):
        if x.flags.c_contiguous and x.dtype == y.dtype:
            # Checked indices would pass through a buffer; of any other array, ``take``
            # copies the whole.
            np.take(x, rows, axis=0, out=y, mode="clip")
            continue
        found = x[rows]
        require_fit(stream.form, leaf, found, y.dtype)
        y[...] = found


def assign(out, start, rows) -> None:
    for x, y in zip(rows, out, strict=True):
        y[start : start + len(x)] = x
