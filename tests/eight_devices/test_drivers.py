"""Contract: what drives a step drives it on many devices as on one."""

from functools import lru_cache

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import AUTO, EXPLICIT, FEW, LAYOUTS, close, mesh_of, minimize, same_result
from objectives import DATA, START, linear, logistic

import jaxgd

MINI = {"learning_rate": 0.05, "batch_size": 32, "key": 4, "max_steps": 40}
FULL = {"learning_rate": 0.05, "max_steps": 40}


# Transformations.


@pytest.mark.parametrize("layout", ["8 devices", "one axis of two", "explicit mesh"])
def test_within_jit(layout):
    def run(params, data, rate):
        how = {**MINI, "learning_rate": rate}
        if layout != "explicit mesh":  # whose types tell how many pieces there are
            how["strata"] = 8
        return jaxgd.minimize(logistic, params, data, **how)

    result = jax.jit(run)(START, LAYOUTS[layout](DATA), 0.05)
    one = minimize("one device", logistic, START, DATA, **MINI)
    for name in ("params", "value", "grad_norm", "status", "steps", "evaluations"):
        close(getattr(result, name), getattr(one, name))
    kept = np.asarray(result.history.step) >= 0
    close(np.asarray(result.history.value)[kept], one.history.value)


@pytest.mark.parametrize(
    ("layout", "how"), [("8 devices", MINI), ("explicit mesh", FULL)]
)
def test_vmap_over_rates(layout, how):
    rates = np.array([0.01, 0.1, 0.3], "f")

    def runs(layout):
        run = lambda rate: minimize(
            layout, logistic, START, DATA, **{**how, "learning_rate": rate}
        )
        return jax.vmap(run)(rates)

    many, one = runs(layout), runs("one device")
    close(
        (many.params, many.value, many.status, many.evaluations),
        (one.params, one.value, one.status, one.evaluations),
    )


def test_gradient_of_the_whole_run():
    def end(rate, layout):
        how = {**MINI, "learning_rate": rate, "stop": None, "max_steps": 10}
        return minimize(layout, logistic, START, DATA, **how).value

    slopes = [jax.grad(end)(0.05, name) for name in ("8 devices", "one device")]
    np.testing.assert_allclose(*slopes, rtol=1e-4)
    h = 1e-2
    rise = end(0.05 + h, "one device") - end(0.05 - h, "one device")
    np.testing.assert_allclose(slopes[0], rise / (2 * h), rtol=0.05)


# Drivers.


@pytest.mark.parametrize("layout", ["both axes, explicit"])
def test_sweep(layout):
    def run(layout):
        data = LAYOUTS[layout](DATA)
        how = {"batch_size": 32, "strata": 8, "max_steps": 40, "key": 4}
        over = {"learning_rate": [0.01, 0.05, 0.2]}
        return jaxgd.sweep(logistic, START, data, over=over, **how)

    many, one = run(layout), run("one device")
    assert many.best_settings == one.best_settings
    for i in range(3):
        same_result(many[i], one[i])


@pytest.mark.parametrize("layout", ["8 devices", "explicit mesh"])
@pytest.mark.parametrize("how", [MINI, FULL], ids=["mini-batch", "batch"])
def test_cuts_change_no_bit(layout, how):
    whole = minimize(layout, logistic, START, DATA, final_evaluation=False, **how)
    data = LAYOUTS[layout](DATA)
    seen = list(jaxgd.iterate(logistic, START, data, every=7, **how))
    assert [int(snapshot.steps) for snapshot in seen] == [7, 14, 21, 28, 35, 40]
    last = seen[-1]
    same = jax.tree.map(np.array_equal, last.params, whole.params)
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(last.history.value, whole.history.value)
    assert int(last.evaluations) == int(whole.evaluations)


def test_find_learning_rate():
    def found(layout):
        data = LAYOUTS[layout](DATA)
        return jaxgd.find_learning_rate(
            logistic, START, data, batch_size=32, strata=8, max_steps=30
        )

    many, one = found("8 devices"), found("one device")
    np.testing.assert_allclose(many.learning_rates, one.learning_rates, rtol=1e-3)
    np.testing.assert_allclose(many.suggestion, one.suggestion, rtol=1e-3)
    np.testing.assert_allclose(many.stable_limit, one.stable_limit, rtol=1e-3)


@pytest.mark.parametrize("layout", FEW)
def test_sharpness(layout):
    x = np.c_[DATA[0], np.ones(len(DATA[0]))].astype(float)
    exact = np.linalg.eigvalsh(2 * x.T @ x / len(x))[-1]
    found = jaxgd.sharpness(linear, START, LAYOUTS[layout](DATA))
    np.testing.assert_allclose(found, exact, rtol=0.01)


