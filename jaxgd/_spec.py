"""The structure and the numbers of a call, and whether the user's functions fit.

This room owns what a compiled program is keyed by (``Spec``) and what it is fed with
(``Numbers``), and traces each of the user's functions once, abstractly, so that one
that does not fit is refused before anything is compiled. Errors of the functions
themselves come through as they are.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxgd import _tree
from jaxgd._gradient import even_block, make_objective
from jaxgd._loop import Check
from jaxgd._means import is_mean_over_rows
from jaxgd._native import available, can_be_one_function, one_cpu
from jaxgd._processes import on_all_processes
from jaxgd._rules import (
    call_factory,
    describe,
    evaluation_params,
    find_state,
    require_rule,
)
from jaxgd._shards import undisturbed, untyped
from jaxgd._source import SMALL_WORK, bytes_computed, cache_block, pass_block
from jaxgd._stop import StopRule
from jaxgd._tree import Split, short

_CONFIG: Any = jax.config


class Spec(NamedTuple):
    """Everything that is structure: the key of the compiled program."""

    fun: Split
    optimizer: Any  # Split, or None for plain descent
    factory: bool
    learning_rate: Split
    hyperparams: Split
    stop: Split | None
    batch_size: Any  # int, or None for all rows
    strata: int
    n: Any  # rows of the data, or None
    layout: Any  # Layout of rows split over devices, or None
    places: Any  # Places of the results, or None
    pieces: int  # of the rows, and of those of a batch, that a block takes its part of
    microbatch_size: int | None
    has_aux: bool
    with_key: bool
    final_evaluation: bool
    history_rows: int
    exactly: int | None  # steps of a static scan
    lanes: bool  # under vmap
    axes: tuple = ()  # of vmap, where lanes share one loop
    work: int = 0  # bytes of intermediate results in one gradient
    small: bool = False  # whether starting its kernels is what takes a step's time
    cpu_block: int | None = None  # rows of a full batch to evaluate at once on a CPU
    mean_of_shards: bool = False  # whether each device may take its own mean


class Numbers(NamedTuple):
    """Everything that is data: a pytree of arrays."""

    fun: Any
    params: Any
    data: Any
    args: Any
    optimizer: Any
    learning_rate: Any
    hyperparams: Any
    stop: Any
    key: Any


def objective_of(spec: Spec, numbers: Numbers, block=None):
    """The objective of a call, its gradient in blocks of ``block`` rows."""
    return make_objective(
        lambda fun, args: (spec.fun.join(fun), args),
        (numbers.fun, numbers.args),
        has_aux=spec.has_aux,
        block=block,
        cpu_block=spec.cpu_block,
        pieces=spec.pieces,
        shards=spec.layout if spec.mean_of_shards else None,
        places=spec.places if spec.places is not None and spec.places.split else None,
    )


def rate_of(spec: Spec, numbers: Numbers) -> Any:
    """The rate as the rule gets it: an array, a schedule of that dtype, or None."""
    rate = spec.learning_rate.join(numbers.learning_rate)
    if rate is None or hasattr(rate, "dtype"):
        return rate
    dtype = _tree.real_dtype(numbers.params)
    return lambda step: jnp.asarray(rate(step)).astype(dtype)


def optimizer_of(spec: Spec, numbers: Numbers) -> optax.GradientTransformationExtraArgs:
    """The rule of a call."""
    rate = rate_of(spec, numbers)
    if spec.optimizer is None:
        return optax.with_extra_args_support(optax.sgd(rate))
    optimizer = spec.optimizer.join(numbers.optimizer)
    if not spec.factory:
        return require_rule(optimizer)
    return call_factory(optimizer, rate, spec.hyperparams.join(numbers.hyperparams))


def block_of_pass(spec: Spec, data) -> int:
    """Rows in a block of a full pass of a mini-batch run."""
    rows = min(spec.microbatch_size or spec.batch_size, spec.batch_size)
    work = spec.work * rows // spec.batch_size
    block = pass_block(rows, work, spec.n, data)
    return even_block(spec.n // spec.pieces, -(-block // spec.pieces)) * spec.pieces


def weighed(spec: Spec, numbers: Numbers) -> Spec:
    """``spec`` with the weight of one gradient; raises if a function is no fit."""
    leaves, treedef = jax.tree.flatten(numbers)
    shapes = tuple((np.shape(x), x.dtype) for x in leaves)
    traced = any(_tree.is_traced(x) for x in leaves)
    trace = _work.__wrapped__ if traced else _work
    wide = _CONFIG.jax_enable_x64
    key = spec._replace(exactly=None, lanes=False, layout=None, places=None)
    work, small, block, plain = trace(key, shapes, treedef, wide)
    part = _part_of_shard(spec) if spec.layout is not None else block
    told = part is not None and plain and not traced
    told = told and (spec.layout is not None or one_cpu())
    told = told and _splits(spec, part, numbers, shapes, treedef, wide)
    if spec.layout is not None:
        told = on_all_processes(spec.layout, told)
        return spec._replace(work=work, mean_of_shards=told)
    small = small and not spec.lanes and available()
    return spec._replace(work=work, small=small, cpu_block=block if told else None)


def _part_of_shard(spec: Spec) -> int | None:
    """Rows of a batch on one device, where nothing but rows is split."""
    if not spec.layout.alone or spec.places is None or spec.places.split:
        return None
    return (spec.batch_size or spec.n) // spec.layout.shards


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
    work = bytes_computed(jaxpr.jaxpr)
    small = work <= SMALL_WORK and can_be_one_function(jaxpr.jaxpr)
    block = None
    if spec.batch_size is None and spec.n is not None and spec.microbatch_size is None:
        block = cache_block(numbers.data, work)
    plain = not (spec.has_aux or spec.with_key or jaxpr.effects)
    exact = not any(jnp.finfo(d).bits < 32 for d in _float_dtypes(jaxpr))
    return work, small, block, plain and exact


def _float_dtypes(jaxpr) -> set:
    dtypes = {v.aval.dtype for v in jaxpr.jaxpr.outvars}
    return {d for d in dtypes if jnp.issubdtype(d, jnp.floating)}


# What was found of objectives. Their programs decide, which all calls with these shapes
# share; the rows of the first call only tell means from sums.
_TRIED: dict = {}


def _splits(spec: Spec, part, numbers: Numbers, *rest) -> bool:
    """Whether batches may be split into parts of so many rows."""
    key = (spec, part, *rest)
    if key not in _TRIED:
        if len(_TRIED) >= 256:  # it keeps objectives alive
            _TRIED.clear()
        try:
            objective = objective_of(spec, numbers)
            sizes = part, spec.batch_size or spec.n
            given = numbers.params, numbers.data, sizes
            _TRIED[key] = is_mean_over_rows(objective, *given) and _fits_shards(
                spec, numbers
            )
        except Exception:  # an objective that takes no other number of rows
            _TRIED[key] = False
    return _TRIED[key]


def _fits_shards(spec: Spec, numbers: Numbers) -> bool:
    """Raises if the objective cannot be traced for the rows of one device.

    It may hold arrays of a mesh of its own, which ``shard_map`` takes from nobody.
    """
    if spec.layout is not None:
        spec = spec._replace(mean_of_shards=True)

        def value_and_grad(numbers):
            objective = objective_of(spec, numbers)
            return objective.value_and_grad(numbers.params, numbers.data, None)

        with undisturbed(spec.places):
            jax.eval_shape(partial(untyped, value_and_grad), numbers)
    return True


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


def parts_of(rule: StopRule) -> list:
    """The rules that any_of or all_of made one rule of."""
    leaves = jax.tree.leaves(rule.init, is_leaf=lambda x: isinstance(x, StopRule))
    return [leaf for leaf in leaves if isinstance(leaf, StopRule)]


def _form(tree) -> str:
    """A pytree as an error shows it: arrays by dtype and shape."""

    def one(leaf):
        array = isinstance(leaf, np.ndarray | jax.Array)
        return f"{leaf.dtype}{list(leaf.shape)}" if array else describe(leaf)

    form = jax.tree.map(one, tree)
    return short(form if isinstance(form, str) else str(form).replace("'", ""))


def dtype_of(leaf) -> Any:
    """The dtype of numbers that JAX knows, or None."""
    if isinstance(leaf, bool | int | float | complex):
        return np.dtype(type(leaf))
    if not isinstance(leaf, np.generic | np.ndarray | jax.Array):
        return None
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended) or dtype == np.bool_:
        return dtype
    widest = 16 if dtype.kind == "c" else 8  # no long double
    known = jnp.issubdtype(dtype, jnp.number) and dtype.itemsize <= widest
    return dtype if known else None


def is_real(dtype) -> bool:
    """Whether a dtype is of integers or floating numbers."""
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
