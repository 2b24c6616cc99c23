"""The thread that reads ahead, and the windows it hands over."""

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxgd._rows.block_order import Order
from jaxgd._rows.source import StreamError
from jaxgd._rows.stream import Stream
from jaxgd._rows.windows import Plan, pass_windows, step_windows


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
        windows = step_windows(*given, step, limit, may_read)
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
            pass_windows(self._stream, self._form, self._memory, self._plan)
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
