"""The host that feeds a run with rows from outside, window by window.

This room owns ``drive``, the one way into a run: resident data go to the compiled
program as they are, a ``Stream`` is driven from here. The order of events is that of
``_loop/passes``, whose pieces are the programs here; between them the host brings
windows of rows and decides nothing but which of the programs comes next.
"""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._devices.layout import undisturbed
from jaxgd._loop.advance import advance, progress_at_start
from jaxgd._loop.outcome import Outcome, outcome_of
from jaxgd._loop.parts import Full, full_of, make_parts, stop_rule
from jaxgd._loop.passes import absorb, pass_wanted, to_next_check
from jaxgd._loop.plan import Numbers, Spec, objective_of, windows_of
from jaxgd._loop.program import go, go_together, taken_up
from jaxgd._loop.step import State
from jaxgd._problem.objective import (
    BlockForms,
    add_block,
    block_forms,
    block_of,
    count_rows,
)
from jaxgd._rows.block_order import KeyData, Order
from jaxgd._rows.order import place_taken_up
from jaxgd._rows.reader import Reader
from jaxgd._rows.resident import pass_key
from jaxgd._rows.source import Form, StreamError
from jaxgd._rows.stream import Stream
from jaxgd._rules.adapter import evaluation_params
from jaxgd._stop.measures import MEASURES
from jaxgd._stop.status import Status


def drive(
    spec: Spec, numbers: Numbers, state: State, limit, feed: "Feed | None" = None
) -> Outcome:
    """Goes on from ``state`` for at most ``limit`` steps, wherever the rows are.

    ``feed``: the rows of a ``Stream``, where this is one of several cuts of a run.
    """
    if isinstance(numbers.data, Stream):
        if feed is not None:
            return _driven(spec, numbers, state, limit, feed)
        with feeding(spec, numbers, state, limit) as own:
            return _driven(spec, numbers, state, limit, own)
    with undisturbed(spec.places):
        traced = any(map(_tree.is_traced, jax.tree.leaves((numbers, state, limit))))
        return (go_together if traced else go)(spec, numbers, state, limit)


def feeding(spec: Spec, numbers: Numbers, state: State, limit) -> Any:
    """``with`` this, the cuts of a run share one reading; resident rows need none."""
    if not isinstance(numbers.data, Stream):
        return contextlib.nullcontext()
    return Feed(spec, numbers, state, int(limit))


class Feed:
    """The rows of a run's next ``limit`` steps, window by window."""

    def __init__(self, spec: Spec, numbers: Numbers, state: State, limit: int):
        stream: Stream = numbers.data
        self.plan, self.reached = windows_of(spec, stream), state
        sizes = spec.n, spec.batch_size, spec.strata
        place = _place_taken_up(state.run.rows, state.step, *sizes, numbers.mark)
        order = Order(KeyData.of(state.run.key), *sizes, np.asarray(place))
        self.reader = Reader(stream, self.plan, order)
        self._form, step = stream.form, int(state.step)
        last = min(step + limit, 2**31 - 1)
        self._windows = self.reader.steps(step, last)
        self._first = self._until = step
        self._window: Any = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *failed) -> None:
        try:
            self.reader.__exit__(*failed)
        except StreamError as error:
            error.state = self.reached
            raise

    def rows(self, step: int, goal: int) -> tuple[Any, int, int]:
        """(rows, the step that their first batch is of, how far they lead)."""
        if self._window is None or self._until == step < goal:
            self._window = None  # its memory, before there is another
            self.reader.want(goal)
            self._first, self._until, window = next(self._windows)
            self._window = _on_device(self._form, window)
        return self._window, self._first, min(goal, self._until)


def _driven(spec: Spec, numbers: Numbers, state: State, limit, feed: Feed) -> Outcome:
    now, due, limit, told = _enter(spec, numbers, state, limit)
    step, verdict, goal = map(int, told)
    try:
        while True:
            while verdict == Status.RUNNING:
                window, first, upto = feed.rows(step, goal)
                given = numbers._replace(data=window), now
                now, told = _advanced(spec, *given, np.int32(upto), np.int32(first))
                del window, given
                step, verdict = map(int, told)
                if step == goal:
                    break
            if _wants_pass(spec, numbers, now, due):
                full = _full_pass(spec, feed, numbers, now.state)
            else:
                full = _no_pass(spec, numbers, now.state)
            outcome, now, due, told = _settled(spec, numbers, now, full, due, limit)
            now = now._replace(state=outcome.state)
            verdict, goal = map(int, told)
            if verdict != Status.RUNNING:
                feed.reached = outcome.state
                return outcome
    except StreamError as error:
        error.state = now.state
        raise


_place_taken_up = jax.jit(place_taken_up, static_argnums=(2, 3, 4))


def _on_device(form: Form, leaves: list) -> Any:
    """The rows of a window as arrays of the device; it may take over their memory."""
    return jax.device_put(form.treedef.unflatten(leaves))


def _without_rows(numbers: Numbers) -> Numbers:
    """Within a program, where only the form of the rows counts."""
    return numbers._replace(data=numbers.data.zeros())


@partial(jax.jit, static_argnums=0)
def _enter(spec: Spec, numbers: Numbers, state: State, limit):
    numbers = _without_rows(numbers)
    state, limit = taken_up(spec, numbers, state, limit)
    parts, _ = make_parts(spec, numbers, state, stop_rule(spec, numbers))
    now, due = to_next_check(parts, progress_at_start(parts, state, limit), limit)
    told = jnp.stack([state.step, now.verdict, now.goal])
    return now, due, limit, told


