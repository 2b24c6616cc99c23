"""A run from its first chunk to its end, with checks between chunks where they are due.

This room owns the order of a run whose checks are passes over all rows, and the run of
a fixed length. What happens within a chunk is owned by ``_loop/advance``.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._loop.advance import Progress, advance, progress_at_start
from jaxgd._loop.chunk import any_lane, judged_if, scan_steps
from jaxgd._loop.memory import (
    change_since_check,
    first_true,
    is_bad,
    is_finite,
    not_finite,
    rates_of,
    remember,
)
from jaxgd._loop.parts import Full, Parts
from jaxgd._result.history import extend, side_by_side
from jaxgd._stop.status import Check, Status


class End(NamedTuple):
    """Where a run ended and what was seen there."""

    state: Any
    status: Any  # int32
    full: Full
    watch: Any
    seen: Check  # the last check
    extra: Any  # int32: evaluations not counted in the state


def run_to(parts: Parts, state, limit) -> End:
    """Drives ``state`` to step ``limit``, or to the iterate at which the run ends."""
    now = progress_at_start(parts, state, limit)
    if parts.full is not None:
        return _run_with_passes(parts, now, limit)
    now = advance(parts, now)
    seen = now.seen
    full = Full(seen.value, seen.grad_norm, aux=now.aux)
    status = jnp.where(now.verdict == Status.RUNNING, Status.MAX_STEPS, now.verdict)
    return End(now.state, status, full, now.watch, seen, jnp.int32(1))


def run_exactly(parts: Parts, state, steps: int) -> tuple[Any, Any]:
    """``steps`` steps as a static scan, for reverse mode: (state, status)."""

    def chunk(carry, _, size=parts.size):
        state, status = carry
        inputs = parts.inputs(state.step, jnp.bool_(False))
        inputs = jax.tree.map(lambda x: x[:size], inputs)
        core, infos = scan_steps(parts, state, inputs, size)
        bad_at = first_true(is_bad(infos))
        bad = (bad_at < size) & (status == Status.MAX_STEPS)
        status = jnp.where(bad, not_finite(state.step + bad_at), status)
        run = remember(parts, state, infos, jnp.int32(size))
        return (replace(core, run=run), status), None

    finite = _tree.all_finite(lax.stop_gradient(state.params))
    carry = (state, jnp.where(finite, Status.MAX_STEPS, not_finite(state.step)))
    whole, rest = divmod(steps, parts.size)
    if whole:
        carry, _ = lax.scan(chunk, carry, length=whole)
    if rest:
        carry, _ = chunk(carry, None, size=rest)
    state, status = carry
    finite = _tree.all_finite(lax.stop_gradient(state.params))
    late = ~finite & (status == Status.MAX_STEPS)
    return state, jnp.where(late, Status.DIVERGED, status)


def _run_with_passes(parts: Parts, now: Progress, limit) -> End:
    """``run_to`` where checks and the final numbers take a pass over all rows."""
    watched = parts.judge is not None

    def segment(end_and_look):
        before, now = end_and_look
        now, due = to_next_check(parts, now, limit)
        now = advance(parts, now)
        wanted = pass_wanted(parts, now, due)
        full = _pass(parts, now.state, wanted if watched else parts.final_evaluation)
        end, now = absorb(parts, now, full, due, limit)
        if parts.axes:  # a lane that has ended stays as it was
            end = _tree.select(before.status == Status.RUNNING, end, before)
        return end, now

    blank = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda: _pass(parts, now.state, jnp.bool_(True))),
    )
    end = End(
        now.state,
        jnp.int32(Status.RUNNING),
        blank,
        now.watch,
        now.seen,
        jnp.int32(0),
    )
    if not watched:
        return segment((end, now))[0]

    def more(end_and_look):
        return any_lane(parts.axes, end_and_look[0].status == Status.RUNNING)

    return lax.while_loop(more, segment, (end, now))[0]


def to_next_check(parts: Parts, now: Progress, limit) -> tuple[Progress, Any]:
    """``now`` with the next full check, or the limit, as its goal; and that check."""
    running = now.verdict == Status.RUNNING
    due = limit
    if parts.judge is not None:
        due = parts.next_check(now.state.step, now.state.run.checked)
    goal = jnp.where(running, jnp.minimum(due, limit), now.state.step)
    return now._replace(goal=goal, done=jnp.bool_(False)), due


def pass_wanted(parts: Parts, now: Progress, due):
    """Whether the iterate that was reached takes a pass over all rows."""
    return _is_due(parts, now, due) | parts.final_evaluation


def _is_due(parts: Parts, now: Progress, due):
    running = now.verdict == Status.RUNNING
    return (now.state.step == due) & running & (parts.judge is not None)


def absorb(parts: Parts, now: Progress, full: Full, due, limit) -> tuple[End, Progress]:
    """What the pass ``full`` means for the run: it has ended, or goes on."""
    watched = parts.judge is not None
    nan = jnp.full_like(now.seen.value, jnp.nan)
    is_due = _is_due(parts, now, due)
    wanted = is_due | parts.final_evaluation
    state, run, verdict = now.state, now.state.run, now.verdict
    full = _apart(full, state.step)
    lost = ~is_finite(full)
    bad = lost & wanted
    if parts.has_answer is not None:  # then batches are as good as they were
        bad = bad & ~parts.has_answer
    if watched:
        change = nan if run.anchor is None else change_since_check(state.params, run)
        seen = Check(
            step=state.step,
            value=full.value,
            grad_norm=full.grad_norm,
            update_norm=change,
            expected_decrease=nan,
            **full.measures,
        )
        judged, code = judged_if(~lost, parts, run.watch, seen, None)
        columns = {
            "value": full.value,
            "grad_norm": full.grad_norm,
            "learning_rate": rates_of(parts, state.step - 1, None),
            "update_norm": change,
            **full.measures,
        }
        row = side_by_side(columns, run.checks.numbers.dtype)
        absorbed = replace(
            run,
            evaluations=run.evaluations + 1,
            watch=judged,
            status=code,
            checked=state.step,
            seen=seen,
            anchor=None
            if run.anchor is None
            else _tree.select(lost, run.anchor, state.params),
            checks=extend(run.checks, state.step[None], row[None], jnp.int32(1)),
        )
        run = _tree.either(is_due, absorbed, run)
        verdict = jnp.where(is_due, code, verdict)
    known = verdict == Status.NON_FINITE
    verdict = jnp.where(bad & ~known, not_finite(state.step), verdict)
    at_limit = (verdict == Status.RUNNING) & (state.step >= limit)
    status = jnp.where(at_limit, Status.MAX_STEPS, verdict)
    state = replace(state, run=run)
    checked = run.checked == state.step  # and counted, as the pass it repeats
    extra = jnp.where(checked, 0, jnp.int32(parts.final_evaluation))
    if not parts.final_evaluation:
        full = full._replace(
            value=jnp.where(checked, run.seen.value, full.value),
            grad_norm=jnp.where(checked, run.seen.grad_norm, full.grad_norm),
        )
    end = End(state, status, full, run.watch, run.seen, extra)
    return end, now._replace(state=state, verdict=verdict)


def _apart(full: Full, step) -> Full:
    """``full``, its numbers as they are, in a form that no later arithmetic enters.

    XLA:CPU makes one rounding of the last product of the pass and the first difference
    that a stop rule takes of it, where both are in one program (it ignores
    ``optimization_barrier`` there). A host that stands between the two must see the
    same bits, so a choice that only the running program knows lies between them.
    """
    numbers = full._replace(aux=None)
    numbers = jax.tree.map(lambda x: jnp.where(step >= 0, x, jnp.nan), numbers)
    return numbers._replace(aux=full.aux)


def _pass(parts: Parts, state, wanted) -> Full:
    """The full pass if ``wanted``, else NaN in its place."""
    shapes = jax.eval_shape(parts.full, state)
    if wanted is True or parts.final_evaluation:
        return parts.full(state)
    blank = jax.tree.map(lambda s: _blank(s.shape, s.dtype), shapes)
    if wanted is False:
        return blank._replace(aux=None)
    full = lax.cond(any_lane(parts.axes, wanted), parts.full, lambda _: blank, state)
    return _tree.select(wanted, full, blank) if parts.axes else full


def _blank(shape, dtype):
    filler = jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
    return jnp.full(shape, filler, dtype)
