"""What a sweep returns: the runs of a grid, compared and as a table."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxgd._result.result import Result
from jaxgd._stop.status import Status

# What of a call may differ from lane to lane as a whole, stacked.
STACKED = ("params", "args")


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
            found[name] = one if name in STACKED else float(one)
        return found


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
