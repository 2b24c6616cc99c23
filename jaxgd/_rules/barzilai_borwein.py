"""Spectral steps: descent that needs no learning rate.

This room owns ``barzilai_borwein``, an ordinary optax transformation. It plugs into the
step like any of optax's line searches, and is what batch descent uses where neither a
rate nor an optimizer is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgd import _tree
from jaxgd._checks import whole
from jaxgd._rules.line_search import (
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

_FIRST_STEP = 1e-2  # of the norm of the parameters: the next rate knows better
_SHORTEST_CUT = 0.1  # of a rate none of whose trial points was accepted
_GROWTH = 10.0  # of the rate where the curvature along a step is not positive
_SHORT_RATES = 3  # recent ones, of which the smallest is taken
_THRESHOLD, _LOWER, _RAISE = 0.7, 0.9, 1.1  # of short to long, and how it adapts
# Steps in a row without a better objective or a 1 % smaller gradient.
_IDLE = 100


class BarzilaiBorweinState(NamedTuple):
    """What ``barzilai_borwein`` remembers.

    Attributes:
      learning_rate: the rate of the last update, 0 where no trial point was accepted.
      value: the objective at the parameters which that update leads to.
      grad: its gradient there; ``optax.value_and_grad_from_state`` finds both.
      num_linesearch_steps: int32, evaluations (value and gradient) of the last update.
      evaluations: int32, evaluations of all updates.
      proposal: the rate to try next, 0 before the first.
      recent: float[memory], the last values, newest first.
      short: float[3], the last short spectral rates.
      threshold: the ratio of short to long below which a short rate is taken.
      lowest: the lowest value so far.
      smallest: the smallest gradient norm so far.
      idle: int32, steps in a row without progress in either.
    """

    learning_rate: Any
    value: Any
    grad: Any
    num_linesearch_steps: Any
    evaluations: Any
    proposal: Any
    recent: Any
    short: Any
    threshold: Any
    lowest: Any
    smallest: Any
    idle: Any


def barzilai_borwein(
    memory: int = 10, max_linesearch_steps: int = 30
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent whose rates come from the curvature of the last step.

    With :math:`s = \theta_k - \theta_{k-1}` and :math:`y = g_k - g_{k-1}`, the inverse
    of a secant estimate of the curvature is the long or the short rate

    .. math:: \alpha^{L} = \frac{s^T s}{s^T y}, \qquad
              \alpha^{S} = \frac{s^T y}{y^T y} \le \alpha^{L}.

    The long one is taken unless the short one is far smaller; then it is the smallest
    of the last three short ones, which removes the steep directions. The step
    :math:`-\alpha g_k` is accepted if

    .. math:: J(\theta_k - \alpha g_k) \le
              \max_{0 \le j < \text{memory}} J(\theta_{k-j})
              - 10^{-4} \alpha \|g_k\|^2,

    else :math:`\alpha` is cut down by interpolation. Where rounding hides so small a
    fall, the slope at the trial point decides. A trial point where the value or the
    gradient is not finite is never accepted. Along negative curvature the rate grows
    tenfold. The first step moves the parameters by 1 % of their norm (by 0.01 where
    they are 0), so that no scale needs to be known. Once 100 steps in a row have
    brought neither a lower value nor a gradient smaller by 1 %, precision is
    exhausted, and all further updates are 0.

    An update evaluates value and gradient at each trial point, mostly one, and leaves
    those of the accepted one in its state. Batch descent by ``minimize`` does not
    evaluate them again (unless ``has_aux``, ``with_key`` or fewer than 32 bits ask for
    it); in a loop of your own ``optax.value_and_grad_from_state`` finds them.

    Args:
      memory: how many past values the new one is compared with; 1 makes the descent
        monotone.
      max_linesearch_steps: trial points of one update, at most. If none is accepted,
        the update is 0 and the next one starts from the rate reached.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for parameters of any pytree, complex
      leaves included. Its ``update`` needs ``params`` and the keywords ``value``,
      ``grad`` and ``value_fn``; put nothing behind it in a chain. The state is a
      ``BarzilaiBorweinState``.

    Raises:
      TypeError, ValueError: if an argument is no whole number, or below 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxgd
      >>> def fun(x):
      ...     return jnp.sum(jnp.array([1.0, 100.0]) * (x - 1) ** 2)
      >>> rule = jaxgd.barzilai_borwein()
      >>> x = jnp.zeros(2)
      >>> state = rule.init(x)
      >>> value_and_grad = optax.value_and_grad_from_state(fun)
      >>> for _ in range(20):
      ...     value, grad = value_and_grad(x, state=state)
      ...     updates, state = rule.update(
      ...         grad, state, x, value=value, grad=grad, value_fn=fun
      ...     )
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.allclose(x, 1.0))
      True

    References:
      Barzilai and Borwein, Two-point step size gradient methods, IMA Journal of
      Numerical Analysis 8 (1988). Grippo, Lampariello and Lucidi, A nonmonotone line
      search technique for Newton's method, SIAM Journal on Numerical Analysis 23
      (1986). Raydan, The Barzilai and Borwein gradient method for the large scale
      unconstrained minimization problem, SIAM Journal on Optimization 7 (1997). Zhou,
      Gao and Dai, Gradient methods with adaptive step-sizes, Computational Optimization
      and Applications 35 (2006). Frassoldati, Zanni and Zanghirati, New adaptive
      stepsize selections in gradient methods, Journal of Industrial and Management
      Optimization 4 (2008). Hager and Zhang, A new conjugate gradient method with
      guaranteed descent and an efficient line search, SIAM Journal on Optimization 16
      (2005), for the acceptance under rounding.
    """
    memory = whole("memory", memory)
    most = whole("max_linesearch_steps", max_linesearch_steps)

    def init(params) -> BarzilaiBorweinState:
        dtype = _tree.real_dtype(params)
        zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        return BarzilaiBorweinState(
            learning_rate=zero,
            value=inf,
            grad=jax.tree.map(jnp.zeros_like, params),
            num_linesearch_steps=jnp.int32(0),
            evaluations=jnp.int32(0),
            proposal=zero,
            recent=jnp.full((memory,), -jnp.inf, dtype),
            short=jnp.full((_SHORT_RATES,), jnp.inf, dtype),
            threshold=jnp.full((), _THRESHOLD, dtype),
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
            "barzilai_borwein",
            params=params,
            value=value,
            grad=grad,
            value_fn=value_fn,
        )
        dtype = _tree.real_dtype(params)
        value = jnp.asarray(value).astype(dtype)
        unit = unit_of(grad, dtype)
        own, ahead = over(grad, unit), over(updates, unit)
        size = unit * jnp.sqrt(_tree.dot(own, own, dtype))
        progress = Progress(state.lowest, state.smallest, state.idle)
        progress = extend_progress(progress, value, size)
        idle = jnp.where(state.proposal == 0, 0, progress.idle)

        recent = jnp.roll(state.recent, 1).at[0].set(value)
        back = jax.tree.map(jnp.negative, ahead)
        line = line_of(params, back, value, grad, unit, jnp.max(recent))
        busy = (idle < _IDLE) & (line.downhill > 0) & jnp.isfinite(value)
        squares = _tree.dot(ahead, ahead, dtype)
        length = _tree.safe_norm(params, dtype)
        first = _FIRST_STEP * jnp.where(length > 0, length, 1)
        first = first / (unit * jnp.sqrt(squares))
        rate = jnp.where(state.proposal > 0, state.proposal, first)
        count, length, end, accepted = search(
            value_and_grad_of(value_fn, extra),
            line,
            rate * unit,
            most,
            stay(line),
            ~busy,
        )
        rate, moved = length / unit, accepted & busy

        change = _tree.subtract(own, over(end.grad, unit))
        bend = _tree.dot(ahead, change, dtype)
        long = rate * (squares / bend)
        short = rate * (bend / _tree.dot(change, change, dtype))
        told = moved & (bend > 0) & (short > 0) & jnp.isfinite(long)
        shorts = jnp.roll(state.short, 1).at[0].set(short)
        shorts = jnp.where(told, shorts, state.short)
        steep = short < state.threshold * long
        threshold = state.threshold * jnp.where(steep, _LOWER, _RAISE)
        otherwise = rate * jnp.where(moved, _GROWTH, _SHORTEST_CUT)
        proposal = jnp.where(told, jnp.where(steep, jnp.min(shorts), long), otherwise)
        proposal = jnp.clip(proposal, *_bounds(dtype))
        return end.step, BarzilaiBorweinState(
            learning_rate=jnp.where(moved, rate, 0),
            value=end.value,
            grad=end.grad,
            num_linesearch_steps=count,
            evaluations=state.evaluations + count,
            proposal=jnp.where(busy, proposal, state.proposal),
            recent=recent,
            short=shorts,
            threshold=jnp.where(told, threshold, state.threshold),
            lowest=progress.lowest,
            smallest=progress.smallest,
            idle=idle,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _bounds(dtype):
    """Rates that leave room for a tenfold more and a search for less."""
    limits = np.finfo(dtype)
    return float(limits.tiny) * 1e2, float(limits.max) / 1e2
