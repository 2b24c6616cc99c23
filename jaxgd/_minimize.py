"""The front door: validate, wire, run.

This room owns the life of a call. It makes the step, the source of rows, the loop and
the result out of the other rooms, in two compiled programs: one makes the state before
step 0, the other goes on from any state.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgd import _tree
from jaxgd._check import check_all
from jaxgd._diagnosis import Met, nothing_met
from jaxgd._gradient import even_block
from jaxgd._history import empty_record, history_of
from jaxgd._loop import End, Full, Parts, Run, run_exactly, run_to, unseen
from jaxgd._result import Result, Setting, Status, on_host
from jaxgd._rows import divide_product
from jaxgd._rules import (
    counts_by_itself,
    default_rate,
    evaluation_params,
    has_evaluation_params,
    known_point,
    reports_rate,
    with_known_point,
)
from jaxgd._source import chunk_size, pass_block, pass_key, resident
from jaxgd._spec import Numbers, Spec, objective_of, optimizer_of, rate_of
from jaxgd._step import State, descent_step
from jaxgd._stop import (
    StopRule,
    describe,
    fields_used,
    fingerprint,
    fresh_watch,
    make_judge,
)


def minimize(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    args: tuple | list = (),
    batch_size: int | None = None,
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    max_steps: Any = None,
    epochs: Any = None,
    stop: StopRule | Literal["auto"] | None = "auto",
    key: Any = None,
    state: State | None = None,
    has_aux: bool = False,
    with_key: bool = False,
    microbatch_size: int | None = None,
    strata: int | None = None,
    final_evaluation: bool = True,
    history_rows: int = 1000,
) -> Result:
    r"""Minimizes an objective by gradient descent, as one compiled program.

    .. math:: \theta_{t+1} = \theta_t - \alpha\, \nabla J(\theta_t; \text{batch}_t)

    or any optax rule in place of :math:`-\alpha \nabla J`. The gradient comes from
    ``jax.value_and_grad``. The batch is all rows (batch gradient descent), one row
    (stochastic gradient descent) or ``batch_size`` rows (mini-batch), taken from an
    endless stream of shuffled epochs.

    Args:
      fun: the objective, a JAX function returning a real floating scalar:
        ``fun(params, *args)`` without data, ``fun(params, batch, *args)`` with data,
        where ``batch`` has the structure of ``data`` with a leading axis of rows and
        the value is a mean over those rows. It may be a callable pytree; its arrays
        are data then. A new closure is a new program.
      params: the start, a pytree of floating or complex arrays; never modified.
      data: a pytree of arrays that share a leading axis of ``n`` rows.
      args: a tuple of extra traced arguments of ``fun``.
      batch_size: rows per step, ``1 <= batch_size <= n``; None for all.
      learning_rate: a number or an optax schedule (``step -> rate``). Alone, it means
        plain descent. With neither a rate nor an optimizer, rates are found on the
        way: by ``barzilai_borwein`` for batch descent, by ``parabolic_rms`` with
        ``batch_size``.
      optimizer: an optax rule (``optax.adam(1e-3)``), or a factory (``optax.adam``)
        that is called as ``optimizer(learning_rate, **hyperparams)`` inside the
        compiled program, so that new numbers cost no compilation.
      hyperparams: further arguments of a factory. Floats and floating arrays are data;
        bool, int, str, None and functions are structure.
      max_steps: the limit in steps; default 1000 without ``batch_size``. 0 evaluates
        the start.
      epochs: the limit in passes over the data, may be fractional; default 10 with
        ``batch_size``.
      stop: ``"auto"`` (a small gradient for batch descent, no early stop otherwise), a
        stop rule, or None: exactly ``max_steps`` steps in a static scan, which reverse
        mode can differentiate.
      key: a JAX PRNG key or an int seed, default 0; it alone decides the row order.
      state: a ``Result.state`` to go on from; ``params`` then gives only structure.
      has_aux: ``fun`` returns ``(value, aux)``.
      with_key: ``fun`` takes ``key=``, a function of ``(key, step)``, the same for all
        blocks of a step; full passes use one fixed key.
      microbatch_size: compute each gradient over blocks of this many rows.
      strata: take ``batch_size / strata`` rows of each of this many equal blocks of
        rows per step; default: the number of shards of ``data``.
      final_evaluation: False skips the full pass at the end of a mini-batch run.
      history_rows: upper bound on the rows of history.

    Returns:
      A ``Result``. Reaching the limit, diverging or stalling are outcomes
      (``result.status``), not exceptions.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument has a wrong value or shape.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> x = jnp.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
      >>> y = jnp.array([2.0, 5.0, 9.0])
      >>> def loss(theta, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ theta - y) ** 2) / 2
      >>> result = jaxgd.minimize(
      ...     loss, jnp.zeros(2), (x, y), learning_rate=0.1, max_steps=5000
      ... )
      >>> bool(result.converged)
      True

    References:
      Cauchy, Methode generale pour la resolution des systemes d'equations simultanees
      (1847). Robbins and Monro, A stochastic approximation method (1951). Bottou,
      Curtis and Nocedal, Optimization methods for large-scale machine learning, SIAM
      Review 60 (2018).
    """
    spec, numbers, limit = check_all(
        fun,
        params,
        data,
        args=args,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        hyperparams=hyperparams,
        max_steps=max_steps,
        epochs=epochs,
        stop=stop,
        key=key,
        state=state,
        has_aux=has_aux,
        with_key=with_key,
        microbatch_size=microbatch_size,
        strata=strata,
        final_evaluation=final_evaluation,
        history_rows=history_rows,
    )
    if state is not None:
        _require_same_problem(_start.eval_shape(spec, numbers), state)
    fresh = _start(spec, numbers)
    if state is not None:
        fresh = _resumed(fresh, state)
    outcome = _go(spec, numbers, fresh, limit)
    return _finished(spec, outcome)


class Outcome(NamedTuple):
    """What the compiled program returns; parameters are in the state."""

    state: Any
    judged: Any  # evaluation parameters where they are not the state's, else None
    value: Any
    grad_norm: Any
    aux: Any
    status: Any
    evaluations: Any
    limit: Any
    criteria: Any


@partial(jax.jit, static_argnums=0)
def _start(spec: Spec, numbers: Numbers) -> State:
    """The state before step 0."""
    params = numbers.params
    dtype = _tree.real_dtype(params)
    rule = _stop_rule(spec, numbers)
    needs = _needs(spec, rule, params)
    opt_state = optimizer_of(spec, numbers).init(params)
    full_checks = spec.batch_size is not None
    run = Run(
        key=numbers.key,
        evaluations=jnp.int32(0),
        watch=() if rule is None else fresh_watch(rule, params),
        rule=()
        if rule is None
        else (jnp.uint32(fingerprint(rule)), tuple(numbers.stop)),
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
    opt_state = jax.tree.map(jnp.asarray, opt_state)
    return State(params, opt_state, jnp.int32(0), run)


@partial(jax.jit, static_argnums=0)
def _go(spec: Spec, numbers: Numbers, state: State, limit) -> Outcome:
    """Goes on from ``state`` for at most ``limit`` steps."""
    rule = _stop_rule(spec, numbers)
    state = replace(state, run=_same_rule_or_fresh(state, rule, numbers))
    parts, full = _parts(spec, numbers, state, rule)
    if _reuses(spec, state):
        state = replace(state, opt_state=_seen_again(spec, numbers, state))
    # Saturating, so that "as many as an int holds" means just that.
    limit = state.step + jnp.minimum(limit, 2**31 - 1 - state.step)
    if spec.exactly is not None:
        end = _end_of_scan(spec, parts, full, state, spec.exactly)
    else:
        end = run_to(parts, state, limit)
        if spec.batch_size is None and has_evaluation_params(end.state.opt_state):
            end = end._replace(extra=end.extra + 1)  # the last look, of two points
    run = end.state.run
    found = (
        ()
        if rule is None
        else describe(rule, end.watch.memory, end.seen, _succeeded(end.status))
    )
    if spec.with_key and spec.batch_size is None:  # the last look was no check
        seen = end.status != Status.MAX_STEPS
        found = tuple(c._replace(holds=c.holds & seen) for c in found)
    judged = None
    if has_evaluation_params(end.state.opt_state):
        judged = evaluation_params(end.state.opt_state, end.state.params)
    return Outcome(
        state=end.state,
        judged=judged,
        value=end.full.value,
        grad_norm=end.full.grad_norm,
        aux=end.full.aux,
        status=end.status,
        evaluations=run.evaluations + end.extra,
        limit=limit,
        criteria=found,
    )


def _parts(spec: Spec, numbers: Numbers, state: State, rule):
    """The loop's parts, and the full pass at a state."""
    params, run = numbers.params, state.run
    objective = objective_of(spec, numbers, spec.microbatch_size)
    optimizer = optimizer_of(spec, numbers)
    needs = _needs(spec, rule, params)
    rate: Any = _rate_of_step(spec, numbers)
    scheduled = callable(rate_of(spec, numbers))
    if scheduled and counts_by_itself(state.opt_state):
        rate = None
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
    if _same_objective(spec) and "update_norm" in wanted and not told:
        wanted.add("slope")
    step = descent_step(
        objective,
        optimizer,
        frozenset(wanted),
        size_of_update=partial(_size_of_plain_update, rate) if plain else None,
        idle=partial(_rate_is_zero, rate) if scheduled and rate else None,
        reuse=_reuses(spec, state),
        apart=apart,
    )
    size = chunk_size(numbers.data, spec.batch_size, spec.work)
    source = resident(
        numbers.data,
        run.key,
        batch_size=spec.batch_size,
        strata=spec.strata,
        size=size,
        with_key=spec.with_key,
        within=spec.small,
        lanes=spec.lanes,
    )
    full = _full_pass(spec, numbers, run.key)
    once = partial(jax.jit, inline=True)  # traced once, wherever the loop calls it
    parts = Parts(
        step=once(lambda state, x: step(state, source.batch(x))),
        inputs=once(source.inputs),
        size=size,
        rate=rate,
        plain=plain,
        judge=None if rule is None else make_judge(rule, params),
        judge_at_limit=not spec.with_key,
        full=None if spec.batch_size is None else full,
        next_check=partial(_next_check, spec.n, spec.batch_size),
        final_evaluation=spec.final_evaluation or spec.batch_size is None,
        lanes=spec.lanes,
        small=spec.small,
    )
    return parts, full


