"""The same run, driven from Python: a result so far after each so many steps.

This room owns the host's loop. It cuts a run into calls of the very program that
``minimize`` calls once, which changes no bit, and hands out what each of them reached.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.call import call_of
from jaxgd._checks import flag, whole
from jaxgd._files.resume import begin
from jaxgd._loop.cause import explained
from jaxgd._loop.host import drive, feeding
from jaxgd._loop.outcome import finished
from jaxgd._loop.plan import Numbers, Spec
from jaxgd._loop.step import State
from jaxgd._result.result import Result
from jaxgd._rows.stream import Stream
from jaxgd._stop.status import Status

_REFRESH = 0.1  # seconds between two looks of the bar at the numbers


def iterate(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    every: int,
    progress: bool = False,
    **like_minimize: Any,
) -> Iterator[Result]:
    r"""Runs ``minimize(fun, params, data, **like_minimize)``, stopping by on the way.

    The descent is the same, to the bit, whatever ``every`` is: the run of ``minimize``
    is cut after each ``every`` steps, and what is reached there is handed to the body
    of your loop. Whatever belongs on the host happens in that body: log, save,
    validate, ask a clock, ``break``.

    Args:
      fun, params, data: as for ``minimize``.
      every: steps between two snapshots. A snapshot costs about half a millisecond and
        one gradient, the look at the iterate it returns. All of them share one reading
        of a ``Stream``, whose thread and windows stay until the loop ends.
      progress: show a bar with steps, objective, gradient norm, rate and rows a second;
        needs the extra ``jaxgd[progress]``.
      **like_minimize: all other arguments of ``minimize``. ``final_evaluation`` is
        False here, so a snapshot of a mini-batch run has the value NaN, unless a stop
        rule has just checked it; with True every snapshot evaluates the objective on
        all rows. With ``stop=None`` only the limit or divergence ends the run, where
        ``minimize`` scans on to the end.

    Returns:
      An iterator of at least one ``Result``. Each but the last has the status
      ``RUNNING``; the last is what ``minimize`` returns. Each is complete:
      ``snapshot.state`` goes on from there, whatever ended the loop.

    Raises:
      TypeError, ValueError: as ``minimize``, when ``iterate`` is called.
      ImportError: ``progress=True`` without tqdm.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> def bowl(x):
      ...     return jnp.sum(x**2)
      >>> for snapshot in jaxgd.iterate(
      ...     bowl, jnp.ones(3), every=10, learning_rate=0.01, max_steps=1000
      ... ):
      ...     if snapshot.value < 1e-3:
      ...         break
      >>> int(snapshot.steps), snapshot.status == jaxgd.Status.RUNNING
      (200, Array(True, dtype=bool))
    """
    like_minimize = {"final_evaluation": False, **like_minimize}
    call = call_of("iterate", fun, params, data, like_minimize)
    every = whole("every", every, low=1, high=2**31 - 1)
    flag("progress", progress)
    if any(_tree.is_traced(x) for x in jax.tree.leaves((params, data, like_minimize))):
        raise TypeError(
            "iterate hands its snapshots to Python, so it takes no traced values, got "
            "one: call it outside jit, vmap and grad, or call minimize."
        )
    spec, numbers, limit = checked(call)
    spec = spec._replace(exactly=None)
    bar = _bar() if progress else None
    numbers = _owned(spec, numbers)
    state = begin(spec, numbers, _owned(spec, call.state))
    spec = tried(spec, numbers._replace(params=state.params))
    return _snapshots(spec, numbers, state, int(limit), every, bar)


def _owned(spec: Spec, tree):
    """``tree`` with copies in place of NumPy arrays, which the loop's body may change.

    On a CPU, JAX reads the memory of an array of NumPy where it is.
    """

    def own(x):
        if not isinstance(x, np.ndarray):
            return x
        # A copy of the host's: device_put(may_alias=False) takes the memory over, too.
        # Where there are several devices, it is left to the program which have it.
        x = np.array(x)
        return jax.device_put(x) if spec.places is None else x

    # A Stream is one, and none of its rows are read yet.
    return jax.tree.map(own, tree, is_leaf=lambda x: isinstance(x, Stream))


def _snapshots(spec: Spec, numbers: Numbers, state: State, limit, every, make_bar):
    step = int(state.step)
    end = min(step + limit, 2**31 - 1)
    running, last = jax.numpy.int32(Status.RUNNING), jax.numpy.int32(end)
    bar = nullcontext() if make_bar is None else make_bar(spec, step, end)
    with feeding(spec, numbers, state, end - step) as feed, bar as show:
        while True:
            cut = min(step + every, end)
            outcome = drive(spec, numbers, state, np.int32(cut - step), feed)
            snapshot = finished(spec, outcome)
            state, step = snapshot.state, int(snapshot.steps)
            ended = cut == end or int(snapshot.status) != Status.MAX_STEPS
            if not ended:
                snapshot = replace(snapshot, status=running)
            snapshot = replace(snapshot, limit=last)
            if ended:
                snapshot = explained(spec, numbers, snapshot)
            if show is not None:
                show(snapshot)
            yield snapshot
            if ended:
                return


def _bar():
    """What makes the bar of a run; here, so that a missing package is told at once."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "A progress bar needs tqdm: pip install 'jaxgd[progress]'."
        ) from error

    class Bar:
        def __init__(self, spec: Spec, step: int, end: int):
            self.rows = spec.batch_size or spec.n
            self.bar = tqdm(
                total=end,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                disable=jax.process_index() > 0,  # one bar for all processes
            )
            self.since, self.from_step, self.shown = time.perf_counter(), step, 0.0
            self.last: Any = None

        def __enter__(self):
            return self.show

        def __exit__(self, *_):
            if self.last is not None:
                self.draw()
            self.bar.close()

        def show(self, snapshot: Result) -> None:
            self.last = snapshot
            if time.perf_counter() - self.shown >= _REFRESH:
                self.draw()

        def draw(self) -> None:
            now, steps = time.perf_counter(), int(self.last.steps)
            told, status = _in_numbers(self.last), Status(int(self.last.status))
            if self.rows:
                a_second = (steps - self.from_step) * self.rows / (now - self.since)
                told["rows/s"] = f"{a_second:.3g}"
            if status not in (Status.RUNNING, Status.MAX_STEPS):
                told["ended"] = status.name
            self.bar.set_postfix(told, refresh=False)
            self.bar.update(steps - self.bar.n)
            self.bar.refresh()
            self.shown = now

    return Bar


def _in_numbers(snapshot: Result) -> dict[str, str]:
    """What a bar tells of a snapshot."""
    history, checks = snapshot.history, snapshot.checks
    told, row = {}, history.step.size - 1
    if np.isfinite(snapshot.value):
        told["objective"], told["gradient"] = snapshot.value, snapshot.grad_norm
    elif row >= 0:
        told["batch"], told["gradient"] = history.value[row], history.grad_norm[row]
    if checks.step.size:
        told["check"] = checks.value[-1]
    if row >= 0 and np.isfinite(history.learning_rate[row]):
        told["rate"] = history.learning_rate[row]
    return {name: f"{float(number):.4g}" for name, number in told.items()}
