"""The two compiled programs of a run: one makes its state, one goes on from any state.

This room owns how step, source of rows, loop and result are made out of the other
rooms, and what of it depends on the call: which numbers a step must see, when the next
check is due, what a full pass is.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxgd import _tree
from jaxgd._devices.layout import everywhere, pinned, untyped
from jaxgd._loop.loop import (
    End,
    Full,
    Parts,
    Run,
    is_finite,
    run_exactly,
    run_to,
    unseen,
)
from jaxgd._loop.plan import (
    Numbers,
    Spec,
    block_of_pass,
    objective_of,
    optimizer_of,
    rate_of,
)
from jaxgd._loop.step import State, descent_step
from jaxgd._result.curvature import Met, nothing_met
from jaxgd._result.history import empty_record, history_of
from jaxgd._result.result import Result, Setting, on_host
from jaxgd._rows.order import first_place, next_epoch_end, place_at, place_taken_up
from jaxgd._rows.resident import chunk_size, pass_key, resident
from jaxgd._rules.absorb import make_absorbs
from jaxgd._rules.adapter import (
    counts_by_itself,
    default_rate,
    evaluation_params,
    expects_decrease,
    has_evaluation_params,
    known_point,
    rate_used,
    reports_rate,
    with_known_point,
)
from jaxgd._rules.rest import answers
from jaxgd._stop.judge import Kind, fresh_watch, make_judge
from jaxgd._stop.rules import AUTO, describe, fields_used, fingerprint, memory_of
from jaxgd._stop.status import Status, succeeded

# Lanes may compute so much more in vain than one run: a chunk has costs of its own, of
# every lane (64 rates of a small logistic regression: 104 us a step without, 82 with).
_LANES_AT_ONCE = 8


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


@partial(jax.jit, static_argnums=0)
def start(spec: Spec, numbers: Numbers) -> State:
    """The state before step 0."""
    params = numbers.params
    dtype = _tree.real_dtype(params)
    rule = stop_rule(spec, numbers)
    needs = _needs(spec, rule, params)
    opt_state = optimizer_of(spec, numbers).init(params)
    full_checks = spec.batch_size is not None
    rows: Any = ()
    if spec.n is not None:
        rows = first_place(spec.n, spec.batch_size, spec.strata, numbers.mark)
    run = Run(
        key=numbers.key,
        rows=rows,
        evaluations=jnp.int32(0),
        skipped=jnp.int32(0),
        watch=() if rule is None else fresh_watch(memory_of(rule, params), dtype),
        rule=()
        if rule is None
        else (jnp.uint32(fingerprint(rule, params)), tuple(numbers.stop)),
        arrived=(jnp.asarray(jnp.nan, dtype), jnp.bool_(True))
        if "moved" in needs
        else (),
        met=nothing_met(dtype) if _same_objective(spec) else (),
        status=jnp.int32(Status.RUNNING),
        checked=jnp.int32(-1),
        seen=unseen(params),
        anchor=params if "anchor" in needs else None,
        history=empty_record(spec.history_rows, dtype),
        checks=empty_record(spec.history_rows if full_checks else 0, dtype),
    )
    # A weak type would be gone after the first chunk, and cost the next a compilation.
    opt_state = jax.tree.map(lambda x: _strong(jnp.asarray(x)), opt_state)
    return in_places(spec, State(params, opt_state, jnp.int32(0), run), params)


def in_places(spec: Spec, state: State, params) -> State:
    """``state`` where parameters and rows are; see ``Places``."""
    places, run = spec.places, state.run
    alone = everywhere(places, replace(state, params=None, opt_state=None, run=None))
    own = pinned(places, (state.params, state.opt_state), params)
    anchor = pinned(places, run.anchor, params)
    run = replace(everywhere(places, replace(run, anchor=None)), anchor=anchor)
    return replace(alone, params=own[0], opt_state=own[1], run=run)


def _strong(x):
    """``x`` without a weak type."""
    return lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


@partial(jax.jit, static_argnums=0)
def go(spec: Spec, numbers: Numbers, state: State, limit) -> Outcome:
    """Goes on from ``state`` for at most ``limit`` steps."""

    def out(kept, on_all):
        apart = has_evaluation_params(state.opt_state)
        judged = kept(numbers.params) if apart else None
        return Outcome(kept(state), judged, *[on_all] * 8)

    return untyped(partial(_go, spec), numbers, state, limit, out=out)


def go_together(spec: Spec, numbers: Numbers, state: State, limit) -> Outcome:
    """``go``, whose runs share one loop where ``vmap`` makes lanes of them."""
    if spec.exactly is not None:  # no loop to share, and a gradient passes
        return go(spec, numbers, state, limit)
    # What the user's functions hold of the caller's trace, JAX cannot make lanes of.
    held = jax.make_jaxpr(partial(go, spec))(numbers, state, limit).consts
    if any(map(_tree.is_traced, held)):
        return go(spec, numbers, state, limit)
    return _lanes_of(spec, ())(numbers, state, limit)


def _lanes_of(spec: Spec, maps: tuple):
    """``go`` under one ``vmap`` for each of ``maps``, (axes of arguments, lanes).

    It stands under a name that every loop in it can ask for all lanes, and one ``vmap``
    more adds another: the innermost comes first.
    """

    @jax.custom_batching.custom_vmap
    def run(*args):
        names = tuple(f"lanes {i}" for i in range(len(maps)))
        sizes = [size for _, size in maps]
        together = spec._replace(axes=names, work=spec.work * math.prod(sizes))
        every = partial(go, together._replace(lanes=spec.lanes or bool(maps)))
        for name, (in_axes, size) in zip(names, maps, strict=True):
            every = jax.vmap(every, in_axes, axis_name=name, axis_size=size)
        return every(*args)

    @run.def_vmap
    def _(size, batched, *args):
        in_axes = jax.tree.map(lambda is_lane: 0 if is_lane else None, tuple(batched))
        found = _lanes_of(spec, (*maps, (in_axes, size)))(*args)
        return found, jax.tree.map(lambda _: True, found)

    return run


def _go(spec: Spec, numbers: Numbers, state: State, limit) -> Outcome:
    rule = stop_rule(spec, numbers)
    state, limit = taken_up(spec, numbers, state, limit)
    parts, full = make_parts(spec, numbers, state, rule)
    if _reuses(spec, state):
        state = replace(state, opt_state=_seen_again(spec, numbers, state))
    if spec.exactly is not None:
        end = _end_of_scan(spec, parts, full, state, spec.exactly)
    else:
        end = run_to(parts, state, limit)
        if spec.batch_size is None and has_evaluation_params(end.state.opt_state):
            end = end._replace(extra=end.extra + 1)  # the last look, of two points
    outcome = outcome_of(spec, numbers, rule, end, limit)
    rest = everywhere(spec.places, outcome._replace(state=None, judged=None))
    return rest._replace(
        state=in_places(spec, outcome.state, numbers.params),
        judged=pinned(spec.places, outcome.judged, numbers.params),
    )


def taken_up(spec: Spec, numbers: Numbers, state: State, limit):
    """``state`` with the memory of this call's rule, and the step to reach."""
    rule = stop_rule(spec, numbers)
    run = _same_rule_or_fresh(state, rule, numbers)
    if spec.n is not None:
        given = spec.n, spec.batch_size, spec.strata, numbers.mark
        run = replace(run, rows=place_taken_up(run.rows, state.step, *given))
    state = replace(state, run=run)
    # Saturating, so that "as many as an int holds" means just that.
    return state, state.step + jnp.minimum(limit, 2**31 - 1 - state.step)


