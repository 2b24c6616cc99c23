"""What comes back: Result, and the report.

This room owns the words. The outcome of a run is data (a status code with one sentence,
numbers at the returned parameters, the criteria with their verdicts), and what is
printed is made of that data on the host.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._result.history import History, trimmed
from jaxgd._rows.order import Place
from jaxgd._stop.status import Criterion, Status, has_no_bound, succeeded

if TYPE_CHECKING:
    from jaxgd._result.diagnosis import Diagnosis


class Setting(NamedTuple):
    """Static facts of the run that the report needs."""

    n: int | None
    batch_size: int | None
    stop: bool  # whether there was a stop rule
    rule: str  # "plain" descent, a line "search", an "average", or an "other"
    block: int | None = None  # rows that a full value is the mean over blocks of
    exact: bool = False  # whether a static scan goes on, whatever it sees
    final: bool = True  # whether there was a full pass in the end


class Cause(NamedTuple):
    """What was not finite, as the host found it (see ``_loop/cause``)."""

    kind: str  # "params", "data", "schedule", "gradient", "objective", "update", "rate"
    words: str  # a clause

    @property
    def sentence(self) -> str:
        name = self.words.startswith("params")
        first = self.words[0] if name else self.words[0].upper()
        return f"{first}{self.words[1:]}."


@dataclass(frozen=True, repr=False)
class Result:
    r"""The outcome of a run; a pytree, usable inside ``jit`` and ``vmap``.

    Attributes:
      params: the last iterate such that it and every iterate before it had finite
        parameters, batch value and gradient, steps that the rule ``skipped`` apart.
        With ``stop=None`` the last iterate, whatever it is.
      value: the full objective at ``params``; where a mini-batch run diverged it may
        be infinite although every batch so far was finite. Of an objective that is no
        mean over rows it may be a mean over blocks of rows, which the report says.
      grad_norm: the 2-norm of the gradient of ``value`` at ``params``.
      aux: the auxiliary output of the objective at ``params``; None without one. Where
        full passes run in blocks, leaves with a row axis are joined, other floating
        leaves averaged by rows, integers summed, and booleans hold if all do.
      status: int32 code of ``Status``.
      steps: int32, updates applied since step 0 to reach ``params``.
      evaluations: int32, evaluations of the objective: one per step, one per further
        trial point of a line search that reports them, one per full pass.
      skipped: int32, steps whose value or gradient was not finite and of which the
        update rule made a finite update and a finite state, as
        ``optax.apply_if_finite`` does; 0 for a rule that does not.
      learning_rate: the rate that the next step would take, where the call sets it; the
        one that the last step took, where the state of the rule reports it; else NaN.
      history: ``History`` of the steps.
      checks: ``History`` of the full objective at the checks of a mini-batch run.
      state: everything needed to go on, ``minimize(..., state=result.state)``.
      limit: int32, the step at which the run would have ended by itself.
      criteria: what the stop rule saw at its last check.
      cause: what was not finite in a run that ended badly, for ``message`` and
        ``diagnosis``; None where it was not looked for or found. It is no leaf: what
        comes out of ``jit`` or ``jax.tree.map`` has none.
    """

    params: Any
    value: Any
    grad_norm: Any
    aux: Any
    status: Any
    steps: Any
    evaluations: Any
    skipped: Any
    learning_rate: Any
    history: History
    checks: History
    state: Any
    limit: Any
    criteria: tuple
    setting: Setting = field(metadata={"static": True})
    cause: Any = None

    @property
    def converged(self):
        """Whether the run ended in success: a bool array of ``status``' shape."""
        return succeeded(self.status)

    @property
    def rows_seen(self) -> int:
        """Rows of data used by the ``steps``, with repetition (a Python int)."""
        if self.setting.n is None:
            return 0
        places = Place(*np.moveaxis(np.asarray(self.state.run.rows, np.int64), -1, 0))
        return int(np.sum(places.seen_high)) * 2**32 + int(np.sum(places.seen_low))

    @property
    def diagnosis(self) -> "Diagnosis":
        """Whether the rate was too small, good or too large, with a number."""
        from jaxgd._result.diagnosis import diagnose

        return diagnose(self._one("diagnosis"))

    @property
    def message(self) -> str:
        """Why the run ended: a sentence, and what was not finite where that is why."""
        return _message(self._one("message"))

    def __getitem__(self, lane) -> "Result":
        """The result of one lane of a batched run."""
        if not np.shape(self.status):
            raise TypeError("This Result is of a single run: it has no lanes to take.")
        if not any(map(_tree.is_traced, jax.tree.leaves(lane))):
            # JAX clamps an index out of range, and iteration would never end.
            np.broadcast_to(False, np.shape(self.status))[lane]
        one = jax.tree.map(lambda x: x[lane], self)
        if isinstance(self.cause, np.ndarray):
            one = replace(one, cause=self.cause[lane])
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
        from jaxgd._result.plot import plot_result

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
            "skipped": int(one.skipped),
            "learning_rate": _plain(one.learning_rate),
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


