"""Arguments of ``minimize`` as the compiled program wants them, or an error.

This room owns every complaint about an argument: each names the argument, what was
expected, what came, and the fix, and is raised before anything is compiled. What passes
is split into numbers (data) and structure (the program's key).
"""

import inspect
import math
import operator
import sys
from functools import lru_cache
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.fit import after_trial, weighed
from jaxgd._devices.layout import (
    layout_of,
    places_of,
    require_same_devices,
    undisturbed,
)
from jaxgd._devices.processes import require_same_on_processes
from jaxgd._loop.loop import Run
from jaxgd._loop.plan import Numbers, Spec, parts_of, windows_of
from jaxgd._problem.objective import count_rows
from jaxgd._rows.order import as_key
from jaxgd._rows.sample import mark_of, sample_of
from jaxgd._rows.stream import Form, Stream
from jaxgd._rules.adapter import check_factory, describe, is_rule
from jaxgd._rules.parabolic_rms import parabolic_rms
from jaxgd._rules.scaled_lbfgs import scaled_lbfgs
from jaxgd._stop.rules import StopRule, auto_rule
from jaxgd._stop.status import Status
from jaxgd._tree import dtype_of, is_real, short

_LAST_STEP = 2**31 - 1
_CONFIG: Any = jax.config


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
    """(structure, numbers, limit on steps); ``tried`` is to follow."""
    flag("has_aux", has_aux)
    flag("with_key", with_key)
    flag("final_evaluation", final_evaluation)
    function("fun", fun)
    params = numbers_of(params)
    data, n = rows_of(data)
    args = extra(args, _tree.real_dtype(params))
    batch_size = _batch_size(batch_size, n)
    microbatch_size = _microbatch_size(microbatch_size, n)
    layout = None if isinstance(data, Stream) else layout_of(data)
    strata = _strata(strata, n, batch_size, layout)
    history_rows = whole("history_rows", history_rows, low=0, high=_LAST_STEP)
    if isinstance(data, Stream):
        _stream_fits(data, batch_size, strata, stop)
    if state is not None:
        _state_fits(state, key)
    _call_fits(fun, n is not None, len(args), with_key)
    if learning_rate is None and optimizer is None and not hyperparams:
        optimizer = _default_rule(batch_size)
    _update_rule(learning_rate, optimizer, hyperparams)
    exactly, limit = _limit(max_steps, epochs, n, batch_size, stop)
    rule = _stop(stop, params, batch_size)
    for name, tree in (("fun", fun), ("optimizer", optimizer), ("stop", rule)):
        fit_32_bits(name, tree)

    dtype = _tree.real_dtype(params)
    fun_numbers, fun_rest = _tree.split(fun, dtype, arrays_too=False)
    rate_numbers, rate_rest = _tree.split(_rate(learning_rate), dtype)
    rule_numbers, rule_rest = _tree.split(optimizer, dtype, arrays_too=False)
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
        (),
        np.uint32(0),
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
        layout=layout,
        places=places_of(layout, params),
        pieces=_pieces(layout, strata, batch_size, data),
        microbatch_size=microbatch_size,
        has_aux=bool(has_aux),
        with_key=bool(with_key),
        final_evaluation=bool(final_evaluation),
        history_rows=history_rows,
        exactly=exactly,
        # Under vmap a loop with a traced trip count selects its whole carry at every
        # step, a static scan does not.
        lanes=_tree.is_batched((numbers, key, state)),
    )
    named = _named(numbers, key)
    require_same_devices(layout, named)
    told = {"max_steps or epochs": limit, "state": _place_of(state)}
    fields = ("batch_size", "strata", "microbatch_size", "has_aux", "with_key")
    for name in (*fields, "final_evaluation", "history_rows"):
        told[name] = np.int32(getattr(spec, name) or 0)
    rest = {name: x for name, x in named.items() if name != "data"}
    require_same_on_processes(layout, {**rest, **told})
    if isinstance(data, Stream):
        _not_traced((numbers, key, state, limit))
        spec = weighed(spec, numbers._replace(data=data.form.abstract()))
        windows_of(spec, data)
        numbers = numbers._replace(mark=data.mark())
    else:
        spec = weighed(spec, numbers)
        if batch_size is not None:
            numbers = numbers._replace(mark=mark_of(_sample(spec, data)))
    # Last, since making a key out of a seed compiles where it is the first one.
    with undisturbed(spec.places):
        key = as_key(0 if key is None else key)  # a state has a key of its own
    return spec, numbers._replace(key=key), limit


