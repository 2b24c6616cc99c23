"""The judgment of a run: how far it still has to fall, and whether it can move.

This room owns what the loop remembers of the checks of a run beside its stop rule, and
the verdict that is made of both. It plugs into the loop as ``judge``, a function of one
check; nothing here knows gradients, data or chunks.

How far the objective may still fall is estimated from numbers that a run sees anyway.
Near a minimum the excess :math:`J - J^*` goes with the square of the gradient along the
direction that is left over, and so for two checks a and k

.. math:: J_k - J^* \\approx (J_a - J_k)\\, \\frac{r}{1 - r}, \\qquad
          r = \\frac{\\|g_k\\|^2}{\\|g_a\\|^2}.

A step :math:`u` on a parabola gives another estimate, :math:`-g^T u / 2 b` with ``b``
its boldness (``_result/diagnosis``), and a rule that knows an inverse Hessian a third,
:math:`g^T H g / 2`, the Newton decrement (Boyd and Vandenberghe, Convex Optimization,
2004, section 9.5). All scale with the objective, and none changes with the units of
the parameters more than the steps themselves do. Each sees only directions that the
steps have taken, so the largest of five checks in a row counts, and what the objective
falls by afterwards refutes it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._rules.adapter import OTHER, Kind
from jaxgd._stop.status import Check, Status

# A run that stood still for so many steps will not move again; fewer could be a warm-up
# from rate 0 or the wait of accumulated gradients.
STILL_STEPS = 100
# Estimates in a row, of which the largest counts.
_ESTIMATES = 5
# Where a run stands still, a fall by this share of its whole fall is none any more.
_NO_FALL = {"float64": 1e-10, "float32": 1e-8}
_NO_FALL_HALF = 1e-3
# A settled objective that is still to fall by so many of its last changes is none.
_TOO_SLOW = 100.0
# and no step made the gradient so much smaller: then the steps are too small.
_QUICK = 0.8
# A gradient this much below the largest hides no direction of smaller curvature; in
# fewer bits none is known to.
_DEEP = {"float64": 1e-8}
# Changes by less than this from check to check are no noise: the gradient is level.
_LEVEL, _LEVEL_CHECKS = 0.02, 8
# Steps of standing still after which nothing is hidden that another would show.
_SURE_STILL = 12
# A rule that comes to rest makes so much smaller steps of a gradient than before.
_RESTING = 1e-2


class Fall(NamedTuple):
    """How far the objective has fallen, and may fall.

    Attributes:
      initial: the objective at the first check.
      lowest: the lowest at any check.
      at: int32, checks so far.
      anchor_at: int32, of them at the anchor, the last power of 2.
      anchor_value: the objective at the anchor.
      anchor_norm: the gradient norm there.
      estimates: float[5], the last estimates of the fall to come, newest first.
      told: int32, estimates since the objective last fell by more than they said.
      to_come: the largest of five estimates, the smallest that it has been since the
        objective last fell by more; inf before.
      falls: int32, checks in a row at each of which the objective was lower.
      quickest: the smallest ratio of the gradient norms at a check and the one before.
      window_end: int32, the check that ends the window, which is a ninth of all.
      peak: the largest gradient norm in the window so far.
      last_peak: that in the window before.
      low, last_low: the lowest objective there; a run may go on with other data, whose
        values are no matter.
      falling: bool, whether that was at most half of the one before it.
      level: int32, checks in a row at which the gradient norm kept within 2 %.
      norms: float[5], the last gradient norms, newest first.
    """

    initial: Any
    lowest: Any
    at: Any
    anchor_at: Any
    anchor_value: Any
    anchor_norm: Any
    estimates: Any
    told: Any
    to_come: Any
    falls: Any
    quickest: Any
    window_end: Any
    peak: Any
    last_peak: Any
    low: Any
    last_low: Any
    falling: Any
    level: Any
    norms: Any


class Watch(NamedTuple):
    """What a run remembers of its checks: the rule's memory, and the loop's own."""

    memory: Any
    started: Any  # bool: the memory holds a check
    value: Any  # the objective at the check before
    lowest: Any  # the lowest objective at any check
    largest: Any  # the largest gradient norm at any check
    still: Any  # int32: steps in a row that stood still
    grad_norm: Any  # the gradient norm at the check before
    gain: Any  # the largest ratio of a step to the gradient it came from
    fall: Any  # Fall


def fresh_watch(memory, dtype) -> Watch:
    """The memory of a run whose rule has seen nothing yet, ``memory`` in zeros."""
    zero = jnp.zeros((), dtype)
    inf = zero + jnp.inf
    fall = Fall(
        initial=zero,
        lowest=inf,
        at=jnp.int32(0),
        anchor_at=jnp.int32(0),
        anchor_value=zero,
        anchor_norm=zero,
        estimates=jnp.full((_ESTIMATES,), jnp.inf, dtype),
        told=jnp.int32(0),
        to_come=inf,
        falls=jnp.int32(0),
        quickest=inf,
        window_end=jnp.int32(_LEVEL_CHECKS),
        peak=zero,
        last_peak=inf,
        low=inf,
        last_low=inf,
        falling=jnp.bool_(True),
        level=jnp.int32(0),
        norms=jnp.full((_ESTIMATES,), jnp.inf, dtype),
    )
    return Watch(
        memory, jnp.bool_(False), zero, inf, zero, jnp.int32(0), zero, zero, fall
    )


def extend_fall(
    fall: Fall, check: Check, before, largest, eps: float, kind: Kind, still
) -> tuple[Fall, Any, Any]:
    """``fall`` with a check more, the decrease to come, and whether that is sure.

    For example: at checks 0, 1, 2, 3 the values are 8, 2, 0.5, 0.125 and the gradient
    norms 4, 2, 1, 0.5. The anchor of check 3 is check 2, r = 1/4, and what is to come
    (0.5 - 0.125) / 3 = 0.125, as it is.

    Estimates come from the direction in which the gradient falls, while one of smaller
    curvature may be hidden beneath it. So they are sure once the gradient is so small
    that it hides none, or has not halved from one window of checks to the next.

    Args:
      fall: up to the check before.
      check: with what its step promises as ``expected_decrease``, NaN where nothing.
      before: the gradient norm at the check before.
      largest: the largest of all up to this check.
      eps: the resolution of the objective.
      kind: a rule that reports is believed, and inf is where it cannot tell. What was
        to come before a line search stood still is what is to come there.
      still: steps in a row that stood still, where the gradient is small.
    """
    value, norm, promised = check.value, check.grad_norm, check.expected_decrease
    start = fall.at == 0
    lowest = jnp.where(start, value, fall.lowest)
    drop = lowest - value

    ratio = norm / fall.anchor_norm  # of norms first: squares may leave the range
    share = ratio**2 / ((1 - ratio) * (1 + ratio))
    fell = jnp.abs(fall.anchor_value - value) + 2 * eps * jnp.abs(value)
    by_norms = jnp.where((ratio < 1) & ~start, fell * share, jnp.inf)
    estimate = promised if kind.reported else jnp.fmax(by_norms, promised)
    level, flat = fall.level, jnp.zeros_like(norm)
    if not kind.reported:
        again = (still > 0) & kind.searches & (fall.told > 0)
        least = jnp.fmin(estimate, fall.estimates[0])  # rounding adds to it
        estimate = jnp.where(again, least, estimate)
        level, flat = _of_level_gradient(fall, check, before, eps, kind, still)
        estimate = jnp.where(flat > 0, jnp.fmax(estimate, flat), estimate)
    known = jnp.isfinite(estimate)
    room = drop - 4 * eps * jnp.abs(value)
    so_far = jnp.where(jnp.arange(_ESTIMATES) < fall.told, fall.estimates, 0)
    told = jnp.where(room > jnp.max(so_far), 0, fall.told)
    told = jnp.minimum(told + known.astype(told.dtype), _ESTIMATES)
    newest = jnp.roll(fall.estimates, 1).at[0].set(estimate)
    estimates = jnp.where(known, newest, fall.estimates)
    window, still_falls = _with_window(fall, value, norm)
    left = _expected(told, estimates, norm)
    deep = norm <= _DEEP.get(value.dtype.name, 0) * largest
    rests = still >= _SURE_STILL
    sure = kind.reported | deep | ~still_falls | rests
    # What has been lower can be so again.
    low = jnp.fmin(jnp.fmin(fall.low, value), fall.last_low)
    above = value - low - 4 * eps * jnp.abs(value)
    left = jnp.where(norm > 0, jnp.fmax(left, above), left)
    to_come = jnp.where(room > fall.to_come, jnp.inf, fall.to_come)
    to_come = jnp.fmin(jnp.where(flat > to_come, jnp.inf, to_come), left)
    to_come = jnp.fmax(to_come, above)
    anew = (fall.at >= 2 * fall.anchor_at) | start
    fall = window._replace(
        initial=jnp.where(start, value, fall.initial),
        lowest=jnp.fmin(lowest, value),
        at=fall.at + 1,
        anchor_at=jnp.where(anew, fall.at, fall.anchor_at),
        anchor_value=jnp.where(anew, value, fall.anchor_value),
        anchor_norm=jnp.where(anew, norm, fall.anchor_norm),
        estimates=estimates,
        told=told,
        to_come=to_come,
        falls=jnp.where(drop > 0, fall.falls + 1, 0),
        quickest=jnp.where(start, jnp.inf, jnp.fmin(fall.quickest, norm / before)),
        level=level,
    )
    return fall, left, sure | (norm == 0)


def _with_window(fall: Fall, value, norm) -> tuple[Fall, Any]:
    """``fall`` with a check more in its window; whether the gradient still falls.

    It does where the largest gradient of the last window that ended, or of the last
    five checks, was at most half of that in the window before.
    """
    peak, low = jnp.fmax(fall.peak, norm), jnp.fmin(fall.low, value)
    ends = fall.at + 1 >= fall.window_end
    norms = jnp.roll(fall.norms, 1).at[0].set(norm)
    falls = jnp.max(norms) <= fall.last_peak / 2
    falling = jnp.where(ends, peak <= fall.last_peak / 2, fall.falling)
    longer = fall.at + 1 + _LEVEL_CHECKS + fall.at // 8
    window = fall._replace(
        window_end=jnp.where(ends, longer, fall.window_end),
        peak=jnp.where(ends, 0, peak),
        last_peak=jnp.where(ends, peak, fall.last_peak),
        low=jnp.where(ends, jnp.inf, low),
        last_low=jnp.where(ends, low, fall.last_low),
        falling=falling,
        norms=norms,
    )
    return window, falling | falls


def _of_level_gradient(fall: Fall, check: Check, before, eps, kind: Kind, still):
    """(checks in a row at which the gradient was level, the decrease it tells of).

    Where the gradient is level, what is left curves by its change in a step.
    """
    norm = check.grad_norm
    change = jnp.abs(norm / before - 1)
    level = jnp.where((fall.at > 0) & (change <= _LEVEL), fall.level + 1, 0)
    flat = check.update_norm * norm / (2 * jnp.maximum(change, eps**0.5 / 4))
    tells = (flat > 0) & (kind.plain | (still == 0))  # others may step anywhere
    return level, jnp.where((level >= _LEVEL_CHECKS) & tells, flat, 0)


def _expected(told, estimates, norm):
    """What the last five estimates expect of the fall to come; inf before."""
    worst = jnp.where(told >= _ESTIMATES, jnp.max(estimates), jnp.inf)
    return jnp.where(norm == 0, 0, worst)


def make_judge(rule, params, kind: Kind = OTHER, waits: bool = False):
    """``judge(watch, check, moved) -> (watch, code)`` with a ``Status`` code.

    ``waits``: the stop rule holds only where the expected decrease is sure.
    ``moved``: whether the last step changed any parameter, or None where checks are
    further apart. A step stands still that changes no bit, or that lowers the objective
    no further and is as small as rounding (a cycle between neighboring numbers).

    A "settled" rule that holds while the gradient is still large is no success: either
    the steps are too small (the gradient has not even halved; or it has never become a
    fifth smaller from one check to the next, and the objective falls steadily and has
    a hundred times as far to fall), or the objective and parameters
    are at the resolution of their dtype (then a gradient of ten times the root of that
    resolution is large; J - J* goes with its square).
    """
    dtype = _tree.real_dtype(params)
    eps = float(np.finfo(dtype).eps)
    floor = 10 * eps**0.5
    coarse = resolution(params)
    no_fall = min(
        _NO_FALL.get(jnp.finfo(x.dtype).dtype.name, _NO_FALL_HALF)
        for x in jax.tree.leaves(params)
    )

    def judge(watch: Watch, check: Check, moved=None):
        change = jnp.abs(check.value - watch.value)
        unresolved = watch.started & (change <= 2 * eps * jnp.abs(check.value))
        still = watch.still
        if moved is not None:
            tiny = check.update_norm <= 4 * eps * check.params_norm
            rounding = tiny & (check.update_norm > 0)
            stands = ~moved | (rounding & (check.value >= watch.lowest))
            still = jnp.where(stands & watch.started, watch.still + 1, 0)
            unresolved = unresolved | (still > 0)
        # A search that knows no way down may stand still where the gradient is large.
        largest = jnp.fmax(watch.largest, check.grad_norm)
        small = check.grad_norm <= floor * largest
        stood = jnp.where(small, still, 0)
        before = watch.fall, check, watch.grad_norm, largest
        fall, left, sure = extend_fall(*before, coarse, kind, stood)
        check = check._replace(expected_decrease=left)
        memory = _tree.select(
            watch.started, watch.memory, _tree.cast_like(rule.init(check), watch.memory)
        )
        memory, holds = rule.update(memory, check)
        if waits:
            holds = holds & sure
        memory = _tree.cast_like(memory, watch.memory)
        code = jnp.int32(rule.status(memory) if callable(rule.status) else rule.status)
        last_gain = check.update_norm / watch.grad_norm
        gain = jnp.fmax(watch.gain, jnp.where(watch.started, last_gain, 0))
        resting = kind.rests & (gain > 0) & (last_gain <= _RESTING * gain)
        at_rest = kind.rests & (last_gain <= eps**0.5 * gain)

        share = jnp.where(unresolved, floor, 0.5)
        large = check.grad_norm > share * largest
        steady, slow = _pace(fall, change)
        if moved is None:  # of batches: noise keeps a gradient large, too
            large = large & (steady | unresolved)
        rounding = coarse * jnp.abs(check.value)
        no_more = jnp.fmax(no_fall * (fall.initial - fall.lowest), rounding)
        precise = fall.to_come <= no_more
        settled = (code == Status.VALUE_SETTLED) | (code == Status.PARAMS_SETTLED)
        failed = settled & (large | slow) & ~precise
        code = jnp.where(
            failed, jnp.where(resting, Status.AT_REST, Status.STALLED), code
        )

        end = jnp.where(at_rest, Status.AT_REST, Status.STALLED)
        end = jnp.where(precise, Status.PRECISION_REACHED, end)
        otherwise = jnp.where(still >= STILL_STEPS, end, Status.RUNNING)
        watch = Watch(
            memory=memory,
            started=jnp.bool_(True),
            value=check.value,
            lowest=jnp.fmin(watch.lowest, check.value),
            largest=largest,
            still=still,
            grad_norm=check.grad_norm,
            gain=gain,
            fall=fall,
        )
        return watch, jnp.where(holds, code, otherwise).astype(jnp.int32)

    return judge


def _pace(fall: Fall, change):
    """Whether the objective falls at each check, and whether that is far too slow."""
    steady = fall.falls >= jnp.minimum(16, fall.at - 1)
    slow = steady & (fall.quickest > _QUICK) & (fall.at > 2)
    return steady, slow & (jnp.min(fall.estimates) > _TOO_SLOW * change)


def resolution(params) -> float:
    """The relative rounding of what is computed of all parameters."""
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps)
