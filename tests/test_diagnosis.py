"""The diagnosis of a learning rate, against curvatures that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxgd
from jaxgd import Status, problems

pytestmark = pytest.mark.thin(4)


def largest_eigenvalue(problem, params):
    flat, back = ravel_pytree(params)
    rest = () if problem.data is None else (problem.data,)
    hessian = jax.hessian(lambda v: problem.fun(back(v), *rest))(flat)
    return float(np.linalg.eigvalsh(np.asarray(hessian, np.float64))[-1])


def call(problem, **kwargs):
    return jaxgd.minimize(problem.fun, problem.init, problem.data, **kwargs)


QUADRATIC = problems.quadratic(10, 100.0)  # largest curvature 1
RIDGE = problems.ridge()
LOGISTIC = problems.logistic(penalty=0.1)

# Shares of the stable limit, and what a colleague would say of them. Where the
# curvature changes along the way (logistic), two names may fit a rate near the limit.
VERDICTS = (
    (1e-6, {"too small"}),
    (1e-4, {"too small"}),
    (1e-2, {"too small"}),
    (0.04, {"too small"}),
    (0.3, {"good"}),
    (0.5, {"good"}),
    (0.99, {"edge of stability"}),
    (1.05, {"too large"}),
    (1.2, {"too large", "edge of stability"}),
    (2.0, {"too large"}),
    (5.0, {"too large"}),
)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "problem", [QUADRATIC, RIDGE, LOGISTIC], ids=["quadratic", "ridge", "logistic"]
)
def test_the_verdict_from_a_millionth_to_five_times_the_limit(problem):
    solution = call(problem, optimizer=optax.lbfgs()).params
    limit = 2 / largest_eigenvalue(problem, solution)
    for share, expected in VERDICTS:
        result = call(problem, learning_rate=share * limit, max_steps=500)
        found = result.diagnosis
        assert found.verdict in expected, (share, str(found))
        if problem is not LOGISTIC and share == 1.2:
            assert found.verdict == "too large"
        # Never more than the largest curvature there is, and most of it.
        steepest = largest_eigenvalue(problem, problem.init)
        if problem is not LOGISTIC:
            assert 0.4 * steepest < found.curvature < 1.1 * steepest, share
            if share >= 0.99:
                assert found.curvature == pytest.approx(steepest, rel=0.03)
        if found.curvature > 0:
            stable = found.stable_learning_rate
            assert stable == pytest.approx(2 / found.curvature)
        assert any(letter.isdigit() for letter in found.advice)
        assert found.advice.endswith(".")


def test_the_factor_by_which_a_rate_is_too_small():
    result = call(QUADRATIC, learning_rate=2e-3, max_steps=50)
    assert "0.000692 times the stable limit 2.9" in result.diagnosis.advice
    assert "1.4 would be up to 720 times faster" in result.diagnosis.advice


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.1, 0.9])
def test_the_curvature_is_the_largest_rayleigh_quotient(dtype, share):
    with jax.enable_x64(dtype == np.float64):
        problem = problems.quadratic(10, 100.0, dtype=dtype)
        matrix, center = (np.asarray(x, np.float64) for x in problem.fun.args)
        x, rate, seen = np.zeros(10), share * 2, []
        for _ in range(40):
            g = matrix @ (x - center)
            seen.append(g @ matrix @ g / (g @ g))
            x = x - rate * g
        result = call(problem, learning_rate=rate, max_steps=40, stop=None)
        # A single precision gradient norm knows the curvature of a tiny step to 10 %.
        rel = 0.15 if dtype == np.float32 and share < 1e-4 else 0.01
        assert result.diagnosis.curvature == pytest.approx(max(seen), rel=rel)


def test_it_costs_no_evaluation():
    calls = []

    def counted(theta):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(theta**2)

    result = jaxgd.minimize(counted, jnp.ones(2), learning_rate=0.1, max_steps=20)
    jax.effects_barrier()
    assert result.evaluations == 21
    evaluated = len(calls)
    assert result.diagnosis.curvature == pytest.approx(2.0, rel=1e-3)
    jax.effects_barrier()
    assert len(calls) == evaluated


def test_a_cut_changes_nothing():
    whole = call(LOGISTIC, learning_rate=1.0, max_steps=30)
    first = call(LOGISTIC, learning_rate=1.0, max_steps=7)
    rest = call(LOGISTIC, learning_rate=1.0, max_steps=23, state=first.state)
    np.testing.assert_array_equal(whole.state.run.met, rest.state.run.met)
    assert whole.diagnosis == rest.diagnosis


@pytest.mark.parametrize("how", [{"stop": None}, {"history_rows": 0}, {}])
def test_it_needs_no_history_and_no_stop_rule(how):
    found = call(QUADRATIC, learning_rate=1.0, max_steps=50, **how).diagnosis
    assert found.verdict == "good"
    assert found.stable_learning_rate == pytest.approx(2.89, rel=0.01)


@pytest.mark.full
def test_lanes_have_their_own():
    rates = jnp.array([1e-3, 1.0, 3.0])
    results = jax.vmap(lambda rate: call(QUADRATIC, learning_rate=rate, max_steps=100))(
        rates
    )
    with pytest.raises(TypeError, match="single run"):
        _ = results.diagnosis
    verdicts = [results[i].diagnosis.verdict for i in range(3)]
    assert verdicts == ["too small", "good", "too large"]


# At the limit of steps: a larger rate, or more steps?


def test_more_steps_are_counted_in_advance():
    few = call(RIDGE, learning_rate=0.2, max_steps=20)
    assert few.status == Status.MAX_STEPS
    text = few.diagnosis.advice
    more = int(text.split("about ")[1].split(" more")[0])
    whole = call(RIDGE, learning_rate=0.2)
    assert whole.status == Status.GRADIENT_SMALL
    assert 20 + more == pytest.approx(int(whole.steps), rel=0.25)


def test_a_larger_rate_is_missing():
    result = call(RIDGE, learning_rate=1e-4, max_steps=20)
    assert result.status == Status.MAX_STEPS
    assert "times faster" in result.diagnosis.advice
    assert "Steps are missing" not in result.diagnosis.advice


# Divergence.


@pytest.mark.parametrize("batch_size", [None, 1, 32])
def test_a_diverged_run_says_which_rate_is_stable(batch_size):
    result = call(RIDGE, learning_rate=50.0, batch_size=batch_size, max_steps=500)
    assert result.status == Status.DIVERGED
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))
    true = RIDGE.fun(result.params, RIDGE.data)
    np.testing.assert_allclose(result.value, true, rtol=1e-5)
    found = result.diagnosis
    assert found.verdict == "too large"
    rate = float(found.advice.rstrip(".").split("try ")[1])
    again = call(RIDGE, learning_rate=rate, batch_size=batch_size, max_steps=500)
    assert again.status != Status.DIVERGED
    assert again.value < 2 * RIDGE.value + 0.1
    steps = int(result.steps)
    assert f"after {steps} steps" in str(result)


def test_a_run_that_blows_up_in_its_first_step_says_so():
    result = jaxgd.minimize(
        lambda x: jnp.sum(x**4), jnp.full(3, 10.0), learning_rate=1e12, max_steps=5
    )
    assert result.status == Status.DIVERGED
    assert result.diagnosis.verdict == "too large"
    assert "rate" in result.diagnosis.advice


# Rules and regimes for which the curvature means less, or nothing.


@pytest.mark.full
def test_the_curvature_of_other_rules_is_no_limit_of_their_rate():
    for optimizer, rate in ((optax.adam, 1e-4), (optax.rmsprop, 1e-4)):
        found = call(RIDGE, optimizer=optimizer, learning_rate=rate).diagnosis
        assert found.verdict == "too small"
        assert np.isnan(found.stable_learning_rate)
        assert not found.curvature > 1.5  # NaN where rounding hides it
        assert "times larger" in found.advice
    momentum = {"momentum": 0.9}
    good = call(RIDGE, optimizer=optax.sgd, learning_rate=0.1, hyperparams=momentum)
    assert good.converged
    assert good.diagnosis.verdict == "good"


def test_the_curvature_along_a_step_of_another_rule():
    matrix, center = (np.asarray(x, np.float64) for x in QUADRATIC.fun.args)
    rule = optax.sgd(0.3, momentum=0.5)
    x, state, seen = jnp.zeros(10), rule.init(jnp.zeros(10)), []
    for _ in range(15):
        g = jnp.asarray(matrix @ (np.asarray(x, np.float64) - center), jnp.float32)
        updates, state = rule.update(g, state, x)
        u = np.asarray(updates, np.float64)
        seen.append(u @ matrix @ u / (u @ u))
        x = optax.apply_updates(x, updates)
    result = call(QUADRATIC, optimizer=rule, max_steps=15)
    assert result.diagnosis.curvature == pytest.approx(max(seen), rel=0.01)


def test_line_searches_choose_their_own():
    found = call(LOGISTIC, optimizer=optax.lbfgs()).diagnosis
    assert found.verdict == "unknown"
    assert "chooses its own rates" in found.advice
    assert np.isnan(found.curvature)


@pytest.mark.parametrize(
    ("rate", "verdict"), [(1e-7, "too small"), (0.2, "unknown"), (1e4, "too large")]
)
def test_mini_batches_hide_all_but_the_obvious(rate, verdict):
    problem = problems.multinomial(penalty=1e-3)
    result = call(problem, learning_rate=rate, batch_size=16, epochs=20)
    found = result.diagnosis
    assert found.verdict == verdict, str(found)
    assert np.isnan(found.curvature)
    if verdict == "unknown":
        assert "find_learning_rate" in found.advice
        assert "diagnosis" not in result.report()


def test_nothing_is_claimed_of_no_step():
    found = call(RIDGE, learning_rate=1.0, max_steps=0).diagnosis
    assert (found.verdict, np.isnan(found.curvature)) == ("unknown", True)
    bad = jaxgd.minimize(lambda x: jnp.sum(x) / 0, jnp.ones(2), learning_rate=1.0)
    assert bad.diagnosis.verdict == "unknown"


def test_it_is_for_the_host():
    def inside(x):
        return jaxgd.minimize(jnp.sum, x, learning_rate=1.0, max_steps=1).diagnosis

    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(inside)(jnp.ones(2))


def test_it_is_part_of_the_dict():
    result = call(RIDGE, learning_rate=0.5)
    found = result.to_dict()["diagnosis"]
    assert found == {
        "curvature": result.diagnosis.curvature,
        "stable_learning_rate": result.diagnosis.stable_learning_rate,
        "verdict": "good",
        "advice": result.diagnosis.advice,
    }


@pytest.mark.parametrize("fun", [lambda x: -jnp.sum(x**2), lambda x: -jnp.sum(x)])
def test_where_nothing_curves_up_no_rate_is_called_too_small(fun):
    result = jaxgd.minimize(fun, jnp.ones(1), learning_rate=0.01, max_steps=20)
    found = result.diagnosis
    assert found.verdict == "unknown"
    assert "never curved up" in found.advice


def test_an_objective_without_a_bound_is_called_that():
    result = jaxgd.minimize(lambda x: -jnp.sum(x**2), jnp.ones(2))
    assert "unbounded below" in result.diagnosis.advice
    assert "unbounded below" in str(result)
