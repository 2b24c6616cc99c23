"""One step of descent, as the body of a scan: ``(state, batch) -> (state, info)``.

This room owns ``State``, ``Info`` and the manual loop. Every driver of the library
scans the step made here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgd import _check, _tree
from jaxgd._gradient import Batch, Objective, make_objective
from jaxgd._rules import (
    evaluation_params,
    known_point,
    rate_used,
    require_rule,
    trial_points,
)
from jaxgd._shards import untyped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What survives from step to step.

    Attributes:
      params: the parameters, a pytree.
      opt_state: the state of the optax rule.
      step: int32, the number of updates applied since the start.
      run: what ``minimize`` remembers besides (key, counters, history, the stop
        rule's memory); None in a manual loop.
    """

    params: Any
    opt_state: Any
    step: Any
    run: Any = None


class Info(NamedTuple):
    """What one step saw; fields that nobody asked for are None.

    Attributes:
      value: the objective at the parameters the step started from, on its batch.
      grad_norm: the 2-norm of its gradient there.
      update_norm: the 2-norm of the update that the step applied.
      learning_rate: the rate, where the optax rule's state tells it; else NaN.
      aux: the auxiliary output of the objective there.
      evaluations: int32, evaluations of the objective within the step, where a line
        search reports its trial points.
      grad_max: the largest absolute entry of the gradient.
      params_norm: the 2-norm of the parameters the step started from.
      moved: whether any entry of the parameters changed.
      slope: the real inner product of gradient and update, negative downhill.
    """

    value: Any
    grad_norm: Any
    update_norm: Any = None
    learning_rate: Any = None
    aux: Any = None
    evaluations: Any = None
    grad_max: Any = None
    params_norm: Any = None
    moved: Any = None
    slope: Any = None


def init_state(params, optimizer) -> State:
    """The state before step 0.

    Args:
      params: a pytree of floating or complex arrays.
      optimizer: an optax rule (``optax.adam(1e-3)``).

    Returns:
      ``State(params, optimizer.init(params), step=0)``.

    Raises:
      TypeError: if ``optimizer`` is no optax rule.

    Example:
      >>> import jax.numpy as jnp, optax, jaxgd
      >>> jaxgd.init_state(jnp.zeros(3), optax.sgd(0.1)).step.item()
      0
    """
    optimizer = require_rule(optimizer)
    params = jax.tree.map(jnp.asarray, _check.numbers_of(params))
    return State(params, optimizer.init(params), jnp.int32(0))


def make_step(fun, optimizer, *, args=(), has_aux=False, microbatch_size=None):
    r"""The step of descent as a ``lax.scan`` body, ``(state, batch) -> (state, info)``.

    With :math:`g_t = \nabla J(\theta_t; \text{batch}_t)` and an optax rule, the step is
    :math:`\theta_{t+1} = \theta_t + \mathrm{rule}(g_t)`; for ``optax.sgd(alpha)`` that
    is :math:`\theta_t - \alpha g_t`. ``minimize`` scans this very step.

    Args:
      fun: the objective, ``fun(params, batch, *args)``, or ``fun(params, *args)`` where
        the scan runs over no batches (``xs=None``).
      optimizer: an optax rule. The value, the gradient and ``value_fn`` of the same
        batch are passed to it, so line searches and Polyak steps work.
      args: extra arguments of ``fun``.
      has_aux: ``fun`` returns ``(value, aux)``; then ``info.aux`` is set.
      microbatch_size: compute each gradient over blocks of this many rows.

    Returns:
      A pure function of ``(State, batch)``; it returns ``(State, Info)`` with
      ``value``, ``grad_norm`` and ``update_norm`` in at least float32.

    Raises:
      TypeError: if ``optimizer`` is no optax rule.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxgd
      >>> batches = jnp.arange(6.0).reshape(3, 2)
      >>> optimizer = optax.sgd(0.5)
      >>> step = jaxgd.make_step(lambda x, batch: jnp.mean((x - batch) ** 2), optimizer)
      >>> state, infos = jax.lax.scan(step, jaxgd.init_state(0.0, optimizer), batches)
      >>> float(state.params)
      4.5
    """
    _check.function("fun", fun)
    _check.flag("has_aux", has_aux)
    _check.extra(args, jnp.float32)
    if microbatch_size is not None:
        microbatch_size = _check.whole("microbatch_size", microbatch_size, low=1)
    optimizer = require_rule(optimizer)

    def step(state: State, batch) -> tuple[State, Info]:
        # Numbers in args get the precision of the parameters, as in minimize.
        own = _check.extra(args, _tree.real_dtype(state.params))

        def out(kept, on_all):
            return kept(state), on_all

        return untyped(once, state, batch, own, out=out)

    def once(state: State, batch, own) -> tuple[State, Info]:
        objective = make_objective(
            lambda args: (fun, args), (own,), has_aux=has_aux, block=microbatch_size
        )
        inner = descent_step(objective, optimizer, frozenset({"update_norm", "aux"}))
        return inner(state, Batch(batch))

    return step


