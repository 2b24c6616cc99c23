"""What comes back: Status, Result, and the report.

This room owns the words. The outcome of a run is data (a status code with one sentence,
numbers at the returned parameters, the criteria with their verdicts), and what is
printed is made of that data on the host.
"""

import enum
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._history import History, trimmed

if TYPE_CHECKING:
    from jaxgd._diagnosis import Diagnosis


class Status(enum.IntEnum):
    """Why a run ended. ``Status.X.message`` is a sentence."""

    RUNNING = 0
    GRADIENT_SMALL = 1
    VALUE_SETTLED = 2
    PARAMS_SETTLED = 3
    TARGET_REACHED = 4
    MAX_STEPS = 5
    STALLED = 6
    DIVERGED = 7
    NON_FINITE = 8

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Status.RUNNING: "The run has not ended.",
    Status.GRADIENT_SMALL: "The gradient is small.",
    Status.VALUE_SETTLED: "The objective no longer changes.",
    Status.PARAMS_SETTLED: "The parameters no longer change.",
    Status.TARGET_REACHED: "The objective reached its target.",
    Status.MAX_STEPS: "The limit on steps was reached.",
    Status.STALLED: "The run stands still before the gradient is small: the steps are "
    "too small, or the numbers are at the limit of their precision.",
    Status.DIVERGED: "An iterate was not finite; the last finite one is returned.",
    Status.NON_FINITE: "The start itself is not finite.",
}


class Criterion(NamedTuple):
    """One criterion of a stop rule at the last check.

    Attributes:
      name: what was measured.
      measured: its value.
      threshold: the criterion asks for ``measured <= threshold``.
      holds: whether it did, for as many checks as it asks for.
    """

    name: Any
    measured: Any
    threshold: Any
    holds: Any


jax.tree_util.register_pytree_node(
    Criterion,
    lambda c: (tuple(c[1:]), c.name),
    lambda name, rest: Criterion(name, *rest),
)


class Setting(NamedTuple):
    """Static facts of the run that the report needs."""

    n: int | None
    batch_size: int | None
    stop: bool  # whether there was a stop rule
    rule: str  # "plain" descent, a line "search", an "average", or an "other"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Result:
    r"""The outcome of a run; a pytree, usable inside ``jit`` and ``vmap``.

    Attributes:
      params: the last iterate such that it and every iterate before it had finite
        parameters, batch value and gradient. (A mini-batch gradient counts as finite
        where the sum of its squares is: below a norm of 1.8e19 in float32.)
      value: the full objective at ``params``; where a mini-batch run diverged it may
        be infinite although every batch so far was finite.
      grad_norm: the 2-norm of its full gradient at ``params``.
      aux: the auxiliary output of the objective at ``params``; None without one. Where
        full passes run in blocks, leaves with a row axis are joined, other floating
        leaves averaged by rows, integers summed, and booleans hold if all do.
      status: int32 code of ``Status``.
      steps: int32, updates applied since step 0 to reach ``params``.
      evaluations: int32, evaluations of the objective: one per step, one per further
        trial point of a line search that reports them, one per full pass.
      history: ``History`` of the steps.
      checks: ``History`` of the full objective at the checks of a mini-batch run.
      state: everything needed to go on, ``minimize(..., state=result.state)``.
      limit: int32, the step at which the run would have ended by itself.
      criteria: what the stop rule saw at its last check.
    """

    params: Any
    value: Any
    grad_norm: Any
    aux: Any
    status: Any
    steps: Any
    evaluations: Any
    history: History
    checks: History
    state: Any
    limit: Any
    criteria: tuple
    setting: Setting = field(metadata={"static": True})

    @property
    def converged(self):
        """Whether the run ended in success: a bool array of ``status``' shape."""
        status = self.status
        return (status >= Status.GRADIENT_SMALL) & (status <= Status.TARGET_REACHED)

    @property
    def rows_seen(self) -> int:
        """Rows of data used by the ``steps``, with repetition (a Python int)."""
        rows = self.setting.batch_size or self.setting.n or 0
        return int(np.sum(np.asarray(self.steps, np.int64))) * rows

    @property
    def diagnosis(self) -> "Diagnosis":
        """Whether the rate was too small, good or too large, with a number."""
        from jaxgd._diagnosis import diagnose

        return diagnose(self._one("diagnosis"))

    @property
    def message(self) -> str:
        """One sentence: why the run ended."""
        return Status(int(self._one("message").status)).message

    def __getitem__(self, lane) -> "Result":
        """The result of one lane of a batched run."""
        if not np.shape(self.status):
            raise TypeError("This Result is of a single run: it has no lanes to take.")
        if not any(map(_tree.is_traced, jax.tree.leaves(lane))):
            # JAX clamps an index out of range, and iteration would never end.
            np.broadcast_to(False, np.shape(self.status))[lane]
        one = jax.tree.map(lambda x: x[lane], self)
        return one if np.shape(one.status) else on_host(one)

    def report(self) -> str:
        """The run in a few lines: why it ended, each criterion, numbers, counts."""
        return _report(self._one("report"))

    def plot(self, ax=None):
        """Objective and gradient norm over the steps; needs the extra ``jaxgd[plot]``.

        Args:
          ax: Matplotlib axes to draw into; new ones if None.

        Returns:
          The axes.
        """
        from jaxgd._plot import plot_result

        return plot_result(self._one("plot"), ax)

    def to_dict(self) -> dict:
        """Plain numbers, lists and strings, ready for JSON, without ``state``."""
        one = self._one("to_dict")
        return {
            "params": _plain_tree(one.params),
            "value": _plain(one.value),
            "grad_norm": _plain(one.grad_norm),
            "aux": _plain_tree(one.aux),
            "status": Status(int(one.status)).name,
            "message": one.message,
            "converged": bool(one.converged),
            "steps": int(one.steps),
            "evaluations": int(one.evaluations),
            "rows_seen": one.rows_seen,
            "history": {k: _plain(v) for k, v in one.history._asdict().items()},
            "checks": {k: _plain(v) for k, v in one.checks._asdict().items()},
            "diagnosis": asdict(one.diagnosis),
        }

    def __repr__(self) -> str:
        shape = np.shape(self.status)
        if _tree.is_traced(self.status):
            return f"Result(inside jit, status={self.status})"
        if shape:
            codes, counts = np.unique(np.asarray(self.status), return_counts=True)
            kinds = ", ".join(
                f"{count} {Status(int(code)).name}"
                for code, count in zip(codes, counts, strict=True)
            )
            return f"Result of {np.size(self.status)} runs, shape {shape}: {kinds}"
        return self.report()

    def _one(self, what) -> "Result":
        if _tree.is_traced(self.status):
            raise TypeError(
                f"Result.{what} is for the host: use it outside jit and vmap."
            )
        if np.shape(self.status):
            raise TypeError(
                f"Result.{what} is for a single run, this one has lanes of shape "
                f"{np.shape(self.status)}: take one, result[i].{what}."
            )
        return on_host(self)


