"""Which learning rate to take: ``find_learning_rate``, a race of rates.

This room owns the choice of the rates that race and of the one that is suggested. It
stands above ``_api/minimize``: a lane of the race is a run of that very program with a
rate of its own, all lanes on the same rows, and the host decides between heats only.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.arrays import refuse_stream
from jaxgd._call.call import Call
from jaxgd._checks import describe, short
from jaxgd._loop.plan import Numbers, Spec, block_alone, objective_of
from jaxgd._loop.program import go, start
from jaxgd._result.search import Heat, LearningRateSearch
from jaxgd._rows.resident import pass_key
from jaxgd._rules.adapter import is_rule
from jaxgd._rules.barzilai_borwein import barzilai_borwein
from jaxgd._rules.parabolic_rms import parabolic_rms
from jaxgd._rules.scaled_lbfgs import scaled_lbfgs
from jaxgd._tools.sharpness import sharpness
from jaxgd._tree import dtype_of, is_real

# Measured on 7 tasks x 4 batch sizes x 3 rules (benchmarks/rate_search.py). The best
# rate after a tenth of a run is no good one at its end in a third of all cases (20 of
# 84 more than 1.2 times the best objective), nor is that after a half of it (10 of 84).
# So a few rates run to the end; shorter heats find out which.
_LANES, _BELOW = 12, 4  # a heat, and how many of its rates lie below the best so far
_PER_DECADE = 8  # rates of the finest heat
# (spacing, tenths of the run, steps at least, blocks to add if the best is at an end)
_HEATS = ((4, 1, 5, 6), (2, 3, 10, 1), (1, 10, 1, 1))
_CURVATURE_RTOL = 0.1  # of a number that only says where to begin
_WORSE = 7.0  # a lane that diverged counts as exp(7) times the objective at the start
_EQUAL = 1e-6  # relative difference of objectives that rounding makes


def find_learning_rate(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    args: tuple | list = (),
    batch_size: int | None = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    max_steps: int | None = None,
    epochs: Any = None,
    learning_rates: Any = None,
    key: Any = None,
    has_aux: bool = False,
    with_key: bool = False,
    microbatch_size: int | None = None,
    strata: int | None = None,
) -> LearningRateSearch:
    r"""Finds a learning rate by racing rates against each other on the same rows.

    A rate that looks best after a few steps is seldom best at the end of a run: noise
    and instability take their time. So the race is for a run of a given length, in
    three heats of 12 rates each, lanes of one compiled program: half-decade steps for a
    tenth of the run, quarters of a decade for three tenths, eighths of a decade to the
    end. A heat whose best rate is at its end goes on from there. In all, that is the
    work of 17 to 45 runs (the median is 18) whose batches are shared, and the memory of
    12.

    The rate that is suggested reached the lowest full objective together with its
    neighbors, so that one next to a rate that diverged is not taken for its own good
    fortune. Where no rows are drawn and nothing is fortune, it reached the lowest by
    itself, and the next larger rate lowered the objective, too.

    Plain descent starts the race around its stable limit :math:`2 / \lambda`, with
    :math:`\lambda` the ``sharpness`` at the start. A factory starts between 1e-5 and 3.

    Args:
      fun, params, data, args, batch_size, key, has_aux, with_key, microbatch_size,
        strata: as for ``minimize``.
      optimizer: None for plain descent, or a factory (``optax.adam``, any function of a
        rate that returns an optax rule).
      hyperparams: further arguments of the factory.
      max_steps, epochs: the length of the run that the rate is for, as for
        ``minimize``: by default 1000 steps without ``batch_size``, else 10 epochs. A
        rate for fewer is found faster, and may be too large for more.
      learning_rates: race these rates alone, all of them to the end; the one of the
        lowest objective is suggested, whatever its neighbors did.

    Returns:
      A ``LearningRateSearch``; its ``suggestion`` is a float, ``print`` it for more.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument has a wrong value or shape.

    Warns:
      UserWarning: ``fun`` is no mean over rows, as ``minimize`` and ``sharpness`` do.

    Example:
      >>> import jax.numpy as jnp, jaxgd, optax
      >>> x = jnp.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
      >>> y = jnp.array([2.0, 5.0, 9.0])
      >>> def loss(theta, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ theta - y) ** 2) / 2
      >>> found = jaxgd.find_learning_rate(loss, jnp.zeros(2), (x, y), max_steps=100)
      >>> 0.1 < found.suggestion < found.stable_limit < 0.21
      True
      >>> adam = jaxgd.find_learning_rate(
      ...     loss, jnp.zeros(2), (x, y), batch_size=2, optimizer=optax.adam
      ... )
      >>> adam.reached < adam.start / 10
      True

    References:
      Smith, Cyclical learning rates for training neural networks, WACV (2017), the
      range test within one pass. Jamieson and Talwalkar, Non-stochastic best arm
      identification and hyperparameter optimization, AISTATS (2016). Wu, Ren, Liao and
      Grosse, Understanding short-horizon bias in stochastic meta-optimization, ICLR
      (2018).
    """
    _require_factory(optimizer)
    given = (params, data, args, hyperparams, learning_rates, max_steps, epochs, key)
    if any(_tree.is_traced(x) for x in jax.tree.leaves(given)):
        raise TypeError(
            "find_learning_rate decides on the host which rates to race, so it takes "
            "no traced values, got one: call it outside jit, vmap and grad."
        )
    grid = None if learning_rates is None else _grid(learning_rates)
    refuse_stream("find_learning_rate", data)
    call = Call(
        fun,
        params,
        data,
        args=args,
        batch_size=batch_size,
        optimizer=optimizer,
        hyperparams=hyperparams,
        max_steps=max_steps,
        epochs=epochs,
        key=key,
        has_aux=has_aux,
        with_key=with_key,
        microbatch_size=microbatch_size,
        strata=strata,
        learning_rate=1.0,
        stop=None,
        final_evaluation=False,
        history_rows=0,
    )
    return _searched(call, grid)


def _searched(call: Call, grid) -> LearningRateSearch:
    """The race of a call, or of the rates of ``grid`` alone."""
    spec, numbers, steps = checked(call)
    if steps < 1:
        name = "epochs" if call.max_steps is None else "max_steps"
        raise ValueError(f"{name} must be at least 1 step, got 0: there is no race.")
    limit, plain = float("nan"), call.optimizer is None
    spec = tried(spec, numbers, plain, _LANES)
    if plain:
        limit = _stable_limit(call)
    race = _Race(spec, numbers, int(steps))
    if grid is None:
        scale, middle = (limit, -0.75) if np.isfinite(limit) else (1.0, -2.25)
        heats, suggestion = _three_heats(race, scale, middle)
    else:
        heats = [race.heat(grid)]
        suggestion = _suggested(heats[0], race.start, _lowest)
    last = heats[-1]
    return LearningRateSearch(
        suggestion=suggestion,
        learning_rates=last.learning_rates,
        values=last.values,
        stable_limit=limit,
        start=race.start,
        steps=last.steps,
        heats=tuple(heats),
        rule=_in_words(call.optimizer, call.hyperparams),
    )


class _Race:
    """Lanes of one problem from its start: the compiled programs and their inputs."""

    def __init__(self, spec: Spec, numbers: Numbers, steps: int):
        # Every heat is so many calls of one program that takes a tenth of the steps.
        self._leg = -(-steps // 10)
        self._legs = -(-steps // self._leg)
        self._spec = spec._replace(exactly=self._leg)
        self._numbers = numbers
        self.noiseless = spec.batch_size is None and not spec.with_key
        self.start = float("nan")

    def heat(self, rates, tenths: int = 10, fewest: int = 1) -> Heat:
        """All ``rates`` for ``tenths`` of the steps, but ``fewest`` steps at least."""
        spec, numbers = self._spec, self._numbers
        dtype = _tree.real_dtype(numbers.params)
        most = np.finfo(dtype).max
        rates = np.clip(rates, 1 / most, most).astype(dtype)
        state = _start_lanes(spec, numbers, rates)
        if np.isnan(self.start):
            self.start = float(_values(spec, numbers, state.params)[0])
        legs = max(self._legs * tenths // 10, -(-fewest // self._leg))
        legs = min(legs, self._legs)
        judged = state.params
        for _ in range(legs):
            state, judged = _go_lanes(spec, numbers, rates, state)
        values = np.asarray(_values(spec, numbers, judged), np.float64)
        values = np.where(np.isfinite(values), values, np.inf)
        return Heat(legs * self._leg, rates.astype(np.float64), values)


def _with_rate(numbers: Numbers, rate) -> Numbers:
    return numbers._replace(learning_rate=[rate])


@partial(jax.jit, static_argnums=0)
def _start_lanes(spec: Spec, numbers: Numbers, rates):
    """States before step 0, one a lane."""
    return jax.vmap(lambda rate: start(spec, _with_rate(numbers, rate)))(rates)


@partial(jax.jit, static_argnums=0)
def _go_lanes(spec: Spec, numbers: Numbers, rates, states):
    """(states, parameters to judge) ``spec.exactly`` steps later."""

    def lane(rate, state):
        no_limit = np.int32(0)  # the length is the program's
        outcome = go(spec, _with_rate(numbers, rate), state, no_limit)
        judged = outcome.judged
        return outcome.state, outcome.state.params if judged is None else judged

    return jax.vmap(lane)(rates, states)


@partial(jax.jit, static_argnums=0)
def _values(spec: Spec, numbers: Numbers, params):
    """The full objective, (lanes,)."""
    block = spec.microbatch_size
    if spec.batch_size is not None:
        block = block_alone(spec, jax.tree.leaves(params)[0].shape[0])
    objective = objective_of(spec, numbers, block)
    key = pass_key(numbers.key) if spec.with_key else None
    return jax.vmap(lambda p: objective.value(p, numbers.data, key))(params)


def _three_heats(race: _Race, scale: float, middle: float):
    """(heats, suggestion), all rates of the form ``scale * 10**(k / 8)``."""
    heats, first = [], None
    for spacing, tenths, fewest, blocks in _HEATS:
        if first is None:
            first = round(middle * _PER_DECADE) - spacing * _LANES // 2
        run = partial(race.heat, tenths=tenths, fewest=fewest)
        heat, first = _widened(run, race, scale, first, spacing, blocks)
        heats.append(heat)
        best = first + spacing * _best(heat, race.start)
        first = best - spacing // 2 * _BELOW  # the next heat is twice as fine
    choose = _lowest_with_margin if race.noiseless else _best
    return heats, _suggested(heats[-1], race.start, choose)


def _widened(run, race: _Race, scale, low, spacing, blocks):
    """(heat, its lowest k): up or down until its best rate is not at its end."""

    def block(first):
        k = first + spacing * np.arange(_LANES)
        return run(scale * 10.0 ** (k / _PER_DECADE))

    heat, high = block(low), low + spacing * _LANES
    for _ in range(blocks):
        best = _best(heat, race.start)
        up = best == heat.values.size - 1
        if not np.isfinite(race.start) or not (up or best == 0):
            break
        if up:
            parts, high = (heat, block(high)), high + spacing * _LANES
        else:
            low -= spacing * _LANES
            parts = (block(low), heat)
        rates = np.concatenate([part.learning_rates for part in parts])
        values = np.concatenate([part.values for part in parts])
        heat = Heat(heat.steps, rates, values)
    return heat, low


def _suggested(heat: Heat, start: float, choose: Callable) -> float:
    if not np.isfinite(start) or not (heat.values < start).any():
        return float("nan")
    chosen = choose(heat, start)
    lowers = heat.values[chosen] < start
    return float(heat.learning_rates[chosen]) if lowers else float("nan")


def _lowest(heat: Heat, start: float) -> int:
    """The lane with the lowest objective."""
    del start
    return int(np.argmin(heat.values))


def _lowest_with_margin(heat: Heat, start: float) -> int:
    """The lowest lane of those whose next rate lowers the objective, too.

    Without noise a lane is repeated by the run it stands for, so the lowest is no
    matter of luck; but what lies next to a rate that diverges may do so by rounding.
    """
    above = np.append(heat.values[1:], -np.inf)
    values = np.where(above <= start, heat.values, np.inf)
    return int(np.argmin(values)) if np.isfinite(values).any() else _best(heat, start)


def _best(heat: Heat, start: float) -> int:
    """The lane with the lowest objective, its neighbors counted by half.

    In the logarithm of ``1 + (value - lowest) / |lowest|``, which for positive values
    is that of the value. Of lanes that are equal, it is the one of the largest rate.
    """
    finite = np.isfinite(heat.values)
    if not finite.any():
        return 0
    lowest = heat.values[finite].min()
    size = abs(lowest) or abs(start) or 1.0
    with np.errstate(over="ignore"):
        score = np.log1p((heat.values - lowest) / size)
    worst = np.log1p(max(start - lowest, 0.0) / size) + _WORSE
    score = np.minimum(score, worst)
    around = np.pad(score, 1, mode="edge")
    score = (around[:-2] + 2 * score + around[2:]) / 4
    score[~finite] = np.inf
    return int(np.flatnonzero(score <= score.min() + _EQUAL)[-1])


def _stable_limit(call: Call) -> float:
    """2 / sharpness at the start; inf where the objective curves nowhere up."""
    with warnings.catch_warnings():  # said before
        warnings.filterwarnings("ignore", "fun is no mean over rows")
        curvature = sharpness(
            call.fun,
            call.params,
            call.data,
            args=call.args,
            rtol=_CURVATURE_RTOL,
            key=call.key,
            has_aux=call.has_aux,
            with_key=call.with_key,
            microbatch_size=call.microbatch_size,
        )
    curvature = float(curvature)
    if np.isnan(curvature):
        return curvature
    return 2 / curvature if curvature > 0 else float("inf")


def _require_factory(optimizer) -> None:
    if not inspect.isclass(optimizer) and is_rule(optimizer):
        raise ValueError(
            "optimizer must be a factory, since a ready rule has its rate already, got "
            f"{describe(optimizer)}: pass for example optimizer=optax.adam, and what "
            'else it takes in hyperparams, such as {"b1": 0.95}.'
        )
    if optimizer in (barzilai_borwein, parabolic_rms, scaled_lbfgs):
        raise ValueError(
            "optimizer must be a factory that takes a rate, got "
            f"{describe(optimizer)}, which needs none: call minimize with it."
        )


def _in_words(optimizer, hyperparams) -> str:
    if optimizer is None:
        return "plain descent"
    name = getattr(optimizer, "__name__", None) or describe(optimizer)
    given = (f"{k}={short(repr(v), 20)}" for k, v in (hyperparams or {}).items())
    return ", ".join([name, *given])


def _grid(learning_rates) -> np.ndarray:
    """The rates in ascending order, or an error."""
    fix = "pass for example np.geomspace(1e-4, 1, 9)"
    came = describe(learning_rates)
    if not isinstance(learning_rates, list | tuple | np.ndarray | jax.Array):
        raise TypeError(f"learning_rates must be an array of rates, got {came}: {fix}.")
    leaves = learning_rates if isinstance(learning_rates, list | tuple) else ()
    if not all(is_real(dtype_of(leaf)) and np.shape(leaf) == () for leaf in leaves):
        raise TypeError(f"learning_rates must be real numbers, got {came}: {fix}.")
    grid = np.asarray(learning_rates)
    if not is_real(grid.dtype):
        raise TypeError(f"learning_rates must be real numbers, got {came}: {fix}.")
    grid = np.sort(grid.astype(np.float64), axis=-1)
    if grid.ndim != 1 or grid.size == 0:
        raise ValueError(
            "learning_rates must have one axis and a rate at least, got shape "
            f"{grid.shape}: {fix}."
        )
    if not (np.isfinite(grid).all() and grid[0] > 0):
        raise ValueError(
            f"learning_rates must be finite and positive, got {came}: {fix}."
        )
    return grid