def _reuses(spec: Spec, state: State) -> bool:
    """Whether a step finds value and gradient where the one before it left them."""
    known = known_point(state.opt_state)
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
    from it by more than rounding is replaced.
    """
    objective = objective_of(spec, numbers, spec.microbatch_size)
    (value, _), grad = objective.value_and_grad(state.params, numbers.data, None)
    known = known_point(state.opt_state)
    dtype = _tree.real_dtype(state.params)
    eps = 16 * jnp.finfo(value.dtype).eps
    near = jnp.abs(value - known[0]) <= eps * jnp.abs(value)
    apart = _tree.norm(_tree.subtract(grad, known[1]), dtype)
    most = jnp.fmax(_tree.norm(grad, dtype), Met(*state.run.met).steepest)
    same = near & (apart <= eps * most)
    return _tree.select(
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
        rows = min(spec.microbatch_size or spec.batch_size, spec.batch_size)
        block = even_block(
            spec.n, pass_block(rows, spec.work * rows // spec.batch_size, spec.n)
        )
    objective = objective_of(spec, numbers, block)
    key = pass_key(key) if spec.with_key else None

    def full(state: State) -> Full:
        params = evaluation_params(state.opt_state, state.params)
        dtype = _tree.real_dtype(params)
        (value, aux), grad = objective.value_and_grad(params, numbers.data, key)
        return Full(
            value=value.astype(dtype),
            grad_norm=_tree.safe_norm(grad, dtype),
            grad_max=_tree.largest(grad, dtype),
            params_norm=_tree.norm(params, dtype),
            aux=aux if spec.has_aux else None,
        )

    return full


def _end_of_scan(spec: Spec, parts: Parts, full, state: State, steps: int) -> End:
    state, status = run_exactly(parts, state, steps)
    wanted = parts.final_evaluation
    nan = jnp.full((), jnp.nan, _tree.real_dtype(state.params))
    seen = full(state) if wanted else Full(nan, nan)
    if wanted:
        finite = jnp.isfinite(seen.value) & jnp.isfinite(seen.grad_norm)
        late = ~finite & (status == Status.MAX_STEPS)
        bad = jnp.where(state.step == 0, Status.NON_FINITE, Status.DIVERGED)
        status = jnp.where(late, bad, status)
    status = status.astype(jnp.int32)
    return End(state, status, seen, (), unseen(state.params), jnp.int32(wanted))


def _rate_of_step(spec: Spec, numbers: Numbers) -> Any:
    """steps -> rates where arithmetic tells them, or None."""
    rate = rate_of(spec, numbers)
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


def _stop_rule(spec: Spec, numbers: Numbers):
    return None if spec.stop is None else spec.stop.join(numbers.stop)


def _needs(spec: Spec, rule, params) -> frozenset:
    """What the stop rule wants of every step, or of the parameters at every check."""
    if rule is None:
        return frozenset()
    fields = fields_used(rule, params)
    if spec.batch_size is not None:
        return frozenset({"anchor"} if "update_norm" in fields else ())
    watched = {"update_norm", "params_norm", "moved", "precise"}
    return frozenset(fields & {"grad_max"}) | watched


def _searches(opt_state) -> bool:
    return bool(optax.tree.get_all_with_path(opt_state, "num_linesearch_steps"))


def _next_check(n, batch_size, step, checked):
    """The first step ``ceil(j * n / batch_size)``, j >= 1, that is still to check."""
    j, _ = divide_product(step, batch_size, n)

    def after(j):
        whole, rest = divide_product(j, n, batch_size)
        return whole + (rest > 0).astype(jnp.int32)

    due = (j >= 1) & (after(j) == step) & (checked < step)
    return jnp.where(due, step, after(j + 1))


def _same_rule_or_fresh(state: State, rule, numbers: Numbers) -> Run:
    """The run's memory, forgotten where another stop rule wrote it."""
    run = state.run
    if rule is None:
        return replace(run, status=jnp.int32(Status.RUNNING))
    print_, old = run.rule
    same = print_ == jnp.uint32(fingerprint(rule))
    for a, b in zip(old, numbers.stop, strict=True):
        same = same & jnp.all(jnp.asarray(a) == jnp.asarray(b))
    return replace(
        run,
        watch=_tree.select(same, run.watch, fresh_watch(rule, numbers.params)),
        seen=_tree.select(same, run.seen, unseen(numbers.params)),
        rule=(jnp.uint32(fingerprint(rule)), tuple(numbers.stop)),
        status=jnp.where(
            same & (run.checked == state.step), run.status, Status.RUNNING
        ),
    )


