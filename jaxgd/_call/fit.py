"""Whether the functions of a call fit, and how much of them fits into memory at once.

This room traces each of the user's functions once, abstractly, so that one that does
not fit is refused before anything is compiled. Errors of the functions themselves come
through as they are. What to do with an objective that is no mean over rows is decided
here as well (``weighed``).
"""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxgd import _tree
from jaxgd._call.trial import kind_of, warn
from jaxgd._checks import describe, short
from jaxgd._loop.plan import (
    Numbers,
    Spec,
    _part,
    objective_of,
    optimizer_of,
    parts_of,
    rate_of,
)
from jaxgd._rows.resident import bytes_computed, coarsest, pairs_rows
from jaxgd._rules.adapter import evaluation_params, find_state
from jaxgd._stop.rules import StopRule
from jaxgd._stop.status import Check
from jaxgd._tree import dtype_of, is_real

# Intermediate bytes, as the program of the objective counts them, up to which all rows
# are evaluated at once where parts of them may not be averaged.
_WHOLE_BYTES = 2**31
_CONFIG: Any = jax.config


def weighed(spec: Spec, numbers: Numbers) -> Spec:
    """``spec`` with the weight of one gradient; raises if a function is no fit."""
    return spec._replace(work=_weight(spec, numbers)[0])


def after_trial(spec: Spec, numbers: Numbers, sample, splits: bool, lanes: int) -> Spec:
    """``spec`` with the blocks that the objective bears, and a warning if it has to be.

    ``sample``: some of the rows. ``splits``: whether rows are evaluated in blocks.
    ``lanes``: how many evaluations are there at a time.
    """
    work, eps, pairs = _weight(spec, numbers)
    if eps is None or not (splits or pairs):
        return spec
    how = {"has_aux": spec.has_aux, "eps": eps, "pairs": pairs, "places": spec.places}
    found = kind_of(spec.fun, numbers, sample, **how)
    if found is None or not (splits or found.kind == "pairs"):
        return spec
    if lanes * work <= _WHOLE_BYTES:  # then a step is not split either
        spec = spec._replace(microbatch_size=None)
    told = "The objective and its gradient are told"
    if found.kind == "counts" and pairs and spec.batch_size is not None:
        # A contrastive loss of all rows is another objective than that of a batch.
        part, why = _part(spec), f"{told}, as in each step,"
    elif lanes * _work_at_once(spec, numbers) <= _WHOLE_BYTES:
        part, why = spec.n, told
    else:
        part, why = _part(spec), f"All rows at once do not fit. {told}"
    where = "all rows at once" if part == spec.n else f"blocks of {part} rows"
    warn(found, f"{why} {'of' if part == spec.n else 'as means over'} {where}.")
    return spec._replace(pass_rows=part)


def _work_at_once(spec: Spec, numbers: Numbers) -> float:
    """Bytes of intermediate results in a gradient of all rows, where they are there."""
    rows = jax.tree.leaves(numbers.data)
    resident = all(isinstance(x, np.ndarray | jax.Array) for x in rows)
    whole = spec._replace(batch_size=None, microbatch_size=None, strata=1)
    return _weight(whole, numbers)[0] if resident else np.inf


def _weight(spec: Spec, numbers: Numbers) -> tuple:
    leaves, treedef = jax.tree.flatten(numbers)
    shapes = tuple((np.shape(x), _tree.dtype_on_device(x.dtype)) for x in leaves)
    traced = any(_tree.is_traced(x) for x in leaves)
    trace = _work.__wrapped__ if traced else _work
    key = spec._replace(exactly=None, lanes=False, layout=None, places=None)
    return trace(key, shapes, treedef, _CONFIG.jax_enable_x64)