def outcome_of(spec: Spec, numbers: Numbers, rule, end: End, limit) -> Outcome:
    """What is returned of a run that has ended."""
    state, run = end.state, end.state.run
    if spec.n is not None:
        sizes = spec.n, spec.batch_size, spec.strata
        run = replace(run, rows=place_at(run.rows, state.step, *sizes))
        state = replace(state, run=run)
    status = end.status
    if rule is not None and _may_rest(spec, state.opt_state):
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


def make_parts(spec: Spec, numbers: Numbers, state: State, rule, first=None):
    """The loop's parts, and the full pass at a state.

    ``first``: the data are the rows of the steps from ``first`` on, in their order.
    """
    params, run = numbers.params, state.run
    objective = objective_of(spec, numbers, spec.microbatch_size)
    optimizer = optimizer_of(spec, numbers)
    needs = _needs(spec, rule, params)
    rate: Any = _rate_of_step(spec, numbers, state)
    scheduled = callable(rate_of(spec, numbers))
    wanted = set(needs)
    if spec.history_rows:
        wanted.add("update_norm")
        if rate is None and reports_rate(state.opt_state):
            wanted.add("learning_rate")
    if spec.has_aux and spec.batch_size is None:
        wanted.add("aux")
    plain, searches = spec.optimizer is None, _searches(state.opt_state)
    apart = spec.batch_size is None and has_evaluation_params(state.opt_state)
    if searches or apart:
        wanted.add("evaluations")
    told = plain or searches or apart
    same = _same_objective(spec)
    reported = same and expects_decrease(state.opt_state)
    if same and "update_norm" in wanted and not told:
        wanted.add("slope")
    if "expected_decrease" in needs and not plain:
        wanted.add("decrement" if reported else "slope")
    absorbs = None if plain else make_absorbs(optimizer, params)
    step = descent_step(
        objective,
        optimizer,
        frozenset(wanted),
        size_of_update=partial(_size_of_plain_update, rate) if plain else None,
        idle=partial(_rate_is_zero, rate) if scheduled and rate else None,
        reuse=_reuses(spec, state),
        apart=apart,
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
    parts = Parts(
        step=once(lambda state, x: step(state, source.batch(x))),
        inputs=once(source.inputs),
        batch=source.batch,
        size=size,
        rate=rate,
        plain=plain,
        searches=searches,
        judge=None
        if rule is None
        else make_judge(
            rule,
            params,
            Kind(
                rests=_may_rest(spec, state.opt_state),
                reported=reported,
                searches=searches,
                plain=plain,
                waits=rule.name == AUTO,
            ),
        ),
        judge_at_limit=not spec.with_key,
        full=None if spec.batch_size is None else full,
        next_check=partial(
            next_epoch_end, run.rows, spec.n, spec.batch_size, spec.strata
        ),
        final_evaluation=spec.final_evaluation or spec.batch_size is None,
        has_answer=None if absorbs is None else absorbs[0],
        axes=spec.axes,
    )
    return parts, full


def _reuses(spec: Spec, state: State) -> bool:
    """Whether a step finds value and gradient where the one before it left them."""
    known = known_point(state.opt_state, state.params)
    if known is None or not _same_objective(spec) or spec.has_aux:
        return False
    # In fewer bits two objectives may look the same (see ``_seen_again``).
    leaves = jax.tree.leaves((state.params, known))
    return all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in leaves)


