"""Arguments of ``minimize`` as the compiled program wants them, or an error.

This room owns every complaint about an argument: each names the argument, what was
expected, what came, and the fix, and is raised before anything is compiled. What passes
is split into numbers (data) and structure (the program's key).
"""

import inspect
import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._gradient import count_rows, make_objective
from jaxgd._rows import as_key
from jaxgd._rules import check_factory, describe, is_rule
from jaxgd._source import bytes_computed
from jaxgd._stop import StopRule, auto_rule
from jaxgd._tree import Split

_LAST_STEP = 2**31 - 1


class Spec(NamedTuple):
    """Everything that is structure: the key of the compiled program."""

    fun: Split
    optimizer: Split | None
    factory: bool
    learning_rate: Split
    hyperparams: Split
    stop: Split | None
    batch_size: int | None
    strata: int
    n: int | None
    microbatch_size: int | None
    has_aux: bool
    with_key: bool
    final_evaluation: bool
    history_rows: int
    exactly: int | None  # steps of a static scan
    lanes: bool  # under vmap


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


def check_all(
    fun,
    params,
    data,
    *,
    args,
    batch_size,
    learning_rate,
    optimizer,
    hyperparams,
    max_steps,
    epochs,
    stop,
    key,
    state,
    has_aux,
    with_key,
    microbatch_size,
    strata,
    final_evaluation,
    history_rows,
) -> tuple[Spec, Numbers, Any]:
    """(structure, numbers, limit on steps)."""
    for name, flag in (
        ("has_aux", has_aux),
        ("with_key", with_key),
        ("final_evaluation", final_evaluation),
    ):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {flag!r}: pass a bool.")
    if not callable(fun):
        raise TypeError(
            f"fun must be a function of (params, ...), got {describe(fun)}: pass the "
            "objective itself."
        )
    params = _params(params)
    data, n = _data(data)
    args = _args(args, _tree.real_dtype(params))
    batch_size = _batch_size(batch_size, n)
    microbatch_size = _block("microbatch_size", microbatch_size, n)
    strata = _strata(strata, n, batch_size, data)
    history_rows = whole("history_rows", history_rows, low=0)
    if state is not None and key is not None:
        raise ValueError(
            "key must not be given with state, which carries its own: leave key out."
        )
    key = as_key(0 if key is None else key)
    _call_fits(fun, n, args, with_key)
    _update_rule(learning_rate, optimizer, hyperparams, batch_size)
    exactly, limit = _limit(max_steps, epochs, n, batch_size, stop)
    rule = _stop(stop, params, batch_size)

    dtype = _tree.real_dtype(params)
    fun_numbers, fun_rest = _tree.split(fun, None)
    rate_numbers, rate_rest = _tree.split(_rate(learning_rate), dtype)
    rule_numbers, rule_rest = _tree.split(optimizer, None)
    hyper_numbers, hyper_rest = _tree.split(_hyperparams(hyperparams), dtype)
    stop_numbers, stop_rest = _tree.split(rule, dtype)
    numbers = Numbers(
        fun_numbers,
        params,
        data,
        args,
        rule_numbers,
        rate_numbers,
        hyper_numbers,
        stop_numbers,
        key,
    )
    spec = Spec(
        fun=fun_rest,
        optimizer=None if optimizer is None else rule_rest,
        factory=optimizer is not None and not is_rule(optimizer),
        learning_rate=rate_rest,
        hyperparams=hyper_rest,
        stop=None if rule is None else stop_rest,
        batch_size=batch_size,
        strata=strata,
        n=n,
        microbatch_size=microbatch_size,
        has_aux=bool(has_aux),
        with_key=bool(with_key),
        final_evaluation=bool(final_evaluation),
        history_rows=history_rows,
        exactly=exactly,
        # Under vmap a loop with a traced trip count selects its whole carry at every
        # step, a static scan does not.
        lanes=any(type(x).__name__ == "BatchTracer" for x in jax.tree.leaves(numbers)),
    )
    return spec, numbers, limit


