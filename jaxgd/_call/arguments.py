"""Arguments of ``minimize`` as the compiled program wants them, or an error.

This room owns the order of the checks: each refusal names the argument, what was
expected, what came, and the fix, and is raised before anything is compiled. What passes
is split into numbers (data) and structure (the program's key).
"""

import inspect
from dataclasses import replace
from functools import lru_cache
from types import FunctionType
from typing import Any

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._call.arrays import extra, numbers_of, require_untraced, rows_of
from jaxgd._call.call import Call
from jaxgd._call.fit import after_trial, weighed
from jaxgd._call.rules import stop_of, with_rule
from jaxgd._call.sizes import limit_of, pieces_of, with_sizes
from jaxgd._checks import (
    describe,
    fit_32_bits,
    flag,
    function,
    short,
)
from jaxgd._devices.layout import (
    Layout,
    layout_of,
    places_of,
    require_same_devices,
    undisturbed,
)
from jaxgd._devices.processes import require_same_on_processes
from jaxgd._loop.memory import Run
from jaxgd._loop.plan import Numbers, Spec, windows_of
from jaxgd._rows.order import as_key
from jaxgd._rows.sample import mark_of, sample_of
from jaxgd._rows.stream import Stream
from jaxgd._rules.adapter import is_rule


def checked(call: Call) -> tuple[Spec, Numbers, Any]:
    """(structure, numbers, limit on steps) of a call; ``tried`` is to follow."""
    call, n, layout = _with_arrays(call)
    call = with_rule(call)
    exactly, limit = limit_of(call, n)
    spec, numbers = _split(call, n, layout, exactly)
    named = _named(numbers, call.key)
    require_same_devices(layout, named)
    require_same_on_processes(layout, _agreed(spec, named, limit, call.state))
    data = numbers.data
    if isinstance(data, Stream):
        require_untraced((numbers, call.key, call.state, limit))
        spec = weighed(spec, numbers._replace(data=data.form.abstract()))
        windows_of(spec, data)
        numbers = numbers._replace(mark=data.mark())
    else:
        spec = weighed(spec, numbers)
        if spec.batch_size is not None:
            numbers = numbers._replace(mark=mark_of(_sample(spec, data)))
    # Last, since making a key out of a seed compiles where it is the first one.
    with undisturbed(spec.places):  # a state has a key of its own
        key = as_key(0 if call.key is None else call.key)
    return spec, numbers._replace(key=key), limit


def _with_arrays(call: Call) -> tuple[Call, int | None, Layout | None]:
    """(``call`` with arrays and sizes as they are to be, rows, where they are)."""
    for name in ("has_aux", "with_key", "final_evaluation"):
        flag(name, getattr(call, name))
    function("fun", call.fun)
    params = numbers_of(call.params)
    data, n = rows_of(call.data)
    args = extra(call.args, _tree.real_dtype(params))
    layout = None if isinstance(data, Stream) else layout_of(data)
    call = with_sizes(replace(call, params=params, data=data, args=args), n, layout)
    if call.state is not None:
        _state_fits(call.state, call.key)
    _call_fits(call.fun, n is not None, len(args), call.with_key)
    return call, n, layout


def _split(call: Call, n, layout, exactly) -> tuple[Spec, Numbers]:
    """What of a call is structure, and what are numbers."""
    rule = stop_of(call)
    for name, tree in (
        ("fun", call.fun),
        ("optimizer", call.optimizer),
        ("stop", rule),
    ):
        fit_32_bits(name, tree)
    dtype = _tree.real_dtype(call.params)
    fun_numbers, fun_rest = _tree.split(call.fun, dtype, arrays_too=False)
    rate_numbers, rate_rest = _tree.split(call.learning_rate, dtype)
    rule_numbers, rule_rest = _tree.split(call.optimizer, dtype, arrays_too=False)
    hyper_numbers, hyper_rest = _tree.split(call.hyperparams, dtype)
    stop_numbers, stop_rest = _tree.split(rule, dtype)
    numbers = Numbers(
        fun=fun_numbers,
        params=call.params,
        data=call.data,
        args=call.args,
        optimizer=rule_numbers,
        learning_rate=rate_numbers,
        hyperparams=hyper_numbers,
        stop=stop_numbers,
        key=(),
        mark=np.uint32(0),
    )
    spec = Spec(
        fun=fun_rest,
        optimizer=None if call.optimizer is None else rule_rest,
        factory=call.optimizer is not None and not is_rule(call.optimizer),
        learning_rate=rate_rest,
        hyperparams=hyper_rest,
        stop=None if rule is None else stop_rest,
        batch_size=call.batch_size,
        strata=call.strata,
        n=n,
        layout=layout,
        places=places_of(layout, call.params),
        pieces=pieces_of(call, layout),
        microbatch_size=call.microbatch_size,
        has_aux=bool(call.has_aux),
        with_key=bool(call.with_key),
        final_evaluation=bool(call.final_evaluation),
        history_rows=call.history_rows,
        exactly=exactly,
        # Under vmap a loop with a traced trip count selects its whole carry at every
        # step, a static scan does not.
        lanes=_tree.is_batched((numbers, call.key, call.state)),
    )
    return spec, numbers


def _agreed(spec: Spec, named: dict[str, Any], limit, state) -> dict[str, Any]:
    """What all processes must have in common, by the name of its argument."""
    found = {name: x for name, x in named.items() if name != "data"}
    found["max_steps or epochs"], found["state"] = limit, _place_of(state)
    sizes = ("batch_size", "strata", "microbatch_size", "history_rows")
    for name in (*sizes, "has_aux", "with_key", "final_evaluation"):
        found[name] = np.int32(getattr(spec, name) or 0)
    return found


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
