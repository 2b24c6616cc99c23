"""Rows from outside the device: ``Stream``, what the user makes of a source."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from jaxgd._checks import short, whole
from jaxgd._rows.block_order import KeyData, Order, mixed_rows, window_rows
from jaxgd._rows.order import as_key
from jaxgd._rows.sample import as_on_device, mark_of, sample_places
from jaxgd._rows.source import check_files, form_of_blocks, opened

_BLOCK_BYTES = 2**20


_MIXED = 16


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
            self.form, self._begun, self._first = form_of_blocks(source, said)
        else:
            if rows is not None:
                raise ValueError(
                    f"rows is for a function as source, got {rows!r}: arrays tell their"
                    " number of rows, leave it out."
                )
            self._arrays, self.form = opened(source)
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
            return window_rows(order, 1, step)[0]
        if self.shuffle is None:
            return (order.position(step) + np.arange(batch_size)) % self.n
        return mixed_rows(self, order, step)

    def sample(self) -> Any:
        """A few rows, in the dtypes they have on a device; of a function the first."""
        rows = self._first
        if self._arrays is not None:
            check_files(self)
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


def _refuse_for_function(name, value) -> None:
    if value is not None:
        raise ValueError(
            f"{name} is for arrays as source, a function yields rows in its own order, "
            f"got {value!r}: leave it out and shuffle in the function."
        )