@lru_cache(maxsize=256)
def _work(spec: Spec, shapes, treedef, wide) -> tuple:
    del wide  # decides about dtypes, so it is part of the key
    numbers = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*x) for x in shapes])
    rows = None
    if spec.n is not None:
        size = spec.batch_size or spec.n
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), numbers.data
        )
    key = jax.eval_shape(lambda: jax.random.key(0)) if spec.with_key else None

    def call_each(numbers, rows, key, step, check):
        fun = spec.fun.join(numbers.fun)
        positional = (numbers.params, *(() if rows is None else (rows,)), *numbers.args)
        keyword = {"key": key} if spec.with_key else {}
        _objective_fits(fun(*positional, **keyword), spec.has_aux)
        rate = spec.learning_rate.join(numbers.learning_rate)
        if callable(rate):
            _schedule_fits(rate, rate(step))
        if spec.stop is not None:
            _rule_fits(spec.stop.join(numbers.stop), check)

    step = jax.ShapeDtypeStruct((), jnp.int32)
    check = Check.like(_tree.real_dtype(numbers.params))
    jax.eval_shape(call_each, numbers, rows, key, step, check)

    def value_and_grad(numbers, rows, key):
        return objective_of(spec, numbers).value_and_grad(numbers.params, rows, key)

    jaxpr, ((value, _), grad) = jax.make_jaxpr(value_and_grad, return_shape=True)(
        numbers, rows, key
    )
    if spec.optimizer is not None:
        fits = partial(_optimizer_fits, spec)
        jax.eval_shape(fits, numbers, rows, key, value, grad)
    # What has effects, or draws from keys, cannot be tried.
    eps = None if spec.with_key or jaxpr.effects else coarsest(jaxpr.jaxpr)
    pairs = spec.n is not None and pairs_rows(jaxpr.jaxpr, spec.batch_size or spec.n)
    return bytes_computed(jaxpr.jaxpr), eps, pairs