def _same_objective(spec: Spec) -> bool:
    """Whether every step sees the same function."""
    return spec.batch_size is None and not spec.with_key


def _seen_again(spec: Spec, numbers: Numbers, state: State):
    """The rule's state with value and gradient of this call's objective in it.

    A run that goes on finds its own there, to the bit. But the objective of this call
    may be another (other data, other ``args``): it is evaluated once, and what differs
    from it by more than rounding is replaced. Within the loop XLA may have evaluated it
    at parameters before they were rounded, that is some ulps of the update away.
    """
    objective = objective_of(spec, numbers, spec.microbatch_size)
    (value, _), grad = objective.value_and_grad(state.params, numbers.data, None)
    known = known_point(state.opt_state, state.params)
    dtype = _tree.real_dtype(state.params)
    eps, norm = 16 * jnp.finfo(value.dtype).eps, _tree.safe_norm(grad, dtype)
    way = state.run.arrived[0] if state.run.arrived else 0.0
    reach = norm * (_tree.norm(state.params, dtype) + jnp.fmax(way, 0.0))
    near = jnp.abs(value - known[0]) <= eps * (jnp.abs(value) + reach)
    near = near & jnp.isfinite(known[0])  # it is not before step 0
    apart = _tree.safe_norm(_tree.subtract(grad, known[1]), dtype)
    most = jnp.fmax(norm, Met(*state.run.met).steepest)
    same = near & (apart <= eps * most)
    return _tree.either(
        same, state.opt_state, with_known_point(state.opt_state, value, grad)
    )


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
    return Full(
        value=value.astype(dtype),
        grad_norm=_tree.safe_norm(grad, dtype),
        grad_max=_tree.largest(grad, dtype),
        params_norm=_tree.norm(params, dtype),
        aux=aux if spec.has_aux else None,
    )


