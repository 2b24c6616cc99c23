"""One step of descent, as the body of a scan: ``(state, batch) -> (state, info)``.

This room owns ``State`` and ``Info``. Every driver of the library, and the manual loop
of ``_api/manual``, scans the step made here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgd import _tree
from jaxgd._problem.objective import Batch, Objective
from jaxgd._rules.adapter import (
    decrease_expected,
    evaluation_params,
    keeps_point,
    known_point,
    rate_used,
    trial_points,
)
from jaxgd._stop.measures import MEASURES, Seen


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
    """What one step saw; fields that nobody asked for are None, measures left out.

    Attributes:
      value: the objective at the parameters the step started from, on its batch.
      grad_norm: the 2-norm of its gradient there.
      update_norm: the 2-norm of the update that the step applied.
      learning_rate: the rate, where the optax rule's state tells it; else NaN.
      aux: the auxiliary output of the objective there.
      evaluations: int32, evaluations of the objective within the step, where a line
        search reports its trial points.
      measures: what else of the iterate a stop rule looks at, by name (see
        ``_stop/measures``).
      moved: whether any entry of the parameters changed.
      slope: the real inner product of gradient and update, negative downhill.
      decrement: the decrease that the optax rule expects, where its state tells it.
      absorbed: whether the rule made a finite update and state of a value or gradient
        that is not finite.
    """

    value: Any
    grad_norm: Any
    update_norm: Any = None
    learning_rate: Any = None
    aux: Any = None
    evaluations: Any = None
    measures: Any = None
    moved: Any = None
    slope: Any = None
    decrement: Any = None
    absorbed: Any = None


def descent_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    wanted: frozenset,
    size_of_update: Callable | None = None,
    idle: Callable | None = None,
    reuse: bool = False,
    apart: bool = False,
    absorbs: Callable | None = None,
    lanes: bool = False,
) -> Callable[[State, Batch], tuple[State, Info]]:
    """The one step behind every driver; computes no norm that is not ``wanted``.

    ``size_of_update(step, grad_norm)``: the norm of the update where arithmetic
    gives it without looking at the update. ``idle(step)``: whether a schedule has the
    step stand still, which is no sign that the run does. ``reuse``: the state of the
    rule holds value and gradient at the parameters. ``apart``: the rule is judged at
    parameters of its own, and what is seen of an iterate is seen there. ``absorbs``:
    whether the rule absorbed what is not finite (see ``_rules/absorb``). ``lanes``:
    whether many such steps are taken side by side.
    """
    precise = "precise" in wanted
    norm = _tree.norm if lanes else _tree.step_norm

    def evaluated(state: State, batch: Batch):
        """(value, grad) for the rule, (value, grad, aux) of what is seen."""
        params = state.params
        if reuse:
            value, grad = known_point(state.opt_state, params)
            return (value, grad), (value, grad, None)
        (value, aux), grad = objective.value_and_grad(params, *batch)
        if not apart:
            return (value, grad), (value, grad, aux)
        judged = evaluation_params(state.opt_state, params)
        (seen, aux), seen_grad = objective.value_and_grad(judged, *batch)
        finite = jnp.isfinite(value) & _tree.all_finite(grad)
        return (value, grad), (jnp.where(finite, seen, jnp.nan), seen_grad, aux)

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        params, dtype = state.params, _tree.real_dtype(state.params)
        (value, grad), (seen, seen_grad, aux) = evaluated(state, batch)
        # Only line searches differentiate it, which no reverse mode goes through.
        searches = keeps_point(state.opt_state)
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
        grad_norm = (_tree.safe_norm if precise else norm)(seen_grad, dtype)

        absorbed = None
        if absorbs is not None:
            fine = jnp.isfinite(seen) & jnp.isfinite(grad_norm)
            absorbed = ~fine & absorbs(fine, updates, opt_state, state.opt_state)

        iterate = Seen(params, seen_grad, dtype, norm)

        def wants(name, compute):
            return jax.lax.stop_gradient(compute()) if name in wanted else None

        def update_norm():
            if size_of_update is not None:
                return size_of_update(state.step, grad_norm)
            size = (norm if precise else _tree.quick_norm)(updates, dtype)
            # A step that was left out is not a small one.
            return size if absorbed is None else jnp.where(absorbed, jnp.nan, size)

        def was_moved(absorbed):
            changed = _moved(idle, state.step, moved, params)
            return changed if absorbed is None else changed | absorbed

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
            measures={
                name: jax.lax.stop_gradient(measure(iterate))
                for name, measure in MEASURES.items()
                if name in wanted
            },
            moved=wants("moved", lambda: was_moved(absorbed)),
            slope=wants("slope", lambda: _tree.dot(grad, updates, dtype)),
            decrement=wants("decrement", lambda: decrease_expected(opt_state, dtype)),
            absorbed=absorbed,
        )
        return State(moved, opt_state, state.step + 1, state.run), info

    return step


def _moved(idle, step, new, old):
    moved = _tree.differ(new, old)
    return moved if idle is None else moved | idle(step)