def objective_of(spec: Spec, numbers: Numbers, block=None):
    fun = spec.fun.join(numbers.fun)
    return make_objective(fun, numbers.args, has_aux=spec.has_aux, block=block)


def work_per_step(spec: Spec, numbers: Numbers) -> int:
    """Bytes of intermediate results in one gradient; raises if ``fun`` does not fit."""
    leaves, treedef = jax.tree.flatten(numbers._replace(key=()))
    shapes = tuple((np.shape(x), jnp.result_type(x)) for x in leaves)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    trace = _work.__wrapped__ if traced else _work
    return trace(spec._replace(exactly=None, lanes=False), shapes, treedef)


@lru_cache(maxsize=256)
def _work(spec: Spec, shapes, treedef) -> int:
    numbers = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*x) for x in shapes])
    rows = None
    if spec.n is not None:
        size = spec.batch_size or spec.n
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), numbers.data
        )
    key = jax.eval_shape(lambda: jax.random.key(0)) if spec.with_key else None

    def out(numbers, rows, key):
        fun = spec.fun.join(numbers.fun)
        positional = (numbers.params, *(() if rows is None else (rows,)), *numbers.args)
        return fun(*positional) if key is None else fun(*positional, key=key)

    _scalar(jax.eval_shape(out, numbers, rows, key), spec.has_aux)
    jaxpr = jax.make_jaxpr(
        lambda numbers, rows, key: objective_of(spec, numbers).value_and_grad(
            numbers.params, rows, key
        )
    )(numbers, rows, key)
    return bytes_computed(jaxpr.jaxpr)


def _scalar(out, has_aux) -> None:
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"fun must return a pair (value, aux) with has_aux=True, got {_shape(out)}: "
                "return both, or leave has_aux out."
            )
        out = out[0]
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"fun must return a real floating scalar, got {_shape(out)}: return the "
            "objective alone, or (value, aux) with has_aux=True."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        fix = "take jnp.real or jnp.abs" if jnp.issubdtype(
            out.dtype, jnp.complexfloating
        ) else "convert it to float"
        raise TypeError(
            f"fun must return a real floating scalar, got dtype {out.dtype}: {fix}."
        )
    if out.shape != ():
        raise ValueError(
            f"fun must return a scalar, got shape {out.shape}: reduce it, for example "
            "with jnp.mean over the rows."
        )


def _shape(out) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", out))


def _params(params):
    paths = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        dtype = _dtype(name, leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} must be floating or complex, got {dtype}: convert it, for example "
                "with jnp.asarray(x, jnp.float32), or pass it in args."
            )
    if sum(math.prod(np.shape(leaf)) for _, leaf in paths) == 0:
        raise ValueError(
            f"params must hold at least one number, got {params!r}: pass a pytree of arrays."
        )
    # NumPy memory may be taken over by a device array without a copy.
    return jax.tree.map(
        lambda x: np.array(x, _narrow(x)) if not isinstance(x, jax.Array) else _tree.as_number(x, None),
        params,
    )


def _narrow(leaf):
    return jax.dtypes.canonicalize_dtype(np.result_type(leaf) if isinstance(leaf, float | complex) else leaf.dtype)


def _dtype(name, leaf):
    if isinstance(leaf, bool | int | float | complex):
        return np.dtype(type(leaf))
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(
            f"{name} must be an array, got {describe(leaf)}: convert it with jnp.asarray."
        )
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    if np.dtype(dtype).kind not in "biufcV":
        raise TypeError(
            f"{name} must be an array of numbers, got dtype {dtype}: encode it as numbers."
        )
    return dtype


