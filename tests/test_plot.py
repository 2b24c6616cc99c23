"""Result.plot: what is drawn for each kind of run, never more than a picture."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

ROWS, BATCH = 60, 7
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
DATA = (X, X @ np.array([1.0, -2.0, 3.0], np.float32))
START = jnp.zeros(3)


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2) / 2


def waves(params):
    return jnp.sum(jnp.cos(params)) - 10.0


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def draw(result, ax=None):
    """The axes, drawn once so that a warning or an error of drawing shows."""
    axes = result.plot(ax)
    assert isinstance(axes, matplotlib.axes.Axes)
    axes.figure.canvas.draw()
    return axes


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, label):
    return next(x for x in axes.lines if x.get_label().startswith(label))


def test_batch_run_ends_at_the_value_returned():
    result = jaxgd.minimize(loss, START, DATA, learning_rate=0.3)
    axes = draw(result)
    x, y = line(axes, "objective").get_data()
    assert (x[0], x[-1]) == (0, result.steps)
    assert y[0] == result.history.value[0]
    assert y[-1] == float(result.value)
    assert axes.get_yscale() == "log"
    assert axes.get_title() == result.message
    assert axes.get_xlabel() == "steps (one epoch each)"
    assert labels(axes)[-1] == "gradient norm"


def test_mini_batch_run_shows_the_full_objective_and_epochs():
    stop = jaxgd.value_change(rtol=1e-3)
    result = jaxgd.minimize(
        loss, START, DATA, batch_size=BATCH, learning_rate=0.1, epochs=5, stop=stop
    )
    axes = draw(result)
    x, y = line(axes, "full objective").get_data()
    assert x.size > 1
    np.testing.assert_array_equal(x, result.checks.step)
    np.testing.assert_array_equal(y, result.checks.value)
    end = line(axes, "full objective at the end")
    assert end.get_xydata().tolist() == [[result.steps, float(result.value)]]
    assert f"objective of mini-batches of {BATCH}" in labels(axes)
    assert axes.get_xlabel() == "steps"
    (top,) = axes.child_axes
    assert top.get_xlabel() == "epochs"
    right = axes.get_xlim()[1] * BATCH / ROWS
    assert top.get_xlim()[1] == pytest.approx(right)


def test_running_mean_keeps_the_scale_readable_for_single_rows():
    result = jaxgd.minimize(
        loss, START, DATA, batch_size=1, learning_rate=0.05, epochs=5
    )
    axes = draw(result)
    noise = line(axes, "objective of single rows").get_ydata()
    mean = line(axes, "their running mean").get_ydata()
    assert noise.min() < mean.min() / 10
    assert axes.get_ylim()[0] > noise.min()
    np.testing.assert_allclose(mean[150], noise[150 - 6 : 150 + 7].mean())


@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_without_history_only_the_end_is_drawn(batch_size):
    result = jaxgd.minimize(
        loss, START, DATA, batch_size=batch_size, learning_rate=0.1, history_rows=0
    )
    axes = draw(result)
    low, high = axes.get_xlim()
    assert low <= 0 < result.steps <= high
    assert len(axes.figure.axes) == 1  # no gradient norm


@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_diverged_run(batch_size):
    result = jaxgd.minimize(
        loss, START, DATA, batch_size=batch_size, learning_rate=5.0, max_steps=500
    )
    assert result.status == jaxgd.Status.DIVERGED
    axes = draw(result)
    assert axes.get_title() == result.message
    assert axes.get_yscale() == "log"
    assert 1e30 < axes.get_ylim()[1] < np.inf


def test_start_that_is_not_finite():
    axes = draw(jaxgd.minimize(loss, START * np.nan, DATA, learning_rate=0.1))
    assert labels(axes) == ["at the end: nan"]


def test_negative_objective_is_on_a_linear_scale():
    start = jnp.array([0.1, 0.2, 0.3])
    axes = draw(jaxgd.minimize(waves, start, learning_rate=0.1, max_steps=100))
    assert axes.get_yscale() == "linear"
    assert axes.get_xlabel() == "steps"


def test_draws_into_given_axes():
    _, (left, right) = plt.subplots(1, 2)
    for axes, rate in [(left, 0.1), (right, 0.3)]:
        result = jaxgd.minimize(loss, START, DATA, learning_rate=rate)
        assert draw(result, axes) is axes
    assert len(plt.get_fignums()) == 1


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    result = jaxgd.minimize(waves, START + 1, learning_rate=0.1, max_steps=3)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxgd\[plot\]'"):
        result.plot()