def _objective_fits(out, has_aux) -> None:
    what = "fun must return a real floating scalar"
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "fun must return a pair (value, aux) with has_aux=True, got "
                f"{_form(out)}: return both, or leave has_aux out."
            )
        out, aux = out
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            if dtype_of(leaf) is None:
                raise TypeError(
                    f"fun must return arrays in aux, got {describe(leaf)} as "
                    f"aux{jax.tree_util.keystr(path)}: leave it out."
                )
    dtype = dtype_of(out)
    if dtype is None:
        raise TypeError(
            f"{what}, got {_form(out)}: return the objective alone, or (value, aux) "
            "with has_aux=True."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        fix = "take jnp.real or jnp.abs of it" if is_complex else "convert it to float"
        raise TypeError(f"{what}, got {_form(out)}: {fix}.")
    if np.shape(out) != ():
        raise ValueError(
            f"{what}, got shape {np.shape(out)}: reduce it, for example with jnp.mean "
            "over the rows."
        )


def _schedule_fits(rate, out) -> None:
    came = (
        f"learning_rate as a schedule must return a real scalar, {describe(rate)} "
        f"returned {_form(out)}: pass a function step -> rate, for example an optax "
        "schedule."
    )
    if not is_real(dtype_of(out)):
        raise TypeError(came)
    if np.shape(out) != ():
        raise ValueError(came)


# Rules that no wrapper helps: what their state is, and why they do not fit.
_MISFITS = (
    (
        optax.LookaheadState,
        "optax.lookahead keeps two sets of parameters, minimize has one: pass its fast "
        "rule alone, or one that averages, such as optax.contrib.schedule_free_sgd",
    ),
    (
        contrib.DifferentiallyPrivateAggregateState,
        "differentially private rules take the gradient of each row, minimize has the "
        "mean over the rows of a batch: use optax.noisy_sgd or a loop of your own",
    ),
)


def _optimizer_fits(spec: Spec, numbers: Numbers, rows, key, value, grad) -> None:
    """Whether a first step of the optimizer has the form that every step must have."""
    params = numbers.params
    optimizer = spec.optimizer.join(numbers.optimizer)
    name = describe(optimizer if spec.factory else optimizer.update)
    name = name.split(".<locals>")[0]
    scheduled = callable(rate_of(spec, numbers))
    no_schedule = "pass learning_rate as a number if it takes no schedule"

    def called(what, fix, call):
        return _called(f"{what} {name}", no_schedule if scheduled else fix, call)

    rule = called(
        "a factory for these numbers,",
        "pass learning_rate and hyperparams of the kinds it takes",
        lambda: optimizer_of(spec, numbers),
    )
    state = called(
        "a rule for these params, init of",
        "pass params of a form it takes, or wrap it with optax.masked",
        lambda: rule.init(params),
    )
    for kind, why in _MISFITS:
        if find_state(state, kind) is not None:
            raise TypeError(f"optimizer must work with one gradient a step; {why}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if dtype_of(leaf) is None:
            raise TypeError(
                f"optimizer must keep arrays in its state, init of {name} returned "
                f"{describe(leaf)} as state{jax.tree_util.keystr(path)}: leave it out."
            )
    value_fn = objective_of(spec, numbers).value_fn(rows, key)
    updates, new = called(
        "a rule for this loop, update of",
        "it gets gradient, state and params, and by name value, grad and value_fn of "
        "the batch: let it take these, for params of these shapes",
        lambda: rule.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        ),
    )
    _require_form("updates", updates, params, name)
    _require_form("state", new, state, name)
    evaluation_params(new, params)


_ASKS_FOR_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _called(what, fix, call) -> Any:
    """``call()``; where it fails as calls with wrong arguments do, an error says so."""
    try:
        return call()
    except _ASKS_FOR_A_VALUE as error:
        came = f"asked for the value of a number that is data ({type(error).__name__})"
        fix = "pass a ready rule instead of a factory, or use jnp.where and lax.cond"
        raise TypeError(f"optimizer must be {what} {came}: {fix}.") from error
    except Exception as error:
        is_kind = type(error) in (TypeError, AttributeError)
        known = is_kind or type(error) in (ValueError, KeyError, IndexError)
        if not known or str(error).startswith("optimizer must"):
            raise
        text = short(" ".join(str(error).split()), 120).rstrip(".")
        came = f"raised {type(error).__name__}: {text}"
        raise (TypeError if is_kind else ValueError)(
            f"optimizer must be {what} {came}; {fix}."
        ) from error


def _require_form(what, out, like, name) -> None:
    """A scan needs the same tree and shapes in every step."""

    def form(tree):
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    def shown(tree):
        tree = jax.tree.map(lambda x: list(jnp.shape(x)), tree)
        return short(str(tree).replace("'", ""), 100)

    if form(out) != form(like):
        raise ValueError(
            f"optimizer must return {what} of one form in every step, update of {name} "
            f"returned {shown(out)} for {shown(like)}: keep the tree and the shapes."
        )


def _rule_fits(rule: StopRule, check) -> None:
    """Whether the functions of a rule, and of its parts, return what they should."""
    for part in parts_of(rule):
        _rule_fits(part, check)
    memory = rule.init(check)
    out = rule.update(memory, check)
    if not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(
            "stop: update of a StopRule must return a pair (memory, holds), got "
            f"{_form(out)}: return both."
        )
    new, holds = out
    came = (
        "stop: update of a StopRule must return a bool scalar as holds, got "
        f"{_form(holds)}: return for example jnp.all(...) of a comparison."
    )
    if dtype_of(holds) != np.bool_:
        raise TypeError(came)
    if np.shape(holds) != ():
        raise ValueError(came)
    if jax.tree.map(np.shape, new) != jax.tree.map(np.shape, memory):
        raise ValueError(
            "stop: update of a StopRule must return memory of the form that init made, "
            f"{_form(memory)}, got {_form(new)}: return the same tree and shapes."
        )


def _form(tree) -> str:
    """A pytree as an error shows it: arrays by dtype and shape."""

    def one(leaf):
        array = isinstance(leaf, np.ndarray | jax.Array)
        return f"{leaf.dtype}{list(leaf.shape)}" if array else describe(leaf)

    form = jax.tree.map(one, tree)
    return short(form if isinstance(form, str) else str(form).replace("'", ""))