def test_benchmark():
    data = LAYOUTS["8 devices"](DATA)
    how = {"learning_rate": 0.05, "batch_size": 32}
    timed = jaxgd.benchmark(logistic, START, data, steps=50, repeats=2, **how)
    assert timed.rows_per_s > 0
    assert timed.flops > 0
    assert str(timed)


@pytest.mark.parametrize("layout", FEW)
@pytest.mark.parametrize("block", [None, 8])
def test_step_by_hand(layout, block):
    """Batches whose rows are split, a scan over them split on its second axis."""
    optimizer = optax.adam(0.05)
    step = jaxgd.make_step(logistic, optimizer, microbatch_size=block)
    single = jaxgd.make_step(logistic, optimizer)
    one = many = jaxgd.init_state(START, optimizer)
    split, once = jax.jit(step), jax.jit(single)
    for start in range(0, 160, 32):
        batch = jax.tree.map(lambda x: x[start : start + 32], DATA)
        many, seen = split(many, LAYOUTS[layout](batch))
        one, expected = once(one, batch)
        close((seen.value, seen.grad_norm), (expected.value, expected.grad_norm))
    close(many.params, one.params)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_scan_by_hand(kind):
    batches = jax.tree.map(lambda x: x.reshape(5, 32, *x.shape[1:]), DATA)
    place = NamedSharding(mesh_of((8,), kind), P(None, "a"))
    optimizer = optax.sgd(0.05)
    step = jaxgd.make_step(logistic, optimizer)

    @jax.jit
    def run(batches):
        return lax.scan(step, jaxgd.init_state(START, optimizer), batches)

    state, infos = run(jax.device_put(batches, place))
    expected, seen = run(batches)
    close((state.params, infos.value), (expected.params, seen.value))


# Compilations.


@pytest.mark.parametrize("layout", ["4 devices", "explicit mesh"])
@pytest.mark.parametrize("how", [MINI, FULL], ids=["mini-batch", "batch"])
def test_new_numbers_compile_nothing(layout, how, count_compilations):
    data = LAYOUTS[layout](DATA)
    other = LAYOUTS[layout](jax.tree.map(lambda x: x + 1, DATA))
    changes = [
        {},
        {"learning_rate": 0.01},
        {"learning_rate": np.float64(0.02)},
        {"max_steps": 11},
        {"data": other},
        {"params": jax.tree.map(lambda x: x + 1, START)},
        {"key": 9},
        {"key": jax.random.key(3)},
    ]
    jaxgd.minimize(logistic, START, data, **how)
    jax.random.key(0), jax.random.key(3)
    for change in changes:
        given = {"params": START, "data": data, **how, **change}
        with count_compilations() as count:
            jaxgd.minimize(logistic, **given)
        assert count() == 0, change


@pytest.mark.parametrize("layout", ["one device", *FEW[:2]])
def test_going_on_compiles_nothing(layout, count_compilations):
    data, how = LAYOUTS[layout](DATA), {**MINI, "optimizer": optax.adam, "strata": 8}
    result = jaxgd.minimize(logistic, START, data, **how)
    how.pop("key")
    with count_compilations() as count:
        jaxgd.minimize(logistic, START, data, state=result.state, **how)
    assert count() == 0


# Going on elsewhere.

ADAM = {**MINI, "optimizer": optax.adam, "strata": 8}
PATHS = [
    ("8 devices", "one device"),
    ("one device", "8 devices"),
    ("8 devices", "4 devices"),
    ("4 devices", "8 devices"),
    ("explicit mesh", "both axes"),
]


@lru_cache
def run_of(layout, steps):
    return minimize(layout, logistic, START, DATA, **{**ADAM, "max_steps": steps})


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
@pytest.mark.parametrize(("before", "after"), PATHS)
def test_goes_on_elsewhere(before, after, kept, tmp_path):
    whole, state = run_of("one device", 80), run_of(before, 40).state
    if kept == "in a file":
        jaxgd.save(tmp_path / "state", state)
        state = jaxgd.load(tmp_path / "state")
    how = {name: value for name, value in ADAM.items() if name != "key"}
    rest = minimize(after, logistic, START, DATA, state=state, **how)
    assert int(rest.steps) == 80
    close(rest.params, whole.params)
    close(rest.value, whole.value)
    np.testing.assert_array_equal(rest.history.step, whole.history.step)
    close(rest.history, whole.history, 1e-4)


def test_batch_descent_goes_on_elsewhere():
    """With a rule that remembers the last gradient."""
    how = {"stop": jaxgd.gradient_norm(atol=1e-6)}
    whole = minimize("one device", logistic, START, DATA, max_steps=30, **how)
    cut = minimize("8 devices", logistic, START, DATA, max_steps=5, **how)
    rest = minimize(
        "one device", logistic, START, DATA, max_steps=25, state=cut.state, **how
    )
    close(rest.params, whole.params, 1e-3)
    assert rest.status == whole.status