def tried(spec: Spec, numbers: Numbers, splits: bool = False, lanes: int = 1) -> Spec:
    """``spec`` after a trial of the objective on some rows, where it evaluates blocks.

    ``splits``: the caller evaluates blocks, whatever the arguments say. ``lanes``: how
    many evaluations at a time. It comes after all that can be refused: it compiles.
    """
    data = numbers.data
    splits = splits or (spec.batch_size or spec.microbatch_size) is not None
    given = numbers.fun, numbers.params, numbers.args
    if data is None or any(map(_tree.is_traced, jax.tree.leaves(given))):
        return spec
    if isinstance(data, Stream):
        sample, numbers = data.sample(), numbers._replace(data=data.form.abstract())
    else:
        sample = _sample(spec, data)
    if sample is None:
        return spec
    return after_trial(spec, numbers, sample, splits, lanes)


def _sample(spec: Spec, data):
    with undisturbed(spec.places):
        return sample_of(data, spec.n)


def _wrong_kind(name, what, leaf, fix) -> TypeError:
    array = isinstance(leaf, np.ndarray | jax.Array)
    came = f"dtype {leaf.dtype}" if array else describe(leaf)
    return TypeError(f"{name} must be {what}, got {came}: {fix}.")


def numbers_of(params):
    """``params`` as arrays of floating or complex numbers."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in paths:
        name, dtype = "params" + jax.tree_util.keystr(path), dtype_of(leaf)
        if dtype is None:
            fix = "pass arrays of numbers, such as jnp.asarray makes"
            raise _wrong_kind(name, "a floating or complex array", leaf, fix)
        if not jnp.issubdtype(dtype, jnp.inexact):
            fix = "convert it with jnp.asarray(x, jnp.float32), or pass it in args"
            raise _wrong_kind(name, "a floating or complex array", leaf, fix)
    if sum(math.prod(np.shape(leaf)) for _, leaf in paths) == 0:
        raise ValueError(
            f"params must hold at least one number, got {describe(params)}: pass a "
            "pytree of floating arrays."
        )
    # NumPy memory may be taken over by a device array without a copy.
    return jax.tree.map(
        lambda x: (
            _tree.as_number(x, None)
            if isinstance(x, jax.Array)
            else np.array(x, jax.dtypes.canonicalize_dtype(dtype_of(x)))
        ),
        params,
    )


def rows_of(data):
    """``data`` as arrays that share a leading axis, and its length; or an error."""
    if data is None:
        return None, None
    if isinstance(data, Form):
        raise TypeError(_UNTRACED)
    if isinstance(data, Stream):
        return data, data.n
    fix = "convert lists and tables with np.asarray, pass single numbers in args"
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data must be a pytree of arrays, got a {type(data).__name__}: collect "
            "its rows in arrays first."
        )
    _not_sparse(data)
    paths = jax.tree_util.tree_leaves_with_path(data)
    if not paths:
        raise ValueError(
            f"data must hold at least one array, got {data!r}: pass arrays, or leave "
            "data out."
        )
    rows = {}
    for path, leaf in paths:
        name = "data" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise _wrong_kind(name, "an array with a leading axis of rows", leaf, fix)
        if dtype_of(leaf) is None:
            encode = "encode it as numbers, in an array such as np.asarray makes"
            raise _wrong_kind(name, "an array of numbers", leaf, encode)
        if leaf.ndim == 0:
            raise ValueError(
                f"{name} must have a leading axis of rows, got a scalar: pass it in "
                "args."
            )
        _fits_32_bits(name, leaf)
        rows[name] = leaf.shape[0]
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(
            "data must have equally many rows in every array, got different lengths "
            f"({short(lengths)}): cut them to one length."
        )
    n = count_rows(data)
    if not 1 <= n <= _LAST_STEP:
        fix = "pass fewer rows" if n else "pass rows, or leave data out"
        raise ValueError(f"data must have 1 to 2**31 - 1 rows, got {n}: {fix}.")
    return jax.tree.map(lambda x: _tree.as_number(x, None), data), n


def _not_sparse(data) -> None:
    """A TypeError where data are sparse: their parts have no axis of rows."""
    paths = jax.tree_util.tree_leaves_with_path(data, is_leaf=_is_sparse)
    for path, leaf in paths:
        if _is_sparse(leaf):
            kind, shape = type(leaf).__name__, tuple(leaf.shape)
            raise TypeError(
                f"data{jax.tree_util.keystr(path)} must be a dense array, got a sparse "
                f"{kind} of shape {shape}: make it dense with todense(), feed dense "
                "rows by a jaxgd.Stream, or pass it in args, as a BCOO of "
                "jax.experimental.sparse, and take its rows in fun."
            )


def _is_sparse(x) -> bool:
    """Whether JAX or SciPy made it sparse; neither is imported for that."""
    of_jax = getattr(sys.modules.get("jax.experimental.sparse"), "JAXSparse", ())
    told = getattr(sys.modules.get("scipy.sparse"), "issparse", None)
    return isinstance(x, of_jax) or (told is not None and told(x))


def fit_32_bits(name, tree) -> None:
    """A ValueError where arrays hold whole numbers that JAX would cut to 32 bits."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _fits_32_bits(name + jax.tree_util.keystr(path), leaf)


