"""What a race of learning rates returns, and its report."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


class Heat(NamedTuple):
    """Rates that ran side by side.

    Attributes:
      steps: the steps that each of them took.
      learning_rates: (lanes,), ascending.
      values: (lanes,), the full objective they reached; inf where they diverged.
    """

    steps: int
    learning_rates: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class LearningRateSearch:
    """What a race of learning rates found.

    Attributes:
      suggestion: the rate to take; NaN where no rate that raced lowers the objective.
      learning_rates: (lanes,), the rates that ran the whole length, ascending.
      values: (lanes,), the full objective that each of them reached; inf where the run
        diverged.
      stable_limit: ``2 / sharpness`` at the start, below which plain batch descent is
        stable there; inf where nothing curves up, NaN with an ``optimizer``.
      start: the full objective at the start.
      steps: the length of the run that the rate is for.
      heats: all heats, ``Heat(steps, learning_rates, values)``, the shorter ones first;
        the last is ``learning_rates`` and ``values``.
      rule: what was raced, in words.
    """

    suggestion: float
    learning_rates: np.ndarray
    values: np.ndarray
    stable_limit: float
    start: float
    steps: int
    heats: tuple[Heat, ...]
    rule: str

    def plot(self, ax=None):
        """Draws the objective over the learning rate.

        Args:
          ax: Matplotlib axes to draw into; new ones if None.

        Returns:
          The axes. Needs Matplotlib: ``pip install 'jaxgd[plot]'``.
        """
        from jaxgd._result.plot import plot_search

        return plot_search(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain numbers and lists; not finite ones as they are."""
        heats = [
            {
                "steps": heat.steps,
                "learning_rates": heat.learning_rates.tolist(),
                "values": heat.values.tolist(),
            }
            for heat in self.heats
        ]
        return asdict(self) | heats[-1] | {"heats": heats, "steps": self.steps}

    @property
    def reached(self) -> float:
        """The full objective that the suggestion reached."""
        at = np.flatnonzero(self.learning_rates == self.suggestion)
        return float(self.values[at[0]]) if at.size else float("nan")

    def __str__(self) -> str:
        rates = self.learning_rates
        reached = "" if np.isnan(self.suggestion) else f" -> {self.reached:.6g}"
        raced = f"{_rates(rates.size)} from {rates[0]:.3g} to {rates[-1]:.3g}"
        lines = [
            ("rule", self.rule),
            ("objective", f"{self.start:.6g}{reached}"),
            ("raced", f"{raced}, {_steps(self.steps)} each"),
        ]
        for heat in self.heats[:-1]:
            low, high = heat.learning_rates[[0, -1]]
            count = _rates(heat.learning_rates.size)
            lines.append(("", f"{count} from {low:.3g} to {high:.3g}, {heat.steps}"))
        lines.append(("too large", self._too_large()))
        if not np.isnan(self.stable_limit):
            lines.append(("stable limit", f"{self.stable_limit:.3g} = 2 / sharpness"))
        head = f"Take a learning rate of {self.suggestion:.3g}."
        if np.isnan(self.suggestion):
            head = "No learning rate can be suggested: "
            stuck = np.isfinite(self.values).all()
            head += (
                "none lowers the objective." if stuck else "all diverge or raise it."
            )
        elif self.suggestion in rates[[0, -1]] and rates.size > 1:
            end = "smallest" if self.suggestion == rates[0] else "largest"
            head += f" It is the {end} of those that raced."
        return "\n".join([head, *(f"  {name:13} {text}" for name, text in lines)])

    def _too_large(self) -> str:
        """From which rates on the objective rose, and was lost, in words."""
        rates = np.concatenate([heat.learning_rates for heat in self.heats])
        values = np.concatenate([heat.values for heat in self.heats])
        rose, lost = rates[values > self.start], rates[~np.isfinite(values)]
        if not rose.size:
            return "none"
        text = f"from {rose.min():.3g} the objective may rise"
        return text + (f", from {lost.min():.3g} diverge" if lost.size else "")


def _rates(count: int) -> str:
    return f"{count} rate{'' if count == 1 else 's'}"


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
