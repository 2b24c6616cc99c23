"""The curvature along the steps of a run, measured in the compiled program."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Met(NamedTuple):
    """What a run of batch descent has met on its way: scalars.

    A run carries them in one array: every array in and out of a call costs it time.
    """

    value: Any  # of the iterate that the last step left, NaN before the first
    grad_norm: Any
    update_norm: Any  # of that step
    slope: Any  # gradient times update, negative downhill
    curvature: Any  # the largest along any step, NaN while none could be told
    boldness: Any  # of the boldest step, NaN likewise
    steepest: Any  # the largest gradient norm


def nothing_met(dtype):
    """``Met`` before the first step, as one array."""
    return jnp.full((len(Met._fields),), jnp.nan, dtype)


def extend_met(packed, value, grad_norm, update_norm, slope, count, plain):
    """``packed`` with the first ``count`` of the offered steps, arrays (K,)."""
    met = Met(*packed)
    live = jnp.arange(value.shape[0]) < count
    columns = (value, grad_norm, update_norm, slope)
    before = _one_back(met, columns)
    bold, curvature = measured(jnp, before, value, grad_norm, plain)

    def most(so_far, new):
        return jnp.fmax(so_far, jnp.nanmax(jnp.where(live, new, jnp.nan)))

    last = jnp.maximum(count - 1, 0)
    newest = [
        jnp.where(count > 0, x[last], old)
        for x, old in zip(columns, met[:4], strict=True)
    ]
    largest = [
        most(met.curvature, curvature),
        most(met.boldness, bold),
        most(met.steepest, grad_norm),
    ]
    return jnp.stack([*newest, *largest])


def promised(packed, value, grad_norm, update_norm, slope, plain, searches):
    """The decrease to expect after each of the offered steps, by the parabola along it.

    From the start of a step to the minimum along its line it is half the slope by the
    boldness. Where rounding hides the boldness of a line search, it is taken for 1.
    """
    before = _one_back(Met(*packed), (value, grad_norm, update_norm, slope))
    bold, _ = measured(jnp, before, value, grad_norm, plain)
    bold = jnp.where(searches & jnp.isnan(bold), 1, bold)
    down = jnp.where(before[3] < 0, -before[3], jnp.nan)
    return jnp.where(bold > 0, down / (2 * bold), jnp.nan)


def _one_back(met: Met, columns):
    """Columns of the iterates that lead to those of ``columns``."""
    return [
        jnp.concatenate([jnp.reshape(old, (1,)), x[:-1]])
        for old, x in zip(met[:4], columns, strict=True)
    ]


def measured(xp: Any, before, next_value, next_norm, plain):
    """(boldness, curvature) of steps; NaN where rounding hides them.

    ``before``: value, gradient norm, update norm and slope of the iterates they leave.

    Where a step is too short for the objective to tell, that of plain descent still
    shows in the gradient, whose norm shrinks by a factor 1 - b.
    """
    value, grad_norm, update_norm, slope = before
    eps = xp.finfo(next_value.dtype).eps
    down = xp.where((slope < 0) & xp.isfinite(slope), -slope, xp.nan)
    bold = 2 * (1 - (value - next_value) / down)
    error = 4 * eps * xp.maximum(abs(value), abs(next_value)) / down
    told = error <= xp.maximum(0.02, 0.03 * abs(bold))
    error = xp.where(told, error, xp.nan)
    bold = xp.where(told, bold, xp.nan)
    if plain:
        shrinks = next_norm / grad_norm
        other = (1 - shrinks) * (1 + shrinks) / 2
        better = (down > 0) & (abs(other) <= 0.1) & ~(error <= 0.1 * bold)
        bold = xp.where(better, xp.maximum(other, 0), bold)
        error = xp.where(better, 2 * eps, error)
    finite = xp.isfinite(bold)
    curvature = xp.where(
        error <= 0.3 * bold, bold * (down / update_norm) / update_norm, xp.nan
    )
    return xp.where(finite, bold, xp.nan), curvature
