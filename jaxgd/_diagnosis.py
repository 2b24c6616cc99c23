r"""Was the learning rate too small or too large? What the steps themselves tell.

This room owns the curvature met along the steps and the verdict drawn from it. The loop
offers it what its steps saw anyway (``extend_met``, pure arithmetic on scalars); the
result turns that into ``Diagnosis`` on the host.

A step :math:`u` from :math:`\theta` to :math:`\theta_+` meets the curvature
:math:`c = u^T H u / u^T u`, and by Taylor's formula
:math:`J(\theta_+) = J(\theta) + g^T u + \tfrac12 c\,\|u\|^2`, with :math:`H` averaged
over the segment: all but :math:`c` is known. Its boldness
:math:`b = c\,\|u\|^2 / -g^T u` says where on the parabola the step ends: at 1 in the
minimum along its line, beyond 2 higher than it began. For plain descent
:math:`u = -\alpha g`, so :math:`b = \alpha c` and descent is stable below
:math:`\alpha = 2 / c`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgd._result import Status

# Boldness of the boldest step: below the first a rate is too small, above the second it
# is at the edge. Beyond 2 the objective rose (by more than rounding: the third), which
# networks at the edge of stability make good again, unless it is as far as the last.
_SMALL, _EDGE, _RISES, _OVERSHOT = 0.2, 1.8, 2.01, 2.5
# Rows of a batch from which on its mean stands for that of all.
_CALM = 16


class Met(NamedTuple):
    """What a run of batch descent has met on its way: scalars.

    A run carries them in one array: every array in and out of a call costs it time.
    """

    value: Any  # of the iterate that the last step left, NaN before the first
    grad_norm: Any
    update_norm: Any  # of that step
    slope: Any  # gradient times update, negative downhill
    curvature: Any  # the largest along any step, NaN while none could be told
    boldness: Any  # of the boldest step, NaN likewise
    steepest: Any  # the largest gradient norm


def nothing_met(dtype):
    """``Met`` before the first step, as one array."""
    return jnp.full((len(Met._fields),), jnp.nan, dtype)


def extend_met(packed, value, grad_norm, update_norm, slope, count, plain):
    """``packed`` with the first ``count`` of the offered steps, arrays (K,)."""
    met = Met(*packed)
    live = jnp.arange(value.shape[0]) < count
    columns = (value, grad_norm, update_norm, slope)
    before = [
        jnp.concatenate([jnp.reshape(old, (1,)), x[:-1]])
        for old, x in zip(met[:4], columns, strict=True)
    ]
    bold, curvature = measured(jnp, before, value, grad_norm, plain)

    def most(so_far, new):
        return jnp.fmax(so_far, jnp.nanmax(jnp.where(live, new, jnp.nan)))

    last = jnp.maximum(count - 1, 0)
    newest = [
        jnp.where(count > 0, x[last], old)
        for x, old in zip(columns, met[:4], strict=True)
    ]
    largest = [
        most(met.curvature, curvature),
        most(met.boldness, bold),
        most(met.steepest, grad_norm),
    ]
    return jnp.stack([*newest, *largest])


def measured(xp: Any, before, next_value, next_norm, plain):
    """(boldness, curvature) of steps; NaN where rounding hides them.

    ``before``: value, gradient norm, update norm and slope of the iterates they leave.

    Where a step is too short for the objective to tell, that of plain descent still
    shows in the gradient, whose norm shrinks by a factor 1 - b.
    """
    value, grad_norm, update_norm, slope = before
    eps = xp.finfo(next_value.dtype).eps
    down = xp.where((slope < 0) & xp.isfinite(slope), -slope, xp.nan)
    bold = 2 * (1 - (value - next_value) / down)
    error = 4 * eps * xp.maximum(abs(value), abs(next_value)) / down
    told = error <= xp.maximum(0.02, 0.03 * abs(bold))
    error = xp.where(told, error, xp.nan)
    bold = xp.where(told, bold, xp.nan)
    if plain:
        shrinks = next_norm / grad_norm
        other = (1 - shrinks) * (1 + shrinks) / 2
        better = (down > 0) & (abs(other) <= 0.1) & ~(error <= 0.1 * bold)
        bold = xp.where(better, xp.maximum(other, 0), bold)
        error = xp.where(better, 2 * eps, error)
    finite = xp.isfinite(bold)
    curvature = xp.where(
        error <= 0.3 * bold, bold * (down / update_norm) / update_norm, xp.nan
    )
    return xp.where(finite, bold, xp.nan), curvature


@dataclass(frozen=True)
class Diagnosis:
    """What a run tells of its learning rate; ``print`` it, or read its fields.

    Attributes:
      curvature: the largest curvature met along the steps, from what they saw anyway;
        NaN with mini-batches, whose noise hides it, and with line searches.
      stable_learning_rate: ``2 / curvature``, the rate up to which plain descent on
        that curvature is stable; NaN for other rules, whose rate means something else.
      verdict: "too small", "good", "edge of stability", "too large" or "unknown".
      advice: one sentence with a number in it.
    """

    curvature: float
    stable_learning_rate: float
    verdict: str
    advice: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.advice}"


def diagnose(result) -> Diagnosis:
    """The diagnosis of a single run, on the host."""
    rule, batch_size = result.setting.rule, result.setting.batch_size
    if result.status == Status.NON_FINITE:
        return _unknown("No step was taken: the objective is not finite at the start.")
    if int(result.steps) == 0 and result.status != Status.DIVERGED:
        return _unknown("0 steps were taken, which tell nothing of the rate.")
    if rule == "search":
        return _unknown(_of_search(result))
    if rule == "average" and result.status != Status.DIVERGED:
        took = f"The {int(result.steps)} steps were not taken from the points judged"
        return _unknown(f"{took}, so they tell nothing of the rate.")
    if batch_size is not None or np.size(result.state.run.met) == 0:
        return _with_noise(result, rule)
    bold, curvature = _largest(result)
    stable = 2 / curvature if rule == "plain" and curvature > 0 else np.nan
    verdict = _verdict(result, rule, bold)
    words = _plain_words if rule == "plain" else _other_words
    return Diagnosis(curvature, stable, verdict, words(result, verdict, bold, stable))


def _unknown(advice) -> Diagnosis:
    return Diagnosis(np.nan, np.nan, "unknown", advice)


def _largest(result) -> tuple[float, float]:
    """Boldness and curvature of the run, its last step included."""
    met = Met(*np.asarray(result.state.run.met))
    last = measured(
        np,
        met[:4],
        np.asarray(result.value),
        np.asarray(result.grad_norm),
        result.setting.rule == "plain",
    )
    bold, curvature = np.fmax(met.boldness, last[0]), np.fmax(met.curvature, last[1])
    return float(bold), float(curvature)


def _verdict(result, rule, bold) -> str:
    if result.status == Status.DIVERGED:
        return "too large"
    if not bold > 0:
        return "unknown"
    if bold < _SMALL:
        return "too small"
    if rule != "plain":
        return "good" if result.converged else "unknown"
    if bold < _EDGE:
        return "good"
    rose = bold > _RISES and not _falls(result)
    return "too large" if rose or bold > _OVERSHOT else "edge of stability"


def _falls(result) -> bool:
    """Whether the objective still came down in the end, by more than it swings."""
    if result.converged:
        return True
    values = np.append(result.history.value, result.value)
    third, last = (
        values[-(values.size // 2) :][: values.size // 4],
        values[-(values.size // 4) :],
    )
    return bool(last.size) and third.mean() - last.mean() > 0.1 * last.std()


def _plain_words(result, verdict, bold, stable) -> str:
    if verdict == "unknown":
        return _nothing_told(result, bold)
    if np.isnan(stable) and verdict == "too large":
        return _after_divergence(result)
    if np.isnan(stable):  # only a bound on the boldness is known
        resolved = max(bold, float(np.finfo(np.asarray(result.value).dtype).eps))
        return (
            f"The rate could be more than {_n(1 / resolved)} times larger: the "
            "steps are so short that the objective hardly feels any curvature."
        )
    times = f"{bold / 2:.3g} times the stable limit {_n(stable)}"
    times += f" (2 over the curvature {_n(2 / stable)})"
    if verdict == "too small":
        faster = f"up to {_n(1 / bold)} times faster"
        return f"The rate is {times}: {_n(stable / 2)} would be {faster}."
    if verdict == "too large":
        # A run that swings and does not blow up feels less curvature on its way than
        # near the minimum.
        safe = stable / 2 if result.status == Status.DIVERGED else stable / 4
        return f"The rate is {times}: try {_n(safe)}."
    if verdict == "edge of stability":
        calm = f"{_n(stable / 2)} would descend without overshooting"
        return f"The rate is {times}: {calm}."
    return f"The rate is {times}.{_more_steps(result)}"


def _other_words(result, verdict, bold, stable) -> str:
    del stable
    if result.status == Status.DIVERGED:
        return _after_divergence(result)
    if verdict == "unknown" and not bold > 0:
        return _nothing_told(result, bold)
    at = f"Its boldest step went {_n(bold)} times as far as the minimum along its line"
    if verdict == "too small":
        return f"{at}: the rate could be up to {_n(1 / bold)} times larger."
    return f"{at}.{_more_steps(result)}"


def _nothing_told(result, bold) -> str:
    steps = int(result.steps)
    if bold <= 0:
        along = f"Along the {steps} steps the objective never curved up"
        return f"{along}: no rate is too large."
    return (
        f"The {steps} steps do not tell the curvature: they are too short for the "
        "digits of the objective, or nothing of them was recorded."
    )


def _of_search(result) -> str:
    if abs(float(result.value)) > 1e-2 * np.finfo(np.asarray(result.value).dtype).max:
        return f"The objective is {_n(result.value)}: it seems to be unbounded below."
    rates = result.history.learning_rate
    rates = rates[np.isfinite(rates) & (rates > 0)]
    text = "The rule chooses its own rates"
    if rates.size:
        text += f", here {_n(rates.min())} to {_n(rates.max())}"
    else:
        text += f" and took {int(result.steps)} steps"
    return f"{text}.{_more_steps(result)}"


def _with_noise(result, rule) -> Diagnosis:
    """Of mini-batches and random objectives: only what stands out of their noise."""
    if result.status == Status.DIVERGED:
        return Diagnosis(np.nan, np.nan, "too large", _after_divergence(result))
    history, batch_size = result.history, result.setting.batch_size or 1
    if history.step.size < 32:
        return _unknown(
            f"{history.step.size} recorded steps are too few to tell their noise from "
            "progress; jaxgd.find_learning_rate can."
        )
    quarter = history.step.size // 4
    first, last = history.value[:quarter], history.value[-quarter:]
    before, after = float(first.mean()), float(last.mean())
    of = (
        "From the first quarter of the batches to the last their mean went from "
        f"{_n(before)} to {_n(after)}"
    )
    noise = np.hypot(first.std(), last.std()) / np.sqrt(quarter)
    start = float(history.value[0])  # of one batch: the smaller, the less it means
    surely = after - 4 * last.std() / np.sqrt(quarter)
    above = surely > start * (2 if batch_size >= _CALM else 100)
    if after - before > 4 * noise or above:
        if above:
            of = (
                f"The batches of the last quarter have a mean of {_n(after)}, the "
                f"first batch had {_n(start)}"
            )
        advice = f"{of}: try a tenth of the rate, or jaxgd.find_learning_rate."
        return Diagnosis(np.nan, np.nan, "too large", advice)
    left = history.grad_norm[-quarter:].mean() / history.grad_norm[:quarter].mean()
    # Near a minimum the gradient of a batch is noise, and that of all rows far smaller.
    downhill = float(result.grad_norm) > 0.5 * history.grad_norm[-quarter:].mean()
    if rule == "plain" and downhill and 0.9 < left < 1.1 and after < 2 * abs(start):
        advice = (
            f"{of}, and the gradient kept {left:.0%} of its size: the rate could be "
            "10 times larger or more."
        )
        return Diagnosis(np.nan, np.nan, "too small", advice)
    return _unknown(
        f"{of}; whether another rate is better is hidden in the noise of mini-batches: "
        "jaxgd.find_learning_rate tells."
    )


def _after_divergence(result) -> str:
    steps = int(result.steps)
    if steps == 0:
        return (
            "It blew up in step 1: leave the rate out, or race rates with "
            "jaxgd.find_learning_rate."
        )
    text = f"It blew up after {steps} step{'' if steps == 1 else 's'}"
    history = result.history
    if result.setting.rule != "plain" or not history.step.size:
        return f"{text}: try a tenth of the rate, or jaxgd.find_learning_rate."
    # In the end the sharpest direction rules, and multiplies by |1 - rate * curvature|.
    tail = history.grad_norm[-50:]
    low = int(np.argmin(tail))
    over = max(int(history.step[-50:][-1] - history.step[-50:][low]), 1)
    growth = float(tail[-1] / tail[low]) ** (1 / over) if tail[low] > 0 else np.inf
    rate = float(history.learning_rate[-1])
    if not np.isfinite(growth):
        return f"{text}: try a tenth of the rate {_n(rate)}, or find_learning_rate."
    stable = 2 * rate / (1 + growth)
    few = (result.setting.batch_size or _CALM) < _CALM  # single rows may be far steeper
    return (
        f"{text}, the gradient growing {_n(growth)} times a step: rates below about "
        f"{_n(stable)} are stable, try {_n(stable / (10 if few else 2))}."
    )


def _more_steps(result) -> str:
    """How many more steps are missing at this pace, where the limit ended the run."""
    if result.status != Status.MAX_STEPS:
        return ""
    goal = next((c for c in result.criteria if c.name == "gradient norm"), None)
    history = result.history
    if goal is None or history.step.size < 8:
        return ""
    half = slice(history.step.size // 2, None)
    norms = np.append(history.grad_norm[half], goal.measured)
    steps = np.append(history.step[half], int(result.steps))
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < 4 or not goal.threshold > 0:
        return ""
    slope = np.polyfit(steps[usable], np.log(norms[usable]), 1)[0]
    if slope >= 0:
        return " The gradient no longer shrinks."
    missing = np.log(float(goal.measured) / float(goal.threshold)) / -slope
    text = f" Steps are missing: about {_n(max(missing, 1))} more at this pace"
    if result.setting.rule == "plain" and missing > 10 * int(result.steps):
        text += ", or leave the rate out: jaxgd.barzilai_borwein needs none"
    return text + "."


def _n(x) -> str:
    """Two digits, without an exponent where that reads well."""
    x = float(f"{float(x):.2g}")
    plain = 1e-3 <= abs(x) < 1e7 or x == 0
    return np.format_float_positional(x, trim="-") if plain else f"{x:.2g}"