def _fits_32_bits(name, leaf) -> None:
    whole_numbers = isinstance(leaf, np.ndarray | np.generic) and (
        leaf.dtype.kind in "iu" and leaf.dtype.itemsize == 8 and leaf.size
    )
    if not whole_numbers or _CONFIG.jax_enable_x64:
        return
    narrow = np.iinfo(np.int32 if leaf.dtype.kind == "i" else np.uint32)
    for find in (np.argmin, np.argmax):
        place = np.unravel_index(find(leaf), leaf.shape)
        number = int(np.asarray(leaf)[place])
        if not narrow.min <= number <= narrow.max:
            where = f" at {[int(i) for i in place]}" if place else ""
            raise ValueError(
                f"{name} must fit in {narrow.dtype}, got {number}{where}: JAX keeps 32 "
                "bits of a whole number; turn on 64 with jax.enable_x64(True), or "
                "renumber."
            )


_UNTRACED = (
    "data must be arrays inside jit, vmap and grad, got a Stream: the host feeds it, "
    "so call minimize outside of them."
)


def refuse_stream(what: str, data) -> None:
    """A TypeError where ``what`` takes resident data only."""
    if isinstance(data, Stream):
        raise TypeError(
            f"data must be arrays in {what}, got a Stream: pass some of the rows as "
            "arrays."
        )


def _not_traced(values) -> None:
    traced = any(_tree.is_traced(x) for x in jax.tree.leaves(values))
    if traced or _tree.is_traced(jnp.zeros(())):
        raise TypeError(_UNTRACED)


def _stream_fits(stream: Stream, batch_size, strata, stop) -> None:
    if batch_size is None:
        raise ValueError(
            "batch_size must be given with a Stream, got None: batch descent would "
            "read the whole source at every step; pass for example batch_size=128."
        )
    if stop is None:
        raise ValueError(
            "stop=None is one static scan over resident data, got a Stream: leave stop "
            "out, which stops at no rule with batch_size."
        )
    if strata != 1 and stream.shuffle != "rows":
        raise ValueError(
            f'strata needs the order of shuffle="rows", got strata={strata} with a '
            f"Stream in {'the order of its blocks' if stream.shuffle else 'its own'}: "
            "leave strata out."
        )


def extra(args, dtype):
    """``args`` as a tuple of pytrees of arrays."""
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple, got {describe(args)}: pass args=(x,) for one "
            "argument."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        name = "args" + jax.tree_util.keystr(path)
        if dtype_of(leaf) is None:
            fix = "pass numbers; bind the rest to fun, for example by functools.partial"
            raise _wrong_kind(name, "an array of numbers", leaf, fix)
        if isinstance(leaf, int | np.integer) and not -(2**31) <= leaf < 2**31:
            raise ValueError(
                f"{name} must fit in int32, got {leaf}: pass an array of the dtype you "
                "want."
            )
        _fits_32_bits(name, leaf)
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


def _microbatch_size(size, n):
    if size is None:
        return None
    if n is None:
        raise ValueError(
            f"microbatch_size needs data, got microbatch_size={size!r} without data: "
            "leave it out."
        )
    return whole("microbatch_size", size, low=1)


