r"""Was the learning rate too small or too large? What the steps themselves tell.

This room owns the verdict that is drawn, on the host, from the curvature met along the
steps: the loop keeps that of what its steps saw anyway (``_result/curvature``).

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
from typing import Any

import jax
import numpy as np

from jaxgd._result.curvature import Met, measured
from jaxgd._stop.status import Status, has_no_bound

# Boldness of the boldest step: below the first a rate is too small, above the second it
# is at the edge. Beyond 2 the objective rose (by more than rounding: the third), which
# networks at the edge of stability make good again, unless it is as far as the last.
_SMALL, _EDGE, _RISES, _OVERSHOT = 0.2, 1.8, 2.01, 2.5
# Rows of a batch from which on its mean stands for that of all.
_CALM = 16


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
    with np.errstate(all="ignore"):  # numbers near the ends of their range
        return _diagnosed(result)


def _diagnosed(result) -> Diagnosis:
    rule, batch_size = result.setting.rule, result.setting.batch_size
    if result.status == Status.NON_FINITE:
        return _unknown(f"No step was taken. {_blame(result)}")
    if result.status == Status.DIVERGED and not blown_up(result):
        return _unknown(_blame(result))
    if not (result.history.grad_norm.any() or float(result.grad_norm) != 0):
        return _unknown("The gradient was exactly zero: no rate moves anything.")
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


# What helps against what was not finite, by the kind of the cause.
_HELPS = {
    "params": "begin at numbers that are finite",
    "data": "leave such rows out, fill them in, or take a rule that passes over their "
    "batches (optax.apply_if_finite)",
    "schedule": "let it return a number at every step",
    "gradient": "such is the derivative of a root at 0, and of a jnp.where whose other "
    "branch is not finite there; give that branch an input where it is",
    "objective": "keep the parameters where it is defined",
    "update": "look at the rule",
}


def _blame(result) -> str:
    """What is known of a run that was not finite, where the rate is not to blame."""
    cause = result.cause
    if cause is None:
        return (
            "The steps before do not show that the rate was too large: look at the "
            "objective, its gradient and the data."
            if result.status == Status.DIVERGED
            else f"{result.message} Look at the objective and the data."
        )
    return f"{cause.sentence} No rate mends that: {_HELPS[cause.kind]}."


def blown_up(result) -> bool:
    """Whether a diverged run shows that it was the rate: its steps overshot or grew."""
    if result.cause is not None:
        return result.cause.kind == "rate"
    with np.errstate(all="ignore"):
        return _overshot(result) or _grew(result)


def _overshot(result) -> bool:
    """Whether a step of plain descent went twice as far as the minimum of its line."""
    if np.size(result.state.run.met) == 0 or result.setting.rule != "plain":
        return False
    return _largest(result)[0] > 2


def _grew(result) -> bool:
    """Whether gradients grew without end, or the last step went far beyond all."""
    norms = result.history.grad_norm
    norms = norms[np.isfinite(norms)].astype(np.float64)
    if norms.size > 2 and max(norms[-1], norms[-2]) > 1e3 * np.median(norms):
        return True
    far = 1e3 * (1 + _size(result.params))
    rate, norm = float(result.learning_rate), float(result.grad_norm)
    if result.setting.rule != "plain":
        sizes = result.history.update_norm
        return bool(sizes.size) and sizes[-1] > far
    if not np.isfinite(norm) and norms.size:
        norm = norms[-1]
    return rate * norm > far


def _size(params) -> float:
    """The 2-norm of parameters, on the host."""
    leaves: list[Any] = [np.asarray(x) for x in jax.tree.leaves(params)]
    return float(np.sqrt(sum(np.sum(abs(x * np.float64(1)) ** 2) for x in leaves)))


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
    values = np.append(result.history.value, result.value)
    third, last = (
        values[-(values.size // 2) :][: values.size // 4],
        values[-(values.size // 4) :],
    )
    return bool(last.size and third.mean() - last.mean() > 0.1 * last.std())


def _plain_words(result, verdict, bold, stable) -> str:
    if verdict == "unknown":
        return _nothing_told(result, bold)
    if verdict == "too large" and (np.isnan(stable) or bold <= 2):
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
    if has_no_bound(result.value):
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
    seen = np.isfinite(history.value) & np.isfinite(history.grad_norm)
    history = type(history)(*(column[seen] for column in history))
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
    if growth <= 1:
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
    # An expected decrease goes with the square of the gradient.
    powers = {"gradient norm": 1, "expected decrease": 2}
    goal = next((c for c in result.criteria if c.name in powers), None)
    history = result.history
    if goal is None or history.step.size < 8:
        return ""
    half = slice(history.step.size // 2, None)
    norms = np.append(history.grad_norm[half], result.grad_norm)
    steps = np.append(history.step[half], int(result.steps))
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < 4 or not (goal.threshold > 0 and np.isfinite(goal.measured)):
        return ""
    slope = np.polyfit(steps[usable], np.log(norms[usable]), 1)[0]
    if slope >= 0:
        return " The gradient no longer shrinks."
    decades = np.log(float(goal.measured) / float(goal.threshold)) / powers[goal.name]
    missing = decades / -slope
    if goal.name == "expected decrease" and norms.dtype != np.float64:
        # There the rule waits until the gradient has come down to its rounding.
        floor = np.finfo(norms.dtype).eps * np.nanmax(history.grad_norm)
        missing = max(missing, np.log(norms[-1] / floor) / -slope)
    text = f" Steps are missing: about {_n(max(missing, 1))} more at this pace"
    if result.setting.rule == "plain" and missing > 10 * int(result.steps):
        text += ", or leave the rate out: jaxgd.scaled_lbfgs needs none"
    return text + "."


def _n(x) -> str:
    """Two digits, without an exponent where that reads well."""
    x = float(f"{float(x):.2g}")
    plain = 1e-3 <= abs(x) < 1e7 or x == 0
    return np.format_float_positional(x, trim="-") if plain else f"{x:.2g}"
