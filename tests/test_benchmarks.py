"""The suite of benchmarks: its claims, its rows, and peers that are not there."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are not part of the installed package

from benchmarks import _measure, peers  # noqa: E402
from benchmarks.__main__ import NAMES, parsed  # noqa: E402
from benchmarks._measure import Missing, Options  # noqa: E402
from jaxgd import problems  # noqa: E402

NEEDED = {
    "benchmark",
    "name",
    "size",
    "peer",
    "unit",
    "jaxgd",
    "peer_time",
    "ratio",
    "spread",
    "device",
    "versions",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ahead_of_time"])
def test_a_benchmark_opens_with_its_claim(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__.startswith("Claim: ")
    assert callable(module.run)


def test_the_suite_writes_rows(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "row_order", "repeated_call"]
    command += ["--quick", "--scale", "0.01", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert [row["peer"] for row in rows] == ["jax.random.permutation", "NumPy", None]
    assert set(rows[0]) == NEEDED
    assert rows[0]["size"] == "10,000"
    low, high = rows[0]["spread"]
    assert low <= rows[0]["ratio"] <= high
    assert rows[2]["compilations"] == 0
    assert "0 compilations" in done.stdout
    assert "Claim: a shuffled order" in done.stdout


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(["fast"])
    assert "no benchmark fast" in capsys.readouterr().err


def absent():
    raise Missing("ghost is not installed")


def test_peers_that_are_absent_or_wrong(capsys):
    def work():
        return np.ones(3)

    rows = _measure.compare(
        "work", "3", Options(quick=True), work, {"ghost": absent}, units=1
    )
    assert "ghost skipped, ghost is not installed" in capsys.readouterr().out
    assert [row["peer"] for row in rows] == [None]
    other = {"other": lambda: lambda: np.full(3, 2.0)}
    (row,) = _measure.compare("work", "3", Options(quick=True), work, other, units=1)
    assert row["disagrees"] == 1.0
    assert "work: other ends 1.0e+00 from jaxgd" in capsys.readouterr().out
    with pytest.raises(Missing, match="no_such_package is not installed"):
        _measure.needs("no_such_package")


def test_ratios_are_medians_of_pairs(monkeypatch):
    times = iter([1.0, 3.0, 2.0, 8.0, 1.0, 100.0, 1.0, 4.0, 1.0, 5.0])
    monkeypatch.setattr(_measure, "timed", lambda run: next(times))
    other = {"other": lambda: lambda: 0.0}
    (row,) = _measure.compare(
        "work", "1", Options(quick=True), lambda: 0.0, other, units=10
    )
    assert (row["jaxgd"], row["peer_time"], row["ratio"]) == (0.1, 0.5, 4.0)


@pytest.mark.parametrize(
    "maker", ["bare_scan", "optax_loop", "jaxopt_solver", "torch_loop"]
)
def test_peers_take_the_same_steps(maker):
    import jax
    import optax

    from benchmarks.mini_batch import runner

    problem = problems.mlp(*problems.blobs(50, 4, 3), sizes=(4, 5, 3))
    how = {"steps": 7, "batch_size": 8}
    try:
        if maker == "torch_loop":
            other = peers.torch_loop(problem, "sgd", 0.1, device="cpu", **how)
        else:
            other = getattr(peers, maker)(problem, optax.sgd(0.1), **how)
    except Missing as missing:
        pytest.skip(str(missing))
    ours = runner(problem, 8, 7, learning_rate=0.1)()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other()), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_a_suggested_rate_is_judged_by_a_grid():
    pytest.importorskip("sklearn")
    from benchmarks import rate_search

    row = rate_search.measured("diabetes", "plain", None, {"epochs": 10})
    assert row["size"] == "all rows, 10 epochs"
    assert row["objective_ratio"] == row["reached"] / row["best_reached"]
    assert row["objective_ratio"] <= rate_search.AIM
    assert row["suggestion"] < row["stable_limit"]
    assert (row["diverged"], row["other_orders"]) == (0, row["objective_ratio"])
