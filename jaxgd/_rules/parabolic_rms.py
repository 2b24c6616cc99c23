r"""A stochastic rule without a rate: directions by Adam's scale, rates by parabolas.

This room owns ``parabolic_rms``, an ordinary optax transformation that needs ``value``,
``grad`` and ``value_fn`` of the batch, and its state, at whose ``average`` a run is
judged (``_rules.evaluation_params``). It uses nothing of the loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgd import _tree


class ParabolicRMSState(NamedTuple):
    """State of ``parabolic_rms``; numbers in at least float32.

    Attributes:
      count: int32, updates so far.
      learning_rate: the rate along the scaled direction; 0 before the first gradient.
      slope: the mean of the slopes, an estimate of the decrease per unit of rate.
      curvature: the mean of the curvatures along the directions.
      root_mean_square: of the gradient, entry by entry; real.
      average: the averaged parameters, those to evaluate.
      num_linesearch_steps: int32, trial values of the last update: always 1.
    """

    count: Any
    learning_rate: Any
    slope: Any
    curvature: Any
    root_mean_square: Any
    average: Any
    num_linesearch_steps: Any


def parabolic_rms(
    relaxation=1.0, memory=1000.0, averaging=16.0
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic descent that finds its rate by itself and averages its iterates.

    With the gradient :math:`g_t` of the batch's objective :math:`f_t` at
    :math:`\theta_t`, entry by entry,

    .. math::

      v_t &= v_{t-1} + \max(\tfrac{1}{t + 1}, \tfrac{1}{\text{memory}})
      (|g_t|^2 - v_{t-1}), \qquad d_t = -g_t / \sqrt{v_t}, \\
      m_t &= -\langle g_t, d_t \rangle, \qquad
      c_t = \max\bigl(0,\; 2\, (f_t(\theta_t + \eta_{t-1} d_t) - f_t(\theta_t)
      + \eta_{t-1} m_t) / \eta_{t-1}^2\bigr), \\
      \eta_t &= \min(\text{relaxation} \cdot \bar m_t / \bar c_t,\; 2\, \eta_{t-1}),
      \qquad
      \theta_{t+1} = \theta_t + \min(\eta_t,\; m_t / c_t)\, d_t .

    One more value of the batch, without a gradient, thus gives a parabola along the
    step: slope :math:`m_t`, curvature :math:`c_t`. Its minimum, :math:`m_t / c_t`,
    limits the step. The rate is the ratio of the means of all slopes and curvatures so
    far, hence that of the objective rather than of one noisy batch, and it does not
    decay; the noise that this leaves is averaged away:

    .. math::

      \bar\theta_{t+1} = \bar\theta_t + \frac{a + 1}{t + 1 + a}
      (\theta_{t+1} - \bar\theta_t), \qquad a = \text{averaging},

    whose memory is about the last :math:`t / a` iterates at any :math:`t`, so no length
    of the run is needed. The state's ``average`` is what ``minimize`` reports. The
    first trial is :math:`\eta_{-1} = |f_0| / m_0`, the Polyak step; a trial that is not
    finite moves nothing and divides the rate by 8.

    The path is the same for :math:`\alpha f`, and for :math:`f + \beta` after the first
    trial. Columns of different size are evened out as Adam does. As the rate does not
    decay, a run ends at a floor: at batch size 1 on noisy rows the limits of the steps
    depend on the rows, and the average lies slightly off the minimum.

    Args:
      relaxation: multiplies the rate; above 2 the batch's own value would rise on a
        parabola.
      memory: the number of steps that the mean square of the gradient looks back.
      averaging: ``a``; larger follows the iterates faster and averages fewer.

    Returns:
      An optax rule. Its ``update`` needs ``params``, ``value`` and ``value_fn``, and
      takes ``grad`` where a transformation before it has changed the gradient. State:
      ``ParabolicRMSState``, two copies of the parameters. It works on pytrees of
      floating and complex leaves; ``value_fn`` must be that of the same batch and of
      all parameters, so it cannot stand within ``optax.masked``.

    Raises:
      ValueError: from ``update``, without ``params``, ``value`` or ``value_fn``.

    Example:
      >>> import jaxgd
      >>> ridge = jaxgd.problems.ridge()
      >>> result = jaxgd.minimize(ridge.fun, ridge.init, ridge.data, batch_size=32,
      ...                         optimizer=jaxgd.parabolic_rms())
      >>> bool(result.value < 1.01 * ridge.value)
      True

    References:
      Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015 (the scale).
      Vaswani et al., Painless stochastic gradient: interpolation, line-search, and
      convergence rates, NeurIPS 2019; Adaptive gradient methods converge faster with
      over-parameterization (but you should do a line-search), arXiv:2006.06835 (trial
      values of the batch). Mutschler and Zell, Parabolic approximation line search for
      DNNs, NeurIPS 2020 (parabolas). Loizou et al., Stochastic Polyak step-size for
      SGD, AISTATS 2021 (the first trial). Shamir and Zhang, Stochastic gradient descent
      for non-smooth optimization, ICML 2013 (the average).
    """

    def update(
        updates, state, params=None, *, value=None, grad=None, value_fn=None, **_
    ):
        if params is None or value is None or value_fn is None:
            raise ValueError(
                "parabolic_rms needs params, value and value_fn of the batch: pass "
                "update(grad, state, params, value=..., grad=..., value_fn=...)."
            )
        step = state.count.astype(state.learning_rate.dtype)
        weight = jnp.maximum(1 / (step + 1), 1 / jnp.asarray(memory, step.dtype))
        root = jax.tree.map(
            lambda r, g: _root_mean_square(r, g, weight),
            state.root_mean_square,
            updates,
        )
        direction = jax.tree.map(_scaled, updates, root)
        trial, slope, curvature = _parabola(
            state.learning_rate,
            params,
            direction,
            value,
            updates if grad is None else grad,
            value_fn,
        )
        lost = ~jnp.isfinite(curvature)
        counted = jnp.where(lost, 0, jnp.stack([slope, curvature]))
        means = jnp.stack([state.slope, state.curvature])
        means = means + (counted - means) / (step + 1)
        rate = jnp.minimum(
            relaxation * _ratio(means[0], means[1]),
            jnp.where(lost, trial / 8, 2 * trial),
        )
        length = jnp.where(lost, 0, jnp.minimum(rate, _ratio(slope, curvature)))
        moves = jax.tree.map(
            lambda d, p: (
                jnp.where(slope > 0, length, 0).astype(d.real.dtype) * d
            ).astype(p.dtype),
            direction,
            params,
        )
        share = (averaging + 1) / (step + 1 + averaging)
        average = jax.tree.map(
            lambda a, p: a + share.astype(a.real.dtype) * (p.astype(a.dtype) - a),
            state.average,
            optax.apply_updates(params, moves),
        )
        return moves, ParabolicRMSState(
            count=optax.safe_increment(state.count),
            learning_rate=jnp.where(slope > 0, rate, state.learning_rate),
            slope=means[0],
            curvature=means[1],
            root_mean_square=root,
            average=average,
            num_linesearch_steps=state.num_linesearch_steps,
        )

    return optax.GradientTransformationExtraArgs(_init, update)


