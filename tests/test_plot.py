"""Result.plot: what is drawn for each kind of run, never more than a picture."""

import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd

pytestmark = pytest.mark.full

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


def drawn(axes):
    axes.figure.canvas.draw()
    return axes


def sweep(over, seeds=1, **kw):
    kw = {"batch_size": BATCH, "epochs": 3, **kw}
    return jaxgd.sweep(loss, START, DATA, over=over, seeds=seeds, **kw)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_curve_over_one_axis(seeds):
    rates = np.array([1e-3, 1e-1, 1e-2, 0.9, 1e3])  # in any order
    found = sweep({"learning_rate": rates}, seeds)
    axes = drawn(found.plot())
    label = "mean over seeds" if seeds > 1 else "objective at the end"
    x, y = line(axes, label).get_data()
    kept = np.isfinite(found.scores)
    np.testing.assert_array_equal(x, np.sort(rates[kept]))
    np.testing.assert_array_equal(y, found.scores[kept][np.argsort(rates[kept])])
    assert line(axes, "diverged").get_xdata().tolist() == [1e3]
    best = line(axes, "best").get_xydata()[0]
    assert best.tolist() == [rates[np.argmin(found.scores)], found.scores.min()]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "learning rate"
    seen = " with 3 seeds each" if seeds > 1 else ""
    assert axes.get_title() == f"5 settings{seen}, 1 of them lost"
    assert len(axes.collections) == (seeds > 1)


def test_values_above_the_start_do_not_squeeze_the_rest():
    """A rate just too large may end at 1e30 without being lost."""
    found = sweep({"learning_rate": np.array([0.01, 0.1, 3.0])}, epochs=2)
    assert np.isfinite(found.scores).all()
    start = found.results.history.value[:, 0].max()
    assert found.scores.max() > 100 * start
    axes = drawn(found.plot())
    assert axes.get_ylim()[1] < 10 * start
    grid = sweep(
        {"learning_rate": np.array([0.01, 3.0]), "momentum": [0.0, 0.5]},
        epochs=2,
        optimizer=optax.sgd,
    )
    (image,) = drawn(grid.plot()).images
    assert image.norm.vmax <= start


def test_a_heat_map_over_two():
    rates, momenta = np.array([0.1, 1e-3, 1e4]), np.array([0.0, 0.9])
    over = {"learning_rate": rates, "momentum": momenta}
    found = sweep(over, optimizer=optax.sgd)
    axes = drawn(found.plot())
    (image,) = axes.images
    order = np.argsort(rates)
    shown = np.ma.filled(image.get_array(), np.nan)
    expected = np.where(np.isfinite(found.scores), found.scores, np.nan)[order]
    np.testing.assert_array_equal(shown, expected)
    assert line(axes, "diverged").get_xydata().tolist() == [[0, 2], [1, 2]]
    i, j = np.unravel_index(np.argmin(found.scores), found.shape)
    assert line(axes, "best").get_xydata()[0].tolist() == [j, order.tolist().index(i)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("momentum", "learning rate")


def test_runs_of_many_starts():
    starts = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    found = jaxgd.sweep(loss, None, DATA, over={"params": starts}, learning_rate=0.3)
    axes = drawn(found.plot())
    assert len(axes.lines) == 6
    ends = {line.get_xydata()[-1, 1] for line in axes.lines}
    assert ends == {float(v) for v in found.results.value}
    assert line(axes, "best").get_xydata()[-1, 1] == found.results.value.min()


def test_three_axes_are_no_picture():
    def rule(learning_rate, momentum, damping):
        return optax.sgd(learning_rate * damping, momentum)

    over = {"learning_rate": [0.1], "momentum": [0.5], "damping": [0.5]}
    found = sweep(over, optimizer=rule, epochs=1)
    assert found.shape == (1, 1, 1)
    with pytest.raises(ValueError, match="print its table"):
        found.plot()


def test_paths_over_contours():
    def bowl(p, height=1.0):
        return height * (p["x"] ** 2 + 4 * p["y"] ** 2)

    start = {"x": jnp.float32(1.0), "y": jnp.float32(-1.0)}
    snapshots = list(jaxgd.iterate(bowl, start, every=1, learning_rate=0.1))
    path = [start, *snapshots]
    other = [{"x": 3.0, "y": 0.5}, {"x": np.nan, "y": 0.0}, {"x": 0.0, "y": 0.0}]
    axes = drawn(jaxgd.plot_paths(bowl, {"plain": path, "jump": other}, args=(2.0,)))
    points = line(axes, "plain").get_xydata()
    expected = [[1.0, -1.0], *([float(s.params[k]) for k in "xy"] for s in snapshots)]
    np.testing.assert_allclose(points, expected, rtol=1e-6)
    assert line(axes, "jump").get_xydata().tolist() == [[3.0, 0.5], [0.0, 0.0]]
    assert labels(axes) == ["plain", "jump"]
    assert axes.get_xlim()[1] > 3.0
    contours = axes.collections[0].get_paths()
    levels = [p.vertices for p in contours if len(p.vertices) > 10]
    assert levels
    for vertices in levels[-3:]:  # each at one height
        heights = vertices[:, 0] ** 2 + 4 * vertices[:, 1] ** 2
        assert np.ptp(heights) < 0.2 * heights.mean()
    again = jaxgd.plot_paths(bowl, [path], ax=axes)
    assert again is axes


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "one descent at least"),
        ([[]], "an iterate at least"),
        ([[np.zeros(3)]], "two real parameters"),
        ([[np.zeros(2, complex)]], "two real parameters"),
        (np.zeros((3, 2)), "list or dict"),
        ([np.float32(1), np.float32(2)], "wrap them"),
        ([[np.full(2, np.nan)]], "finite iterate"),
    ],
)
def test_paths_that_are_none(paths, text):
    with pytest.raises(ValueError, match=text):
        jaxgd.plot_paths(lambda p: jnp.sum(p**2), paths)
