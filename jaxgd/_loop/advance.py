"""The order of events within a run: chunks, what happened in each, where it ends.

A chunk runs unguarded and is judged afterwards by what its steps saw. If something
happened in it (a stop rule held, a number was not finite), the chunk is dropped and run
again up to the iterate in question: that costs about a chunk (where the last good
iterate lies before it, the way from the entry once more), while freezing finished steps
would cost a selection over all parameters in every step. On a GPU a
traced trip count would ask the host at every step, so there full chunks are scans of
static length.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._loop.chunk import NEVER, any_lane, judge_steps, loop_steps, scan_steps
from jaxgd._loop.memory import (
    at_place,
    first_true,
    is_bad,
    not_finite,
    remember,
    unseen,
    up_to,
)
from jaxgd._loop.parts import Parts
from jaxgd._stop.status import Check, Status, succeeded

# Steps of the first chunk of batch descent on a CPU; see ``first_chunk``.
_FIRST_CHUNK = 16


class Progress(NamedTuple):
    """A run on its way."""

    state: Any
    goal: Any  # int32: the step to reach
    verdict: Any  # int32: why, as far as it is known
    most: Any  # int32: steps that a chunk may take
    done: Any  # bool: at the goal, and it has been looked at
    watch: Any  # memory of the stop rule after `seen`
    seen: Check
    aux: Any


def progress_at_start(parts: Parts, state, limit) -> Progress:
    """A run that has not moved yet."""
    finite = _tree.all_finite(state.params)
    verdict = jnp.where(finite, state.run.status, not_finite(state.step))
    return Progress(
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


def advance(parts: Parts, entry: Progress) -> Progress:
    """Chunks of steps from ``entry`` to its goal, or to where the run ends.

    The iterate at the goal is looked at as well, on the batch of the step that would
    leave it: a run that is cut there must not be taken for finite.

    Written for one run. Under ``vmap`` with named axes all lanes share the loop, so
    that no predicate is batched: a turn is that of the lanes furthest behind, and the
    others stand still in it.
    """

    def chunk(now: Progress) -> Progress:
        state, turn = now.state, next_turn(parts, now)
        inputs = parts.inputs(turn.step, turn.closing)
        core, infos, aux, judged = _steps_and_checks(parts, now, inputs, turn)
        finite = _tree.all_finite(core.params)

        # The last good iterate may lie before this chunk: then the way there is run
        # again from the entry, which costs time once in a diverged run and no memory.
        settled, back, ahead = settle(
            parts, _slim(now), _slim(entry).state, turn, infos, judged, finite
        )
        old = _tree.either(
            back, replace(entry.state, run=None), replace(state, run=None)
        )
        core = _tree.either(ahead, core, old)
        run = replace(settled.state.run, anchor=state.run.anchor)
        return settled._replace(state=replace(core, run=run), aux=aux)

    def more(now: Progress):
        return any_lane(parts.axes, ~_is_done(parts, now))

    return lax.while_loop(more, chunk, entry)


class Turn(NamedTuple):
    """Which steps are next."""

    step: Any  # int32, of all lanes: the step that the inputs are of
    closing: Any  # bool, of all lanes: whether iterates at their goals are looked at
    looks: Any  # bool: whether this one is
    count: Any  # int32: steps to take, 0 where a lane stands still; 1 to look


def next_turn(parts: Parts, now: Progress) -> Turn:
    """The next chunk of a run, or of the lanes that are furthest behind."""
    step, at_goal = now.state.step, now.state.step == now.goal
    count = jnp.minimum(now.most, now.goal - step)
    if not parts.axes:
        return Turn(step, at_goal, at_goal, jnp.where(at_goal, 1, count))
    waits = ~_is_done(parts, now)
    closing = ~any_lane(parts.axes, waits & ~at_goal)
    takes_part = waits & (at_goal == closing)
    clock = lax.pmin(jnp.where(takes_part, step, NEVER), parts.axes)
    if parts.full is not None:  # else the look does not depend on the step
        takes_part = takes_part & (step == clock)
    takes_part = takes_part & (closing | (step == clock))
    count = jnp.where(closing, 1, count)
    return Turn(clock, closing, closing & takes_part, jnp.where(takes_part, count, 0))


def _is_done(parts: Parts, now: Progress):
    """Whether the run is at its goal, and what is to be seen there has been."""
    if parts.full is None:
        return now.done
    decided = now.verdict != Status.RUNNING
    return now.done | (decided & (now.state.step == now.goal))


class Event(NamedTuple):
    """What happened in a chunk of steps, and what follows of it."""

    goal: Any  # int32: the step to reach
    verdict: Any  # int32: why, as far as it is known
    counts: Any  # bool: the chunk counts; else it is run again, or was a look
    chunk_limit: Any  # int32: steps that the next chunk may take


def event_of(now: Progress, turn: Turn, codes, bad, finite, may_hold, size) -> Event:
    """The first thing that happened in the steps of ``turn``.

    For example: a chunk of 4 steps begins at step 8, and the rule holds at the third
    iterate that its steps saw, ``codes = [0, 0, 1, 0]``. Then the goal is step 10, the
    verdict 1, and the chunk does not count: its next turn takes 2 steps and the one
    after looks at step 10. Were the third iterate not finite instead, ``bad = [0, 0, 1,
    1]``, the goal were step 9, the last that is.

    Args:
      now: the run before the chunk.
      turn: the chunk.
      codes: int32[size], what the stop rule says at the iterate each step saw.
      bad: bool[size], whether that is not finite.
      finite: whether the iterate after the last step is.
      may_hold: whether a rule that holds may end the run here: always but in the last
        look of an objective with a key.
      size: the most steps that a chunk may take.
    """
    step, count = now.state.step, turn.count
    undecided = now.verdict == Status.RUNNING
    live = up_to(codes.shape[0]) < count
    held_at = first_true(live & (codes != Status.RUNNING))
    bad_at = first_true(live & bad)
    held = undecided & may_hold & (held_at < jnp.minimum(bad_at, count))
    # An objective with a key may be finite for the rule, and not in the last look.
    open_ = undecided | (turn.looks & succeeded(now.verdict))
    lost = open_ & ~held & (bad_at < count)
    calm = ~turn.looks & ~held & ~lost & (count > 0)
    # No step saw the iterate that is not finite: look for it in shorter chunks.
    blown = calm & ~finite & (count == 1)
    longer = jnp.where(calm, jnp.minimum(2 * now.most, size), now.most)
    shorter = jnp.maximum(count // 2, 1)

    verdict = jnp.where(held, at_place(codes, held_at), now.verdict)
    verdict = jnp.where(lost, not_finite(step + bad_at), verdict)
    verdict = jnp.where(blown, Status.DIVERGED, verdict)
    goal = jnp.where(held, step + held_at, now.goal)
    goal = jnp.where(lost, step + bad_at - 1, goal)
    goal = jnp.where(blown, step, goal)
    limit = jnp.where(calm & ~finite, shorter, longer)
    return Event(goal, verdict, calm & finite, limit)


def settle(parts: Parts, now: Progress, start, turn: Turn, infos, judged, finite):
    """The run after a chunk.

    Args:
      now: the run before the chunk, without what grows with the parameters.
      start: the state at the entry, without these.
      turn: the chunk.
      infos: what its steps saw.
      judged: (watch, codes, checks), what the stop rule says of each.
      finite: whether the parameters after the last step are.

    Returns:
      (now, back, counts): the run, without what grows with the parameters; whether it
      goes back to its entry; whether the chunk counts.
    """
    state, run, (watch, codes, checks) = now.state, now.state.run, judged
    may_hold = ~turn.looks | parts.judge_at_limit
    bad = is_bad(infos)
    event = event_of(now, turn, codes, bad, finite, may_hold, parts.size)
    goal = jnp.maximum(event.goal, start.step)
    back = goal < state.step
    new = remember(parts, state, infos, turn.count, watch)
    run = _tree.either(event.counts, new, _tree.either(back, start.run, run))
    first = jax.tree.map(lambda x: x[0], checks)
    settled = now._replace(
        state=replace(state, run=run),
        goal=goal,
        verdict=event.verdict,
        most=event.chunk_limit,
        done=now.done | (turn.looks & (event.goal >= state.step)),
        watch=_tree.either(turn.looks, watch, now.state.run.watch),
        seen=now.seen if checks is None else _tree.either(turn.looks, first, now.seen),
    )
    return settled, back, event.counts


def _slim(now: Progress) -> Progress:
    """``now`` without what grows with the parameters."""
    state = now.state
    run = replace(state.run, anchor=None)
    return now._replace(
        state=replace(state, params=None, opt_state=None, run=run), aux=None
    )


def _blank_aux(parts: Parts, state):
    first = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], parts.inputs(state.step, jnp.bool_(False)))
    )
    _, info = jax.eval_shape(parts.step, replace(state, run=None), first)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), info.aux)


def _steps_and_checks(parts: Parts, now: Progress, inputs, turn: Turn):
    """The steps of a turn: (core, infos, aux, what the stop rule says of each)."""
    state, count = now.state, turn.count

    def traced(state, inputs, aux):
        core, infos, aux = loop_steps(parts, state, inputs, count, aux)
        return core, infos, aux, judge_steps(parts, state, infos, count)

    def static(state, inputs, aux):
        core, infos = scan_steps(parts, state, inputs, parts.size)
        if parts.axes:
            core = _tree.select(count > 0, core, replace(state, run=None))
        return core, infos, aux, judge_steps(parts, state, infos, parts.size)

    def elsewhere(state, inputs, aux):
        short = any_lane(parts.axes, (count > 0) & (count < parts.size))
        return lax.cond(short | turn.closing, traced, static, state, inputs, aux)

    return lax.platform_dependent(state, inputs, now.aux, cpu=traced, default=elsewhere)
