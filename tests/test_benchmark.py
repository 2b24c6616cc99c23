"""``jaxgd.benchmark``: what it counts, and that it counts one step."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from jaxgd import problems
from jaxgd._tools import benchmark

pytestmark = pytest.mark.full

N, D = 600, 40


def half_mean_square(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


@pytest.fixture(scope="module")
def data():
    return problems.linear_data(N, D)


@pytest.fixture
def clock(monkeypatch):
    """Runs that take 3 ms and 5 us a step, whatever they do."""
    lengths = []

    def run(self, steps):
        real(self, steps)
        lengths.append(steps)
        return 3e-3 + 5e-6 * steps

    real = benchmark._Programs.run
    monkeypatch.setattr(benchmark._Programs, "run", run)
    return lengths


REGIMES = {
    "batch": {"stop": jaxgd.gradient_norm(atol=0.0)},
    "mini-batch": {"batch_size": 60},
    "one row": {"batch_size": 1},
    "watched": {"batch_size": 60, "stop": jaxgd.gradient_norm(atol=0.0)},
    "exactly": {"batch_size": 60, "stop": None},
    "Adam": {"batch_size": 60, "optimizer": optax.adam},
}


@pytest.mark.parametrize("name", REGIMES)
def test_a_step_is_the_slope(name, clock, data):
    how = {"learning_rate": 1e-3} | REGIMES[name]
    found = jaxgd.benchmark(
        half_mean_square, np.zeros(D, np.float32), data, steps=50, repeats=3, **how
    )
    assert found.step_s == pytest.approx(5e-6)
    assert found.step_spread_s == pytest.approx((5e-6, 5e-6))
    assert found.call_s == pytest.approx(3e-3)
    assert clock[-6:] == [found.steps, 2 * found.steps] * 3
    assert found.rows == how.get("batch_size", N)
    assert found.rows_per_s == pytest.approx(found.rows / 5e-6)
    # x @ theta and its transpose: 4 rows d of arithmetic, and little else.
    least = 4 * found.rows * D
    assert least <= found.flops <= 1.3 * least + 60 * D
    # Each row is read at least once.
    assert found.bytes >= 4 * found.rows * D
    assert found.peak_bytes >= 4 * N * D
    assert found.platform == jax.devices()[0].platform
    assert found.trace_s > 0
    assert found.compile_s > 0
    assert json.loads(json.dumps(found.to_dict()))["step_s"] == found.step_s
    assert "one step     5 us  (5 us - 5 us)" in str(found)


def test_steps_are_whole_chunks_or_fill_the_clock(clock, data):
    params = np.zeros(D, np.float32)
    how = {"batch_size": 60, "learning_rate": 1e-3, "repeats": 1}
    one = jaxgd.benchmark(half_mean_square, params, data, steps=1, **how)
    assert (
        one.steps
        == jaxgd.benchmark(half_mean_square, params, data, steps=one.steps, **how).steps
    )
    two = jaxgd.benchmark(half_mean_square, params, data, steps=one.steps + 1, **how)
    assert two.steps == 2 * one.steps
    free = jaxgd.benchmark(half_mean_square, params, data, **how)
    assert 3e-3 + 5e-6 * free.steps >= 0.1 > 3e-3 + 5e-6 * free.steps / 2


def test_without_data(clock):
    problem = problems.rosenbrock()
    found = jaxgd.benchmark(
        problem.fun, problem.init, learning_rate=1e-4, steps=10, repeats=2
    )
    assert found.rows is None
    assert found.rows_per_s is None
    assert "rows" not in str(found)


def test_roofline_is_arithmetic():
    bench = benchmark.Benchmark(
        steps=10,
        repeats=3,
        rows=5,
        trace_s=1.0,
        compile_s=2.0,
        first_run_s=0.5,
        step_s=1e-3,
        step_spread_s=(9e-4, 2e-3),
        call_s=0.1,
        flops=4e6,
        bytes=1e6,
        peak_bytes=None,
        device="chip",
        platform="gpu",
        versions={"jax": "1"},
    )
    assert bench.intensity == 4.0
    assert bench.of_roofline is None
    assert replace(bench, peak_flops=1e12).of_roofline is None
    # 4 flops a byte at 2 GB/s allow 8 Gflop/s; 4 are reached.
    bound = replace(bench, peak_flops=1e12, peak_bandwidth=2e9)
    assert bound.of_roofline == pytest.approx(0.5)
    # Plenty of bandwidth: 4 of 16 Gflop/s.
    assert replace(bench, peak_flops=16e9, peak_bandwidth=1e12).of_roofline == 0.25
    silent = replace(bench, flops=None, bytes=None, peak_flops=1.0, peak_bandwidth=1.0)
    assert (silent.intensity, silent.of_roofline, silent.flops_per_s) == (None,) * 3
    text = str(silent)
    assert "arithmetic" not in text
    assert "memory" not in text
    assert "1 ms  (900 us - 2 ms)" in text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_steps": 10}, TypeError, "no argument 'max_steps': pass steps"),
        ({"epochs": 1}, TypeError, "no argument 'epochs'"),
        (
            {"batchsize": 1},
            TypeError,
            "no argument 'batchsize': did you mean 'batch_size'",
        ),
        ({"repeats": 0}, ValueError, "repeats"),
        ({"steps": 0}, ValueError, "steps"),
        ({"stop": None}, ValueError, "steps must be given with stop=None"),
        ({"learning_rate": 1e3}, ValueError, "DIVERGED"),
        ({"stop": jaxgd.target_value(1e9)}, ValueError, "TARGET_REACHED after 0 of"),
        ({"batch_size": N + 1}, ValueError, "batch_size must be"),
        ({"peak_flops": -1.0}, ValueError, "peak_flops"),
    ],
)
def test_errors(change, error, words, data):
    how = {"learning_rate": 1e-3, "repeats": 1} | change
    with pytest.raises(error, match=words):
        jaxgd.benchmark(half_mean_square, np.zeros(D, np.float32), data, **how)


def test_blocks_are_counted_in_full(clock, data):
    how = {"learning_rate": 1e-3, "steps": 2, "repeats": 1}
    whole, split = (
        jaxgd.benchmark(
            half_mean_square, np.zeros(D, np.float32), data, microbatch_size=size, **how
        )
        for size in (None, 60)
    )
    assert whole.flops == split.flops
    assert whole.bytes == split.bytes


def test_every_call_traces_and_compiles_for_itself(clock, data):
    """Or the second of two alike would seem to compile in no time."""
    how = {"learning_rate": 1e-3, "steps": 2, "repeats": 1}
    first, second = (
        jaxgd.benchmark(half_mean_square, np.zeros(D, np.float32), data, **how)
        for _ in range(2)
    )
    assert second.compile_s > first.compile_s / 10


def test_auto_leaves_no_step_out(data):
    """A run that converges at once is timed on, or as far as it goes."""
    found = jaxgd.benchmark(
        half_mean_square, np.zeros(D, np.float32), data, learning_rate=0.1, repeats=5
    )
    assert found.step_s > 0


def test_not_inside_jit(data):
    def timed(theta):
        jaxgd.benchmark(half_mean_square, theta, data, learning_rate=1e-3)
        return theta

    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(timed)(np.zeros(D, np.float32))


def test_too_fast_to_be_timed(data, monkeypatch):
    monkeypatch.setattr(benchmark._Programs, "run", lambda self, steps: 1.0)
    with pytest.raises(ValueError, match="enough to be timed"):
        jaxgd.benchmark(
            half_mean_square, np.zeros(D, np.float32), data, learning_rate=1e-3, steps=5
        )
