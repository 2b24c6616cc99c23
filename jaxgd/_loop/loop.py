"""The loop: chunks of steps, what happened in each, and where the run ends.

This room owns the order of events of a run: it scans the step over chunks, looks for
the first iterate at which something happened (a stop rule held, a number was not
finite), returns to exactly that iterate, and keeps history and counters. It knows no
gradients, no data layout and no criterion: those come in ``Parts``.

A chunk runs unguarded and is judged afterwards by what its steps saw. If something
happened in it, the chunk is dropped and run again up to the iterate in question: that
costs at most one chunk a run, while freezing finished steps would cost a selection over
all parameters in every step. The same compiled body with a traced trip count serves
every chunk, so a run may be cut anywhere without changing a bit. On a GPU a traced trip
count would ask the host at every step, so there full chunks run first in a scan of
static length, and the traced loop takes the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._result.curvature import extend_met, promised
from jaxgd._result.history import Record, extend
from jaxgd._stop.status import Check, Status

_NEVER = 2**31 - 1

# Steps of the first chunk of batch descent on a CPU; see ``first_chunk``.
_FIRST_CHUNK = 16


class Full(NamedTuple):
    """A pass over all rows at one iterate."""

    value: Any
    grad_norm: Any
    grad_max: Any = None
    params_norm: Any = None
    aux: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """What a run remembers beside parameters and optimizer state.

    It is the memory with which the iterate is reached: in batch descent the check at
    the iterate itself is not part of it (going on repeats that check); with full passes
    it is, where ``checked`` is the iterate's step.
    """

    key: Any
    rows: Any  # packed Place: where it is in its rows; () without data
    evaluations: Any  # int32
    skipped: Any  # int32: steps that the rule absorbed, see ``_rules/absorb``
    watch: Any  # memory of the stop rule, () without one
    rule: Any  # identity of that rule: (fingerprint, its numbers)
    arrived: Any  # of the step that led here: norm of its update, whether it moved
    met: Any  # Met as an array: the curvature along the steps; () with mini-batches
    status: Any  # int32: what the rule said at step `checked`
    checked: Any  # int32: step of the last full check, -1 before the first
    seen: Any  # Check: what that check saw
    anchor: Any  # parameters at that check, where the rule looks at their change
    history: Record
    checks: Record


class Parts(NamedTuple):
    """What the loop is made of: functions of traced values, and static facts."""

    step: Callable  # (State, input) -> (State, Info)
    inputs: Callable  # (step, closing) -> inputs of the next `size` steps
    batch: Callable  # input of one step -> Batch
    size: int  # steps in a chunk
    rate: Any  # steps -> learning rates; None: Info tells
    plain: bool  # whether the update is the rate times the gradient
    searches: bool  # whether it is the step of a line search
    judge: Any  # (watch, check, moved) -> (watch, code), or None
    judge_at_limit: bool  # whether the look at the last iterate is a check
    full: Any  # State -> Full; None: every step is a full pass
    next_check: Callable  # (step, checked) -> step of the next full check
    final_evaluation: bool
    has_answer: Any  # whether the rule absorbs NaN; None: no step does
    axes: tuple  # of vmap, where lanes share one loop


class Look(NamedTuple):
    """A run on its way."""

    state: Any
    goal: Any  # int32: the step to reach
    verdict: Any  # int32: why, as far as it is known
    most: Any  # int32: steps that a chunk may take
    done: Any  # bool: at the goal, and it has been looked at
    watch: Any  # memory of the stop rule after `seen`
    seen: Check
    aux: Any


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
    look = first_look(parts, state, limit)
    if parts.full is not None:
        return _run_with_passes(parts, look, limit)
    look = advance(parts, look)
    seen = look.seen
    full = Full(seen.value, seen.grad_norm, seen.grad_max, seen.params_norm, look.aux)
    status = jnp.where(look.verdict == Status.RUNNING, Status.MAX_STEPS, look.verdict)
    return End(look.state, status, full, look.watch, seen, jnp.int32(1))


def first_look(parts: Parts, state, limit) -> Look:
    """A run that has not moved yet."""
    finite = _tree.all_finite(state.params)
    verdict = jnp.where(finite, state.run.status, not_finite(state.step))
    return Look(
        state=state,
        goal=jnp.where(finite, limit, state.step),
        verdict=verdict,
        most=first_chunk(parts),
        done=jnp.bool_(False),
        watch=state.run.watch,
        seen=unseen(state.params),
        # Mini-batches leave none behind: that of the last full pass counts.
        aux=_blank_aux(parts, state) if parts.full is None else None,
    )


def first_chunk(parts: Parts):
    """Steps of the first chunk: on a CPU few, and more as long as nothing happens.

    What ends a run in its 20th step drops the steps of the chunk behind it. Runs of
    mini-batches end between chunks, and each chunk gathers rows for all of its steps:
    theirs are whole.
    """
    if parts.full is not None:
        return jnp.int32(parts.size)
    few, all_ = jnp.int32(min(_FIRST_CHUNK, parts.size)), jnp.int32(parts.size)
    return lax.platform_dependent(cpu=lambda: few, default=lambda: all_)


def some(axes, flag):
    """Whether a flag is set in any lane of these axes."""
    return lax.pmax(flag.astype(jnp.int32), axes) > 0 if axes else flag


def run_exactly(parts: Parts, state, steps: int) -> tuple[Any, Any]:
    """``steps`` steps as a static scan, for reverse mode: (state, status)."""

    def chunk(carry, _, size=parts.size):
        state, status = carry
        inputs = parts.inputs(state.step, jnp.bool_(False))
        inputs = jax.tree.map(lambda x: x[:size], inputs)
        core, infos = scan_steps(parts, state, inputs, size)
        bad_at = first_place(is_bad(infos))
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


def _run_with_passes(parts: Parts, look: Look, limit) -> End:
    """``run_to`` where checks and the final numbers take a pass over all rows."""
    watched = parts.judge is not None

    def segment(end_and_look):
        before, look = end_and_look
        look, due = to_next_check(parts, look, limit)
        look = advance(parts, look)
        wanted = pass_wanted(parts, look, due)
        full = _pass(parts, look.state, wanted if watched else parts.final_evaluation)
        end, look = absorb(parts, look, full, due, limit)
        if parts.axes:  # a lane that has ended stays as it was
            end = _tree.select(before.status == Status.RUNNING, end, before)
        return end, look

    blank = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda: _pass(parts, look.state, jnp.bool_(True))),
    )
    end = End(
        look.state,
        jnp.int32(Status.RUNNING),
        blank,
        look.watch,
        look.seen,
        jnp.int32(0),
    )
    if not watched:
        return segment((end, look))[0]

    def more(end_and_look):
        return some(parts.axes, end_and_look[0].status == Status.RUNNING)

    return lax.while_loop(more, segment, (end, look))[0]


def to_next_check(parts: Parts, look: Look, limit) -> tuple[Look, Any]:
    """``look`` with the next full check, or the limit, as its goal; and that check."""
    running = look.verdict == Status.RUNNING
    due = limit
    if parts.judge is not None:
        due = parts.next_check(look.state.step, look.state.run.checked)
    goal = jnp.where(running, jnp.minimum(due, limit), look.state.step)
    return look._replace(goal=goal, done=jnp.bool_(False)), due


def pass_wanted(parts: Parts, look: Look, due):
    """Whether the iterate that was reached takes a pass over all rows."""
    return _is_due(parts, look, due) | parts.final_evaluation


def _is_due(parts: Parts, look: Look, due):
    running = look.verdict == Status.RUNNING
    return (look.state.step == due) & running & (parts.judge is not None)


def absorb(parts: Parts, look: Look, full: Full, due, limit) -> tuple[End, Look]:
    """What the pass ``full`` means for the run: it has ended, or goes on."""
    watched = parts.judge is not None
    nan = jnp.full_like(look.seen.value, jnp.nan)
    is_due = _is_due(parts, look, due)
    wanted = is_due | parts.final_evaluation
    state, run, verdict = look.state, look.state.run, look.verdict
    full = _apart(full, state.step)
    lost = ~is_finite(full)
    bad = lost & wanted
    if parts.has_answer is not None:  # then batches are as good as they were
        bad = bad & ~parts.has_answer
    if watched:
        change = nan if run.anchor is None else _change(state.params, run)
        seen = Check(state.step, *full[:3], change, full.params_norm, nan)
        judged, code = judged_if(~lost, parts, run.watch, seen, None)
        row = jnp.stack([*full[:2], _rates(parts, state.step - 1, None), change])
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
    return end, look._replace(state=state, verdict=verdict)


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
    full = lax.cond(some(parts.axes, wanted), parts.full, lambda _: blank, state)
    return _tree.select(wanted, full, blank) if parts.axes else full


def advance(parts: Parts, entry: Look) -> Look:
    """Chunks of steps from ``entry`` to its goal, or to where the run ends.

    The iterate at the goal is looked at as well, on the batch of the step that would
    leave it: a run that is cut there must not be taken for finite.

    Written for one run. Under ``vmap`` with named axes all lanes share the loop, so
    that no predicate is batched: a turn is that of the lanes furthest behind, and the
    others stand still in it.
    """

    def chunk(look: Look) -> Look:
        state, turn = look.state, next_turn(parts, look)
        inputs = parts.inputs(turn.step, turn.closing)
        core, infos, aux, judged = _steps_and_checks(parts, look, inputs, turn)
        finite = _tree.all_finite(core.params)

        # The last good iterate may lie before this chunk: then the way there is run
        # again from the entry, which costs time once in a diverged run and no memory.
        settled, back, ahead = settle(
            parts, _slim(look), _slim(entry).state, turn, infos, judged, finite
        )
        old = _tree.either(
            back, replace(entry.state, run=None), replace(state, run=None)
        )
        core = _tree.either(ahead, core, old)
        run = replace(settled.state.run, anchor=state.run.anchor)
        return settled._replace(state=replace(core, run=run), aux=aux)

    def more(look: Look):
        return some(parts.axes, ~_is_done(parts, look))

    return lax.while_loop(more, chunk, entry)


class Turn(NamedTuple):
    """Which steps are next."""

    step: Any  # int32, of all lanes: the step that the inputs are of
    closing: Any  # bool, of all lanes: whether iterates at their goals are looked at
    looks: Any  # bool: whether this one is
    count: Any  # int32: steps to take, 0 where a lane stands still; 1 to look


def next_turn(parts: Parts, look: Look) -> Turn:
    """The next chunk of a run, or of the lanes that are furthest behind."""
    step, at_goal = look.state.step, look.state.step == look.goal
    count = jnp.minimum(look.most, look.goal - step)
    if not parts.axes:
        return Turn(step, at_goal, at_goal, jnp.where(at_goal, 1, count))
    waits = ~_is_done(parts, look)
    closing = ~some(parts.axes, waits & ~at_goal)
    takes_part = waits & (at_goal == closing)
    clock = lax.pmin(jnp.where(takes_part, step, _NEVER), parts.axes)
    if parts.full is not None:  # else the look does not depend on the step
        takes_part = takes_part & (step == clock)
    takes_part = takes_part & (closing | (step == clock))
    count = jnp.where(closing, 1, count)
    return Turn(clock, closing, closing & takes_part, jnp.where(takes_part, count, 0))


def _is_done(parts: Parts, look: Look):
    """Whether the run is at its goal, and what is to be seen there has been."""
    if parts.full is None:
        return look.done
    decided = look.verdict != Status.RUNNING
    return look.done | (decided & (look.state.step == look.goal))


def settle(parts: Parts, look: Look, start, turn: Turn, infos, judged, finite):
    """What happened in a chunk: (look without large trees, back, ahead)."""
    state, run, count = look.state, look.state.run, turn.count
    watch, codes, checks = judged
    undecided = look.verdict == Status.RUNNING

    live = up_to(parts.size) < count
    held_at = first_place(live & (codes != Status.RUNNING))
    bad_at = first_place(live & is_bad(infos))
    may_hold = undecided & (~turn.looks | parts.judge_at_limit)
    held = may_hold & (held_at < jnp.minimum(bad_at, count))
    bad = undecided & ~held & (bad_at < count)
    ahead = ~turn.looks & ~held & ~bad  # nothing has happened on the way
    if parts.axes:
        ahead = ahead & (count > 0)
    # No step saw the iterate that is not finite: look for it in shorter chunks.
    blown = ahead & ~finite & (count == 1)
    more = jnp.where(ahead, jnp.minimum(2 * look.most, parts.size), look.most)
    most = jnp.where(ahead & ~finite, jnp.maximum(count // 2, 1), more)

    verdict = jnp.where(held, at_place(codes, held_at), look.verdict)
    verdict = jnp.where(bad, not_finite(state.step + bad_at), verdict)
    verdict = jnp.where(blown, Status.DIVERGED, verdict)
    goal = jnp.where(held, state.step + held_at, look.goal)
    goal = jnp.where(bad, state.step + bad_at - 1, goal)
    goal = jnp.where(blown, state.step, goal)
    goal = jnp.maximum(goal, start.step)

    back, ahead = goal < state.step, ahead & finite
    new = remember(parts, state, infos, count, watch)
    run = _tree.either(ahead, new, _tree.either(back, start.run, run))
    first = jax.tree.map(lambda x: x[0], checks)
    seen = look.seen if checks is None else _tree.either(turn.looks, first, look.seen)
    settled = look._replace(
        state=replace(state, run=run),
        goal=goal,
        verdict=verdict,
        most=most,
        done=look.done | (turn.looks & ~bad),
        watch=_tree.either(turn.looks, watch, look.state.run.watch),
        seen=seen,
    )
    return settled, back, ahead


def _steps_and_checks(parts: Parts, look: Look, inputs, turn: Turn):
    """The steps of a turn: (core, infos, aux, what the stop rule says of each)."""
    state, count = look.state, turn.count

    def traced(state, inputs, aux):
        core, infos, aux = loop_steps(parts, state, inputs, count, aux)
        return core, infos, aux, judge_steps(parts, state, infos, count)

    def static(state, inputs, aux):
        core, infos = scan_steps(parts, state, inputs, parts.size)
        if parts.axes:
            core = _tree.select(count > 0, core, replace(state, run=None))
        return core, infos, aux, judge_steps(parts, state, infos, parts.size)

    def elsewhere(state, inputs, aux):
        short = some(parts.axes, (count > 0) & (count < parts.size))
        return lax.cond(short | turn.closing, traced, static, state, inputs, aux)

    return lax.platform_dependent(
        state, inputs, look.aux, cpu=traced, default=elsewhere
    )


def _slim(look: Look) -> Look:
    """``look`` without what grows with the parameters."""
    state = look.state
    run = replace(state.run, anchor=None)
    return look._replace(
        state=replace(state, params=None, opt_state=None, run=run), aux=None
    )


def scan_steps(parts: Parts, state, inputs, size):
    """A static scan of ``size`` steps: (core, infos)."""

    def body(core, x):
        core, info = parts.step(core, x)
        return core, _row(info)

    core = replace(state, run=None)
    shape = info_shape(parts, core, inputs)
    core, (numbers, others) = lax.scan(body, core, inputs, length=size)
    columns, others = iter(numbers.T), iter(others)
    is_number = jax.tree.map(lambda s: s.dtype == shape.value.dtype, shape)
    infos = jax.tree.map(lambda n: next(columns) if n else next(others), is_number)
    return core, infos


def _row(info):
    """What a step saw, numbers side by side: on a GPU one kernel writes them all."""
    leaves, dtype = jax.tree.leaves(info._replace(aux=None)), info.value.dtype
    numbers = [x for x in leaves if x.dtype == dtype]
    return jnp.stack(numbers), [x for x in leaves if x.dtype != dtype]


def loop_steps(parts: Parts, state, inputs, count, aux):
    """``count`` steps, a traced number: (core, infos, aux of the last step)."""
    core = replace(state, run=None)
    infos = jax.tree.map(
        lambda s: jnp.zeros((parts.size, *s.shape), s.dtype),
        info_shape(parts, core, inputs),
    )

    def body(i, carry):
        core, infos, _ = carry
        x = jax.tree.map(lambda x: at_place(x, i), inputs)
        core, info = parts.step(core, x)
        infos = jax.tree.map(
            lambda all, one: lax.dynamic_update_index_in_dim(
                all, one, i, 0, allow_negative_indices=False
            ),
            infos,
            info._replace(aux=None),
        )
        return core, infos, info.aux

    if not parts.axes:
        return lax.fori_loop(0, count, body, (core, infos, aux))

    def until_a_lane_rests(carry):
        done, core, infos, aux = carry
        until = lax.pmin(jnp.where(count > done, count, _NEVER), parts.axes)
        new, infos, last = lax.fori_loop(done, until, body, (core, infos, aux))
        new, last = _tree.select(count > done, (new, last), (core, aux))
        return until, new, infos, last

    # Selecting in each step would cost a pass over all parameters. And so it is the
    # same loop in which a lane goes its way and ends it, to the bit.
    most = _of_all(parts, count)
    carry = jnp.int32(0), core, infos, aux
    found = lax.while_loop(lambda carry: carry[0] < most, until_a_lane_rests, carry)
    return found[1:]


def _of_all(parts: Parts, count):
    """The trip count of a loop that takes ``count`` steps in each lane."""
    return lax.pmax(count, parts.axes) if parts.axes else count


def info_shape(parts: Parts, core, inputs):
    """What a step sees, as shapes."""
    first = jax.tree.map(lambda x: x[0], inputs)
    return jax.eval_shape(parts.step, core, first)[1]._replace(aux=None)


def judge_steps(parts: Parts, state, infos, count):
    """The stop rule at each iterate of a chunk: (watch, codes, checks)."""
    steps, run = state.step + up_to(parts.size), state.run
    codes = jnp.full_like(steps, Status.RUNNING)
    if parts.full is not None:  # then passes are what the rule sees
        return run.watch, codes, None
    nan = jnp.full_like(infos.value, jnp.nan)
    arrived = nan if not run.arrived else _shifted(run.arrived[0], infos.update_norm)
    checks = Check(
        steps,
        infos.value,
        infos.grad_norm,
        nan if infos.grad_max is None else infos.grad_max,
        arrived,
        nan if infos.params_norm is None else infos.params_norm,
        _promised(parts, state, infos),
    )
    if parts.judge is None:
        return run.watch, codes, checks
    fine = is_finite(infos)

    moved = _shifted(run.arrived[1], infos.moved)

    def one(i, carry):
        watch, codes = carry
        check = jax.tree.map(lambda x: at_place(x, i), checks)
        new, code = judged_if(at_place(fine, i), parts, watch, check, moved[i])
        if parts.axes:
            new = _tree.select(i < count, new, watch)
        return new, lax.dynamic_update_index_in_dim(codes, code, i, 0)

    trips = count if isinstance(count, int) else _of_all(parts, count)
    watch, codes = lax.fori_loop(0, trips, one, (run.watch, codes))
    return watch, codes, checks


def judged_if(fine, parts: Parts, watch, check, moved):
    """What the stop rule says of a check: (watch, code).

    Numbers that are not finite are no check: no rule holds there, nor remembers them.
    """
    assert parts.judge is not None
    new, code = parts.judge(watch, check, moved)
    if parts.has_answer is None and moved is not None:
        return new, code  # the run ends there
    return _tree.select(fine, new, watch), jnp.where(fine, code, Status.RUNNING)


def remember(parts: Parts, state, infos, count, watch=()) -> Run:
    """The memory of the run after ``count`` steps of a chunk."""
    run = state.run
    taken, skipped = count, run.skipped
    if infos.absorbed is not None:
        live = up_to(infos.absorbed.shape[0]) < count
        skipped = skipped + jnp.sum(live & infos.absorbed, dtype=jnp.int32)
    if infos.evaluations is not None:
        live = up_to(infos.evaluations.shape[0]) < count
        taken = jnp.sum(jnp.where(live, infos.evaluations, 0), dtype=jnp.int32)
    history = run.history
    if history.step.shape[0]:
        steps = state.step + up_to(infos.value.shape[0])
        rates = _rates(parts, steps, infos)
        columns = [infos.value, infos.grad_norm, rates, infos.update_norm]
        numbers = jnp.stack(jnp.broadcast_arrays(*columns), axis=-1)
        numbers = lax.stop_gradient(numbers).astype(history.numbers.dtype)
        history = extend(history, steps, numbers, count)
    arrived = run.arrived
    if arrived:
        arrived = (
            at_place(infos.update_norm, count - 1),
            at_place(infos.moved, count - 1),
        )
    return replace(
        run,
        evaluations=run.evaluations + taken,
        skipped=skipped,
        watch=watch if parts.judge is not None else run.watch,
        arrived=arrived,
        met=_meet(parts, state, infos, count),
        history=history,
    )


def _meet(parts: Parts, state, infos, count):
    """The curvature met so far, after ``count`` steps of a chunk."""
    met = state.run.met
    if isinstance(met, tuple):
        return met
    return extend_met(met, *_lines(parts, state, infos), count, parts.plain)


def _promised(parts: Parts, state, infos):
    """The decrease that each step of a chunk promises, NaN where it does not."""
    if infos.decrement is not None:
        return infos.decrement
    met = state.run.met
    if isinstance(met, tuple):
        return jnp.full_like(infos.value, jnp.nan)
    return promised(met, *_lines(parts, state, infos), parts.plain, parts.searches)


def _lines(parts: Parts, state, infos):
    """Value, gradient norm, length and slope of the steps of a chunk."""
    steps = state.step + up_to(infos.value.shape[0])
    norm = infos.grad_norm
    nan = jnp.full_like(norm, jnp.nan)
    length = nan if infos.update_norm is None else infos.update_norm
    slope = nan if infos.slope is None else infos.slope
    if parts.plain:
        length = jnp.asarray(_rates(parts, steps, None), norm.dtype) * norm
        slope = -length * norm
    return lax.stop_gradient((infos.value, norm, length, slope))


def _rates(parts: Parts, steps, told):
    if parts.rate is not None:
        return lax.stop_gradient(parts.rate(steps))
    rates = getattr(told, "learning_rate", None)
    return jnp.nan if rates is None else rates


def _change(params, run: Run):
    dtype = _tree.real_dtype(params)
    change = _tree.norm(_tree.subtract(params, run.anchor), dtype)
    return jnp.where(run.watch.started, change, jnp.nan)


def is_finite(seen):
    """Whether value and gradient are, at each step or in the pass seen."""
    return jnp.isfinite(seen.value) & jnp.isfinite(seen.grad_norm)


def is_bad(infos):
    """Whether a step saw what is not finite, and its rule did not absorb it."""
    bad = ~is_finite(infos)
    return bad if infos.absorbed is None else bad & ~infos.absorbed


def not_finite(step):
    """The status of a run whose iterate of this step is not finite."""
    code = jnp.where(step == 0, Status.NON_FINITE, Status.DIVERGED)
    return code.astype(jnp.int32)


def first_place(happened):
    """The first place where it happened, or the length where nowhere."""
    places = up_to(happened.shape[0])
    return jnp.min(jnp.where(happened, places, happened.shape[0]))


def at_place(values, place):
    """The entry at a place that never counts from the end: testing for it costs."""
    return lax.dynamic_index_in_dim(
        values, place, keepdims=False, allow_negative_indices=False
    )


def up_to(count):
    """0, 1, ... as int32, ``count`` of them."""
    return jnp.arange(count, dtype=jnp.int32)


def _shifted(before, values):
    return jnp.concatenate([jnp.reshape(before, (1,)), values[:-1]])


def unseen(params) -> Check:
    """In place of a check before the first."""
    nan = jnp.full((), jnp.nan, _tree.real_dtype(params))
    return Check(jnp.int32(-1), *[nan] * 6)


def _blank_aux(parts: Parts, state):
    first = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], parts.inputs(state.step, jnp.bool_(False)))
    )
    _, info = jax.eval_shape(parts.step, replace(state, run=None), first)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), info.aux)


def _blank(shape, dtype):
    filler = jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
    return jnp.full(shape, filler, dtype)