def _data(data):
    if data is None:
        return None, None
    paths = jax.tree_util.tree_leaves_with_path(data)
    if not paths:
        raise ValueError(
            f"data must hold at least one array, got {data!r}: pass arrays, or leave data out."
        )
    rows = {}
    for path, leaf in paths:
        name = "data" + jax.tree_util.keystr(path)
        if isinstance(leaf, bool | int | float | complex | str):
            raise TypeError(
                f"{name} must be an array with a leading axis of rows, got {leaf!r}: lists "
                "are pytrees of numbers; convert them with np.asarray."
            )
        _dtype(name, leaf)
        if leaf.ndim == 0:
            raise ValueError(
                f"{name} must have a leading axis of rows, got a scalar: pass it in args."
            )
        rows[name] = leaf.shape[0]
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(
            f"data must have equally many rows in every array, got lengths that differ: "
            f"{lengths}. Cut them to one length."
        )
    n = count_rows(data)
    if not 1 <= n <= _LAST_STEP:
        raise ValueError(f"data must have between 1 and 2**31 - 1 rows, got {n}: pass rows.")
    return jax.tree.map(lambda x: _tree.as_number(x, None), data), n


def _args(args, dtype):
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple, got {describe(args)}: pass args=(x,) for one argument."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        _dtype("args" + jax.tree_util.keystr(path), leaf)
    return jax.tree.map(lambda x: _tree.as_number(x, dtype), tuple(args))


def _batch_size(batch_size, n):
    if batch_size is None:
        return None
    if n is None:
        raise ValueError(
            f"batch_size needs data to take rows from, got batch_size={batch_size!r} "
            "without data: pass data, or leave batch_size out."
        )
    return whole("batch_size", batch_size, low=1, high=n, high_is="the number of rows")


def _block(name, size, n):
    if size is None:
        return None
    if n is None:
        raise ValueError(f"{name} needs data, got {size!r} without data: leave it out.")
    return whole(name, size, low=1)


def _strata(strata, n, batch_size, data):
    if strata is None:
        shards = _shards(data)
        fits = batch_size is not None and n % shards == 0 and batch_size % shards == 0
        return shards if fits else 1
    if batch_size is None:
        raise ValueError(
            f"strata needs batch_size, got strata={strata!r} without it: all rows are taken "
            "every step; leave strata out."
        )
    strata = whole("strata", strata, low=1)
    for name, number in (("the number of rows", n), ("batch_size", batch_size)):
        if number % strata:
            raise ValueError(
                f"strata must divide {name} = {number}, got {strata}: pass a divisor of "
                f"{math.gcd(n, batch_size)}."
            )
    return strata


def _shards(data) -> int:
    """Into how many pieces the leading axis of ``data`` is split over devices."""
    first = jax.tree.leaves(data)[0] if data is not None else None
    if isinstance(first, jax.core.Tracer) or not isinstance(first, jax.Array):
        return 1
    pieces = first.sharding.devices_indices_map(first.shape).values()
    return len({(piece[0].start, piece[0].stop) for piece in pieces})


def _call_fits(fun, n, args, with_key) -> None:
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return
    wanted = ["params", *([] if n is None else ["batch"])]
    wanted += [f"args[{i}]" for i in range(len(args))]
    try:
        signature.bind(*wanted, **({"key": None} if with_key else {}))
    except TypeError as error:
        call = ", ".join(wanted + (["key=key"] if with_key else []))
        raise TypeError(
            f"fun must take ({call}), got the signature {signature}: {error}. Extra "
            "arguments go in args, data in data, keys need with_key=True."
        ) from None


