"""How many rows a step takes, in how many parts, and how many steps: or an error."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.call import Call
from jaxgd._checks import LAST_STEP, real, whole, wrong_kind
from jaxgd._devices.layout import Layout
from jaxgd._rows.stream import Stream


def with_sizes(call: Call, n: int | None, layout: Layout | None) -> Call:
    """``call`` with the numbers of rows and of parts as ints."""
    batch_size = _batch_size(call.batch_size, n)
    call = replace(
        call,
        batch_size=batch_size,
        microbatch_size=_microbatch_size(call.microbatch_size, n),
        strata=_strata(call.strata, n, batch_size, layout),
        history_rows=whole("history_rows", call.history_rows, low=0, high=LAST_STEP),
    )
    if isinstance(call.data, Stream):
        _stream_fits(call.data, batch_size, call.strata, call.stop)
    return call


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


def pieces_of(call: Call, layout: Layout | None) -> int:
    """Consecutive pieces of the rows that may lie on different devices."""
    traced = any(_tree.is_traced(x) for x in jax.tree.leaves(call.data))
    if layout is None and not traced:  # where they lie cannot be seen while tracing
        return 1
    if call.batch_size is not None:
        return call.strata
    return 1 if layout is None else layout.shards


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


def limit_of(call: Call, n: int | None) -> tuple[Any, Any]:
    """(steps of a static scan or None, limit on steps)."""
    max_steps, epochs, stop = call.max_steps, call.epochs, call.stop
    if max_steps is not None and epochs is not None:
        raise ValueError(
            "max_steps and epochs must not both be given, got "
            f"max_steps={max_steps!r} and epochs={epochs!r}: pass one."
        )
    if max_steps is None and epochs is None:
        max_steps, epochs = (1000, None) if call.batch_size is None else (None, 10)
    name = "max_steps" if epochs is None else "epochs"
    value: Any = max_steps if epochs is None else epochs
    traced = _tree.is_traced(value)
    if traced and stop is None:
        raise TypeError(
            f"{name} must be a Python number with stop=None, where it is the length of "
            "the program, got a traced value: mark it static, or pass a stop rule."
        )
    if epochs is not None:
        limit = _steps_of(epochs, n, call.batch_size)
    elif traced:
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise wrong_kind(name, "a whole number", value, "pass an int")
        real(name, value, "pass an int")
        limit = value.astype(jnp.int32)
    else:
        limit = whole(name, value, low=0, high=LAST_STEP)
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
    if limit > LAST_STEP:
        raise ValueError(
            f"epochs must be at most 2**31 - 1 steps, got {epochs!r}, which are "
            f"{limit}: pass fewer."
        )
    return 0 if float(epochs) == 0 else max(limit, 1)