def _strata(strata, n, batch_size, layout):
    shards = 1 if layout is None else layout.shards
    if strata is None and batch_size is None:
        return 1
    if strata is None:
        if batch_size % shards:
            near = max(shards, batch_size - batch_size % shards)
            raise ValueError(
                f"batch_size must be a multiple of the {shards} pieces into which the "
                f"rows of data are split, so that each gives equally many, got "
                f"{batch_size}: pass for example {near}."
            )
        return shards
    if batch_size is None:
        raise ValueError(
            f"strata needs batch_size, got strata={strata!r} without it: all rows are "
            "taken every step; leave strata out."
        )
    strata = whole("strata", strata, low=1)
    for name, number in (("the number of rows", n), ("batch_size", batch_size)):
        if number % strata:
            raise ValueError(
                f"strata must divide {name} = {number}, got {strata}: pass a divisor "
                f"of {math.gcd(n, batch_size)}."
            )
    if strata % shards:
        raise ValueError(
            f"strata must be a multiple of the {shards} pieces into which the rows of "
            f"data are split, so that each device reads its own rows only, got "
            f"{strata}: pass {shards}, or put the rows on fewer devices."
        )
    return strata


def _pieces(layout, strata, batch_size, data) -> int:
    """Consecutive pieces of the rows that may lie on different devices."""
    traced = any(_tree.is_traced(x) for x in jax.tree.leaves(data))
    if layout is None and not traced:  # where they lie cannot be seen while tracing
        return 1
    return strata if batch_size is not None else 1 if layout is None else layout.shards


def _place_of(state):
    """What tells two states of one problem apart, as far as processes must agree."""
    return None if state is None else (state.step, state.run.key, state.run.checked)


def _named(numbers: Numbers, key) -> dict:
    """What of a call may lie on a device, by the name of its argument."""
    return {
        "data": None if isinstance(numbers.data, Stream) else numbers.data,
        "params": numbers.params,
        "args": numbers.args,
        "fun": numbers.fun,
        "optimizer": numbers.optimizer,
        "learning_rate": numbers.learning_rate,
        "hyperparams": numbers.hyperparams,
        "stop": numbers.stop,
        "key": key,
    }


def _call_fits(fun, has_data, extras, with_key) -> None:
    plain = isinstance(fun, FunctionType)  # others may hold arrays, which a cache keeps
    fits = _signature_fits if plain else _signature_fits.__wrapped__
    fits(fun, has_data, extras, with_key)


@lru_cache(maxsize=64)
def _signature_fits(fun, has_data, extras, with_key) -> None:
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return
    wanted = ["params", *(["batch"] if has_data else [])]
    wanted += [f"args[{i}]" for i in range(extras)]
    try:
        signature.bind(*wanted, **({"key": None} if with_key else {}))
    except TypeError as error:
        call = ", ".join(wanted + (["key=key"] if with_key else []))
        raise TypeError(
            f"fun must take ({call}), got the signature {short(str(signature))}: "
            f"{error}. Extra arguments go in args, data in data, keys need "
            "with_key=True."
        ) from None


def _state_fits(state, key) -> None:
    if not isinstance(getattr(state, "run", None), Run):
        manual = hasattr(state, "opt_state")
        came = (
            "a State of make_step" if manual else f"one of type {type(state).__name__}"
        )
        raise TypeError(
            f"state must be a Result.state, got {came}: pass result.state of an "
            "earlier run."
        )
    if key is not None:
        raise ValueError(
            "key must not be given with state, which carries its own, got "
            f"{describe(key)}: leave key out."
        )
    if np.shape(state.step) != ():
        raise ValueError(
            f"state must be that of one run, got runs of shape {np.shape(state.step)}: "
            "pass result[i].state, or vmap over it."
        )
    if not _tree.is_traced(state.step) and int(state.step) < 0:
        raise ValueError(
            f"state.step must be at least 0, got {int(state.step)}: pass the state of "
            "a run as it came."
        )


def _default_rule(batch_size):
    """The rule of a call that says nothing of one: it needs no rate."""
    return scaled_lbfgs if batch_size is None else parabolic_rms


