"""What a run costs: tracing, compiling, the first run, and one step of many.

This room owns honest timing for users' own scripts. It compiles the very programs of
``minimize``, apart from running them, and stands above everything that runs in ``jit``.
"""

import inspect
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.arrays import refuse_stream
from jaxgd._call.call import Call, call_of
from jaxgd._checks import whole
from jaxgd._loop.parts import make_parts, stop_rule
from jaxgd._loop.plan import Spec
from jaxgd._loop.program import go, start
from jaxgd._rows.resident import chunk_size
from jaxgd._stop.rules import gradient_norm
from jaxgd._stop.status import Status

_MEASURABLE = 0.1  # seconds that one length should take, so that a clock can tell
_MOST_STEPS = 2**24
_start_fun, _go_fun = inspect.unwrap(start), inspect.unwrap(go)  # not compiled


@dataclass(frozen=True)
class Benchmark:
    """Times are in seconds, of this process; sizes in bytes.

    Attributes:
      steps: steps of the shorter of the two lengths; the longer has twice as many.
      repeats: how often both were timed, in turn.
      rows: rows of data a step looks at; None without data.
      trace_s: tracing and lowering, from arguments to the program handed to XLA.
      compile_s: XLA's part (next to nothing if the persistent cache has the program).
      first_run_s: the first run once compiled, of the steps asked for, else of as few
        as the loop takes at once.
      step_s: the median time of one step, by the slope between the two lengths: what a
        call costs once (launch, transfer, the last full pass) drops out.
      step_spread_s: its lower and upper quartile.
      call_s: what drops out: the median time of ``steps`` steps beyond ``steps *
        step_s``.
      flops: floating point operations of one step, as XLA counts them in the program
        it is given; None where it does not say. Loops within the objective count once.
      bytes: bytes that one step reads and writes in memory, as XLA counts them in a
        compiled step, the batch unsplit and in place; None where it does not say.
      peak_bytes: arguments, results and temporaries of the compiled run together, as
        the compiler planned them; None where the backend does not say.
      device: the kind of the device. platform: "cpu", "gpu" or "tpu".
      versions: of Python and the packages.
      peak_flops, peak_bandwidth: the device's peaks, as given, or None.
    """

    steps: int
    repeats: int
    rows: int | None
    trace_s: float
    compile_s: float
    first_run_s: float
    step_s: float
    step_spread_s: tuple[float, float]
    call_s: float
    flops: float | None
    bytes: float | None
    peak_bytes: int | None
    device: str
    platform: str
    versions: dict[str, str]
    peak_flops: float | None = None
    peak_bandwidth: float | None = None

    @property
    def rows_per_s(self) -> float | None:
        """Rows of data looked at in a second."""
        return None if self.rows is None else self.rows / self.step_s

    @property
    def flops_per_s(self) -> float | None:
        """Floating point operations in a second."""
        return None if self.flops is None else self.flops / self.step_s

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of memory traffic in a second."""
        return None if self.bytes is None else self.bytes / self.step_s

    @property
    def intensity(self) -> float | None:
        """Floating point operations for each byte of memory traffic."""
        return self.flops / self.bytes if self.flops and self.bytes else None

    @property
    def of_roofline(self) -> float | None:
        """The speed reached, as a fraction of what the device's peaks allow.

        The roofline at this intensity is ``min(peak_flops, intensity *
        peak_bandwidth)`` (Williams, Waterman and Patterson, 2009); None unless both
        peaks were given and XLA said what a step does.
        """
        if self.intensity is None or self.flops_per_s is None:
            return None
        if self.peak_flops is None or self.peak_bandwidth is None:
            return None
        roof = min(self.peak_flops, self.intensity * self.peak_bandwidth)
        return self.flops_per_s / roof

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        derived = ("rows_per_s", "flops_per_s", "bytes_per_s", "intensity")
        more = {name: getattr(self, name) for name in (*derived, "of_roofline")}
        return {**asdict(self), "step_spread_s": list(self.step_spread_s), **more}

    def __str__(self) -> str:
        low, high = self.step_spread_s
        lines = [
            (
                "one step",
                f"{_seconds(self.step_s)}  ({_seconds(low)} - {_seconds(high)})",
            ),
            ("rows", _unit(self.rows_per_s, "rows/s")),
            ("arithmetic", _amount(self.flops, "flop", self.flops_per_s, "flop/s")),
            ("memory", _amount(self.bytes, "B", self.bytes_per_s, "B/s")),
            ("roofline", "" if self.of_roofline is None else f"{self.of_roofline:.1%}"),
            ("once a call", _seconds(self.call_s)),
            ("first run", _seconds(self.first_run_s)),
            ("trace", _seconds(self.trace_s)),
            ("compile", _seconds(self.compile_s)),
            ("peak memory", _unit(self.peak_bytes, "B")),
        ]
        about = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        head = (
            f"{self.device} ({self.platform}); {about}\n"
            f"slope from {self.steps} to {2 * self.steps} steps, "
            f"median of {self.repeats} (quartiles)"
        )
        return "\n".join([head, *(f"  {k:12} {v}" for k, v in lines if v)])


def benchmark(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    steps: int | None = None,
    repeats: int = 10,
    peak_flops: float | None = None,
    peak_bandwidth: float | None = None,
    **like_minimize: Any,
) -> Benchmark:
    r"""Times ``minimize(fun, params, data, **like_minimize)``, compilation apart.

    Runs of :math:`n` and :math:`2n` steps are timed in turn; the time of a step is
    :math:`(t_{2n} - t_n) / n`, so whatever a call costs once drops out of it. Every run
    is waited for (``block_until_ready``).

    Args:
      fun, params, data: as for ``minimize``.
      steps: :math:`n`, rounded up to whole chunks of the loop; by default as many as
        take a tenth of a second, or as the run has before it ends.
      repeats: how often both lengths are timed.
      peak_flops: the device's peak in floating point operations a second, in the
        precision used; with ``peak_bandwidth`` it gives ``of_roofline``.
      peak_bandwidth: the device's peak of memory traffic in bytes a second.
      **like_minimize: all other arguments of ``minimize`` but ``max_steps``,
        ``epochs`` and ``state``. ``stop="auto"`` judges batch descent as always, but
        with a tolerance of 0, so that no step is missing.

    Returns:
      A ``Benchmark``; ``print`` it, or take its ``to_dict()``.

    Raises:
      TypeError, ValueError: as ``minimize``; and where the run ends before its last
        step, for then there is nothing to divide by.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> x, y = jnp.ones((1000, 3)), jnp.ones(1000)
      >>> def loss(theta, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ theta - y) ** 2)
      >>> found = jaxgd.benchmark(
      ...     loss, jnp.zeros(3), (x, y), batch_size=10, learning_rate=0.1, repeats=3
      ... )
      >>> found.step_s > 0
      True

    References:
      Williams, Waterman and Patterson, Roofline: an insightful visual performance
      model, CACM 52 (2009).
    """
    own: dict[str, str] = dict.fromkeys(("max_steps", "epochs", "state"), "pass steps")
    call = call_of("benchmark", fun, params, data, like_minimize, own)
    if any(_tree.is_traced(x) for x in jax.tree.leaves((params, data, like_minimize))):
        raise TypeError(
            "benchmark measures time, which nothing does inside jit, vmap or grad: "
            "call it from Python with arrays."
        )
    _require_positive(peak_flops=peak_flops, peak_bandwidth=peak_bandwidth)
    repeats = whole("repeats", repeats, low=1)
    if steps is not None:
        steps = whole("steps", steps, low=1, high=_MOST_STEPS)
    elif call.stop is None:
        raise ValueError(
            "steps must be given with stop=None, whose program has a fixed length, got "
            "None: pass steps=1000."
        )
    if call.stop == "auto" and call.batch_size is None:
        call = replace(call, stop=gradient_norm(atol=0.0))
    programs = _Programs(call)
    size = programs.chunk
    count = size if steps is None else -(-steps // size) * size
    first = programs.run(count)
    if steps is None:
        count = _enough(programs, count)
    for length in (count, 2 * count):
        programs.run(length)  # a new length of stop=None is compiled here
    (low, step, high), short = _timed(programs, count, repeats)
    device = programs.device
    return Benchmark(
        steps=count,
        repeats=repeats,
        rows=programs.spec.batch_size or programs.spec.n,
        trace_s=programs.trace_s,
        compile_s=programs.compile_s,
        first_run_s=first,
        step_s=step,
        step_spread_s=(low, high),
        call_s=short - count * step,
        flops=programs.flops,
        bytes=programs.bytes,
        peak_bytes=programs.peak_bytes,
        device=device.device_kind,
        platform=device.platform,
        versions=_versions(),
        peak_flops=peak_flops,
        peak_bandwidth=peak_bandwidth,
    )


def _require_positive(**peaks) -> None:
    for name, peak in peaks.items():
        if peak is not None and not peak > 0:
            raise ValueError(
                f"{name} must be positive, got {peak!r}: pass what the device's maker "
                "states, for example 1e14."
            )


def _timed(programs, count: int, repeats: int) -> tuple[list[float], float]:
    """(quartiles of the time of a step, seconds of ``count`` steps)."""
    short, long = [], []
    for _ in range(repeats):
        short.append(programs.run(count))
        long.append(programs.run(2 * count))
    slopes = (np.array(long) - np.array(short)) / count
    quartiles = [float(q) for q in np.quantile(slopes, [0.25, 0.5, 0.75])]
    if quartiles[1] <= 0:
        raise ValueError(
            f"steps must be enough to be timed, got {count}, which take no longer than "
            f"{2 * count} here: pass more, or leave steps out."
        )
    return quartiles, float(np.median(short))


def _enough(programs, count: int) -> int:
    """Steps that fill the clock, or as many as the run takes before it ends."""
    while count < _MOST_STEPS:
        try:
            if programs.run(2 * count) >= 2 * _MEASURABLE:
                break
        except _EndedError as ended:
            if ended.status == Status.DIVERGED:
                raise
            return max(count // 2, 1)
        count *= 2
    return count


class _EndedError(ValueError):
    """A run ended before its last step."""

    def __init__(self, status: Status, message: str):
        super().__init__(message)
        self.status = status


class _Programs:
    """The two programs of a run, compiled apart from running them."""

    def __init__(self, call: Call):
        refuse_stream("benchmark", call.data)
        self._call = lambda steps: checked(replace(call, max_steps=steps))
        self._compiled = {}
        self.trace_s = self.compile_s = 0.0
        start = time.perf_counter()
        self.spec, numbers, _ = self._call(1)
        self.trace_s += time.perf_counter() - start
        self.spec = tried(self.spec, numbers)
        # Rows are gathered for a whole chunk, so parts of one would tell too little.
        mini = self.spec.batch_size is not None
        size = chunk_size(numbers.data, self.spec.batch_size, self.spec.work)
        self.chunk = size if mini else 1
        self._numbers = jax.tree.map(jnp.asarray, numbers)

    def run(self, steps: int) -> float:
        """Seconds of a run of ``steps`` steps."""
        start_of, go, limit = self._of(steps)
        begin = time.perf_counter()
        state = start_of(self._numbers)
        outcome = jax.block_until_ready(go(self._numbers, state, limit))
        seconds = time.perf_counter() - begin
        taken, status = int(outcome.state.step), Status(int(outcome.status))
        if status != Status.MAX_STEPS or taken != steps:
            raise _EndedError(
                status,
                f"benchmark needs a run that takes all its steps, but it ended "
                f"{status.name} after {taken} of {steps}: pass fewer steps, another "
                "start or rate, or stop=jaxgd.gradient_norm(atol=0.0).",
            )
        self.device = next(iter(outcome.value.devices()))
        return seconds

    def _of(self, steps):
        spec, _, limit = self._call(steps)
        told = self.spec.pass_rows, self.spec.microbatch_size
        spec = spec._replace(pass_rows=told[0], microbatch_size=told[1])
        if spec not in self._compiled:
            begin = time.perf_counter()
            # Functions of this call alone: nothing of them has been traced before.
            start_of = jax.jit(lambda n: _start_fun(spec, n))
            go = jax.jit(lambda n, s, limit: _go_fun(spec, n, s, limit))
            first = start_of.trace(self._numbers)
            state = first.out_info
            lowered = first.lower(), go.trace(self._numbers, state, limit).lower()
            traced = time.perf_counter()
            compiled = [program.compile() for program in lowered]
            done = time.perf_counter()
            if not self._compiled:  # further lengths of stop=None are no news
                self.trace_s += traced - begin
                self.compile_s += done - traced
                self._describe(spec, state, compiled[1])
            self._compiled[spec] = compiled
        return *self._compiled[spec], limit

    def _describe(self, spec: Spec, state, compiled) -> None:
        """Flops and bytes of one step, which no count of the whole loop tells.

        A loop's body is counted once, whatever its length, and with all around it: so
        the batch is not split into blocks here.
        """
        spec = spec._replace(microbatch_size=None)

        def parts(numbers, state):
            return make_parts(spec, numbers, state, stop_rule(spec, numbers))[0]

        def first_input(numbers, state):
            inputs = parts(numbers, state).inputs(state.step, jnp.bool_(False))
            return jax.tree.map(lambda x: x[0], inputs)

        def step(numbers, state, x):
            core = replace(state, run=None)
            return parts(numbers, state).step(core, x)

        x = jax.eval_shape(first_input, self._numbers, state)
        lowered = jax.jit(step).lower(self._numbers, state, x)
        self.flops = _counted(lowered, "flops")
        self.bytes = _counted(lowered.compile(), "bytes accessed")
        memory = compiled.memory_analysis()
        self.peak_bytes = None if memory is None else int(_peak(memory))


def _counted(program: Any, what) -> float | None:
    """A figure of XLA's cost analysis, or None where the backend has none."""
    try:
        figures: Any = program.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    figures = figures[0] if isinstance(figures, list) and figures else figures
    found = figures.get(what) if figures else None
    return None if found is None or found < 0 else float(found)


def _peak(memory) -> int:
    planned = getattr(memory, "peak_memory_in_bytes", 0)
    together = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return planned or together


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}


def _seconds(value: float) -> str:
    return _unit(value, "s", small=True)


def _unit(value, unit, small=False) -> str:
    """1.23e-5 s as 12.3 us, 4.56e9 B as 4.56 GB."""
    if value is None:
        return ""
    scales = ((1e-9, "n"), (1e-6, "u"), (1e-3, "m"), (1.0, ""))
    large = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))
    scale, prefix = (scales if small else large)[0]
    for scale_, prefix_ in scales if small else large:
        if abs(value) >= scale_:
            scale, prefix = scale_, prefix_
    return f"{value / scale:.3g} {prefix}{unit}"


def _amount(value, unit, speed, speed_unit) -> str:
    if value is None:
        return ""
    return f"{_unit(value, unit)} a step, {_unit(speed, speed_unit)}"
