"""A chunk of steps, and what the stop rule says of each.

This room owns the two loops over the step: a static scan, and a loop whose trip count
is traced. The latter serves chunks of every length, so that a run may be cut anywhere
without changing a bit; lanes of ``vmap`` share it.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._loop.memory import at_place, decrease_promised, is_finite, up_to
from jaxgd._loop.parts import Parts
from jaxgd._stop.measures import MEASURES
from jaxgd._stop.status import Check, Status


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
        until = lax.pmin(jnp.where(count > done, count, NEVER), parts.axes)
        new, infos, last = lax.fori_loop(done, until, body, (core, infos, aux))
        new, last = _tree.select(count > done, (new, last), (core, aux))
        return until, new, infos, last

    # Selecting in each step would cost a pass over all parameters. And so it is the
    # same loop in which a lane goes its way and ends it, to the bit.
    most = _trips(parts, count)
    carry = jnp.int32(0), core, infos, aux
    found = lax.while_loop(lambda carry: carry[0] < most, until_a_lane_rests, carry)
    return found[1:]


def _trips(parts: Parts, count):
    """The trip count of a loop that takes ``count`` steps in each lane."""
    return lax.pmax(count, parts.axes) if parts.axes else count


def any_lane(axes, flag):
    """Whether a flag is set in any lane of these axes."""
    return lax.pmax(flag.astype(jnp.int32), axes) > 0 if axes else flag


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
        step=steps,
        value=infos.value,
        grad_norm=infos.grad_norm,
        update_norm=arrived,
        expected_decrease=decrease_promised(parts, state, infos),
        **{name: infos.measures.get(name, nan) for name in MEASURES},
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

    trips = count if isinstance(count, int) else _trips(parts, count)
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


def _shifted(before, values):
    return jnp.concatenate([jnp.reshape(before, (1,)), values[:-1]])


NEVER = 2**31 - 1
