"""``parabolic_rms``: its formulas, its invariances, and its claim on small tasks."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import START, X, Y, least_squares

import jaxgd
from jaxgd._rules.adapter import evaluation_params, has_evaluation_params, rate_used

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import parameter_free, tasks
from benchmarks._measure import Options

pytestmark = pytest.mark.thin(4)

X, Y = np.asarray(X), np.asarray(Y)


def loss(x, batch):
    a, y = batch
    return jnp.mean((a @ x - y) ** 2) + 0.1 * jnp.sum(jnp.cosh(x))


def by_numpy(x, batches, relaxation=1.0, memory=1000.0, averaging=16.0):
    """The formulas of the docstring, step by step: iterates, averages, rates."""

    def value(x, a, y):
        return np.mean((a @ x - y) ** 2) + 0.1 * np.sum(np.cosh(x))

    def grad(x, a, y):
        return 2 * a.T @ (a @ x - y) / len(y) + 0.1 * np.sinh(x)

    v, mean, slopes, curvatures, rate, rows = 0.0, x, [], [], None, []
    for t, (a, y) in enumerate(batches):
        f, g = value(x, a, y), grad(x, a, y)
        v = v + max(1 / (t + 1), 1 / memory) * (g**2 - v)
        d = -g / np.sqrt(v)
        m = -g @ d
        trial = abs(f) / m if rate is None else rate
        c = max(0.0, 2 * (value(x + trial * d, a, y) - f + trial * m) / trial**2)
        slopes.append(m)
        curvatures.append(c)
        rate = min(relaxation * np.mean(slopes) / np.mean(curvatures), 2 * trial)
        x = x + min(rate, m / c) * d
        mean = mean + (averaging + 1) / (t + 1 + averaging) * (x - mean)
        rows.append(np.concatenate([x, mean, [rate]]))
    return np.array(rows)


@pytest.mark.parametrize(
    "settings", [{}, {"relaxation": 0.7, "memory": 5.0, "averaging": 2.0}]
)
def test_formulas(settings, x64):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 2, 3)) * [0.1, 1.0, 30.0]
    y = a @ [3.0, -1.0, 0.1] + rng.normal(size=(40, 2))
    start = np.array([1.0, 0.5, -0.2])
    rule = jaxgd.parabolic_rms(**settings)

    def step(carry, batch):
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x, batch)
        move, state = rule.update(
            grad, state, x, value=value, value_fn=lambda x: loss(x, batch)
        )
        x = optax.apply_updates(x, move)
        return (x, state), jnp.concatenate(
            [x, state.average, state.learning_rate[None]]
        )

    carry = jnp.asarray(start), rule.init(jnp.asarray(start))
    _, found = jax.lax.scan(step, carry, (jnp.asarray(a), jnp.asarray(y)))
    expected = by_numpy(start, list(zip(a, y, strict=True)), **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


SOLUTION = np.linalg.lstsq(np.c_[X, np.ones(len(X))], Y)[0]


def tree_loss(params, batch):
    x, y = batch
    w = params["w"][0]
    off = x @ w + params["b"] - y
    return jnp.mean((off * jnp.conj(off)).real).astype(w.real.dtype)


@pytest.mark.parametrize(
    ("dtype", "batch_size"),
    [
        ("bfloat16", 5),
        ("float16", 5),
        ("float32", None),
        ("float32", 1),
        ("complex64", 5),
        ("float64", 5),
        ("complex128", 1),
    ],
)
def test_dtypes_and_trees(dtype, batch_size):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        start = {"w": (jnp.zeros(4, dtype),), "b": jnp.zeros((), dtype)}
        turn = 1j if dtype.startswith("complex") else 1
        real = jnp.zeros(0, dtype).real.dtype
        data = jnp.asarray(X, real), jnp.asarray(Y * turn, dtype)
        result = jaxgd.minimize(
            tree_loss,
            start,
            data,
            batch_size=batch_size,
            max_steps=300,
            optimizer=jaxgd.parabolic_rms(),
        )
        leaves = jax.tree.leaves(result.params)
        assert {leaf.dtype.name for leaf in leaves} == {dtype}
        wide = {"bfloat16": "float32", "float16": "float32"}.get(dtype, dtype)
        state = result.state.opt_state
        assert {x.dtype.name for x in jax.tree.leaves(state.average)} == {wide}
        w = np.asarray(result.params["w"][0], np.complex128) / turn
        # A single row is noise that the average does not remove in 300 steps.
        atol = 0.25 if batch_size == 1 else 0.1
        np.testing.assert_allclose(w, SOLUTION[:4], atol=atol)


FIT = {"batch_size": 4, "optimizer": jaxgd.parabolic_rms(), "key": 3}
run = partial(jaxgd.minimize, least_squares, START, (X, Y), **FIT)


def test_results_are_at_the_average():
    result = run(max_steps=50)
    average = result.state.opt_state.average
    assert has_evaluation_params(result.state.opt_state)
    for key in START:
        np.testing.assert_array_equal(result.params[key], average[key])
        assert np.any(result.params[key] != np.asarray(result.state.params[key]))
    value = least_squares(result.params, (X, Y))
    np.testing.assert_allclose(result.value, value, rtol=1e-6)
    assert np.all(result.history.learning_rate > 0)
    assert int(result.evaluations) == 2 * 50 + 1


def test_resuming_changes_no_bit():
    whole = run(max_steps=90)
    part = run(max_steps=37)
    arguments = {k: v for k, v in FIT.items() if k != "key"}
    rest = jaxgd.minimize(
        least_squares, START, (X, Y), state=part.state, max_steps=53, **arguments
    )
    for a, b in zip(
        jax.tree.leaves((whole.params, whole.state.opt_state, whole.value)),
        jax.tree.leaves((rest.params, rest.state.opt_state, rest.value)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_exact_length_jit_and_lanes():
    plain = run(max_steps=60)
    exact = run(max_steps=60, stop=None)
    np.testing.assert_allclose(exact.params["w"], plain.params["w"], rtol=1e-4)
    np.testing.assert_allclose(exact.value, plain.value, rtol=1e-4)

    def value(key):
        arguments = {**FIT, "key": key, "max_steps": 60}
        return jaxgd.minimize(least_squares, START, (X, Y), **arguments).value

    lanes = jax.jit(jax.vmap(value))(jnp.arange(4))
    np.testing.assert_allclose(lanes[3], plain.value, rtol=1e-4)
    assert np.ptp(lanes) > 0


@pytest.mark.full
def test_a_run_can_be_differentiated(x64):
    def end(scale):
        data = (X.astype(np.float64) * [1, 1, 0, 1], Y.astype(np.float64) * scale)
        start = {"w": jnp.full(4, 0.1), "b": jnp.zeros(())}
        arguments = {**FIT, "max_steps": 4, "stop": None, "history_rows": 0}
        return jaxgd.minimize(least_squares, start, data, **arguments).value

    slope = jax.grad(end)(1.3)
    differences = (end(1.3 + 1e-6) - end(1.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, differences, rtol=1e-4)


@pytest.mark.parametrize("factor", [2.0**40, 2.0**-40])
def test_the_path_does_not_depend_on_the_scale_of_the_objective(factor):
    def scaled(params, batch):
        return factor * least_squares(params, batch)

    other = jaxgd.minimize(scaled, START, (X, Y), max_steps=50, **FIT)
    np.testing.assert_allclose(
        other.params["w"], run(max_steps=50).params["w"], rtol=1e-5
    )


def test_negative_values_are_no_obstacle():
    def shifted(params, batch):
        return least_squares(params, batch) - 100.0

    result = jaxgd.minimize(shifted, START, (X, Y), max_steps=400, **FIT)
    best = least_squares(run(max_steps=400).params, (X, Y))
    assert least_squares(result.params, (X, Y)) < 1.1 * best + 1e-3


def test_within_a_chain_and_alone():
    """A clipped gradient is another direction, not another slope."""
    chain = optax.chain(optax.clip_by_global_norm(1.0), jaxgd.parabolic_rms())
    result = jaxgd.minimize(
        least_squares, START, (X, Y), max_steps=300, **{**FIT, "optimizer": chain}
    )
    start = least_squares(START, (X, Y))
    assert result.value < 0.05 * start
    assert evaluation_params(result.state.opt_state, START) is not START
    assert rate_used(result.state.opt_state, jnp.float32) > 0


def cliff(x, batch):
    return jnp.mean(-jnp.log(1.0 - x * batch) - 0.1 * x)  # NaN beyond 1 / batch


def test_a_trial_that_is_not_finite_moves_nothing():
    rule = jaxgd.parabolic_rms()
    x, state = (
        jnp.float32(0.0),
        rule.init(jnp.float32(0.0))._replace(learning_rate=jnp.float32(5.0)),
    )
    batch = -jnp.ones(1)  # the way is up to x = -1, then NaN
    value, grad = jax.value_and_grad(cliff)(x, batch)
    value_fn = lambda x: cliff(x, batch)
    move, state = rule.update(-grad, state, x, value=value, value_fn=value_fn)
    assert move == 0
    np.testing.assert_allclose(state.learning_rate, 5 / 8)
    assert state.average == 0


def test_zero_gradient_and_missing_arguments():
    rule = jaxgd.parabolic_rms()
    zero = jnp.zeros(3)
    with pytest.raises(ValueError, match="needs params, value and value_fn"):
        rule.update(zero, rule.init(zero), zero, value=1.0)
    move, state = rule.update(
        zero, rule.init(zero), zero, value=1.0, value_fn=lambda x: jnp.float32(1.0)
    )
    assert not move.any()
    assert state.learning_rate == 0  # the first gradient is still to come
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


QUICK = Options(quick=True)  # two seeds, five epochs


@pytest.mark.full
@pytest.mark.parametrize("batch_size", [1, 32, 256])
@pytest.mark.parametrize("name", ["breast_cancer_raw", "badly_scaled"])
def test_never_divergent(name, batch_size):
    setting = parameter_free.Setting(tasks.task(name), batch_size, QUICK)
    finals = setting.finals(jaxgd.parabolic_rms())
    assert np.all(finals < setting.start)


@pytest.mark.parametrize(
    ("name", "batch_size"), [("breast_cancer", 32), ("diabetes_raw", 1)]
)
def test_as_good_as_the_best_rate_of_sgd(name, batch_size):
    rules = ("parabolic_rms",)
    rows = parameter_free.at(name, batch_size, rules, QUICK)
    sgd, _, own = rows
    assert (sgd["rule"], own["rule"]) == ("SGD", "parabolic_rms")
    assert own["over_sgd"] < 1.1
    assert own["diverged"] == 0