def _init(params) -> ParabolicRMSState:
    dtype = _tree.real_dtype(params)
    zero = jnp.zeros((), dtype)
    return ParabolicRMSState(
        count=jnp.zeros((), jnp.int32),
        learning_rate=zero,
        slope=zero,
        curvature=zero,
        root_mean_square=jax.tree.map(
            lambda p: jnp.zeros(jnp.shape(p), _wide(p, real=True)), params
        ),
        average=jax.tree.map(lambda p: jnp.array(p, _wide(p)), params),
        num_linesearch_steps=jnp.ones((), jnp.int32),
    )


def _wide(leaf, real=False):
    """At least float32: a mean over 1000 steps does not fit in bfloat16."""
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return jnp.finfo(dtype).dtype if real else dtype


def _root_mean_square(root, grad, weight):
    # The root is kept, not the square, which leaves the range of float32 at 1e19.
    weight = weight.astype(root.dtype)
    size = jnp.abs(grad).astype(root.dtype)
    some = (root > 0) | (size > 0)  # at 0 the root has no derivative
    old, new = jnp.where(some, root, 1), jnp.where(some, size, 1)
    mean = jnp.hypot(jnp.sqrt(1 - weight) * old, jnp.sqrt(weight) * new)
    return jnp.where(some, mean, 0)


def _scaled(grad, root):
    """The direction of descent, 0 where no gradient has been."""
    grad = grad.astype(jnp.promote_types(grad.dtype, root.dtype))
    return -jnp.where(root > 0, grad / jnp.where(root > 0, root, 1), 0)


def _parabola(rate, params, direction, value, grad, value_fn):
    """(trial, slope, curvature) of the batch's value along the direction.

    The trial is the last rate, at the start the Polyak step. A curvature that is not
    finite tells that the value there is not.
    """
    dtype = rate.dtype
    eps = jnp.finfo(jnp.result_type(value)).eps
    value = jnp.asarray(value).astype(dtype)
    slope = jnp.maximum(-_tree.dot(grad, direction, dtype), 0)
    first = jnp.abs(value) / jnp.where(slope > 0, slope, 1)
    first = jnp.where((first > 0) & jnp.isfinite(first), first, 1)
    trial = jnp.where(rate > 0, rate, first)
    ahead = jax.tree.map(
        lambda p, d: (p.astype(d.dtype) + trial.astype(d.real.dtype) * d).astype(
            p.dtype
        ),
        params,
        direction,
    )
    there = jnp.asarray(value_fn(ahead)).astype(dtype)
    # What rounding left of the move decides, or bfloat16 would see curvature in it.
    linear = _tree.dot(grad, jax.tree.map(_difference, ahead, params), dtype)
    excess = there - value - linear
    noise = 4 * eps * jnp.maximum(jnp.abs(value), jnp.abs(there))
    curvature = jnp.where(excess > noise, 2 * excess / trial / trial, 0)
    return trial, slope, jnp.where(jnp.isfinite(there), curvature, jnp.inf)


def _difference(a, b):
    wide = _wide(a)
    return a.astype(wide) - b.astype(wide)


def _ratio(a, b):
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.inf)