def _update_rule(learning_rate, optimizer, hyperparams) -> None:
    _check_hyperparams(hyperparams)
    if optimizer is None:
        if hyperparams:
            raise ValueError(
                f"hyperparams need a factory, got {list(hyperparams)} without "
                "optimizer: pass for example optimizer=optax.adam."
            )
    elif inspect.isclass(optimizer) and hasattr(optimizer, "update"):
        raise TypeError(
            f"optimizer must be an optax rule, got the class {describe(optimizer)}: "
            "pass an instance."
        )
    elif is_rule(optimizer):
        for name, given in (
            ("learning_rate", learning_rate),
            ("hyperparams", hyperparams),
        ):
            if given is not None and given != {}:
                raise ValueError(
                    f"{name} must not be given with a ready rule, which has its own, "
                    f"got {describe(given)}: leave it out, or pass the factory, for "
                    "example optimizer=optax.adam."
                )
    elif callable(optimizer):
        check_factory(optimizer, learning_rate is not None, list(hyperparams or {}))
    else:
        raise TypeError(
            f"optimizer must be an optax rule or a factory, got {describe(optimizer)}: "
            "pass optax.adam(1e-3) or optax.adam, and join several rules with "
            "optax.chain."
        )
    if learning_rate is not None:
        _check_rate(learning_rate)


