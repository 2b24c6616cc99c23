"""A race of learning rates: as good as a grid, for fewer steps, and never divergent."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxgd
from jaxgd import problems

pytestmark = pytest.mark.thin(4)

MOMENTUM = {"optimizer": optax.sgd, "hyperparams": {"momentum": 0.9}}
ADAM = {"optimizer": optax.adam}

TASKS = {
    "logistic": problems.logistic(*problems.blobs(300, 4, 2), penalty=1e-3),
    "badly scaled": problems.least_squares(
        *(lambda x, y: (x * np.geomspace(0.1, 30, 6), y))(
            *problems.linear_data(200, 6, noise=1.0)
        )
    ),
    "mlp": problems.mlp(*problems.blobs(200, 3, 3), sizes=(3, 8, 3)),
}
ROUTES = [
    ("logistic", {"max_steps": 60}),
    ("badly scaled", {"max_steps": 60}),
    ("badly scaled", {"batch_size": 16, "epochs": 5}),
    ("badly scaled", {"batch_size": 16, "epochs": 5, **MOMENTUM}),
    ("logistic", {"batch_size": 1, "epochs": 1, **ADAM}),
    ("mlp", {"batch_size": 32, "epochs": 5, **ADAM}),
]


@pytest.mark.thin(6)
@pytest.mark.parametrize(("name", "how"), ROUTES)
def test_as_good_as_the_best_of_a_grid(name, how):
    task = TASKS[name]
    found = jaxgd.find_learning_rate(task.fun, task.init, task.data, **how)

    def value(rate, key):
        return jaxgd.minimize(
            task.fun,
            task.init,
            task.data,
            learning_rate=rate,
            key=key,
            stop=None,
            **how,
        ).value

    rates = np.geomspace(1e-5, 10, 20)
    rates = np.append(rates, found.suggestion).astype(np.float32)
    keys = jnp.arange(3, dtype=jnp.uint32) + 7
    lanes = jax.vmap(jax.vmap(value, (0, None)), (None, 0))
    values = np.asarray(jax.jit(lanes)(rates, keys))
    assert np.isfinite(values[:, -1]).all()
    values = np.median(np.where(np.isfinite(values), values, np.inf), axis=0)
    assert values[-1] <= 1.2 * values[:-1].min()


X, Y = problems.linear_data(150, 3, seed=2)
Y -= Y.mean()
START = jnp.zeros(3)


def loss(params, batch, scale=1.0):
    x, y = batch
    return scale * jnp.mean((x @ params - y) ** 2) / 2


def search(fun=loss, params=START, data=(X, Y), **how):
    return jaxgd.find_learning_rate(fun, params, data, **how)


@pytest.mark.full
def test_a_lane_is_a_run_of_minimize():
    rates = [0.01, 1e-3, 0.1, 5.0]
    found = search(learning_rates=rates, batch_size=20, epochs=4, key=3)
    np.testing.assert_allclose(found.learning_rates, np.sort(rates), rtol=1e-6)
    assert found.steps == 30
    assert len(found.heats) == 1
    runs = [
        jaxgd.minimize(
            loss, START, (X, Y), batch_size=20, epochs=4, key=3, learning_rate=rate
        )
        for rate in np.sort(rates)
    ]
    values = [float(run.value) for run in runs[:3]]
    np.testing.assert_allclose(found.values[:3], values, rtol=1e-5)
    assert found.start == pytest.approx(float(loss(START, (X, Y))))
    assert found.suggestion == np.float32(0.1)
    assert found.reached == found.values[2]
    assert found.values[3] > found.start


def test_plain_descent_knows_its_stable_limit():
    found = search(max_steps=40)
    limit = 2 / np.linalg.eigvalsh(X.T @ X / len(X)).max()
    assert found.stable_limit == pytest.approx(limit, rel=0.02)
    assert 0.2 * limit < found.suggestion < limit
    assert [heat.steps for heat in found.heats] == [8, 12, 40]
    for heat in found.heats:
        assert heat.values.size % 12 == 0
        assert (np.diff(heat.learning_rates) > 0).all()
        beyond = heat.learning_rates > 1.01 * limit
        # A step beyond the limit grows; far beyond it is soon infinite.
        assert (heat.values[beyond] > heat.values.min()).all()
        assert not np.isnan(heat.values).any()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_the_scale_of_the_rates_is_found(scale):
    # The first heat of a factory begins at 1e-5 to 3, whatever the objective.
    found = search(optimizer=optax.sgd, max_steps=40, args=(scale,))
    plain = search(max_steps=40, args=(scale,))
    assert np.isnan(found.stable_limit)
    assert found.suggestion == pytest.approx(plain.suggestion, rel=0.5)


@pytest.mark.full
def test_objectives_below_zero():
    def well(params, batch):
        return loss(params, batch) - 1000.0

    found = search(well, batch_size=10, epochs=3)
    assert found.reached < found.start
    best = search(batch_size=10, epochs=3)
    assert 0.1 < found.suggestion / best.suggestion < 10


@pytest.mark.parametrize(
    ("fun", "said"),
    [
        (lambda p, batch: jnp.sum(p) * 0.0 + jnp.mean(batch[1]), "none lowers"),
        (lambda p, batch: jnp.sum(p) * jnp.nan, "all diverge"),
    ],
)
def test_no_rate_is_a_suggestion(fun, said):
    found = search(fun, max_steps=3)
    assert np.isnan(found.suggestion)
    assert np.isnan(found.reached)
    assert said in str(found)
    found.plot()


def test_rules_with_evaluation_parameters_are_judged_there():
    how = {"optimizer": contrib.schedule_free_sgd, "batch_size": 30, "max_steps": 20}
    found = search(learning_rates=[0.1, 0.3], **how)
    run = jaxgd.minimize(loss, START, (X, Y), learning_rate=0.3, **how)
    np.testing.assert_allclose(found.values[1], run.value, rtol=1e-5)


@pytest.mark.full
def test_aux_keys_strata_and_complex_parameters():
    def noisy(z, batch, *, key):
        x, y = batch
        level = 1 + 0.1 * jax.random.normal(key)
        return level * jnp.mean(jnp.abs(x @ z - y * (1 + 1j)) ** 2), {"level": level}

    how = {"has_aux": True, "with_key": True, "batch_size": 30, "strata": 3, "key": 5}
    start = jnp.zeros(3, jnp.complex64)
    found = search(noisy, start, microbatch_size=10, epochs=4, **how)
    run = jaxgd.minimize(
        noisy, start, (X, Y), epochs=4, learning_rate=found.suggestion, **how
    )
    np.testing.assert_allclose(found.reached, run.value, rtol=1e-3)
    assert found.reached < found.start / 10


def test_float64(x64):
    found = search(params=np.zeros(3), max_steps=10, learning_rates=[1e-3, 1e-1, 0.3])
    assert found.suggestion == 0.3
    assert found.values.dtype == np.float64


@pytest.mark.full
def test_new_numbers_cost_no_compilation(count_compilations):
    def run(scale=1.0, x=X, **how):
        how = {"hyperparams": {"momentum": 0.9}} | how
        return search(
            data=(x, Y),
            args=(scale,),
            optimizer=optax.sgd,
            batch_size=20,
            max_steps=30,
            **how,
        )

    run()
    for how in (
        {"scale": 1e6},
        {"x": X + 1},
        {"key": 4},
        {"hyperparams": {"momentum": np.float64(0.5)}},
        {"learning_rates": np.geomspace(0.01, 1, 12)},
        {"learning_rates": list(np.geomspace(0.1, 1, 12, dtype="f"))},
    ):
        with count_compilations() as count:
            run(**how)
        assert count() == 0, how


REFUSED = [
    ({"fun": None}, TypeError, "fun must be a function"),
    ({"optimizer": optax.adam(0.1)}, ValueError, "must be a factory.*optax.adam"),
    ({"optimizer": "adam"}, TypeError, "optimizer must be an optax rule or a factory"),
    ({"hyperparams": {"b1": 0.9}}, ValueError, "hyperparams need a factory"),
    ({"batch_size": 151}, ValueError, "batch_size must be at most 150"),
    ({"max_steps": 5, "epochs": 5}, ValueError, "must not both be given"),
    ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1"),
    ({"learning_rates": 0.1}, TypeError, "learning_rates must be an array"),
    ({"learning_rates": ["a"]}, TypeError, "learning_rates must be real numbers"),
    ({"learning_rates": []}, ValueError, "learning_rates must have one axis"),
    ({"learning_rates": np.ones((2, 2))}, ValueError, "learning_rates must have one"),
    ({"learning_rates": [0.1, 0.0]}, ValueError, "must be finite and positive"),
    ({"learning_rates": [0.1, np.inf]}, ValueError, "must be finite and positive"),
    ({"learning_rates": [1j]}, TypeError, "learning_rates must be real numbers"),
    ({"learning_rates": np.array(["a"])}, TypeError, "must be real numbers"),
    ({"strata": 4, "batch_size": 20}, ValueError, "strata must divide"),
]


@pytest.mark.parametrize(("how", "error", "said"), REFUSED)
def test_refused_before_compilation(how, error, said, count_compilations):
    with count_compilations() as count, pytest.raises(error, match=said):
        search(**how)
    assert count() == 0


def test_refused_inside_jit():
    with pytest.raises(TypeError, match="takes no traced values"):
        jax.jit(lambda x: search(params=x).suggestion)(START)


def test_report_and_picture():
    plt = pytest.importorskip("matplotlib.pyplot")
    found = search(max_steps=40)
    text = str(found)
    assert text.startswith(f"Take a learning rate of {found.suggestion:.3g}.\n")
    for said in ("plain descent", "12 rates", "40 steps each", "2 / sharpness", "rise"):
        assert said in text
    told = json.loads(json.dumps(found.to_dict()))
    assert told["suggestion"] == found.suggestion
    assert told["heats"][-1]["values"] == told["values"] == found.values.tolist()
    axes = found.plot()
    axes.figure.canvas.draw()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"suggestion: {found.suggestion:.3g}" in labels
    assert f"stable limit at the start: {found.stable_limit:.3g}" in labels
    assert "after 40 steps" in labels
    line = next(x for x in axes.lines if x.get_label() == "after 40 steps")
    finite = np.isfinite(found.values)
    np.testing.assert_array_equal(line.get_xdata(), found.learning_rates[finite])
    np.testing.assert_array_equal(line.get_ydata(), found.values[finite])
    assert axes.get_xscale() == "log"
    assert found.plot(axes) is axes
    plt.close("all")


def test_a_rate_that_raises_the_objective_is_no_suggestion():
    found = search(learning_rates=[1e3], max_steps=3)
    assert np.isnan(found.suggestion)
    assert "none lowers" in str(found) or "all diverge" in str(found)
    assert "->" not in str(found)


@pytest.mark.parametrize("rule", [jaxgd.barzilai_borwein, jaxgd.parabolic_rms])
def test_rules_without_a_rate_do_not_race(rule):
    with pytest.raises(ValueError, match="needs none: call minimize with it"):
        search(optimizer=rule)