def _end_of_scan(spec: Spec, parts: Parts, full, state: State, steps: int) -> End:
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


def _rate_of_step(spec: Spec, numbers: Numbers, state: State) -> Any:
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


def _rate_at(spec: Spec, numbers: Numbers, state: State):
    """The rate of the next step, else that of the last one, else NaN."""
    rate: Any = _rate_of_step(spec, numbers, state)
    if rate is not None:
        return lax.stop_gradient(rate(state.step))
    used = rate_used(state.opt_state, _tree.real_dtype(state.params))
    # Before the first update a search has a placeholder there.
    return lax.stop_gradient(jnp.where(state.step > 0, used, jnp.nan))


def stop_rule(spec: Spec, numbers: Numbers):
    """The stop rule of a call, or None."""
    return None if spec.stop is None else spec.stop.join(numbers.stop)


def _needs(spec: Spec, rule, params) -> frozenset:
    """What the stop rule wants of every step, or of the parameters at every check."""
    if rule is None:
        return frozenset()
    fields = fields_used(rule, params)
    if spec.batch_size is not None:
        return frozenset({"anchor"} if "update_norm" in fields else ())
    watched = {"update_norm", "params_norm", "moved", "precise"}
    return frozenset(fields & {"grad_max", "expected_decrease"}) | watched


def _may_rest(spec: Spec, opt_state) -> bool:
    """Whether a rule may have fixed points where the gradient is not 0."""
    if spec.optimizer is None or spec.batch_size is not None:
        return False
    return not (_searches(opt_state) or has_evaluation_params(opt_state))


def _searches(opt_state) -> bool:
    return bool(optax.tree.get_all_with_path(opt_state, "num_linesearch_steps"))


def _same_rule_or_fresh(state: State, rule, numbers: Numbers) -> Run:
    """The run's memory, forgotten where another stop rule wrote it."""
    run = state.run
    if rule is None:
        return replace(run, status=jnp.int32(Status.RUNNING))
    print_, old = run.rule
    name = jnp.uint32(fingerprint(rule, numbers.params))
    fresh = fresh_watch(
        memory_of(rule, numbers.params), _tree.real_dtype(numbers.params)
    )
    same = print_ == name
    for a, b in zip(old, numbers.stop, strict=True):
        same = same & jnp.all(jnp.asarray(a) == jnp.asarray(b))
    return replace(
        run,
        watch=_tree.either(same, run.watch, fresh),
        seen=_tree.either(same, run.seen, unseen(numbers.params)),
        rule=(name, tuple(numbers.stop)),
        status=jnp.where(
            same & (run.checked == state.step) & _holds_still(rule, run),
            run.status,
            Status.RUNNING,
        ),
    )


def _holds_still(rule, run: Run):
    """Whether the rule holds at the last check that the run remembers.

    Another rule of the same name, such as that of a lambda, must not end a run by what
    the one before it found.
    """
    return jnp.asarray(rule.update(run.watch.memory, run.seen)[1])


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
            _kind(spec, state),
            None if spec.pass_rows == spec.n else spec.pass_rows,
            spec.exactly is not None,
            spec.final_evaluation or spec.batch_size is None,
        ),
    )
    return result if traced or np.shape(outcome.status) else on_host(result)


def _kind(spec: Spec, state: State) -> str:
    if spec.optimizer is None:
        return "plain"
    if _searches(state.opt_state):
        return "search"
    return "average" if has_evaluation_params(state.opt_state) else "other"


def _numpy(record):
    return jax.tree.map(np.asarray, record)