def _check_hyperparams(hyperparams) -> None:
    if hyperparams is None:
        return
    if not isinstance(hyperparams, dict):
        raise TypeError(
            f"hyperparams must be a dict, got {describe(hyperparams)}: pass for "
            "example "
            '{"b1": 0.95}.'
        )
    for name, value in hyperparams.items():
        if not isinstance(name, str):
            raise TypeError(
                f"hyperparams must have names as keys, got {name!r}: pass a str."
            )
        if name == "learning_rate":
            raise ValueError(
                "hyperparams must not hold 'learning_rate', an argument of its own, "
                f"got {describe(value)}: pass learning_rate=... instead."
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if not _tree.is_number(leaf):
                continue
            where = f"hyperparams[{name!r}]{jax.tree_util.keystr(path)}"
            if dtype_of(leaf) is None:
                raise _wrong_kind(
                    where,
                    "a number or an array of numbers",
                    leaf,
                    "encode it as numbers",
                )
            _fits_32_bits(where, leaf)
            if _tree.is_traced(leaf) or not jnp.issubdtype(dtype_of(leaf), jnp.inexact):
                continue
            if np.isnan(np.asarray(leaf)).any():
                raise ValueError(
                    f"{where} must not be NaN, got {leaf!r}: pass a number."
                )


def _check_rate(rate) -> None:
    if not callable(rate):
        real("learning_rate", rate, "pass for example 0.1, or an optax schedule")
        return
    try:
        signature = inspect.signature(rate)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("step")
    except TypeError as error:
        raise TypeError(
            f"learning_rate as a schedule must take the step alone, {describe(rate)} "
            f"takes {short(str(signature))} ({error}): pass a function step -> rate, "
            "for example what optax.cosine_decay_schedule returns."
        ) from None


def _rate(rate):
    """Numbers of every spelling as floats; schedules as they are."""
    if rate is None or callable(rate) or _tree.is_traced(rate):
        return rate
    return float(rate)


def _hyperparams(hyperparams):
    """Whole numbers of every spelling as ints: they are structure."""
    return {
        name: value.item()
        if not _tree.is_traced(value)
        and getattr(value, "ndim", None) == 0
        and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
        and np.dtype(value.dtype).kind in "biu"
        else value
        for name, value in (hyperparams or {}).items()
    }


def _limit(max_steps, epochs, n, batch_size, stop) -> Any:
    """(steps of a static scan or None, limit on steps)."""
    if max_steps is not None and epochs is not None:
        raise ValueError(
            "max_steps and epochs must not both be given, got "
            f"max_steps={max_steps!r} and epochs={epochs!r}: pass one."
        )
    if max_steps is None and epochs is None:
        max_steps, epochs = (1000, None) if batch_size is None else (None, 10)
    name = "max_steps" if epochs is None else "epochs"
    value: Any = max_steps if epochs is None else epochs
    traced = _tree.is_traced(value)
    if traced and stop is None:
        raise TypeError(
            f"{name} must be a Python number with stop=None, where it is the length of "
            "the program, got a traced value: mark it static, or pass a stop rule."
        )
    if epochs is not None:
        limit = _steps_of(epochs, n, batch_size)
    elif traced:
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise _wrong_kind(name, "a whole number", value, "pass an int")
        real(name, value, "pass an int")
        limit = value.astype(jnp.int32)
    else:
        limit = whole(name, value, low=0, high=_LAST_STEP)
    if traced:
        return None, limit
    return (limit if stop is None else None), np.int32(limit)


def _steps_of(epochs, n, batch_size):
    if n is None:
        raise ValueError(
            f"epochs needs data, got epochs={epochs!r} without data: pass max_steps."
        )
    real("epochs", epochs, "pass for example 10")
    per_epoch = n / (batch_size or n)
    if _tree.is_traced(epochs):
        steps = epochs * per_epoch
        near = jnp.round(steps)
        close = jnp.abs(steps - near) <= 1e-5 * jnp.maximum(steps, 1)
        ceiling = jnp.where(close, near, jnp.ceil(steps))
        return jnp.where(epochs > 0, jnp.maximum(ceiling, 1), 0).astype(jnp.int32)
    steps = float(epochs) * per_epoch
    near = round(steps)
    # 0.1 + 0.2 epochs are 0.3: a product that is whole up to rounding is that number.
    limit = near if abs(steps - near) <= 1e-9 * max(steps, 1) else math.ceil(steps)
    if limit > _LAST_STEP:
        raise ValueError(
            f"epochs must be at most 2**31 - 1 steps, got {epochs!r}, which are "
            f"{limit}: pass fewer."
        )
    return 0 if float(epochs) == 0 else max(limit, 1)


def _stop(stop, params, batch_size) -> StopRule | None:
    if stop is None:
        return None
    if isinstance(stop, StopRule):
        _check_rule(stop)
        return stop
    if isinstance(stop, str) and stop == "auto":
        return auto_rule(params) if batch_size is None else None
    what = f'stop must be "auto", a stop rule or None, got {describe(stop)}: '
    if isinstance(stop, str):
        raise ValueError(what + "pass for example jaxgd.gradient_norm(atol=1e-6).")
    if callable(stop):
        raise TypeError(
            what + "call it first, as in jaxgd.gradient_norm(atol=1e-6), or make a "
            "jaxgd.StopRule of your own function."
        )
    raise TypeError(
        what
        + "pass for example jaxgd.gradient_norm(atol=1e-6), and join several rules "
        "with jaxgd.any_of."
    )


def _check_rule(rule: StopRule) -> None:
    function("stop: init of a StopRule", rule.init)
    function("stop: update of a StopRule", rule.update)
    if rule.describe is not None:
        function("stop: describe of a StopRule", rule.describe)
    for part in parts_of(rule):
        _check_rule(part)
    codes = [status for status in Status if status != Status.RUNNING]
    if not callable(rule.status) and rule.status not in codes:
        raise TypeError(
            "stop: status of a StopRule must be a jaxgd.Status other than RUNNING, or "
            f"a function of the memory, got {describe(rule.status)}: pass for example "
            "jaxgd.Status.GRADIENT_SMALL."
        )


def flag(name, value) -> None:
    """Refuses what is no bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be True or False, got {describe(value)}: pass a bool."
        )


def function(name, value) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function, got {describe(value)}: pass the function "
            "itself."
        )


def real(name, value, fix) -> None:
    """Refuses what is no finite real scalar >= 0, as far as a traced one tells."""
    if isinstance(value, bool) or not is_real(dtype_of(value)):
        raise _wrong_kind(name, "a real number", value, fix)
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}: {fix}; to try "
            "several, vmap over them."
        )
    if _tree.is_traced(value):
        return
    try:
        finite = math.isfinite(float(value))
    except OverflowError:  # an int beyond every float
        finite = False
    if not (finite and float(value) >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}: {fix}.")


def whole(name, value, *, low, high=None, high_is="the largest int32") -> int:
    """A whole number between ``low`` and ``high``, or an error."""
    if _tree.is_traced(value):
        raise TypeError(
            f"{name} must be a Python int, got a traced value: it decides the shape of "
            "the program; mark it static."
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be a whole number, got {describe(value)}: pass an int."
        )
    if number < low:
        raise ValueError(
            f"{name} must be at least {low}, got {number}: pass {low} or more."
        )
    if high is not None and number > high:
        raise ValueError(
            f"{name} must be at most {high} ({high_is}), got {number}: pass a smaller "
            "one."
        )
    return number