def _require_same_problem(fresh: State, state) -> None:
    """A ValueError names the first leaf of ``state`` that differs from ``fresh``."""
    for name in ("params", "opt_state"):
        _require_alike(f"state.{name}", getattr(state, name), getattr(fresh, name))
    old, new = state.run, fresh.run
    for name in ("history", "checks"):
        rows = np.shape(getattr(old, name).step)[-1]
        expected = np.shape(getattr(new, name).step)[-1]
        if rows != expected:
            raise ValueError(
                f"state.run.{name} has room for {rows} rows, this call for {expected}: "
                "pass the history_rows of the first run, and batch_size only if it had "
                "one."
            )


def _resumed(fresh: State, state) -> State:
    """``state`` in the form of ``fresh``: another rule finds fresh memory."""
    old, new = state.run, fresh.run
    same_rule = _alike((old.watch, old.rule), (new.watch, new.rule))
    run = replace(
        old,
        watch=old.watch if same_rule else new.watch,
        rule=old.rule if same_rule else new.rule,
        status=old.status if same_rule else new.status,
        seen=old.seen if same_rule else new.seen,
        arrived=old.arrived if _alike(old.arrived, new.arrived) else new.arrived,
        anchor=old.anchor if _alike(old.anchor, new.anchor) else new.anchor,
    )
    return replace(state, run=run)


