"""Many runs at once: rates, hyperparameters, starts, problems and seeds as lanes.

This room owns the grid: which numbers of a call differ from lane to lane, and how the
lanes compare. The lanes share one loop of one compiled program, see ``_loop/program``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.arrays import refuse_stream
from jaxgd._call.call import OPTIONS, Call, call_of
from jaxgd._checks import describe, fit_32_bits, whole
from jaxgd._loop.cause import BAD, explained
from jaxgd._loop.outcome import finished
from jaxgd._loop.plan import Numbers, Spec
from jaxgd._loop.program import go_together, start
from jaxgd._result.result import Result
from jaxgd._stop.status import Status
from jaxgd._tree import dtype_of, is_real

_STACKED = ("params", "args")
# Lanes that ended badly and are looked at again, one by one.
_EXPLAINED = 16
_ALMOST = {
    "seeds": "the argument seeds=5",
    "key": "the argument seeds=5",
    "lr": "'learning_rate'",
    "learning_rates": "'learning_rate'",
}


@dataclass(frozen=True, repr=False)
class Sweep:
    """Runs of a grid of settings; ``print`` it for a table.

    Attributes:
      results: a ``Result`` whose leaves have the axes of the grid: one for each entry
        of ``over``, in its order, and a last one for ``seeds`` where there are several.
      over: what differed: names, and their values stacked along the first axis.
      seeds: how many seeds each setting was run with.
    """

    results: Result
    over: dict[str, Any]
    seeds: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the grid, seeds last."""
        return np.shape(self.results.status)

    def __getitem__(self, lane) -> Result:
        """The result of one lane, ``sweep[i, j]``, or of some."""
        return self.results[lane]

    @cached_property
    def scores(self) -> np.ndarray:
        """What settings are compared by: the objective reached, the mean over seeds.

        Float64 in the shape of the grid without seeds; infinite where a lane diverged
        or did not end at a finite objective.
        """
        values = np.asarray(self.results.value, np.float64)
        if not self._evaluated:
            raise ValueError(
                "Lanes are compared by their objective, which final_evaluation=False "
                "left out: sweep with final_evaluation=True."
            )
        values = np.where(self._lost | ~np.isfinite(values), np.inf, values)
        return values.mean(axis=-1) if self.seeds > 1 else values

    @property
    def best(self) -> Result:
        """The lane of ``best_settings`` that reached the lowest objective.

        A ValueError where no lane ended at a finite objective.
        """
        return self.results[self._best]

    @property
    def best_settings(self) -> dict[str, Any]:
        """The settings with the lowest score, by name; with the ``seed`` of ``best``.

        Numbers are Python floats, ``params`` and ``args`` those of the lane.
        """
        settings = self._settings(self._best)
        return settings | ({"seed": self._best[-1]} if self.seeds > 1 else {})

    def table(self) -> str:
        """All settings in aligned columns, the best first.

        With several seeds a row tells the mean over them and, after it, their standard
        deviation. ``params`` and ``args`` are shown by their place unless they are
        single numbers. A dash is where there is no objective to tell: a run was lost,
        or not evaluated.
        """
        return _table(self)

    def plot(self, ax=None):
        """The objective over the grid; needs the extra ``jaxgd[plot]``.

        One axis of numbers is drawn as a curve, two as a heat map with lanes that
        diverged marked, starts or problems as the curves of their runs.

        Args:
          ax: Matplotlib axes to draw into; new ones if None.

        Returns:
          The axes.

        Raises:
          ValueError: for a grid of more than two axes, seeds apart.
        """
        from jaxgd._result.plot import plot_sweep

        return plot_sweep(self, ax)

    def __repr__(self) -> str:
        return self.table()

    @property
    def _lost(self) -> np.ndarray:
        status = np.asarray(self.results.status)
        return (status == Status.DIVERGED) | (status == Status.NON_FINITE)

    @property
    def _evaluated(self) -> bool:
        return self.results.setting.final

    @cached_property
    def _best(self) -> tuple[int, ...]:
        scores = self.scores
        if not np.isfinite(scores).any():
            raise ValueError(
                "There is no best lane: of every setting a run ended at an objective "
                "that is not finite. Sweep over smaller rates, or look at the data."
            )
        setting = np.unravel_index(int(np.argmin(scores)), scores.shape)
        place = tuple(int(i) for i in setting)
        if self.seeds > 1:
            values = np.asarray(self.results.value[place], np.float64)
            place += (int(np.argmin(values)),)  # finite, or its mean were not
        return place

    def _settings(self, place) -> dict[str, Any]:
        found = {}
        for i, (name, values) in enumerate(self.over.items()):
            one = jax.tree.map(lambda x, i=i: x[place[i]], values)
            found[name] = one if name in _STACKED else float(one)
        return found


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
    if name in _STACKED:
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
        if name in _STACKED:
            values[name] = stacked
            first[name] = jax.tree.map(lambda x: x[0], _with_axis(name, values[name]))
            continue
        if name in _ALMOST:
            raise ValueError(f"over has {name!r}: did you mean {_ALMOST[name]}?")
        if name in OPTIONS and name != "learning_rate":
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
    if name not in _STACKED:
        most = np.finfo(dtype).max
        return np.clip(values, -most, most).astype(dtype)
    with np.errstate(over="ignore"):
        return jax.tree.map(
            lambda x, like: jnp.asarray(x, jax.dtypes.canonicalize_dtype(like.dtype)),
            values,
            getattr(numbers, name),
        )


def _table(sweep: Sweep) -> str:
    results, seeds = sweep.results, sweep.seeds
    shape = sweep.shape[:-1] if seeds > 1 else sweep.shape
    # Without objectives the rows stand in the order of the grid.
    scores = sweep.scores if sweep._evaluated else np.full(shape, np.nan)
    flat = scores.reshape(-1)
    rows = [_header(sweep)]
    for index in np.argsort(flat, kind="stable"):
        place = np.unravel_index(int(index), shape)
        values = np.atleast_1d(np.asarray(results.value[place], np.float64))
        norms = np.atleast_1d(np.asarray(results.grad_norm[place], np.float64))
        steps = np.atleast_1d(np.asarray(results.steps[place]))
        status = np.atleast_1d(np.asarray(results.status[place]))
        row = [_shown(name, one) for name, one in _shown_settings(sweep, place)]
        reached = np.isfinite(flat[index])
        row.append(f"{values.mean():.6g}" if reached else "-")
        if seeds > 1:
            row.append(f"{values.std():.2g}" if reached else "-")
        row.append(f"{norms.mean():.3g}" if reached else "-")
        low, high = steps.min(), steps.max()
        row.append(str(low) if low == high else f"{low}-{high}")
        row.append(_outcomes(status))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _header(sweep: Sweep) -> list[str]:
    spread = ["std"] if sweep.seeds > 1 else []
    return [*sweep.over, "objective", *spread, "gradient", "steps", "status"]


def _shown_settings(sweep: Sweep, place):
    for i, (name, values) in enumerate(sweep.over.items()):
        leaves = jax.tree.leaves(values)
        if len(leaves) == 1 and leaves[0].ndim == 1:
            yield name, float(leaves[0][place[i]])
        else:
            yield name, int(place[i])


def _shown(name, value) -> str:
    return f"#{value}" if isinstance(value, int) else f"{value:.4g}"


def _outcomes(status) -> str:
    kinds, counts = np.unique(status, return_counts=True)
    if len(kinds) == 1:
        return Status(int(kinds[0])).name
    return ", ".join(
        f"{count} {Status(int(kind)).name}"
        for kind, count in zip(kinds, counts, strict=True)
    )
