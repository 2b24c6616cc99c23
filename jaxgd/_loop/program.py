"""The two compiled programs of a run: one makes its state, one goes on from any state.

This room owns what is compiled: ``start``, ``go`` and the rule by which lanes of
``vmap`` share one loop; and how a state is taken up by another call.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._devices.layout import everywhere, pinned, untyped
from jaxgd._loop.memory import Run, unseen
from jaxgd._loop.outcome import Outcome, end_of_scan, outcome_of
from jaxgd._loop.parts import (
    make_parts,
    needs_of,
    reuses_point,
    same_objective,
    stop_rule,
)
from jaxgd._loop.passes import run_to
from jaxgd._loop.plan import Numbers, Spec, objective_of, optimizer_of
from jaxgd._loop.step import State
from jaxgd._result.curvature import Met, nothing_met
from jaxgd._result.history import empty_record
from jaxgd._rows.order import first_place, place_taken_up
from jaxgd._rules.adapter import has_evaluation_params, known_point, with_known_point
from jaxgd._stop.judge import fresh_watch
from jaxgd._stop.rules import fingerprint, memory_of
from jaxgd._stop.status import Status


@partial(jax.jit, static_argnums=0)
def start(spec: Spec, numbers: Numbers) -> State:
    """The state before step 0."""
    params = numbers.params
    dtype = _tree.real_dtype(params)
    rule = stop_rule(spec, numbers)
    needs = needs_of(spec, rule, params)
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
        met=nothing_met(dtype) if same_objective(spec) else (),
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
    if reuses_point(spec, state):
        state = replace(state, opt_state=_seen_again(spec, numbers, state))
    if spec.exactly is not None:
        end = end_of_scan(spec, parts, full, state, spec.exactly)
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
    run = _same_rule_or_fresh(spec, state, rule, numbers)
    if spec.n is not None:
        given = spec.n, spec.batch_size, spec.strata, numbers.mark
        run = replace(run, rows=place_taken_up(run.rows, state.step, *given))
    state = replace(state, run=run)
    # Saturating, so that "as many as an int holds" means just that.
    return state, state.step + jnp.minimum(limit, 2**31 - 1 - state.step)


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


def _same_rule_or_fresh(spec: Spec, state: State, rule, numbers: Numbers) -> Run:
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
    # Batch descent looks at the iterate again, and has no check to go by.
    holds = spec.batch_size is not None and _holds_still(rule, run)
    return replace(
        run,
        watch=_tree.either(same, run.watch, fresh),
        seen=_tree.either(same, run.seen, unseen(numbers.params)),
        rule=(name, tuple(numbers.stop)),
        status=jnp.where(
            same & (run.checked == state.step) & holds,
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