jax.tree_util.register_dataclass(
    Result,
    data_fields=[f.name for f in fields(Result) if f.name not in ("setting", "cause")],
    meta_fields=["setting"],
    drop_fields=["cause"],
)


def on_host(result: Result) -> Result:
    """The same with histories as NumPy arrays, without their unused rows."""
    return replace(
        result, history=trimmed(result.history), checks=trimmed(result.checks)
    )


def _report(result: Result) -> str:
    status = Status(int(result.status))
    steps, limit = int(result.steps), int(result.limit)
    lines = [f"{_headline(status)} after {_many(steps, 'step')}. {result.message}"]
    lines += [f"  {name:<15}{text}" for name, text in _rows(result, steps, limit)]
    return "\n".join(lines)


_NO_GRADIENT = (
    "The gradient is exactly zero in every entry {}: a stationary point, or an "
    "objective that does not depend on params (argmax, round, stop_gradient)."
)


def _message(result: Result) -> str:
    status, cause = Status(int(result.status)), result.cause
    if status is Status.NON_FINITE:
        return _of_start(result)
    if status is Status.DIVERGED:
        exact = result.setting.exact
        end = "a static scan returns what it reached" if exact else _LAST_ONE
        told = "" if cause is None else f" {cause.sentence}"
        return f"An iterate was not finite; {end}.{told}"
    if _no_gradient(result) and status is not Status.TARGET_REACHED:
        when = "at every step" if int(result.steps) else "at the start"
        return f"{status.message} {_NO_GRADIENT.format(when)}"
    if cause is None:
        if status is Status.STALLED and has_no_bound(result.value):
            return "The objective seems to be unbounded below: its dtype ends here."
        return status.message
    return f"{status.message} The full objective is not finite: {cause.words}."


_LAST_ONE = "the last finite one is returned"


def _of_start(result: Result) -> str:
    """Of a start that is not finite: what of it is not."""
    cause = result.cause
    if cause is not None and cause.kind == "gradient":
        return cause.sentence
    if cause is not None:
        return f"{Status.NON_FINITE.message} {cause.sentence}"
    if np.isfinite(result.value):
        return "At the start the value is finite, its gradient is not."
    return Status.NON_FINITE.message


def _no_gradient(result: Result) -> bool:
    """Whether every gradient of the run was zero in every entry, as far as recorded."""
    norms = result.history.grad_norm
    known = norms.size > 0 or int(result.steps) == 0
    return known and not norms.any() and float(result.grad_norm) == 0


def _headline(status: Status) -> str:
    if succeeded(status):
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
    if batch_size and cut and np.isnan(result.value) and not setting.final:
        value = grad_norm = "not evaluated"
    first = result.history if result.history.step.size else None
    if first is not None and first.step[0] == 0:
        of = f" (first batch of {batch_size})" if batch_size else ""
        last = f" (all {setting.n} rows)" if batch_size else ""
        if setting.block:
            last = f" (mean over blocks of {setting.block} rows)"
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
    yield "learning rate", _rates(result)
    yield (
        "steps",
        f"{steps} of at most {limit}" if steps < limit else f"{steps}, the limit",
    )
    if setting.n is not None:
        size = batch_size or setting.n
        epochs = result.rows_seen / setting.n
        seen = f"{result.rows_seen} in steps of {size}"
        yield (
            "rows",
            f"{seen}: {epochs:.4g} epoch{'' if epochs == 1 else 's'} of {setting.n}",
        )
    yield "evaluations", str(int(result.evaluations))
    if int(result.skipped):
        yield "skipped", _skipped(result)
    found = result.diagnosis
    if found.verdict != "unknown":
        yield "diagnosis", str(found)


def _skipped(result: Result) -> str:
    count = _many(int(result.skipped), "step")
    return f"{count} whose numbers were not finite, absorbed by the update rule"


def _rates(result: Result) -> str:
    """The rates of the run as far as they are known, in words where they are not."""
    rates = result.history.learning_rate
    if not np.isfinite(rates).any():
        rates = np.asarray(result.learning_rate)
    if np.isfinite(rates).any():
        low, high = _number(np.nanmin(rates)), _number(np.nanmax(rates))
        return low if low == high else f"{low} ... {high}"
    searched = result.setting.rule == "search"
    return "found on the way" if searched else "set within the optimizer"


def _verdict(criterion: Criterion) -> str:
    holds = "holds" if bool(criterion.holds) else "does not hold"
    if not np.isfinite(float(criterion.threshold)):
        return f"{criterion.name}: {holds}"
    measured, threshold = _number(criterion.measured), _number(criterion.threshold)
    if criterion.name == "expected decrease" and not np.isfinite(criterion.measured):
        edge = f" <= {threshold}" if criterion.threshold > 0 else ""
        return f"{criterion.name}{edge}: not known yet"
    if np.isnan(float(criterion.measured)) and criterion.name.startswith("change"):
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
