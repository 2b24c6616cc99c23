"""What is not finite: batches that a rule absorbs, and what a bad end is called."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from jaxgd import Status, _tree

pytestmark = pytest.mark.thin(4)

ONES = np.ones(64, np.float32)
BAD = ONES.copy()
BAD[40] = np.nan


def distance(p, batch):
    return jnp.mean((p - batch) ** 2)


def guarded(rate):
    return optax.apply_if_finite(optax.adam(rate), 9)


def skipping(rule, skip):
    return optax.MultiSteps(rule, 1, should_skip_update_fn=skip)


def skip_large(*given):
    return optax.skip_large_updates(*given, max_squared_norm=100.0)


CALL = {"batch_size": 4, "optimizer": guarded, "learning_rate": 0.05}


def fit(data=BAD, **setting):
    return jaxgd.minimize(distance, 0.0, data, **{**CALL, "epochs": 3, **setting})


@pytest.fixture(autouse=True)
def _no_warning_of_numpy():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


# One bad batch does not end a run that has a rule for it.

ANSWERS = {
    "apply_if_finite": guarded(0.05),
    "zero_nans": optax.chain(optax.zero_nans(), optax.adam(0.05)),
    "skip_not_finite": skipping(
        optax.chain(optax.clip(1.0), optax.adam(0.05)), optax.skip_not_finite
    ),
    "skip_large_updates": skipping(optax.adam(0.05), skip_large),
}


@pytest.mark.parametrize("rule", ANSWERS.values(), ids=ANSWERS)
def test_a_rule_for_bad_batches_is_asked(rule):
    result = fit(epochs=50, optimizer=rule, learning_rate=None)
    assert result.status == Status.MAX_STEPS
    assert result.steps == 800
    assert result.params == pytest.approx(1, abs=1e-2)
    assert result.skipped.dtype == np.int32
    assert result.skipped == result.to_dict()["skipped"] == 50
    # The full objective has the bad row in it: that is said, and why.
    assert np.isnan(result.value)
    assert "row 40 of data is not finite (NaN)" in result.message
    report = result.report()
    assert "-> nan (all 64 rows)" in report
    assert "skipped        50 steps" in report
    lost = np.isnan(result.history.grad_norm)
    assert lost.sum() == 50
    assert np.isnan(result.history.value[lost]).all()
    assert np.isfinite(result.history.update_norm[~lost]).all()


NO_ANSWERS = {
    "adam": optax.adam(0.05),
    "clip": optax.chain(optax.clip(1.0), optax.adam(0.05)),
    "clip_by_global_norm": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(0.05)
    ),
    "too late": optax.chain(optax.adam(0.05), optax.zero_nans()),
    "no patience": optax.apply_if_finite(optax.adam(0.05), 0),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_without_such_a_rule_the_run_ends_at_the_last_good_iterate(name):
    result = fit(optimizer=NO_ANSWERS[name], learning_rate=None)
    first = next(t for t in range(99) if 40 in jaxgd.batch_rows(0, 64, 4, t).tolist())
    assert result.status == Status.DIVERGED
    assert (result.steps, result.skipped) == (first - 1, 0)
    assert np.isfinite(result.params)
    assert "skipped" not in result.report()


def test_it_is_the_loop_of_optax():
    rule, p = guarded(0.05), jnp.float32(0)
    state = rule.init(p)
    for t in range(48):
        grad = jax.grad(distance)(p, BAD[np.asarray(jaxgd.batch_rows(0, 64, 4, t))])
        updates, state = rule.update(grad, state, p)
        p = optax.apply_updates(p, updates)
    result = fit()
    np.testing.assert_allclose(result.params, p, rtol=1e-6)
    assert result.state.opt_state.total_notfinite == result.skipped == 3


def test_a_rule_that_gives_up_ends_the_run():
    rule = optax.apply_if_finite(optax.adam(0.05), 2)
    nan = np.full(64, np.nan, np.float32)
    for setting in ({"batch_size": None, "max_steps": 9}, {"max_steps": 9}):
        result = fit(nan, optimizer=rule, learning_rate=None, epochs=None, **setting)
        assert result.status == Status.DIVERGED
        # The iterate of step 2 has numbers that the rule does not absorb.
        assert (result.steps, result.skipped, result.params) == (1, 1, 0)
        assert "row 0 of data" in result.message.lower()


def test_a_value_alone_that_is_not_finite():
    def fun(p, batch):  # the gradient is finite in every row
        return distance(p, batch[:, 0]) + jax.lax.stop_gradient(jnp.sum(batch[:, 1]))

    data = np.stack([ONES, np.where(np.isnan(BAD), np.inf, 0)], 1).astype("f")
    call = {"batch_size": 4, "learning_rate": 0.05, "epochs": 3}
    ended = jaxgd.minimize(fun, 0.0, data, **call)
    assert (ended.status, ended.skipped) == (Status.DIVERGED, 0)
    went_on = jaxgd.minimize(fun, 0.0, data, **{**call, "optimizer": guarded})
    assert (went_on.status, went_on.skipped) == (Status.MAX_STEPS, 3)
    # The rule took these steps: it is asked about the gradient.
    assert went_on.state.opt_state.total_notfinite == 0


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("stop", ["auto", jaxgd.params_change(rtol=1e-3)])
def test_a_cut_changes_nothing(stop, tmp_path):
    whole = fit(stop=stop)
    assert whole.skipped == 3
    for every in (1, 5):
        call = {**CALL, "epochs": 3, "stop": stop, "final_evaluation": True}
        *_, last = jaxgd.iterate(distance, 0.0, BAD, every=every, **call)
        same(last.params, whole.params)
        same(last.history, whole.history)
        same(last.checks, whole.checks)
        assert (last.status, last.skipped) == (whole.status, 3)
        assert last.message == whole.message
    jaxgd.save(tmp_path / "run", fit(stop=stop, epochs=1.5).state)
    state = jaxgd.load(tmp_path / "run")
    assert state.run.skipped > 0
    rest = fit(stop=stop, epochs=1.5, state=state)
    assert rest.skipped == 3
    same(rest.params, whole.params)


@pytest.mark.full
def test_streams_lanes_and_scans_share_it():
    whole = fit()
    stream = fit(jaxgd.Stream(BAD))
    scan = fit(stop=None)
    lanes = jax.vmap(lambda data: fit(data))(np.stack([BAD, ONES]))
    sweep = jaxgd.sweep(
        distance,
        0.0,
        BAD,
        over={"learning_rate": [0.05, 0.01]},
        epochs=3,
        **{k: v for k, v in CALL.items() if k != "learning_rate"},
    )
    for other in (stream, scan, lanes[0], sweep[0]):
        np.testing.assert_allclose(other.params, whole.params, rtol=1e-6)
        assert (other.status, other.skipped) == (Status.MAX_STEPS, 3)
    assert lanes.skipped.tolist() == [3, 0]
    assert "row 40 of data" in stream.message
    assert jax.jit(lambda: fit().skipped)() == 3


def flaky(p, key):
    """Not finite in every other draw; the minimum is at 1."""
    return jnp.where(jax.random.bernoulli(key), jnp.sqrt(jnp.float32(-1)), 1) * (
        (p - 1) ** 2 + 0.5
    )


RULES = {
    "params": jaxgd.params_change(atol=1e-3),
    "value": jaxgd.value_change(rtol=1e-4),
    "gradient": jaxgd.gradient_norm(atol=1e-2, rtol=0.0),
    "relative": jaxgd.gradient_norm(rtol=1e-2),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("stop", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", [0, 1])  # of which one starts with what is no number
def test_a_step_that_was_left_out_is_no_small_step(stop, seed):
    rule = optax.apply_if_finite(optax.sgd(0.1), 100)
    result = jaxgd.minimize(
        flaky, 0.0, optimizer=rule, with_key=True, key=seed, stop=stop
    )
    assert result.converged
    assert result.skipped > 5
    assert result.params == pytest.approx(1, abs=0.02)


@pytest.mark.full
def test_nothing_but_bad_batches_is_no_success():
    for stop in RULES.values():
        for size in (None, 4):
            nan = np.full(8, np.nan, np.float32)
            rule = optax.chain(optax.zero_nans(), optax.sgd(0.1))
            result = jaxgd.minimize(
                distance, 0.0, nan, optimizer=rule, stop=stop, batch_size=size
            )
            assert not result.converged
            assert result.params == 0
            assert result.skipped == result.steps > 0
            assert ": holds" not in result.report()


# A NaN is called by its name.


def softplus(p, d):
    return jnp.mean(jnp.where(d * p > 40, d * p, jnp.log1p(jnp.exp(d * p))))


def fenced(p):
    return jnp.where(p > 0.5, jnp.nan, (p - 1) ** 2 / 2)


def bowl(p):
    return jnp.sum(p**2)


def line(p, d):
    return jnp.mean((d[0] @ p - d[1]) ** 2)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype("f")
Y = X @ np.ones(3, "f")
HOLE = X.copy()
HOLE[7, 2] = np.nan
ROWS = np.array([1, 2, 100, 3], np.float32)


def nan_at_5(t):
    return jnp.where(t == 5, jnp.nan, 0.1)


def cone(p):
    return jnp.sqrt(jnp.sum(p**2)) + p[0]


def at_zero(p):
    return jnp.sqrt(jnp.sum(p["w"] ** 2)) + p["b"] ** 2


ZERO3 = np.zeros(3, "f")
TREE = {"w": np.zeros(2, "f"), "b": np.float32(1)}
GRADIENT_OF_ROW = (
    "At the start the value is finite, the gradient of params is NaN (row 2 of the "
    "data)."
)
ROW_7 = "Row 7 of data[0] is not finite (NaN)."
CAUSES = {
    "norm at 0": (
        lambda: jaxgd.minimize(cone, np.zeros(2, "f")),
        Status.NON_FINITE,
        "At the start the value is finite, the gradient of params is NaN.",
    ),
    "a leaf": (
        lambda: jaxgd.minimize(at_zero, TREE, learning_rate=0.1),
        Status.NON_FINITE,
        "At the start the value is finite, the gradient of params['w'] is NaN.",
    ),
    "where, all rows": (
        lambda: jaxgd.minimize(softplus, 1.0, ROWS, learning_rate=1e-9),
        Status.NON_FINITE,
        GRADIENT_OF_ROW,
    ),
    "where, one row": (
        lambda: jaxgd.minimize(softplus, 1.0, ROWS, batch_size=1, learning_rate=1e-9),
        Status.NON_FINITE,
        GRADIENT_OF_ROW,
    ),
    "where, on the way": (
        lambda: jaxgd.minimize(
            softplus,
            1.0,
            ROWS,
            batch_size=1,
            learning_rate=1e-9,
            final_evaluation=False,
        ),
        Status.DIVERGED,
        "the value is finite, the gradient of params is NaN (row 2 of the data).",
    ),
    "a cell, all rows": (
        lambda: jaxgd.minimize(line, ZERO3, (HOLE, Y)),
        Status.NON_FINITE,
        f"The start itself is not finite. {ROW_7}",
    ),
    "a cell, mini-batches": (
        lambda: jaxgd.minimize(
            line, ZERO3, (HOLE, Y), batch_size=8, learning_rate=0.01
        ),
        Status.DIVERGED,
        ROW_7,
    ),
    "a cell, no rate": (
        lambda: jaxgd.minimize(line, ZERO3, (HOLE, Y), batch_size=8),
        Status.DIVERGED,
        ROW_7,
    ),
    "a cell, a stream": (
        lambda: jaxgd.minimize(
            line, ZERO3, jaxgd.Stream((HOLE, Y)), batch_size=8, learning_rate=0.01
        ),
        Status.DIVERGED,
        ROW_7,
    ),
    "a cell, a scan": (
        lambda: jaxgd.minimize(
            line, ZERO3, (HOLE, Y), batch_size=8, learning_rate=0.01, stop=None
        ),
        Status.DIVERGED,
        f"a static scan returns what it reached. {ROW_7}",
    ),
    "a cell, a sweep": (
        lambda: jaxgd.sweep(
            line, ZERO3, (HOLE, Y), over={"learning_rate": [0.01]}, batch_size=8
        )[0],
        Status.DIVERGED,
        ROW_7,
    ),
    "an objective": (
        lambda: jaxgd.minimize(fenced, 0.0, learning_rate=0.01),
        Status.DIVERGED,
        "The objective is not finite (NaN) at step 69, where params = 0.50016.",
    ),
    "an objective, Adam": (
        lambda: jaxgd.minimize(fenced, 0.0, optimizer=optax.adam(0.01)),
        Status.DIVERGED,
        "The objective is not finite (NaN) at step ",
    ),
    "an objective, a lane": (
        lambda: jaxgd.sweep(fenced, 0.0, over={"learning_rate": [0.6, 0.1]})[1],
        Status.DIVERGED,
        "The objective is not finite (NaN) at step 7, where params = 0.5217.",
    ),
    "a pole": (
        lambda: jaxgd.minimize(lambda p: jnp.sum(1 / p), np.zeros(2, "f")),
        Status.NON_FINITE,
        "The objective is not finite (infinite) at the start, where params = [0. 0.].",
    ),
    "a schedule": (
        lambda: jaxgd.minimize(bowl, np.ones(2, "f"), learning_rate=nan_at_5),
        Status.DIVERGED,
        "The learning rate of step 5 is NaN.",
    ),
    "a schedule, a scan": (
        lambda: jaxgd.minimize(
            bowl, np.ones(2, "f"), learning_rate=nan_at_5, stop=None, max_steps=9
        ),
        Status.DIVERGED,
        "The learning rate of step 5 is NaN.",
    ),
    "a start": (
        lambda: jaxgd.minimize(
            lambda p: bowl(p["w"]),
            {"w": np.array([[1, 2], [3, np.inf]], "f")},
            learning_rate=0.1,
        ),
        Status.NON_FINITE,
        "The start itself is not finite. params['w'][1, 1] is infinite.",
    ),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", CAUSES)
def test_what_was_not_finite_is_named(name):
    make, status, words = CAUSES[name]
    result = make()
    assert result.status == status
    assert words in result.message
    assert result.to_dict()["message"] == result.message
    assert result.report().splitlines()[0].endswith(result.message)
    found = result.diagnosis  # and the rate is not blamed
    assert found.verdict == "unknown"
    assert "No rate mends that" in found.advice
    assert ": holds" not in result.report()
    assert result.cause.sentence in found.advice


def test_the_value_at_which_only_the_gradient_is_bad():
    result = jaxgd.minimize(cone, np.zeros(2, "f"))
    assert result.value == 0
    assert np.isnan(result.grad_norm)


def test_inside_jit_there_is_no_look():
    result = jax.jit(lambda d: jaxgd.minimize(line, ZERO3, d, learning_rate=0.1))(
        (HOLE, Y)
    )
    assert result.cause is None
    assert result.message == "The start itself is not finite."
    found = jax.jit(lambda p: jaxgd.minimize(cone, p))(np.zeros(2, "f"))
    assert found.message == "At the start the value is finite, its gradient is not."
    # The cause is no part of the pytree: one result's never sticks to another.
    one = jaxgd.minimize(line, ZERO3, (HOLE, Y), learning_rate=0.1)
    assert jax.tree.structure(one) == jax.tree.structure(result)
    assert jax.tree.map(lambda x: x, one).cause is None


def test_a_second_look_compiles_nothing(count_compilations):
    jaxgd.minimize(fenced, 0.0, learning_rate=0.01)
    with count_compilations() as count:
        result = jaxgd.minimize(fenced, 0.1, learning_rate=0.02)
        assert count() == 0
    assert "where params" in result.message


def test_rows_that_an_objective_leaves_out_are_not_blamed():
    def fun(p, d):
        x = jnp.where(jnp.isnan(d), 1.0, d)
        return jnp.where(p > 0.5, jnp.nan, jnp.mean((p - x) ** 2))

    result = jaxgd.minimize(fun, 0.0, BAD, learning_rate=0.01)
    assert result.message.endswith("where params = 0.50693.")
    assert "row" not in result.message


# A gradient of zero.


@pytest.mark.full
@pytest.mark.parametrize(
    "fun",
    [
        lambda p: jnp.argmax(p) * 1.0 + jnp.sum(jnp.round(p)),
        lambda p: jnp.sum(jax.lax.stop_gradient(p) ** 2),
    ],
)
def test_a_gradient_of_zero_everywhere_is_told(fun):
    words = "The gradient is exactly zero in every entry at the start: a stationary"
    for setting in ({}, {"learning_rate": 0.1}, {"optimizer": optax.adam(0.1)}):
        result = jaxgd.minimize(fun, np.ones(3, "f"), **setting)
        assert (result.status, result.steps) == (Status.GRADIENT_SMALL, 0)
        assert result.message.startswith(f"The gradient is small. {words}")
        assert "exactly zero" in result.diagnosis.advice
    scan = jaxgd.minimize(
        fun, np.ones(3, "f"), learning_rate=0.1, stop=None, max_steps=3
    )
    assert "zero in every entry at every step" in scan.report()


@pytest.mark.parametrize("rows", [0, 1000])
def test_an_exact_minimum_that_was_reached_is_not_called_that(rows):
    call = {"learning_rate": 0.5, "history_rows": rows}
    result = jaxgd.minimize(bowl, np.ones(2, "f"), **call)
    assert (result.grad_norm, result.steps) == (0, 1)
    assert result.message == Status.GRADIENT_SMALL.message


# The rate is blamed where it is to blame, and never to be raised.

TOO_LARGE = {
    "grows": (lambda p, d: line(p, d), ZERO3, (X, Y), {"learning_rate": 5.0}),
    "grows, mini-batches": (
        line,
        ZERO3,
        (X, Y),
        {"learning_rate": 5.0, "batch_size": 8, "epochs": 50},
    ),
    "a scan": (
        lambda p: jnp.sum(p**4),
        np.full(2, 3, "f"),
        None,
        {"learning_rate": 1.0, "max_steps": 10, "stop": None},
    ),
    "first step": (
        lambda p: jnp.sum(p**4),
        np.full(2, 3, "f"),
        None,
        {"learning_rate": 1e12},
    ),
    "exponential": (
        lambda p: jnp.exp(p) - 3 * p,
        np.float32(0),
        None,
        {"learning_rate": 60.0},
    ),
    "Adam": (
        lambda p: jnp.sum(p**4),
        np.full(2, 3, "f"),
        None,
        {"optimizer": optax.adam, "learning_rate": 1e12},
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_rate_that_is_to_blame_is_blamed(name):
    fun, start, data, setting = TOO_LARGE[name]
    result = jaxgd.minimize(fun, start, data, **setting)
    assert result.status == Status.DIVERGED
    found = result.diagnosis
    assert found.verdict == "too large"
    if "try " in found.advice and "try a tenth" not in found.advice:
        tried = float(found.advice.split("try ")[1].rstrip("."))
        assert tried < setting["learning_rate"]
    exact = setting.get("stop", "auto") is None
    last = "a static scan returns what it reached" if exact else "the last finite one"
    assert last in result.message
    if not exact:
        assert np.isfinite(result.params).all()


def test_without_a_look_the_rate_is_not_blamed_either():
    @jax.jit
    def run():
        return jaxgd.minimize(fenced, 0.0, learning_rate=0.01)

    found = run().diagnosis
    assert found.verdict == "unknown"
    assert "do not show that the rate was too large" in found.advice


# Norms to the ends of the range.


@pytest.mark.parametrize("scale", [1e30, 1e-29])
@pytest.mark.parametrize("how", [{"batch_size": 8}, {}, {"stop": None}])
def test_a_scaled_objective_descends_the_same_way(scale, how):
    def scaled(p, d):
        return scale * line(p, d)

    call = {"max_steps": 40, **how}
    if not how:
        call["stop"] = jaxgd.gradient_norm(rtol=1e-3)
    plain = jaxgd.minimize(line, ZERO3, (X, Y), learning_rate=0.1, **call)
    data = jaxgd.Stream((X, Y)) if "batch_size" in how else (X, Y)
    result = jaxgd.minimize(scaled, ZERO3, data, learning_rate=0.1 / scale, **call)
    assert result.status == plain.status
    np.testing.assert_allclose(result.params, plain.params, rtol=1e-3)
    norms = np.asarray(result.history.grad_norm, np.float64) / scale
    np.testing.assert_allclose(norms, plain.history.grad_norm, rtol=2e-2)
    assert isinstance(str(result) + result.diagnosis.advice, str)


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_norms_are_finite_where_the_entries_are(device, monkeypatch):
    if device == "other":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x)
        )
    most, least = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    cases = (
        ([3, 4], 5),
        ([3e30, 4e30], 5e30),
        ([3e-30, 4e-30], 5e-30),
        ([most] * 5, most),
        ([least, 0], least),
        ([0, 0], 0),
        ([np.inf, 1e30], np.inf),
        ([np.inf, -np.inf], np.inf),
        ([np.nan, np.inf, 1], np.nan),
    )
    for how in (_tree.norm, _tree.safe_norm, _tree.step_norm):
        for entries, expected in cases:
            found = jax.jit(lambda x, how=how: how(x, np.float32))(
                np.asarray(entries, np.float32)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            one = jax.jit(lambda x, how=how: how(x, np.float32))(np.float32(entries[0]))
            np.testing.assert_allclose(one, abs(np.float32(entries[0])), rtol=1e-6)
        many = jax.vmap(lambda x, how=how: how(x, np.float32))(
            np.array([[3, 4], [3e30, 4e30], [np.nan, 1]], np.float32)
        )
        np.testing.assert_allclose(many, [5, 5e30, np.nan], rtol=1e-6)
