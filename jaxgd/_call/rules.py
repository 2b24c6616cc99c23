"""The update rule and the stop rule of a call, or an error."""

import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.call import Call
from jaxgd._checks import describe, fits_32_bits, function, real, short, wrong_kind
from jaxgd._loop.plan import parts_of
from jaxgd._rules.adapter import check_factory, is_rule
from jaxgd._rules.parabolic_rms import parabolic_rms
from jaxgd._rules.scaled_lbfgs import scaled_lbfgs
from jaxgd._stop.rules import StopRule, auto_rule
from jaxgd._stop.status import Status
from jaxgd._tree import dtype_of


def with_rule(call: Call) -> Call:
    """``call`` with its update rule; one that says nothing of it gets one that needs no
    rate."""
    optimizer = call.optimizer
    if call.learning_rate is None and optimizer is None and not call.hyperparams:
        optimizer = scaled_lbfgs if call.batch_size is None else parabolic_rms
    _update_rule(call.learning_rate, optimizer, call.hyperparams)
    return replace(
        call,
        optimizer=optimizer,
        learning_rate=_rate(call.learning_rate),
        hyperparams=_hyperparams(call.hyperparams),
    )


def _update_rule(learning_rate, optimizer, hyperparams) -> None:
    check_hyperparams(hyperparams)
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


def check_hyperparams(hyperparams: Any) -> None:
    """Refuses what are no arguments of a factory by name."""
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
                raise wrong_kind(
                    where,
                    "a number or an array of numbers",
                    leaf,
                    "encode it as numbers",
                )
            fits_32_bits(where, leaf)
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


def stop_of(call: Call) -> StopRule | None:
    """The stop rule of a call."""
    stop = call.stop
    if stop is None:
        return None
    if isinstance(stop, StopRule):
        _check_rule(stop)
        return stop
    if isinstance(stop, str) and stop == "auto":
        return auto_rule(call.params) if call.batch_size is None else None
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
