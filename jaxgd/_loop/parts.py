"""What a run is made of: the step, its inputs, the judge, the full pass.

This room owns how these come out of the other floors, and what of them depends on the
call: which numbers a step must see, when the next check is due, what a full pass is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgd import _tree
from jaxgd._loop.plan import (
    Numbers,
    Spec,
    block_of_pass,
    objective_of,
    optimizer_of,
    rate_of,
)
from jaxgd._loop.step import State, descent_step
from jaxgd._result.history import COLUMNS
from jaxgd._rows.order import next_epoch_end
from jaxgd._rows.resident import chunk_size, pass_key, resident
from jaxgd._rules.absorb import make_absorbs
from jaxgd._rules.adapter import (
    Kind,
    counts_by_itself,
    default_rate,
    evaluation_params,
    expects_decrease,
    has_evaluation_params,
    known_point,
    reports_rate,
)
from jaxgd._stop.judge import make_judge
from jaxgd._stop.measures import MEASURES, Seen
from jaxgd._stop.rules import AUTO, fields_used

# Lanes may compute so much more in vain than one run: a chunk has costs of its own, of
# every lane (64 rates of a small logistic regression: 104 us a step without, 82 with).
_LANES_AT_ONCE = 8


class Full(NamedTuple):
    """A pass over all rows at one iterate."""

    value: Any
    grad_norm: Any
    measures: Any = None  # by name
    aux: Any = None


class Parts(NamedTuple):
    """What the loop is made of: functions of traced values, and static facts."""

    step: Callable  # (State, input) -> (State, Info)
    inputs: Callable  # (step, closing) -> inputs of the next `size` steps
    batch: Callable  # input of one step -> Batch
    size: int  # steps in a chunk
    rate: Any  # steps -> learning rates; None: Info tells
    kind: Kind  # of the update rule
    judge: Any  # (watch, check, moved) -> (watch, code), or None
    judge_at_limit: bool  # whether the look at the last iterate is a check
    full: Any  # State -> Full; None: every step is a full pass
    next_check: Callable  # (step, checked) -> step of the next full check
    final_evaluation: bool
    has_answer: Any  # whether the rule absorbs NaN; None: no step does
    axes: tuple  # of vmap, where lanes share one loop


def make_parts(spec: Spec, numbers: Numbers, state: State, rule, first=None):
    """The loop's parts, and the full pass at a state.

    ``first``: the data are the rows of the steps from ``first`` on, in their order.
    """
    params, run = numbers.params, state.run
    optimizer = optimizer_of(spec, numbers)
    kind = kind_of(spec, state.opt_state)
    rate: Any = rates_by_step(spec, numbers, state)
    scheduled, tells = callable(rate_of(spec, numbers)), reports_rate(state.opt_state)
    absorbs = None if kind.plain else make_absorbs(optimizer, params)
    step = descent_step(
        objective_of(spec, numbers, spec.microbatch_size),
        optimizer,
        _wanted(spec, rule, kind, params, told=rate is None and tells),
        size_of_update=partial(_size_of_plain_update, rate) if kind.plain else None,
        idle=partial(_rate_is_zero, rate) if scheduled and rate else None,
        reuse=reuses_point(spec, state),
        apart=spec.batch_size is None and kind.averages,
        absorbs=None if absorbs is None else absorbs[1],
        lanes=spec.lanes,
    )
    work = spec.work // _LANES_AT_ONCE if spec.axes else spec.work
    size = chunk_size(numbers.data, spec.batch_size, work)
    source = resident(
        numbers.data,
        run.key,
        batch_size=spec.batch_size,
        strata=spec.strata,
        size=size,
        with_key=spec.with_key,
        since=run.rows,
        pieces=spec.pieces,  # 1 of a Stream
        layout=spec.layout,
        first=first,
    )
    full = _full_pass(spec, numbers, run.key)
    once = partial(jax.jit, inline=True)  # traced once, wherever the loop calls it
    judge = None
    if rule is not None:
        judge = make_judge(rule, params, kind, waits=rule.name == AUTO)
    sizes = spec.n, spec.batch_size, spec.strata
    parts = Parts(
        step=once(lambda state, x: step(state, source.batch(x))),
        inputs=once(source.inputs),
        batch=source.batch,
        size=size,
        rate=rate,
        kind=kind,
        judge=judge,
        judge_at_limit=not spec.with_key,
        full=None if spec.batch_size is None else full,
        next_check=partial(next_epoch_end, run.rows, *sizes),
        final_evaluation=spec.final_evaluation or spec.batch_size is None,
        has_answer=None if absorbs is None else absorbs[0],
        axes=spec.axes,
    )
    return parts, full


def kind_of(spec: Spec, opt_state) -> Kind:
    """What the loop has to know of the rule of a call."""
    plain = spec.optimizer is None
    searches = bool(optax.tree.get_all_with_path(opt_state, "num_linesearch_steps"))
    averages = has_evaluation_params(opt_state)
    rests = not (plain or searches or averages) and spec.batch_size is None
    reported = same_objective(spec) and expects_decrease(opt_state)
    return Kind(plain, searches, averages, reported, rests)


def _wanted(spec: Spec, rule, kind: Kind, params, told: bool) -> frozenset:
    """What a step is asked for: fields of ``Info``, measures, and "precise" norms."""
    needs = needs_of(spec, rule, params)
    wanted = set(needs)
    if spec.history_rows:
        wanted |= {"update_norm", *MEASURES.keys() & COLUMNS}
        if told:  # the rate, by the state of the rule
            wanted.add("learning_rate")
    if spec.has_aux and spec.batch_size is None:
        wanted.add("aux")
    apart = spec.batch_size is None and kind.averages
    if kind.searches or apart:
        wanted.add("evaluations")
    if (
        same_objective(spec)
        and "update_norm" in wanted
        and not (kind.plain or kind.searches or apart)
    ):
        wanted.add("slope")
    if "expected_decrease" in needs and not kind.plain:
        wanted.add("decrement" if kind.reported else "slope")
    return frozenset(wanted)


def reuses_point(spec: Spec, state: State) -> bool:
    """Whether a step finds value and gradient where the one before it left them."""
    known = known_point(state.opt_state, state.params)
    if known is None or not same_objective(spec) or spec.has_aux:
        return False
    # In fewer bits two objectives may look the same (see ``_seen_again``).
    leaves = jax.tree.leaves((state.params, known))
    return all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in leaves)


def same_objective(spec: Spec) -> bool:
    """Whether every step sees the same function."""
    return spec.batch_size is None and not spec.with_key


def _size_of_plain_update(rate, step, grad_norm):
    return rate(step) * grad_norm  # no pass over the update itself


def _rate_is_zero(rate, step):
    return rate(step) == 0


def _full_pass(spec: Spec, numbers: Numbers, key):
    """State -> Full: all rows, in blocks that fit where the steps did."""
    block = spec.microbatch_size
    if spec.batch_size is not None:
        block = block_of_pass(spec, numbers.data)
    objective = objective_of(spec, numbers, block)
    key = pass_key(key) if spec.with_key else None

    def full(state: State) -> Full:
        params = evaluation_params(state.opt_state, state.params)
        (value, aux), grad = objective.value_and_grad(params, numbers.data, key)
        return full_of(spec, params, value, grad, aux)

    return full


def full_of(spec: Spec, params, value, grad, aux) -> Full:
    """A pass over all rows, as the loop sees it."""
    dtype = _tree.real_dtype(params)
    seen = Seen(params, grad, dtype, _tree.norm)
    return Full(
        value=value.astype(dtype),
        grad_norm=_tree.safe_norm(grad, dtype),
        measures={name: measure(seen) for name, measure in MEASURES.items()},
        aux=aux if spec.has_aux else None,
    )


def rates_by_step(spec: Spec, numbers: Numbers, state: State) -> Any:
    """steps -> rates where arithmetic tells them, or None."""
    rate = rate_of(spec, numbers)
    if callable(rate) and counts_by_itself(state.opt_state):
        return None
    if rate is None and spec.factory:
        rate = default_rate(spec.optimizer.join(numbers.optimizer))
    if rate is None:
        return None
    dtype = _tree.real_dtype(numbers.params)
    if not callable(rate):
        return lambda steps: jnp.broadcast_to(
            jnp.asarray(rate, dtype), jnp.shape(steps)
        )
    return jnp.vectorize(rate)


def stop_rule(spec: Spec, numbers: Numbers):
    """The stop rule of a call, or None."""
    return None if spec.stop is None else spec.stop.join(numbers.stop)


def needs_of(spec: Spec, rule, params) -> frozenset:
    """What the stop rule wants of every step, or of the parameters at every check."""
    if rule is None:
        return frozenset()
    fields = fields_used(rule, params)
    if spec.batch_size is not None:
        return frozenset({"anchor"} if "update_norm" in fields else ())
    watched = {"update_norm", "params_norm", "moved", "precise"}
    return frozenset(fields & {*MEASURES, "expected_decrease"}) | watched
