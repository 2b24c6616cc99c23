"""L-BFGS on a scale that it learns: descent that needs no learning rate.

This room owns ``scaled_lbfgs``, an ordinary optax transformation. It plugs into the
step like any of optax's line searches, and is what batch descent uses where neither a
rate nor an optimizer is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxgd import _tree
from jaxgd._checks import whole
from jaxgd._rules.line_search import (
    Line,
    Progress,
    extend_progress,
    line_of,
    over,
    require,
    search,
    stay,
    unit_of,
    value_and_grad_of,
)

_FIRST_STEP = 1e-2  # of the norm of the parameters, while no curvature is known
_LONGER = 4.0  # than the last step, where the curvature along it was not positive
_RECENT = 10  # values that a new one is compared with
_MOST = 30  # trial points of one update
# Steps in a row without a better objective or a 1 % smaller gradient.
_IDLE = 30
# A step tells a curvature only if it moves some parameter by so many of its units in
# the last place: of less, the gradient shows nothing but rounding.
_MOVES = 8.0


class ScaledLBFGSState(NamedTuple):
    """What ``scaled_lbfgs`` remembers.

    Attributes:
      value: the objective at the parameters which the last update leads to.
      grad: its gradient there; ``optax.value_and_grad_from_state`` finds both.
      num_linesearch_steps: int32, evaluations (value and gradient) of the last update.
      evaluations: int32, evaluations of all updates.
      decrement: half the slope times the quasi-Newton step at the last point, by
        ``trust``: the decrease that the curvature met promises; inf where it promises
        none.
      trust: the curvature along the last step by that which the pairs promised, at
        most 1.
      steps: changes of the parameters, one along a new first axis for each pair, in
        units in which a step times its change of the gradient is 1.
      changes: those of the gradient.
      pairs: int32, how many there are.
      next: int32, where the next one goes.
      stretch: the length of the next step, 1 being the quasi-Newton step.
      learning_rate: that of the last step, 0 where no trial point was accepted.
      recent: float[10], the last values, newest first.
      lowest: the lowest value so far.
      smallest: the smallest gradient norm so far.
      idle: int32, steps in a row without progress in either.
    """

    value: Any
    grad: Any
    num_linesearch_steps: Any
    evaluations: Any
    decrement: Any
    trust: Any
    steps: Any
    changes: Any
    pairs: Any
    next: Any
    stretch: Any
    learning_rate: Any
    recent: Any
    lowest: Any
    smallest: Any
    idle: Any


def scaled_lbfgs(memory_size: int = 10) -> optax.GradientTransformationExtraArgs:
    r"""Quasi-Newton steps from the last few steps, on a scale for each parameter.

    With :math:`s_i` a step and :math:`y_i` the change of the gradient along it, each
    pair in units in which :math:`s_i^T y_i = 1`, L-BFGS makes an inverse Hessian
    :math:`H` of the last ``memory_size`` pairs and of a first guess :math:`H_0`. Here
    that guess is a diagonal learned from the same pairs,

    .. math:: H_0 = \frac{D}{y^T D\, y}, \qquad
              D_{jj} = \sqrt{\frac{\sum_i s_{ij}^2}{\sum_i y_{ij}^2}},

    :math:`y` being the newest change: where parameter :math:`j` is measured in a unit
    1000 times smaller, :math:`D_{jj}` is a million times larger, so that parameters on
    very different scales descend together.

    The step :math:`-t H g` is tried at :math:`t = 1` and accepted if

    .. math:: J(\theta_k - t H g_k) \le \max_{0 \le j < 10} J(\theta_{k-j})
              - 10^{-4}\, t\, g_k^T H g_k,

    else :math:`t` is cut down by interpolation. Where rounding hides so small a fall,
    the slope at the trial point decides. A trial point where the value or the gradient
    is not finite is never accepted. A pair is kept if its curvature is positive; else
    the next :math:`t` is four times the last one. Where no trial point is
    accepted, the pairs are forgotten. While there is none, the step is along the
    gradient and moves the parameters by 1 % of their norm (by 0.01 where they are 0),
    so that no scale needs to be known; where its curvature is not positive, the next
    one is four times as long. Once 30 steps in a row have brought neither a
    lower value nor a gradient smaller by 1 %, or nothing is accepted along the gradient
    itself, precision is exhausted, and all further updates are 0.

    An update evaluates value and gradient at each trial point, mostly one, and leaves
    those of the accepted one in its state. Batch descent by ``minimize`` does not
    evaluate them again (unless ``has_aux``, ``with_key`` or fewer than 32 bits ask for
    it); in a loop of your own ``optax.value_and_grad_from_state`` finds them.

    Args:
      memory_size: how many pairs are kept. The state holds ``2 * memory_size + 1``
        copies of the parameters.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for parameters of any pytree, complex
      leaves included. Its ``update`` needs ``params`` and the keywords ``value``,
      ``grad`` and ``value_fn``; put nothing behind it in a chain. The state is a
      ``ScaledLBFGSState``.

    Raises:
      TypeError, ValueError: if ``memory_size`` is no whole number, or below 1.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> scale = jnp.array([1.0, 1e3, 1e-3])
      >>> def fun(x):
      ...     return jnp.sum((scale * x - 1) ** 2)
      >>> result = jaxgd.minimize(fun, jnp.zeros(3), optimizer=jaxgd.scaled_lbfgs())
      >>> bool(jnp.allclose(scale * result.params, 1.0, atol=1e-3))
      True

    References:
      Liu and Nocedal, On the limited memory BFGS method for large scale optimization,
      Mathematical Programming 45 (1989). Gilbert and Lemarechal, Some numerical
      experiments with variable-storage quasi-Newton algorithms, Mathematical
      Programming 45 (1989), for diagonals in it. Grippo, Lampariello and Lucidi, A
      nonmonotone line search technique for Newton's method, SIAM Journal on Numerical
      Analysis 23 (1986). Hager and Zhang, A new conjugate gradient method with
      guaranteed descent and an efficient line search, SIAM Journal on Optimization 16
      (2005), for the acceptance under rounding.
    """
    size = whole("memory_size", memory_size)

    def init(params) -> ScaledLBFGSState:
        dtype = _tree.real_dtype(params)
        zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)

        def room():
            return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), _wide(x)), params)

        return ScaledLBFGSState(
            value=inf,
            grad=jax.tree.map(jnp.zeros_like, params),
            num_linesearch_steps=jnp.int32(0),
            evaluations=jnp.int32(0),
            decrement=inf,
            trust=zero + 1,
            steps=room(),
            changes=room(),
            pairs=jnp.int32(0),
            next=jnp.int32(0),
            stretch=zero + 1,
            learning_rate=zero,
            recent=jnp.full((_RECENT,), -jnp.inf, dtype),
            lowest=inf,
            smallest=inf,
            idle=jnp.int32(0),
        )

    def update(
        updates,
        state,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        **extra,
    ):
        require(
            "scaled_lbfgs", params=params, value=value, grad=grad, value_fn=value_fn
        )
        dtype = _tree.real_dtype(params)
        value = jnp.asarray(value).astype(dtype)
        unit = unit_of(grad, dtype)
        ahead = jax.tree.map(lambda g: g.astype(_wide(g)), over(updates, unit))
        own = over(grad, unit)
        steepness = unit * jnp.sqrt(_tree.dot(own, own, dtype))
        progress = Progress(state.lowest, state.smallest, state.idle)
        progress = extend_progress(progress, value, steepness)

        recent = jnp.roll(state.recent, 1).at[0].set(value)
        line, pairs = _line(state, params, value, grad, ahead, unit, jnp.max(recent))
        # A direction of pairs is in units of the gradient, the first step in its own.
        base = jnp.where(pairs > 0, unit, 1)
        busy = (progress.idle < _IDLE) & (line.downhill > 0) & jnp.isfinite(value)
        stretch = jnp.where(pairs < state.pairs, 1, state.stretch)
        promised = (pairs > 0) & (state.stretch == 1) & (state.trust > 0)
        decrement = unit * (base * line.downhill) / (2 * state.trust)
        decrement = jnp.where(promised, decrement, jnp.inf)
        count, length, end, accepted = search(
            value_and_grad_of(value_fn, extra),
            line,
            base * stretch,
            _MOST,
            stay(line),
            ~busy,
        )
        moved = accepted & busy
        change = _tree.subtract(over(end.grad, unit), own)
        felt = moved & _moves(params, end.step)
        told, steps, changes = _remembered(state, end.step, change, unit, felt)
        bend = (1 - end.left / line.downhill) / (length / base)
        trust = jnp.where(moved & (pairs > 0), jnp.clip(bend, 0, 1), 1)
        # Nothing along a quasi-Newton direction: what it is made of is forgotten.
        # Nothing along the gradient either: there is nothing to be found.
        lost = busy & ~accepted
        # The first step is measured by the parameters, which it may have changed.
        after = _first_length(optax.apply_updates(params, end.step), dtype)
        measure = jnp.where(pairs > 0, 1, _first_length(params, dtype) / after)
        longer = _LONGER * jnp.minimum(measure * (length / base), 1e30)
        return end.step, ScaledLBFGSState(
            value=end.value,
            grad=end.grad,
            num_linesearch_steps=count,
            evaluations=state.evaluations + count,
            decrement=decrement.astype(dtype),
            trust=trust.astype(dtype),
            steps=steps,
            changes=changes,
            pairs=jnp.where(lost, 0, jnp.minimum(pairs + told, size)),
            next=(state.next + told) % size,
            stretch=jnp.where(told | lost | ~busy, 1, longer).astype(dtype),
            learning_rate=jnp.where(moved, length / base, 0).astype(dtype),
            recent=recent,
            lowest=progress.lowest,
            smallest=progress.smallest,
            idle=jnp.where(lost & (pairs == 0), _IDLE, progress.idle),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _line(state, params, value, grad, ahead, unit, highest) -> tuple[Line, jax.Array]:
    """The line to search along, and of how many pairs its direction is made.

    Along the gradient if there is none, or theirs does not lead downhill.
    """
    dtype = unit.dtype

    def line(direction):
        return line_of(params, direction, value, grad, unit, highest)

    first = _first_length(params, dtype) / jnp.sqrt(_tree.dot(ahead, ahead, dtype))
    first = line(_times(ahead, -first))
    newton = line(_direction(state, ahead, dtype))
    good = (state.pairs > 0) & (newton.downhill > 0) & jnp.isfinite(newton.downhill)
    return _tree.select(good, newton, first), jnp.where(good, state.pairs, 0)


def _first_length(params, dtype):
    """How far the first step goes."""
    length = _tree.safe_norm(params, dtype)
    return _FIRST_STEP * jnp.where(length > 0, length, 1)


def _direction(state: ScaledLBFGSState, ahead, dtype):
    """``-H ahead`` by the two loops of L-BFGS: newest pair first, then oldest first."""
    size = jax.tree.leaves(state.steps)[0].shape[0]
    ages = (state.next - 1 - jnp.arange(size, dtype=jnp.int32)) % size
    there = ages < state.pairs

    def pair(age):
        at = (state.next - 1 - age) % size
        return _slot(state.steps, at), _slot(state.changes, at)

    def newest_first(age, carry):
        ahead, parts = carry
        step, change = pair(age)
        part = jnp.where(age < state.pairs, _tree.dot(step, ahead, dtype), 0)
        ahead = _tree.subtract(ahead, _times(change, part))
        return ahead, parts.at[age].set(part)

    def oldest_first(i, ahead):
        age = size - 1 - i
        step, change = pair(age)
        part = parts[age] - _tree.dot(change, ahead, dtype)
        part = jnp.where(age < state.pairs, part, 0)
        return jax.tree.map(jnp.add, ahead, _times(step, part))

    parts = jnp.zeros((size,), dtype)
    ahead, parts = lax.fori_loop(0, size, newest_first, (ahead, parts))
    _, newest = pair(0)
    ahead = _scaled(state, newest, there, ahead, dtype)
    ahead = lax.fori_loop(0, size, oldest_first, ahead)
    return jax.tree.map(jnp.negative, ahead)


def _scaled(state, newest, there, ahead, dtype):
    """``H_0 ahead``: the diagonal of the pairs, in the size of the newest."""
    # Changes in units of the newest, steps in the inverse: squares may leave the range.
    root = jnp.sqrt(_tree.dot(newest, newest, dtype))
    flat = 1 / root**2

    def entry(steps, changes):
        def total(x, factor):
            mask = there.reshape(-1, *[1] * (x.ndim - 1))
            x = jnp.abs(x) * factor.astype(x.real.dtype)
            return jnp.sqrt(jnp.sum(jnp.where(mask, x**2, 0), axis=0))

        ratio = flat * total(steps, root) / total(changes, 1 / root)
        return jnp.where((ratio > 0) & (ratio < jnp.inf), ratio, flat)

    diagonal = jax.tree.map(entry, state.steps, state.changes)
    weighed = jax.tree.map(lambda d, y: d * y, diagonal, newest)
    size = _tree.dot(newest, weighed, dtype)
    return _times(jax.tree.map(lambda d, x: d * x, diagonal, ahead), 1 / size)


def _moves(params, step):
    """Whether a step moves any parameter by more than its last digits."""

    def leaf(x, s):
        eps = float(jnp.finfo(x.dtype).eps)
        return jnp.any(jnp.abs(s) > _MOVES * eps * jnp.abs(x))

    return jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, params, step))))


def _remembered(state, step, change, unit, moved):
    """Whether the last step makes a pair, and all pairs with it."""
    dtype = unit.dtype
    eps = float(np.finfo(dtype).eps)
    wide = jax.tree.map(lambda x: x.astype(_wide(x)), (step, change))
    largest = [unit_of(x, dtype) for x in wide]
    step, change = (over(x, most) for x, most in zip(wide, largest, strict=True))
    bend = _tree.dot(step, change, dtype)
    sizes = _tree.dot(step, step, dtype) * _tree.dot(change, change, dtype)
    told = moved & (bend > 4 * eps * jnp.sqrt(sizes)) & jnp.isfinite(bend)
    # In units in which their product is 1, roots first: products may leave the range.
    ratio = jnp.sqrt(largest[0]) / (jnp.sqrt(unit) * jnp.sqrt(largest[1]))
    root = jnp.sqrt(jnp.where(told, bend, 1))

    def put(all, new, factor):
        def leaf(all, new):
            old = lax.dynamic_index_in_dim(all, state.next, keepdims=False)
            new = jnp.where(told, new * factor.astype(new.real.dtype), old)
            return lax.dynamic_update_index_in_dim(all, new, state.next, 0)

        return jax.tree.map(leaf, all, new)

    steps = put(state.steps, step, ratio / root)
    changes = put(state.changes, change, 1 / (ratio * root))
    return told, steps, changes


def _slot(pairs, at):
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(
            x, at, keepdims=False, allow_negative_indices=False
        ),
        pairs,
    )


def _times(tree, number):
    return jax.tree.map(
        lambda x: (number.astype(x.real.dtype) * x).astype(x.dtype), tree
    )


def _wide(x):
    """The dtype in which pairs are kept: of at least 32 bits."""
    return jnp.promote_types(x.dtype, jnp.float32)