def on_host(result: Result) -> Result:
    """The same with histories as NumPy arrays, without their unused rows."""
    return replace(
        result, history=trimmed(result.history), checks=trimmed(result.checks)
    )


def _report(result: Result) -> str:
    status = Status(int(result.status))
    steps, limit = int(result.steps), int(result.limit)
    lines = [f"{_headline(status)} after {_many(steps, 'step')}. {status.message}"]
    lines += [f"  {name:<15}{text}" for name, text in _rows(result, steps, limit)]
    return "\n".join(lines)


def _headline(status: Status) -> str:
    if Status.GRADIENT_SMALL <= status <= Status.TARGET_REACHED:
        return "Converged"
    if status is Status.DIVERGED:
        return "Diverged"
    if status is Status.RUNNING:
        return "Running"
    return "Stopped"


def _rows(result: Result, steps, limit):
    setting, batch_size = result.setting, result.setting.batch_size
    value, grad_norm = _number(result.value), _number(result.grad_norm)
    cut = int(result.status) in (Status.MAX_STEPS, Status.RUNNING)
    if batch_size and cut and np.isnan(result.value):
        value = grad_norm = "not evaluated"
    first = result.history if result.history.step.size else None
    if first is not None and first.step[0] == 0:
        of = f" (first batch of {batch_size})" if batch_size else ""
        last = f" (all {setting.n} rows)" if batch_size else ""
        last = "" if value == "not evaluated" else last
        yield "objective", f"{_number(first.value[0])}{of} -> {value}{last}"
        yield "gradient norm", f"{_number(first.grad_norm[0])}{of} -> {grad_norm}{last}"
    else:
        yield "objective", value
        yield "gradient norm", grad_norm
    for i, criterion in enumerate(result.criteria):
        yield "stop rule" if i == 0 else "", _verdict(criterion)
    if not setting.stop:
        yield "stop rule", "none"
    rates = result.history.learning_rate
    if rates.size and np.isfinite(rates).any():
        low, high = np.nanmin(rates), np.nanmax(rates)
        same = _number(low) == _number(high)
        yield (
            "learning rate",
            _number(low) if same else f"{_number(low)} ... {_number(high)}",
        )
    yield (
        "steps",
        f"{steps} of at most {limit}" if steps < limit else f"{steps}, the limit",
    )
    if setting.n is not None:
        size = batch_size or setting.n
        epochs = steps * size / setting.n
        seen = f"{result.rows_seen} in steps of {size}"
        yield (
            "rows",
            f"{seen}: {epochs:.4g} epoch{'' if epochs == 1 else 's'} of {setting.n}",
        )
    yield "evaluations", str(int(result.evaluations))
    found = result.diagnosis
    if found.verdict != "unknown":
        yield "diagnosis", str(found)


def _verdict(criterion: Criterion) -> str:
    holds = "holds" if bool(criterion.holds) else "does not hold"
    if np.isnan(float(criterion.threshold)):
        return f"{criterion.name}: {holds}"
    measured, threshold = _number(criterion.measured), _number(criterion.threshold)
    if np.isnan(float(criterion.measured)):
        return f"{criterion.name} <= {threshold}: nothing to compare with yet"
    return f"{criterion.name} {measured} <= {threshold}: {holds}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _number(x) -> str:
    return f"{float(x):.6g}"


def _plain_tree(tree):
    """Dicts and lists of plain numbers; other containers as dicts by place."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {str(name): _plain_tree(part) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        return [_plain_tree(part) for part in tree]
    children, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda part: part is not tree
    )
    if len(children) == 1 and children[0][1] is tree:
        return _plain(tree)
    return {
        jax.tree_util.keystr(path, simple=True): _plain_tree(part)
        for path, part in children
    }


def _plain(leaf):
    array: Any = np.asarray(leaf)
    if array.dtype.kind == "c":
        return {"real": array.real.tolist(), "imag": array.imag.tolist()}
    if array.dtype.kind not in "biuf":  # bfloat16 and its like
        array = array.astype(np.float32)
    return array.tolist()