def _update_rule(learning_rate, optimizer, hyperparams, batch_size) -> None:
    if hyperparams is not None and not isinstance(hyperparams, dict):
        raise TypeError(
            f"hyperparams must be a dict, got {describe(hyperparams)}: pass for example "
            '{"b1": 0.95}.'
        )
    names = list(hyperparams or {})
    for name, value in (hyperparams or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"hyperparams must have names as keys, got {name!r}: pass a str.")
        if name == "learning_rate":
            raise ValueError(
                "hyperparams has 'learning_rate', which is an argument of its own: pass "
                "learning_rate=..."
            )
        concrete = _tree.is_number(value) and not isinstance(value, jax.core.Tracer)
        if concrete and np.isnan(np.asarray(value, np.float64)).any():
            raise ValueError(f"hyperparams[{name!r}] must be a number, got {value!r}: mend it.")
    if optimizer is None:
        if hyperparams:
            raise ValueError(
                f"hyperparams need a factory, got {names} without optimizer: pass for "
                "example optimizer=optax.adam."
            )
        if learning_rate is None:
            raise ValueError(
                "learning_rate is missing: pass learning_rate=0.1 for plain descent, or an "
                "optimizer such as optax.adam(1e-3)."
            )
    elif is_rule(optimizer):
        if inspect.isclass(optimizer):
            raise TypeError(
                f"optimizer must be an optax rule, got the class {describe(optimizer)}: "
                "pass an instance."
            )
        for name, given in (("learning_rate", learning_rate), ("hyperparams", hyperparams)):
            if given is not None and given != {}:
                raise ValueError(
                    f"{name} was given with a ready rule, which has its own: pass the "
                    "factory instead, for example optimizer=optax.adam."
                )
    elif callable(optimizer):
        check_factory(optimizer, learning_rate is not None, names)
    else:
        raise TypeError(
            "optimizer must be an optax rule (optax.adam(1e-3)) or a factory (optax.adam), "
            f"got {describe(optimizer)}."
        )
    if learning_rate is not None:
        _check_rate(learning_rate)


def _check_rate(rate) -> None:
    fix = "pass for example 0.1, or an optax schedule"
    if callable(rate) and not hasattr(rate, "dtype"):
        try:
            out = jax.eval_shape(rate, jax.ShapeDtypeStruct((), jnp.int32))
        except TypeError as error:
            raise TypeError(
                f"learning_rate as a schedule must take the step, {describe(rate)} does "
                f"not: {error}."
            ) from None
        shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", np.dtype(object))
        if shape != () or not jnp.issubdtype(dtype, jnp.number):
            raise ValueError(
                f"learning_rate as a schedule must return a scalar, {describe(rate)} "
                f"returned {out}: {fix}."
            )
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(f"learning_rate must be a number, got {describe(rate)}: {fix}.")
    if jnp.result_type(rate) == bool or not (
        jnp.issubdtype(jnp.result_type(rate), jnp.floating)
        or jnp.issubdtype(jnp.result_type(rate), jnp.integer)
    ):
        raise TypeError(
            f"learning_rate must be a real number, got dtype {jnp.result_type(rate)}: {fix}."
        )
    if np.shape(rate) != ():
        raise ValueError(
            f"learning_rate must be a scalar, got shape {np.shape(rate)}: {fix}; to try "
            "several rates, vmap over them."
        )
    if not isinstance(rate, jax.core.Tracer):
        number = float(rate)
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"learning_rate must be finite and >= 0, got {number}: {fix}.")


def _rate(rate):
    """Numbers of every spelling as floats; schedules as they are."""
    if isinstance(rate, int | np.integer) or getattr(rate, "ndim", None) == 0:
        return rate if isinstance(rate, jax.Array) else float(rate)
    return rate


def _hyperparams(hyperparams):
    """Whole numbers of every spelling as ints: they are structure."""
    return {
        name: value.item()
        if not isinstance(value, jax.core.Tracer)
        and getattr(value, "ndim", None) == 0
        and np.dtype(value.dtype).kind in "biu"
        else value
        for name, value in (hyperparams or {}).items()
    }