@partial(jax.jit, static_argnums=0)
def _advanced(spec: Spec, numbers: Numbers, now, goal, first):
    rule = stop_rule(spec, numbers)
    parts, _ = make_parts(spec, numbers, now.state, rule, first)
    now = advance(parts, now._replace(goal=goal, done=jnp.bool_(False)))
    return now, jnp.stack([now.state.step, now.verdict])


@partial(jax.jit, static_argnums=0)
def _settled(spec: Spec, numbers: Numbers, now, full: Full, due, limit):
    numbers = _without_rows(numbers)
    rule = stop_rule(spec, numbers)
    parts, _ = make_parts(spec, numbers, now.state, rule)
    end, now = absorb(parts, now, full, due, limit)
    now, due = to_next_check(parts, now, limit)
    outcome = outcome_of(spec, numbers, rule, end, limit)
    told = jnp.stack([end.status, now.goal])
    return outcome, now._replace(state=None), due, told


def _wants_pass(spec: Spec, numbers: Numbers, now, due) -> bool:
    if spec.final_evaluation or spec.stop is None:
        return spec.final_evaluation
    return bool(_pass_wanted(spec, numbers, now, due))


@partial(jax.jit, static_argnums=0)
def _pass_wanted(spec: Spec, numbers: Numbers, now, due):
    numbers = _without_rows(numbers)
    parts, _ = make_parts(spec, numbers, now.state, stop_rule(spec, numbers))
    return pass_wanted(parts, now, due)


def _full_pass(spec: Spec, feed: Feed, numbers: Numbers, state) -> Full:
    """All rows in blocks, added up as a pass over resident rows does."""
    form, block = numbers.data.form, feed.plan.block
    total, parts_of_aux, rest = None, [], None
    for count, window in feed.reader.blocks():
        window = _on_device(form, window)
        given = numbers._replace(data=window)
        if count == 0 or spec.n <= block:
            rest = window
            continue
        if total is None:
            total = _no_blocks(spec, block, numbers, state)
        total, aux = _with_blocks(spec, block, given, state, total, np.int32(count))
        if spec.has_aux:
            parts_of_aux.append(jax.tree.map(lambda x: np.asarray(x)[:count], aux))
        jax.block_until_ready(total)
        del window, given
    aux = None
    if parts_of_aux:
        aux = jax.tree.map(lambda *parts: np.concatenate(parts), *parts_of_aux)
    return _seen(spec, block, numbers, state, total, aux, rest)


def _of_rows(spec: Spec, numbers: Numbers, state: State):
    """rows -> ((value, grad), aux): a block of a full pass."""
    objective = objective_of(spec, numbers)
    params = evaluation_params(state.opt_state, state.params)
    key = pass_key(state.run.key) if spec.with_key else None

    def of_rows(rows):
        (value, aux), grad = objective.value_and_grad(params, rows, key)
        return (value, grad), aux

    return of_rows


def _forms(spec: Spec, block: int, numbers: Numbers, state: State) -> BlockForms:
    of_rows = _of_rows(spec, numbers, state)
    return block_forms(of_rows, numbers.data.zeros(block + 1), block)


@partial(jax.jit, static_argnums=(0, 1))
def _no_blocks(spec: Spec, block: int, numbers: Numbers, state: State):
    return _forms(spec, block, numbers, state).zeros()


@partial(jax.jit, static_argnums=(0, 1))
def _with_blocks(spec: Spec, block: int, numbers: Numbers, state, total, count):
    """``total`` with ``count`` blocks of a window; and their auxiliary output."""
    window = numbers.data
    of_rows = _of_rows(spec, numbers, state)
    blocks = count_rows(window) // block
    _, shapes = jax.eval_shape(lambda: of_rows(block_of(window, 0, block)))
    room = jax.tree.map(lambda s: jnp.zeros((blocks, *s.shape), s.dtype), shapes)

    def body(i, carry):
        total, all_aux = carry
        means, aux = of_rows(block_of(window, i * block, block))
        all_aux = jax.tree.map(
            lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0),
            all_aux,
            aux,
        )
        return add_block(total, means, block / spec.n), all_aux

    return lax.fori_loop(0, count, body, (total, room))


@partial(jax.jit, static_argnums=(0, 1))
def _seen(spec: Spec, block: int, numbers: Numbers, state, total, aux, rest) -> Full:
    """The pass, once its last rows have come."""
    params = evaluation_params(state.opt_state, state.params)
    of_rows = _of_rows(spec, numbers, state)
    if spec.n <= block:
        (value, grad), aux = of_rows(rest)
        return full_of(spec, params, value, grad, aux)
    share, last = (spec.n % block) / spec.n, None
    if rest is not None:
        means, last = of_rows(rest)
        total = add_block(total, means, share)
    forms = _forms(spec, block, numbers, state)
    (value, grad), aux = forms.joined(total, aux, last, share)
    return full_of(spec, params, value, grad, aux)


@partial(jax.jit, static_argnums=0)
def _no_pass(spec: Spec, numbers: Numbers, state: State) -> Full:
    """In place of a pass that nobody wants, in its form."""
    dtype = _tree.real_dtype(state.params)
    nan = jnp.full((), jnp.nan, dtype)
    blank = Full(nan, nan, dict.fromkeys(MEASURES, nan))
    if spec.stop is None or not spec.has_aux:
        return blank
    of_rows = _of_rows(spec, numbers, state)
    aux = jax.eval_shape(lambda: of_rows(numbers.data.zeros(spec.n))[1])
    return blank._replace(aux=jax.tree.map(_nothing, aux))


def _nothing(shape):
    filler = jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0
    return jnp.full(shape.shape, filler, shape.dtype)
