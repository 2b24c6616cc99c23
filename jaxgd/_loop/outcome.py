"""What a run returns: the compiled program's ``Outcome``, the user's ``Result``."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._loop.memory import is_finite, unseen
from jaxgd._loop.parts import Full, Parts, kind_of, rates_by_step
from jaxgd._loop.passes import End, run_exactly
from jaxgd._loop.plan import Numbers, Spec, optimizer_of
from jaxgd._loop.step import State
from jaxgd._result.history import history_of
from jaxgd._result.result import Result, Setting, on_host
from jaxgd._rows.order import place_at
from jaxgd._rules.adapter import evaluation_params, has_evaluation_params, rate_used
from jaxgd._rules.rest import answers
from jaxgd._stop.rules import describe
from jaxgd._stop.status import Status, succeeded


class Outcome(NamedTuple):
    """What the compiled program returns; parameters are in the state."""

    state: Any
    judged: Any  # evaluation parameters where they are not the state's, else None
    value: Any
    grad_norm: Any
    aux: Any
    status: Any
    evaluations: Any
    learning_rate: Any
    limit: Any
    criteria: Any


def outcome_of(spec: Spec, numbers: Numbers, rule, end: End, limit) -> Outcome:
    """What is returned of a run that has ended."""
    state, run = end.state, end.state.run
    if spec.n is not None:
        sizes = spec.n, spec.batch_size, spec.strata
        run = replace(run, rows=place_at(run.rows, state.step, *sizes))
        state = replace(state, run=run)
    status = end.status
    if rule is not None and kind_of(spec, state.opt_state).rests:
        status = _rest_or_stall(spec, numbers, end)
    found = (
        ()
        if rule is None
        else describe(rule, end.watch.memory, end.seen, succeeded(status))
    )
    seen = is_finite(end.seen)
    if spec.with_key and spec.batch_size is None:  # the last look was no check
        seen = seen & (end.status != Status.MAX_STEPS)
    found = tuple(c._replace(holds=c.holds & seen) for c in found)
    judged = None
    if has_evaluation_params(end.state.opt_state):
        judged = evaluation_params(end.state.opt_state, end.state.params)
    return Outcome(
        state=state,
        judged=judged,
        value=end.full.value,
        grad_norm=end.full.grad_norm,
        aux=end.full.aux,
        status=status,
        evaluations=run.evaluations + end.extra,
        learning_rate=_rate_at(spec, numbers, end.state),
        limit=limit,
        criteria=found,
    )


def end_of_scan(spec: Spec, parts: Parts, full, state: State, steps: int) -> End:
    """The end of a run of a fixed number of steps."""
    state, status = run_exactly(parts, state, steps)
    wanted = parts.final_evaluation
    nan = jnp.full((), jnp.nan, _tree.real_dtype(state.params))
    seen = full(state) if wanted else Full(nan, nan)
    if wanted:
        finite = is_finite(seen)
        late = ~finite & (status == Status.MAX_STEPS)
        if parts.has_answer is not None:
            late = late & ~parts.has_answer
        bad = jnp.where(state.step == 0, Status.NON_FINITE, Status.DIVERGED)
        status = jnp.where(late, bad, status)
    status = status.astype(jnp.int32)
    return End(state, status, seen, (), unseen(state.params), jnp.int32(wanted))


def _rest_or_stall(spec: Spec, numbers: Numbers, end: End):
    """The status of a run whose steps have died down: at rest, if its rule is awake."""
    state, watch, optimizer = end.state, end.watch, optimizer_of(spec, numbers)
    last = end.seen.update_norm / end.seen.grad_norm

    def awake(params, opt_state):
        seen = end.full.value, end.full.grad_norm, last, watch.gain
        return answers(optimizer, params, opt_state, *seen)

    rests = end.status == Status.AT_REST
    asleep = ~lax.cond(
        rests, awake, lambda *_: jnp.bool_(True), state.params, state.opt_state
    )
    return jnp.where(rests & asleep, Status.STALLED, end.status)


def _rate_at(spec: Spec, numbers: Numbers, state: State):
    """The rate of the next step, else that of the last one, else NaN."""
    rate: Any = rates_by_step(spec, numbers, state)
    if rate is not None:
        return lax.stop_gradient(rate(state.step))
    used = rate_used(state.opt_state, _tree.real_dtype(state.params))
    # Before the first update a search has a placeholder there.
    return lax.stop_gradient(jnp.where(state.step > 0, used, jnp.nan))


def finished(spec: Spec, outcome: Outcome) -> Result:
    """The result of one run, or of lanes of them."""
    state, run = outcome.state, outcome.state.run
    traced = any(_tree.is_traced(x) for x in jax.tree.leaves(outcome))
    if not traced:
        outcome.value.block_until_ready()  # all of them come at once
        run = replace(run, history=_numpy(run.history), checks=_numpy(run.checks))
    result = Result(
        params=state.params if outcome.judged is None else outcome.judged,
        value=outcome.value,
        grad_norm=outcome.grad_norm,
        aux=outcome.aux,
        status=outcome.status,
        steps=state.step,
        evaluations=outcome.evaluations,
        skipped=run.skipped,
        learning_rate=outcome.learning_rate,
        history=history_of(run.history),
        checks=history_of(run.checks),
        state=state,
        limit=outcome.limit,
        criteria=outcome.criteria,
        setting=Setting(
            spec.n,
            spec.batch_size,
            spec.stop is not None,
            _kind_in_words(spec, state),
            None if spec.pass_rows == spec.n else spec.pass_rows,
            spec.exactly is not None,
            spec.final_evaluation or spec.batch_size is None,
        ),
    )
    return result if traced or np.shape(outcome.status) else on_host(result)


def _kind_in_words(spec: Spec, state: State) -> str:
    kind = kind_of(spec, state.opt_state)
    if kind.plain:
        return "plain"
    return "search" if kind.searches else "average" if kind.averages else "other"


def _numpy(record):
    return jax.tree.map(np.asarray, record)