def _limit(max_steps, epochs, n, batch_size, stop):
    """(steps of a static scan or None, limit on steps)."""
    if max_steps is not None and epochs is not None:
        raise ValueError(
            f"max_steps and epochs are both given ({max_steps!r} and {epochs!r}): pass one."
        )
    if max_steps is None and epochs is None:
        max_steps, epochs = (1000, None) if batch_size is None else (None, 10)
    if isinstance(max_steps if epochs is None else epochs, jax.core.Tracer):
        if stop is None:
            raise ValueError(
                "max_steps must be a Python int with stop=None, whose length is the "
                "program's: it is traced here; pass a static number or a stop rule."
            )
    if epochs is None:
        if isinstance(max_steps, jax.core.Tracer):
            if max_steps.shape != () or not jnp.issubdtype(max_steps.dtype, jnp.integer):
                raise TypeError(f"max_steps must be an integer scalar, got {max_steps}.")
            return None, max_steps.astype(jnp.int32)
        limit = whole("max_steps", max_steps, low=0, high=_LAST_STEP, high_is="2**31 - 1")
    else:
        limit = _steps_of(epochs, n, batch_size)
        if isinstance(limit, jax.core.Tracer):
            return None, limit
    return (limit if stop is None else None), np.int32(limit)


def _steps_of(epochs, n, batch_size):
    if n is None:
        raise ValueError(
            f"epochs needs data, got epochs={epochs!r} without data: pass max_steps."
        )
    per_epoch = n / (batch_size or n)
    if isinstance(epochs, jax.core.Tracer):
        steps = epochs * per_epoch
        near = jnp.round(steps)
        close = jnp.abs(steps - near) <= 1e-5 * jnp.maximum(steps, 1)
        ceiling = jnp.where(close, near, jnp.ceil(steps))
        return jnp.where(epochs > 0, jnp.maximum(ceiling, 1), 0).astype(jnp.int32)
    if isinstance(epochs, bool | np.bool_) or np.asarray(epochs).dtype.kind not in "iuf":
        raise TypeError(f"epochs must be a number, got {describe(epochs)}: pass for example 10.")
    if np.shape(epochs) != () or not (math.isfinite(float(epochs)) and float(epochs) >= 0):
        raise ValueError(f"epochs must be finite and >= 0, got {epochs!r}: pass for example 10.")
    steps = float(epochs) * per_epoch
    near = round(steps)
    # 0.1 + 0.2 epochs are 0.3: a product that is whole up to rounding is that number.
    limit = near if abs(steps - near) <= 1e-9 * max(steps, 1) else math.ceil(steps)
    if limit > _LAST_STEP:
        raise ValueError(f"epochs={epochs!r} are {limit} steps, more than 2**31 - 1: pass fewer.")
    return 0 if float(epochs) == 0 else max(limit, 1)


def _stop(stop, params, batch_size) -> StopRule | None:
    if isinstance(stop, StopRule):
        return stop
    if stop is None:
        return None
    if isinstance(stop, str) and stop == "auto":
        return auto_rule(params) if batch_size is None else None
    if isinstance(stop, str):
        raise ValueError(
            f'stop must be "auto", a stop rule or None, got {stop!r}: pass for example '
            "jaxgd.gradient_norm(atol=1e-6)."
        )
    hint = " (call it with its tolerance)" if callable(stop) else ""
    raise TypeError(
        f'stop must be "auto", a stop rule or None, got {describe(stop)}{hint}: pass for '
        "example jaxgd.gradient_norm(atol=1e-6)."
    )


def whole(name, value, *, low, high=None, high_is="") -> int:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python int, got a traced value: it decides the shape of the "
            "program; mark it static."
        )
    array = value if hasattr(value, "dtype") else None
    is_int = hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)
    if not is_int or (array is not None and np.shape(array) != ()):
        raise TypeError(
            f"{name} must be a whole number, got {describe(value)}: pass an int."
        )
    value = int(value)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}: pass {low} or more.")
    if high is not None and value > high:
        raise ValueError(
            f"{name} must be at most {high}, {high_is}, got {value}: pass a smaller one."
        )
    return value
