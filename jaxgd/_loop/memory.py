"""What a run remembers of its steps beside parameters and optimizer state.

This room owns ``Run``, and how a chunk of steps extends it: counters, history, the
curvature along the steps, the last update.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._loop.parts import Parts
from jaxgd._result.curvature import extend_met, promised
from jaxgd._result.history import Record, extend, side_by_side
from jaxgd._stop.status import Check, Status


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
    met: Any  # Met as an array: curvature along the steps; () with batches or keys
    status: Any  # int32: what the rule said at step `checked`
    checked: Any  # int32: step of the last full check, -1 before the first
    seen: Any  # Check: what that check saw
    anchor: Any  # parameters at that check, where the rule looks at their change
    history: Record
    checks: Record


def unseen(params) -> Check:
    """In place of a check before the first."""
    nan = jnp.full((), jnp.nan, _tree.real_dtype(params))
    return Check(jnp.int32(-1), *[nan] * (len(Check._fields) - 1))


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
        columns = {
            "value": infos.value,
            "grad_norm": infos.grad_norm,
            "learning_rate": rates_of(parts, steps, infos),
            "update_norm": infos.update_norm,
            **infos.measures,
        }
        numbers = side_by_side(columns, history.numbers.dtype)
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
    return extend_met(met, *_lines(parts, state, infos), count, parts.kind.plain)


def decrease_promised(parts: Parts, state, infos):
    """The decrease that each step of a chunk promises, NaN where it does not."""
    if infos.decrement is not None:
        return infos.decrement
    met = state.run.met
    if isinstance(met, tuple):
        return jnp.full_like(infos.value, jnp.nan)
    return promised(
        met, *_lines(parts, state, infos), parts.kind.plain, parts.kind.searches
    )


def _lines(parts: Parts, state, infos):
    """Value, gradient norm, length and slope of the steps of a chunk."""
    steps = state.step + up_to(infos.value.shape[0])
    norm = infos.grad_norm
    nan = jnp.full_like(norm, jnp.nan)
    length = nan if infos.update_norm is None else infos.update_norm
    slope = nan if infos.slope is None else infos.slope
    if parts.kind.plain:
        length = jnp.asarray(rates_of(parts, steps, None), norm.dtype) * norm
        slope = -length * norm
    return lax.stop_gradient((infos.value, norm, length, slope))


def rates_of(parts: Parts, steps, told):
    """The learning rates of these steps, else what ``told`` has, else NaN."""
    if parts.rate is not None:
        return lax.stop_gradient(parts.rate(steps))
    rates = getattr(told, "learning_rate", None)
    return jnp.nan if rates is None else rates


def change_since_check(params, run: Run):
    """The norm of the change of the parameters since the last check, else NaN."""
    dtype = _tree.real_dtype(params)
    change = _tree.norm(_tree.subtract(params, run.anchor), dtype)
    return jnp.where(run.watch.started, change, jnp.nan)


def at_place(values, place):
    """The entry at a place that never counts from the end: testing for it costs."""
    return lax.dynamic_index_in_dim(
        values, place, keepdims=False, allow_negative_indices=False
    )


def up_to(count):
    """0, 1, ... as int32, ``count`` of them."""
    return jnp.arange(count, dtype=jnp.int32)


def first_true(happened):
    """The first place where it happened, or the length where nowhere."""
    places = up_to(happened.shape[0])
    return jnp.min(jnp.where(happened, places, happened.shape[0]))


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
