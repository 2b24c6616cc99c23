"""Many runs as lanes of one loop: they go side by side, and end each in its own time.

This room owns the order of events where several runs share a loop, as ``_loop/loop``
owns it for one. It is written for one lane and stands under ``vmap`` with named axes;
what decides about the loop itself (is any lane on its way, has anything happened in
any) is asked of all lanes at once, so no predicate is batched and XLA selects nothing
per step.

Lanes that are on their way have taken equally many steps. A chunk runs unguarded. If
nothing happened in it, it counts; else it is run again, each lane up to the iterate at
which it ends. What has ended is carried along, and the loop ends with the last lane.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._loop.loop import (
    Look,
    Parts,
    at_place,
    first_chunk,
    first_place,
    info_shape,
    is_bad,
    judge_steps,
    loop_steps,
    not_finite,
    remember,
    scan_steps,
    shared,
    some,
    up_to,
)
from jaxgd._stop.status import Status

_NEVER = 2**31 - 1


class _Turn(NamedTuple):
    """All lanes between two chunks; ``before`` is one chunk back."""

    look: Any  # Look
    before: Any  # State
    stop: Any  # int32: the step at which the lane is to be frozen
    fate: Any  # int32: why
    at: Any  # int32, of all lanes: steps taken by those on their way
    before_at: Any  # int32, of all lanes
    known: Any  # int32, of all lanes: up to here it is known which lanes end
    closed: Any  # bool, of all lanes: the iterate at the goal has been looked at
    most: Any  # int32, of all lanes: steps that a chunk may take


def advance_lanes(parts: Parts, entry: Look) -> Look:
    """Chunks of steps from ``entry`` to its goal, or to where each lane ends."""
    axes, size = parts.axes, parts.size
    first = entry.state.step
    on = entry.verdict == Status.RUNNING
    goal = shared(axes, on, entry.goal)

    def forward(count):
        """``count`` steps, unguarded; elsewhere than on a CPU that is ``size``."""

        def on_cpu(state, inputs):
            core, infos, _ = loop_steps(parts, state, inputs, count, entry.aux)
            return core, infos

        def elsewhere(state, inputs):
            return scan_steps(parts, state, inputs, size)

        def steps(state, inputs):
            core, infos = lax.platform_dependent(
                state, inputs, cpu=on_cpu, default=elsewhere
            )
            return core, infos, jnp.int32(_NEVER) + jnp.zeros_like(first)

        return steps

    def guarded(turn: _Turn, count):
        """``count`` steps, frozen where the lane ends or stops being finite."""

        def steps(state, inputs):
            core = replace(state, run=None)
            shape = info_shape(parts, core, inputs)
            infos = jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), shape)

            def body(i, carry):
                core, infos, stop = carry
                x = jax.tree.map(lambda x: at_place(x, i), inputs)
                new, info = parts.step(core, x)
                free = turn.at + i < stop
                finite = _tree.all_finite(new.params)
                stop = jnp.where(free & ~finite, turn.at + i, stop)
                infos = jax.tree.map(
                    lambda all, one: lax.dynamic_update_index_in_dim(
                        all, one, i, 0, allow_negative_indices=False
                    ),
                    infos,
                    info._replace(aux=None),
                )
                return _tree.select(free & finite, new, core), infos, stop

            return lax.fori_loop(0, count, body, (core, infos, turn.stop))

        return steps

    def chunk(turn: _Turn) -> _Turn:
        look, state, at = turn.look, turn.look.state, turn.at
        on = look.verdict == Status.RUNNING
        again = at < turn.known
        closing = ~again & (at >= goal)
        count = jnp.minimum(jnp.where(again, turn.known, goal) - at, turn.most)
        count = jnp.where(closing, 1, count)
        free = lax.platform_dependent(
            count, cpu=lambda count: count > 0, default=lambda count: count == size
        )
        inputs = parts.inputs(at, closing)
        core, infos, stop = lax.cond(
            ~again & free,
            forward(count),
            guarded(turn, count),
            state,
            inputs,
        )
        blown = on & (~_tree.all_finite(core.params) | (stop < turn.stop)) & ~again
        stop = jnp.where(again, stop, turn.stop)

        taken = jnp.where(on, jnp.clip(stop - at, 0, count), 0)
        watch, codes, _ = judge_steps(parts, state, infos, taken)
        held_at = first_place(codes != Status.RUNNING)
        live = up_to(size) < taken
        bad_at = first_place(live & is_bad(infos))
        held = on & (held_at < jnp.minimum(bad_at, count))
        held = held & (~closing | parts.judge_at_limit)
        bad = on & ~held & (bad_at < count)
        blown = blown & ~closing & ~held & ~bad
        happened = ~again & some(axes, held | bad | blown)

        # A lane whose iterate was not finite ends one before, which may lie before this
        # chunk: then all go back by one more.
        ends = jnp.where(held, at + held_at, jnp.maximum(at + bad_at - 1, first))
        fate = jnp.where(held, at_place(codes, jnp.minimum(held_at, size - 1)), 0)
        fate = jnp.where(bad, not_finite(at + bad_at), fate)
        fate = jnp.where(blown, Status.DIVERGED, fate).astype(jnp.int32)
        new = happened & (held | bad | blown)
        stop = jnp.where(new & ~blown, ends, stop)
        fate = jnp.where(new, fate, turn.fate)
        fate = jnp.where(again & (stop < turn.stop), Status.DIVERGED, fate)
        back = happened & some(axes, bad & (ends < at))

        run = remember(parts, state, infos, taken, watch)
        after = replace(core, run=run)
        counts = ~happened & ~closing & (taken > 0)
        state = _tree.select(counts, after, _tree.select(back & on, turn.before, state))
        keep = happened | closing
        go_on_at = jnp.where(back, turn.before_at, jnp.where(keep, at, at + count))
        # Up to where the last lane ends, if all do.
        last = lax.pmax(jnp.where(on, stop, -1), axes)
        known = jnp.where(closing, at, jnp.minimum(at + count, last))
        known = jnp.where(closing, known, jnp.maximum(known, go_on_at + 1))
        before = _tree.select(keep, turn.before, look.state)
        verdict = jnp.where(on & (state.step == stop), fate, look.verdict)
        return _Turn(
            look=look._replace(state=state, verdict=verdict),
            before=before,
            stop=stop,
            fate=fate,
            at=go_on_at,
            before_at=jnp.where(keep, turn.before_at, at),
            known=jnp.where(happened, known, turn.known),
            closed=closing & ~back,
            most=jnp.where(keep | again, turn.most, jnp.minimum(2 * turn.most, size)),
        )

    def more(turn: _Turn):
        on = turn.look.verdict == Status.RUNNING
        return ~turn.closed & some(axes, on)

    at = shared(axes, on, first)
    turn = _Turn(
        look=entry,
        before=entry.state,
        stop=jnp.full_like(first, _NEVER),
        fate=jnp.full_like(first, Status.DIVERGED),
        at=at,
        before_at=at,
        known=at,
        closed=jnp.bool_(False),
        most=first_chunk(parts),
    )
    look = lax.while_loop(more, chunk, turn).look
    return look if parts.full is not None else _looked_at(parts, look)


def _looked_at(parts: Parts, look: Look) -> Look:
    """What is to be seen of every lane's last iterate, where a step is a full pass."""
    state = look.state
    inputs = parts.inputs(state.step, look.verdict == Status.RUNNING)
    one = jnp.int32(1)
    _, infos, aux = loop_steps(parts, state, inputs, one, look.aux)
    watch, _, checks = judge_steps(parts, state, infos, one)
    seen = jax.tree.map(lambda x: x[0], checks)
    return look._replace(watch=watch, seen=seen, aux=aux)