def _alike(a, b) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(
        np.shape(x) == np.shape(y) and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _require_alike(name, tree, expected) -> None:
    fix = (
        "go on with the params, optimizer and fun of the run that made the state (a "
        "schedule keeps a counter of steps, a number none)"
    )
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        raise ValueError(
            f"{name} is of another problem: expected {jax.tree.structure(expected)}, "
            f"got {jax.tree.structure(tree)}; {fix}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, leaf), like in pairs:
        if np.shape(leaf) != np.shape(like) or leaf.dtype != like.dtype:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is of another problem: expected "
                f"{like.dtype}{list(np.shape(like))}, got {leaf.dtype}"
                f"{list(np.shape(leaf))}; {fix}."
            )


def _succeeded(status):
    return (status >= Status.GRADIENT_SMALL) & (status <= Status.TARGET_REACHED)


def _finished(spec: Spec, outcome: Outcome) -> Result:
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
        history=history_of(run.history),
        checks=history_of(run.checks),
        state=state,
        limit=outcome.limit,
        criteria=outcome.criteria,
        setting=Setting(
            spec.n, spec.batch_size, spec.stop is not None, _kind(spec, state)
        ),
    )
    return result if traced else on_host(result)


def _kind(spec: Spec, state: State) -> str:
    if spec.optimizer is None:
        return "plain"
    if _searches(state.opt_state):
        return "search"
    return "average" if has_evaluation_params(state.opt_state) else "other"


def _numpy(record):
    return jax.tree.map(np.asarray, record)
