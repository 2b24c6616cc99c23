"""The suite of benchmarks: its claims, its rows, and peers that are not there."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _measure, calls, peers
from benchmarks import classical as suite
from benchmarks.__main__ import NAMES, parsed
from benchmarks._measure import Missing, Options
from benchmarks._picture import pictures
from benchmarks.classical_problems import classical
from jaxgd import problems

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.full

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
    command = [sys.executable, "-m", "benchmarks", "row_order"]
    command += ["--quick", "--scale", "0.01", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert [row["peer"] for row in rows] == ["jax.random.permutation", "NumPy"]
    assert set(rows[0]) == NEEDED
    assert rows[0]["size"] == "10,000"
    low, high = rows[0]["spread"]
    assert low <= rows[0]["ratio"] <= high
    assert "Claim: a shuffled order" in done.stdout


def test_new_numbers_compile_nothing(capsys):
    (row,) = calls.new_numbers(Options(quick=True))
    assert row["compilations"] == 0
    assert "0 compilations" in capsys.readouterr().out


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


def not_a_number(params):
    return params.sum() / 0.0 - params.sum() / 0.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", suite.SOLVERS)
def test_solvers_solve_and_nan_is_never_solved(name):
    try:
        solve = suite.SOLVERS[name]()
    except Missing as missing:
        pytest.skip(str(missing))
    problem = next(p for p in classical(dtype=np.float64) if p.name == "himmelblau")
    row = suite.row_of(problem, name, solve(problem))
    assert row["solved"]
    assert row["finite"]
    assert row["grad_max"] <= 1e-5
    assert abs(row["excess"]) < 1e-9
    assert 5 < row["evaluations"] < 500
    lost = suite.row_of(problem, name, solve(problem._replace(fun=not_a_number)))
    assert not lost["solved"]
    assert not lost["finite"]
    assert lost["value"] is None
    json.dumps(lost, allow_nan=False)


@pytest.mark.usefixtures("x64")
def test_scipy_stops_at_the_limit(monkeypatch):
    monkeypatch.setattr(suite, "LIMIT", 20)
    problem = problems.rosenbrock(dtype=np.float64)
    row = suite.row_of(problem, "CG", suite.of_scipy("CG")(problem))
    assert not row["solved"]
    assert row["finite"]


def solver_rows(solver, evaluations, solved):
    pairs = zip("abcd", evaluations, solved, strict=True)
    return [
        {
            "name": name,
            "solver": solver,
            "evaluations": n,
            "solved": yes,
            "finite": True,
            "value": 1.0,
            "excess": 0.5 if name == "b" else None,
        }
        for name, n, yes in pairs
    ]


def test_the_profile_counts_in_evaluations_of_the_best(tmp_path, capsys):
    rows = solver_rows("jaxgd", (10, 30, 7, 1), (True, True, True, False))
    rows += solver_rows("other", (20, 10, 7, 2), (True, True, False, False))
    found = suite.ratios(rows)
    np.testing.assert_array_equal(found["jaxgd"], [1, 3, 1, np.inf])
    np.testing.assert_array_equal(found["other"], [2, 1, np.inf, np.inf])
    suite.show(rows)
    out = capsys.readouterr().out
    assert "jaxgd, not solved: d" in out
    assert re.search(r"jaxgd +3  75.0% +0 +1.00 +1\n", out)
    assert "other, not solved: c, d" in out
    assert [path.name for path in pictures(rows, tmp_path)] == ["classical.png"]
    assert (tmp_path / "classical.png").stat().st_size > 10_000


def test_the_table_of_devices_is_held_against_its_claim():
    from benchmarks import devices

    row = {
        "name": "MLP, Adam",
        "place": "shard_rows",
        "processes": 2,
        "devices": 8,
        "reduces_per_step": 1,
        "reduced_bytes": 9644,
        "moves": 0,
        "reduces_of_pass": 1,
        "step_s": 0.00085,
        "away": 1e-7,
    }
    line = devices.table([row]).splitlines()[-1]
    told = "2 processes of 4, shard_rows | 1 | 9,644 | 0 | 1 | 1.0e-07 | 850 us"
    assert line == f"| MLP, Adam | {told} |"
    assert devices.failures([row]) == []
    for wrong in ({"away": 2e-5}, {"reduces_per_step": 2}, {"moves": 1}):
        assert len(devices.failures([row | wrong])) == 1
    text = "%a = (f32[64,32]{1,0}, f32[], bf16[3]{0}) all-reduce-start(%b, %c)"
    assert devices.reduced_bytes(text) == 4 * (64 * 32 + 1) + 6
