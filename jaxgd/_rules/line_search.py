"""A line search that lets the objective rise for a while.

This room owns when a trial point is accepted and how far the next one is cut back, for
all rules of the library that need no learning rate.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxgd import _tree

_ARMIJO = 1e-4
_SHORTEST_CUT, _LONGEST_CUT = 0.1, 0.5  # of a step whose trial point was refused
# Rounding hides the fall of the objective within so many resolutions of its value.
_UNRESOLVED = 1e3


class Line(NamedTuple):
    """A line through the parameters, downhill at its start.

    Attributes:
      params: where it starts.
      direction: the change of the parameters for a step of length 1.
      value: the objective at the start.
      grad: its gradient there.
      unit: the largest entry of the gradient, or 1: products are taken in units of it,
        since squares may leave the range of the dtype.
      downhill: minus the slope at the start, in that unit; positive.
      highest: the value that a trial point must stay below.
    """

    params: Any
    direction: Any
    value: jax.Array
    grad: Any
    unit: jax.Array
    downhill: jax.Array
    highest: jax.Array


class Trial(NamedTuple):
    """A point on a line."""

    step: Any  # what leads there
    value: jax.Array
    grad: Any
    finite: jax.Array  # bool: value and gradient are
    left: jax.Array  # minus the slope there, in the unit of the line


def line_of(params, direction, value, grad, unit, highest) -> Line:
    """The line from ``params`` along ``direction``."""
    downhill = -_tree.dot(over(grad, unit), direction, unit.dtype)
    return Line(params, direction, value, grad, unit, downhill, highest)


def look(value_and_grad: Callable, line: Line, length: jax.Array) -> Trial:
    """The point a step of this ``length`` leads to."""
    dtype = line.unit.dtype
    step = jax.tree.map(
        lambda d, p: (length.astype(d.real.dtype) * d).astype(p.dtype),
        line.direction,
        line.params,
    )
    value, grad = value_and_grad(optax.apply_updates(line.params, step))
    # jax.grad of a real function of z is conjugate to the steepest ascent.
    grad = jax.tree.map(lambda g, p: g.conj().astype(p.dtype), grad, line.params)
    value = value.astype(dtype)
    left = -_tree.dot(over(grad, line.unit), line.direction, dtype)
    finite = jnp.isfinite(value) & jnp.isfinite(left) & _tree.all_finite(grad)
    return Trial(step, value, grad, finite, left)


def stay(line: Line) -> Trial:
    """The start of the line, as a point of it."""
    nowhere = jax.tree.map(jnp.zeros_like, line.params)
    return Trial(nowhere, line.value, line.grad, jnp.bool_(True), line.downhill)


def search(value_and_grad: Callable, line: Line, length, most: int, found: Trial, done):
    """Trial points from ``length`` on, shorter and shorter, until one is accepted.

    With :math:`f` the objective along the line, a step of length :math:`t` is accepted
    if :math:`f(t) \\le` ``highest`` :math:`- 10^{-4} t\\,|f'(0)|`, or, where rounding
    hides so small a fall, if the slope has gone down as such a fall asks for.

    Args:
      value_and_grad: of the objective.
      line: along which.
      length: of the first trial.
      most: trial points.
      found: what is returned where none is accepted.
      done: whether ``found`` is accepted already.

    Returns:
      (trial points, length reached, the last trial accepted or ``found``, whether one
      was accepted).
    """
    eps = float(np.finfo(line.unit.dtype).eps)
    value, highest = line.value, line.highest

    def body(carry):
        count, length, found, _ = carry
        trial = look(value_and_grad, line, length)
        # To first order. The unit last: its square may leave the range.
        fall = line.unit * (length * line.downhill)
        lower = trial.value <= highest - _ARMIJO * fall
        level = trial.value <= highest + 4 * eps * jnp.abs(highest)
        level = level & (
            jnp.abs(trial.value - value) <= _UNRESOLVED * eps * jnp.abs(value)
        )
        level = level & (-trial.left <= (1 - 2 * _ARMIJO) * line.downhill)
        accepted = trial.finite & (lower | level)
        # The minimum of the parabola through value, slope and the trial's value.
        cut = fall / (2 * (trial.value - value + fall))
        cut = jnp.where(trial.finite & jnp.isfinite(cut), cut, _SHORTEST_CUT)
        cut = jnp.clip(cut, _SHORTEST_CUT, _LONGEST_CUT)
        length = jnp.where(accepted, length, length * cut)
        return count + 1, length, _tree.select(accepted, trial, found), accepted

    return lax.while_loop(
        lambda carry: (carry[0] < most) & ~carry[3],
        body,
        (jnp.int32(0), length, found, done),
    )


def value_and_grad_of(value_fn: Callable, extra: dict) -> Callable:
    """Of the function that optax hands to a rule; as there, its other arguments come
    with the call."""
    known = inspect.signature(value_fn).parameters
    more = {name: x for name, x in extra.items() if name in known}
    return jax.value_and_grad(lambda p: value_fn(p, **more))


def require(rule: str, **needed) -> None:
    """That an update was called with all that a search needs."""
    for name, given in needed.items():
        if given is None:
            raise ValueError(
                f"{name} is missing: call update(grad, state, params, value=value, "
                f"grad=grad, value_fn=fun) of {rule}."
            )


def unit_of(grad, dtype) -> jax.Array:
    """The largest entry of a gradient, or 1 where it is 0 or not finite."""
    largest = _tree.largest(grad, dtype)
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def over(tree, scale):
    """``tree`` by a scalar, leaf by leaf."""
    return jax.tree.map(
        lambda x: (x / scale.astype(x.real.dtype)).astype(x.dtype), tree
    )


class Progress(NamedTuple):
    """Whether steps still bring anything.

    Attributes:
      lowest: the lowest value so far.
      smallest: the smallest gradient norm so far.
      idle: int32, steps in a row that brought neither a lower value nor a gradient
        smaller by 1 %.
    """

    lowest: Any
    smallest: Any
    idle: Any


def extend_progress(progress: Progress, value, size) -> Progress:
    """``progress`` with a value and a gradient norm more."""
    eps = float(np.finfo(value.dtype).eps)
    better = value < progress.lowest - eps * jnp.abs(progress.lowest)
    better = better | (size < 0.99 * progress.smallest)
    return Progress(
        jnp.fmin(progress.lowest, value),
        jnp.fmin(progress.smallest, size),
        jnp.where(better, 0, progress.idle + 1),
    )
