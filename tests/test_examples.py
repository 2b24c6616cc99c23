"""The examples run, at small sizes, and return what they claim to show."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jaxgd import Status

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """The example as a module, imported by path."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_windows():
    pytest.importorskip("matplotlib").use("Agg")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_every_example_says_what_it_shows(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert "What it shows" in text
    assert 'if __name__ == "__main__":' in text


def test_quickstart(tmp_path, capsys):
    pytest.importorskip("sklearn")
    output = tmp_path / "losses.png"
    results, accuracies = load("quickstart").main(output, target=0.5)
    assert list(results) == ["batch", "stochastic", "mini-batch"]
    for name, result in results.items():
        assert result.status == Status.TARGET_REACHED
        assert result.value <= 0.5
        assert accuracies[name] > 0.85
    assert output.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].count("Converged after") == 3
    assert max(map(len, lines[:-1])) <= 140


def test_seed_linear_regression():
    result, difference = load("seed_linear_regression").main(iterations=(0, 1, 10, 200))
    assert result.steps == 200
    assert difference < 2e-6


def test_neural_network():
    pytest.importorskip("sklearn")
    result, accuracy = load("neural_network").main(hidden=(32,), epochs=12)
    assert accuracy > 0.9
    assert result.checks.step.size == 12
    assert result.checks.value[-1] < result.checks.value[0]


def test_inside_jit_vmap_grad():
    rates = (1e-3, 0.3, 3.0)
    module = load("inside_jit_vmap_grad")
    one, lanes, (derivatives, differences) = module.main(n=50, learning_rates=rates)
    assert one.converged
    assert lanes.status.tolist() == [
        Status.MAX_STEPS,
        Status.GRADIENT_SMALL,
        Status.DIVERGED,
    ]
    np.testing.assert_allclose(derivatives, differences, rtol=5e-3)


def test_learning_rates(tmp_path):
    pytest.importorskip("sklearn")
    results = load("learning_rates").main(tmp_path / "rates.png", max_steps=300)
    verdicts = [result.diagnosis.verdict for result in results.values()]
    assert verdicts[:4] == ["too small", "good", "edge of stability", "too large"]
    assert results["too large"].status == Status.DIVERGED
    none = results["no rate given"]
    assert none.status == Status.GRADIENT_SMALL
    assert none.steps < 100
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_no_tuning():
    pytest.importorskip("sklearn")
    results = load("no_tuning").main(max_steps=200, epochs=3)
    assert len(results) == 3
    for runs in results.values():
        whole, mini, given = runs.values()
        assert np.isfinite(whole.value)
        assert mini.status == Status.MAX_STEPS
        assert mini.value < mini.history.value[0]
        assert not whole.value > mini.value
        assert given.status in (Status.MAX_STEPS, Status.DIVERGED)


def test_sweep(tmp_path, capsys):
    pytest.importorskip("sklearn")
    sweep = load("sweep").main(tmp_path / "sweep.png", epochs=2, seeds=2)
    assert sweep.shape == (8, 6, 2)
    assert sweep.best.value < 0.6
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "96 runs of 2 epochs" in capsys.readouterr().out


def test_training_loop(tmp_path):
    pytest.importorskip("sklearn")
    best, value, after, result = load("training_loop").main(
        tmp_path, width=16, epochs=6, patience=2
    )
    assert best == value < 0.6
    assert after < best + 0.05
    assert result.status == Status.MAX_STEPS
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert len(lines) == 7
    assert int(lines[1].split(",")[0]) == 28


def test_many_starts(tmp_path):
    module = load("many_starts")
    sweep, nearest = module.main(tmp_path / "starts.png", count=40, drawn=3)
    assert sweep.results.converged.all()
    ends = np.asarray(sweep.results.params)
    np.testing.assert_allclose(ends, module.MINIMA[nearest], atol=1e-3)
    assert set(nearest) == {0, 1, 2, 3}
    assert (tmp_path / "starts.png").read_bytes().startswith(b"\x89PNG")


def test_larger_than_memory(tmp_path):
    module = load("larger_than_memory")
    result, accuracy, sizes = module.main(tmp_path, n=120_000, budget_bytes=2**23)
    assert sizes["file"] > sizes["budget"]
    assert result.checks.step.size >= 2
    assert result.checks.value[-1] < result.checks.value[0]
    assert accuracy > 0.85
