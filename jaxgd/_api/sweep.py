"""Many runs at once: rates, hyperparameters, starts, problems and seeds as lanes.

This room owns the grid: which numbers of a call differ from lane to lane, and how the
lanes compare. The lanes share one loop of one compiled program, see ``_loop/program``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.arrays import refuse_stream
from jaxgd._call.call import OPTIONS, Call, call_of
from jaxgd._call.rules import check_hyperparams
from jaxgd._checks import describe, fit_32_bits, whole
from jaxgd._loop.cause import BAD, explained
from jaxgd._loop.outcome import finished
from jaxgd._loop.plan import Numbers, Spec
from jaxgd._loop.program import go_together, start
from jaxgd._result.grid import STACKED, Sweep
from jaxgd._result.result import Result
from jaxgd._tree import dtype_of, is_real

# Lanes that ended badly and are looked at again, one by one.
_EXPLAINED = 16
_ALMOST = {
    "seeds": "the argument seeds=5",
    "key": "the argument seeds=5",
    "lr": "'learning_rate'",
    "learning_rates": "'learning_rate'",
}


def sweep(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    over: dict[str, Any],
    seeds: int = 1,
    **like_minimize: Any,
) -> Sweep:
    r"""Runs ``minimize`` for every setting of a grid, as lanes of one program.

    All lanes descend side by side: one loop takes a step in each, on the same rows. A
    lane that has ended, because its stop rule held or because it diverged, is frozen
    there and changes nothing for the others; the program ends when all have.

    Lanes agree with runs of ``minimize`` to rounding. They share one row order, so that
    settings are compared on the same batches (a paired comparison) and rows are read
    once for all of them. Memory: parameters, optimizer state and the intermediate
    results of a gradient are there once for every lane, data once for all.

    Args:
      fun, params, data: as for ``minimize``.
      over: what differs from lane to lane, an axis of the grid each, in this order:
        ``"learning_rate"`` and floating hyperparameters of the factory by their name,
        as a list or array of numbers; ``"params"`` or ``"args"`` stacked along a new
        first axis (many starts, many problems), taking the place of the argument. A
        list of starts is to be stacked first, ``jnp.stack(starts)``.
      seeds: run every setting with so many keys, ``jax.random.fold_in(key, i)``, a last
        axis of the grid. With 1 there is no such axis, and ``key`` itself is used.
      **like_minimize: all other arguments of ``minimize`` but ``state``. With
        ``stop=None`` only the limit or divergence ends a lane.

    Returns:
      A ``Sweep``: ``print`` it, take ``best`` or ``best_settings``, or ``sweep[i, j]``.

    Raises:
      TypeError, ValueError: as ``minimize``; and for an ``over`` that is no such dict.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> def bowl(x):
      ...     return 2 * x[0] ** 2 + x[1] ** 2 / 2
      >>> found = jaxgd.sweep(
      ...     bowl, jnp.ones(2), over={"learning_rate": [0.01, 0.1, 1.0]}, max_steps=50
      ... )
      >>> round(found.best_settings["learning_rate"], 3)
      0.1
      >>> found[2].status == jaxgd.Status.DIVERGED
      Array(True, dtype=bool)
    """
    own = {"state": "a sweep begins anew; go on with one lane by minimize, state=..."}
    call = call_of("sweep", fun, params, data, like_minimize, own)
    seeds = whole("seeds", seeds, low=1)
    refuse_stream("sweep", data)
    if any(
        _tree.is_traced(x) for x in jax.tree.leaves((params, data, over, like_minimize))
    ):
        raise TypeError(
            "sweep compares its lanes on the host, so it takes no traced values, got "
            "one: call it outside jit, vmap and grad, or call minimize under vmap."
        )
    values, first = _first_of(over, call, seeds)
    spec, numbers, limit = checked(first)
    dtype = _tree.real_dtype(numbers.params)
    lanes_of = [_stacked(name, v, numbers, dtype) for name, v in values.items()]
    sizes = {name: jax.tree.leaves(v)[0].shape[0] for name, v in values.items()}
    lanes = int(np.prod([*sizes.values(), seeds]))
    spec = tried(spec, numbers, lanes=lanes)
    names = tuple((name, _place(name, first.hyperparams)) for name in values)
    spec = spec._replace(exactly=None)
    if seeds > 1:
        numbers = numbers._replace(key=_keys(numbers.key, np.arange(seeds)))
    results = finished(spec, _run(spec, names, seeds, numbers, tuple(lanes_of), limit))

    def numbers_of(place) -> Numbers:
        own = numbers._replace(key=numbers.key[place[-1]]) if seeds > 1 else numbers
        for (name, at), stacked, i in zip(names, lanes_of, place, strict=False):
            own = _with(own, name, at, jax.tree.map(lambda x, i=i: x[i], stacked))
        return own

    return Sweep(_explained(spec, numbers_of, results), values, seeds)


def _explained(spec: Spec, numbers_of, results: Result) -> Result:
    """``results`` with the causes of the first lanes that ended badly."""
    status = np.asarray(results.status)
    causes = np.full(status.shape, None, object)
    for place in map(tuple, np.argwhere(np.isin(status, BAD))[:_EXPLAINED]):
        causes[place] = explained(spec, numbers_of(place), results[place]).cause
    return replace(results, cause=causes)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(spec: Spec, names, seeds, numbers: Numbers, values, limit):
    """All lanes from their start to their end."""

    def lane(numbers, *values):
        for (name, place), value in zip(names, values, strict=True):
            numbers = _with(numbers, name, place, value)
        return go_together(spec, numbers, start(spec, numbers), limit)

    none = Numbers(*[None] * len(Numbers._fields))
    every = lane
    if seeds > 1:
        every = jax.vmap(every, (none._replace(key=0), *[None] * len(names)))
    for i in reversed(range(len(names))):
        every = jax.vmap(
            every, (none, *(0 if j == i else None for j in range(len(names))))
        )
    return every(numbers, *values)


def _with(numbers: Numbers, name, place, value) -> Numbers:
    """``numbers`` of one lane."""
    if name in STACKED:
        return numbers._replace(**{name: value})
    if name == "learning_rate":
        return numbers._replace(learning_rate=[value])
    hyperparams = list(numbers.hyperparams)
    hyperparams[place] = value
    return numbers._replace(hyperparams=hyperparams)


@jax.jit
def _keys(key, index):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _place(name, hyperparams) -> int:
    """Where the number of this hyperparameter is among those of all."""
    leaves = jax.tree_util.tree_leaves_with_path(hyperparams)
    held = [path[0].key for path, leaf in leaves if _tree.is_number(leaf)]
    return held.index(name) if name in held else -1


def _first_of(over, call: Call, seeds) -> tuple[dict[str, Any], Call]:
    """(the values by name, the call of the first lane), or an error."""
    fix = 'pass for example over={"learning_rate": [0.01, 0.1, 1.0]}'
    if not isinstance(over, dict):
        raise TypeError(f"over must be a dict, got {describe(over)}: {fix}.")
    if not over and seeds == 1:
        raise ValueError(f"over must name what differs, got {{}}: {fix}.")
    check_hyperparams(call.hyperparams)
    values, first, hyperparams = {}, {}, dict(call.hyperparams or {})
    for name, stacked in over.items():
        if not isinstance(name, str):
            raise TypeError(f"over must have names as keys, got {name!r}: {fix}.")
        if name in hyperparams:
            _refuse_both(name, hyperparams[name])
        if name == "learning_rate" and call.learning_rate is not None:
            _refuse_both(name, call.learning_rate)
        if name == "args":
            if call.args:
                _refuse_both(name, call.args)
            if not isinstance(stacked, tuple | list):
                raise TypeError(
                    "over['args'] must be a tuple of stacked arrays, one for each of "
                    f"args, got {describe(stacked)}: pass (array,)."
                )
            stacked = tuple(stacked)
        if name in STACKED:
            values[name] = stacked
            first[name] = jax.tree.map(lambda x: x[0], _with_axis(name, values[name]))
            continue
        if name in _ALMOST:
            raise ValueError(f"over has {name!r}: did you mean {_ALMOST[name]}?")
        if name in ("fun", "data", *OPTIONS) and name != "learning_rate":
            raise ValueError(
                "over must name learning_rate, a hyperparameter, params or args, got "
                f"{name!r}: it is one for all lanes; call sweep for each."
            )
        values[name] = _numbers(name, stacked)
        if name == "learning_rate":
            first[name] = values[name][0]
        else:
            hyperparams[name] = values[name][0]
    return values, replace(call, **first, hyperparams=hyperparams or None)


def _refuse_both(name, given) -> None:
    raise ValueError(
        f"{name} must not be given beside over[{name!r}], which takes its place, got "
        f"{describe(given)}: leave it out."
    )


def _numbers(name, values) -> np.ndarray:
    """The values of a rate or hyperparameter, an axis of the grid."""
    fix = "pass a list or array of numbers, for example [0.01, 0.1, 1.0]"
    came = f"over[{name!r}] must be a list of floating numbers, got {describe(values)}"
    if not isinstance(values, list | tuple | np.ndarray | jax.Array):
        raise TypeError(f"{came}: {fix}.")
    loose = values if isinstance(values, list | tuple) else ()
    if not all(is_real(dtype_of(x)) and np.shape(x) == () for x in loose):
        raise TypeError(f"{came}: {fix}; schedules, flags and counts are structure.")
    array = np.asarray(values)
    if name != "learning_rate" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{came} of dtype {array.dtype}: write 1.0 instead of 1; flags and counts "
            "are structure, call sweep for each."
        )
    if not is_real(array.dtype):
        raise TypeError(f"{came} of dtype {array.dtype}: {fix}.")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"over[{name!r}] must have one axis and a number at least, got shape "
            f"{array.shape}: {fix}."
        )
    array = array.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(f"over[{name!r}] must not hold NaN, got {array}: {fix}.")
    if name == "learning_rate" and not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"over[{name!r}] must be finite and >= 0 everywhere, got {array}: {fix}."
        )
    return array


def _with_axis(name, stacked):
    """``stacked`` with its leading axes in order, or an error."""
    fix = "stack them along a new first axis, for example with jnp.stack"
    paths = jax.tree_util.tree_leaves_with_path(stacked)
    lengths = {}
    for path, leaf in paths:
        where = f"over[{name!r}]{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") or np.ndim(leaf) == 0:
            raise TypeError(
                f"{where} must be an array with an axis of lanes, got "
                f"{describe(leaf)}: {fix}."
            )
        lengths[where] = leaf.shape[0]
    fit_32_bits(f"over[{name!r}]", stacked)
    if not lengths or 0 in lengths.values():
        raise ValueError(f"over[{name!r}] must hold a lane at least: {fix}.")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{where} has {n}" for where, n in lengths.items())
        raise ValueError(
            f"over[{name!r}] must have equally many lanes in every array, but {told}: "
            f"{fix}."
        )
    return stacked


def _stacked(name, values, numbers: Numbers, dtype):
    """The values of one axis in the dtypes of the first lane."""
    if name not in STACKED:
        most = np.finfo(dtype).max
        return np.clip(values, -most, most).astype(dtype)
    with np.errstate(over="ignore"):
        return jax.tree.map(
            lambda x, like: jnp.asarray(x, jax.dtypes.canonicalize_dtype(like.dtype)),
            values,
            getattr(numbers, name),
        )
