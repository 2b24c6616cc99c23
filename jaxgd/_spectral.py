"""Spectral steps: descent that needs no learning rate.

This room owns ``barzilai_borwein``, an ordinary optax transformation. It plugs into the
step like any rule of optax that searches along a line; where nothing else is asked for,
it is what batch descent uses.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxgd import _tree

_ARMIJO = 1e-4
_SHORTEST_CUT, _LONGEST_CUT = 0.1, 0.5
_GROWTH = 10.0  # of the rate where the curvature is not positive
_IDLE = 100  # steps without progress after which nothing can be gained any more


class BarzilaiBorweinState(NamedTuple):
    learning_rate: Any
    value: Any
    grad: Any
    evaluations: Any
    num_linesearch_steps: Any
    proposal: Any
    recent: Any
    short: Any
    threshold: Any
    count: Any
    lowest: Any
    smallest: Any
    idle: Any


def barzilai_borwein(
    memory=10, max_linesearch_steps=30, window=6, tau0=0.5, first=1e-2, mode="abbmin"
):
    def init(params):
        dtype = _tree.real_dtype(params)
        inf = jnp.asarray(jnp.inf, dtype)
        return BarzilaiBorweinState(
            learning_rate=jnp.zeros((), dtype),
            value=inf,
            grad=jax.tree.map(jnp.zeros_like, params),
            evaluations=jnp.int32(0),
            num_linesearch_steps=jnp.int32(0),
            proposal=jnp.zeros((), dtype),
            recent=jnp.full((memory,), -jnp.inf, dtype),
            short=jnp.full((window,), jnp.inf, dtype),
            threshold=jnp.asarray(tau0, dtype),
            count=jnp.int32(0),
            lowest=inf,
            smallest=inf,
            idle=jnp.int32(0),
        )

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        del extra
        dtype = _tree.real_dtype(params)
        eps = jnp.asarray(np.finfo(dtype).eps, dtype)
        direction = updates
        value = value.astype(dtype)
        scale = _tree.largest(direction, dtype)
        scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
        unit = lambda g: jax.tree.map(
            lambda x: (x / scale.astype(x.real.dtype)).astype(x.dtype), g
        )
        own = unit(direction)
        square = _dot(own, own, dtype)  # of the gradient, in units of scale ** 2
        size = jnp.sqrt(square) * scale

        recent = jnp.roll(state.recent, 1).at[0].set(value)
        reference = jnp.max(recent)
        improved = (
            (value < state.lowest - eps * jnp.abs(state.lowest))
            | (size < 0.99 * state.smallest)
            | (state.count == 0)
        )
        idle = jnp.where(improved, 0, state.idle + 1)

        # first step
        length = _tree.norm(params, dtype)
        unit_length = jnp.where(length > 0, length, 1.0)
        start = first * unit_length / size
        rate = jnp.where(state.proposal > 0, state.proposal, start)

        value_and_grad = jax.value_and_grad(lambda p: value_fn(p))

        def evaluate(rate):
            step = jax.tree.map(
                lambda g: (-rate.astype(g.real.dtype) * g).astype(g.dtype), direction
            )
            v, g = value_and_grad(optax.apply_updates(params, step))
            g = jax.tree.map(lambda x: x.conj() if jnp.iscomplexobj(x) else x, g)
            v = v.astype(dtype)
            g = jax.tree.map(lambda x, y: x.astype(y.dtype), g, direction)
            slope = -_dot(own, unit(g), dtype) * scale * scale  # of f along -direction
            finite = jnp.isfinite(v) & _tree.all_finite(g) & jnp.isfinite(slope)
            fall = square * scale * scale
            armijo = v <= reference - _ARMIJO * rate * fall
            near = (
                (v <= reference + 4 * eps * jnp.abs(reference))
                & (jnp.abs(v - value) <= 1e3 * eps * jnp.abs(value))
                & (slope <= (1 - 2 * _ARMIJO) * fall)
            )
            return step, v, g, slope, finite, finite & (armijo | near)

        zero = jax.tree.map(jnp.zeros_like, direction)

        def cond(c):
            n, rate, _, done = c
            return (n < max_linesearch_steps) & ~done

        def body(c):
            n, rate, found, _ = c
            step, v, g, slope, finite, ok = evaluate(rate)
            fall = square * scale * scale
            # quadratic through value, slope and trial value
            q = rate * fall / (2 * (v - value + rate * fall))
            q = jnp.where(
                finite & jnp.isfinite(q),
                jnp.clip(q, _SHORTEST_CUT, _LONGEST_CUT),
                _SHORTEST_CUT,
            )
            new = jnp.where(ok, rate, rate * q)
            found = _tree.select(ok, (step, v, g), found)
            return n + 1, new, found, ok

        busy = (idle < _IDLE) & (size > 0)
        n, rate, (step, v, g), ok = lax.while_loop(
            cond, body, (jnp.int32(0), rate, (zero, value, grad), ~busy)
        )
        moved = ok & busy
        # spectral rates
        gp = unit(g)
        diff = jax.tree.map(lambda a, b: a - b, own, gp)
        sy = _dot(own, diff, dtype)
        yy = _dot(diff, diff, dtype)
        long = rate * square / sy
        short = rate * sy / yy
        usable = (
            moved & (sy > 0) & jnp.isfinite(long) & jnp.isfinite(short) & (short > 0)
        )
        shorts = jnp.where(
            usable, jnp.roll(state.short, 1).at[0].set(short), state.short
        )
        steep = short < state.threshold * long
        if mode == "abbmin":
            choice = jnp.where(steep, jnp.min(shorts), long)
            thr = jnp.where(steep, state.threshold * 0.9, state.threshold * 1.1)
        elif mode == "abb":
            choice = jnp.where(steep, short, long)
            thr = state.threshold
        elif mode == "bb1":
            choice, thr = long, state.threshold
        elif mode == "bb2":
            choice, thr = short, state.threshold
        proposal = jnp.where(
            usable, choice, jnp.where(moved, rate * _GROWTH, rate * 0.1)
        )
        proposal = jnp.where(busy, proposal, state.proposal)
        return step, BarzilaiBorweinState(
            learning_rate=jnp.where(moved, rate, 0),
            value=v,
            grad=g,
            evaluations=state.evaluations + n,
            num_linesearch_steps=n,
            proposal=proposal,
            recent=recent,
            short=shorts,
            threshold=jnp.where(usable, thr, state.threshold),
            count=state.count + 1,
            lowest=jnp.minimum(state.lowest, value),
            smallest=jnp.minimum(state.smallest, size),
            idle=idle,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _dot(a, b, dtype):
    """The real inner product of two pytrees."""
    parts = jax.tree.map(lambda x, y: jnp.real(jnp.vdot(x, y)).astype(dtype), a, b)
    return sum(jax.tree.leaves(parts), jnp.zeros((), dtype))