def descent_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    wanted: frozenset,
    size_of_update: Callable | None = None,
    idle: Callable | None = None,
    reuse: bool = False,
    apart: bool = False,
) -> Callable[[State, Batch], tuple[State, Info]]:
    """The one step behind every driver; computes no norm that is not ``wanted``.

    ``size_of_update(step, grad_norm)``: the norm of the update where arithmetic
    gives it without looking at the update. ``idle(step)``: whether a schedule has the
    step stand still, which is no sign that the run does. ``reuse``: the state of the
    rule holds value and gradient at the parameters. ``apart``: the rule is judged at
    parameters of its own, and what is seen of an iterate is seen there.
    """
    precise = "precise" in wanted

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        params, dtype = state.params, _tree.real_dtype(state.params)
        if reuse:
            (value, grad), aux = known_point(state.opt_state), None
        else:
            (value, aux), grad = objective.value_and_grad(params, *batch)
        seen, seen_grad = value, grad
        if apart:
            judged = evaluation_params(state.opt_state, params)
            (seen, aux), seen_grad = objective.value_and_grad(judged, *batch)
            finite = jnp.isfinite(value) & _tree.all_finite(grad)
            seen = jnp.where(finite, seen, jnp.nan)
        # Only line searches differentiate it, which no reverse mode goes through.
        searches = known_point(state.opt_state) is not None
        value_fn = (
            objective.value_fn(*batch)
            if searches
            else (lambda p: objective.value(p, *batch))
        )
        updates, opt_state = optimizer.update(
            grad,
            state.opt_state,
            params,
            value=value,
            grad=grad,
            value_fn=value_fn,
        )
        # A rule may compute in a wider type than it started in; a scan may not.
        opt_state = _tree.cast_like(opt_state, state.opt_state)
        moved = optax.apply_updates(params, updates)
        grad_norm = (_tree.safe_norm if precise else _tree.norm)(seen_grad, dtype)

        def wants(name, compute):
            return jax.lax.stop_gradient(compute()) if name in wanted else None

        def update_norm():
            if size_of_update is not None:
                return size_of_update(state.step, grad_norm)
            return _tree.norm(updates, dtype)

        info = Info(
            value=seen.astype(dtype),
            grad_norm=grad_norm,
            update_norm=wants("update_norm", update_norm),
            learning_rate=wants("learning_rate", lambda: rate_used(opt_state, dtype)),
            aux=aux if "aux" in wanted else None,
            evaluations=wants(
                "evaluations",
                lambda: (0 if reuse else 1 + apart) + trial_points(opt_state),
            ),
            grad_max=wants("grad_max", lambda: _tree.largest(seen_grad, dtype)),
            params_norm=wants("params_norm", lambda: _tree.norm(params, dtype)),
            moved=wants("moved", lambda: _moved(idle, state.step, moved, params)),
            slope=wants("slope", lambda: _tree.dot(grad, updates, dtype)),
        )
        return State(moved, opt_state, state.step + 1, state.run), info

    return step


def _moved(idle, step, new, old):
    moved = _tree.differ(new, old)
    return moved if idle is None else moved | idle(step)
