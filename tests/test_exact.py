"""The descent against something independent: a NumPy loop, optax loops, optima."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from sklearn import datasets, linear_model

import jaxgd
from jaxgd import problems

pytestmark = pytest.mark.thin(4)

X = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
Y = np.array([2.0, 5.0, 9.0])


def least_squares(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


def numpy_loop(rate, steps):
    theta, path = np.zeros(2), []
    for _ in range(steps):
        path.append(np.mean((X @ theta - Y) ** 2) / 2)
        theta = theta - rate * X.T @ (X @ theta - Y) / len(Y)
    return theta, np.array(path)


@pytest.mark.parametrize("stop", ["auto", None])
def test_the_seed_example_in_float32(stop):
    theta, path = numpy_loop(0.01, 1000)
    result = jaxgd.minimize(
        least_squares,
        jnp.zeros(2),
        (X, Y),
        learning_rate=0.01,
        max_steps=1000,
        stop=stop,
    )
    np.testing.assert_allclose(result.params, theta, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.history.value, path, rtol=1e-5)
    assert result.steps == 1000


@pytest.mark.parametrize("stop", ["auto", None])
def test_the_seed_example_in_float64(x64, stop):
    theta, path = numpy_loop(0.01, 1000)
    result = jaxgd.minimize(
        least_squares,
        np.zeros(2),
        (X, Y),
        learning_rate=0.01,
        max_steps=1000,
        stop=stop,
    )
    assert result.params.dtype == jnp.float64
    np.testing.assert_allclose(result.params, theta, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.history.value, path, rtol=1e-10)
    np.testing.assert_array_equal(result.history.step, np.arange(1000))


N, D = 40, 3
RNG = np.random.default_rng(0)
DATA = (RNG.normal(size=(N, D)).astype("f"), RNG.normal(size=N).astype("f"))


def hand_loop(rule, batch_size, steps, key=3):
    """A hand-written optax loop fed the rows of ``batch_rows``."""

    @jax.jit
    def update(params, state, rows):
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], DATA)
        value_fn = lambda p: least_squares(p, batch)
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optax.with_extra_args_support(rule).update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    params = jnp.ones(D)
    state, values = rule.init(params), []
    for step in range(steps):
        rows = jnp.arange(N)
        if batch_size is not None:
            rows = jaxgd.batch_rows(key, N, batch_size, step)
        params, state, value = update(params, state, rows)
        values.append(value)
    return params, np.array(values)


SCHEDULE = optax.cosine_decay_schedule(0.1, 50)
RULES = {
    "sgd": (optax.sgd(0.05), {"learning_rate": 0.05}),
    "momentum": (
        optax.sgd(0.05, momentum=0.9),
        {
            "optimizer": optax.sgd,
            "learning_rate": 0.05,
            "hyperparams": {"momentum": 0.9},
        },
    ),
    "nesterov": (
        optax.sgd(0.05, momentum=0.9, nesterov=True),
        {
            "optimizer": optax.sgd,
            "learning_rate": 0.05,
            "hyperparams": {"momentum": 0.9, "nesterov": True},
        },
    ),
    "adam": (optax.adam(0.05), {"optimizer": optax.adam, "learning_rate": 0.05}),
    "adam object": (optax.adam(0.05), {"optimizer": optax.adam(0.05)}),
    "adamw": (
        optax.adamw(0.05, weight_decay=0.1),
        {
            "optimizer": optax.adamw,
            "learning_rate": 0.05,
            "hyperparams": {"weight_decay": 0.1},
        },
    ),
    "rmsprop": (
        optax.rmsprop(0.02),
        {"optimizer": optax.rmsprop, "learning_rate": 0.02},
    ),
    "schedule": (optax.sgd(SCHEDULE), {"learning_rate": SCHEDULE}),
    "adam schedule": (
        optax.adam(SCHEDULE),
        {"optimizer": optax.adam, "learning_rate": SCHEDULE},
    ),
    "clipping chain": (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05)),
        {"optimizer": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))},
    ),
    "polyak": (optax.polyak_sgd(0.5), {"optimizer": optax.polyak_sgd(0.5)}),
    "lbfgs": (optax.lbfgs(), {"optimizer": optax.lbfgs()}),
    "lbfgs factory": (optax.lbfgs(), {"optimizer": optax.lbfgs}),
    "prodigy factory": (contrib.prodigy(), {"optimizer": contrib.prodigy}),
}


# All sizes of batches for one rule, each other rule with one of them by turns.
SIZES = [None, 1, 7]
PAIRS = [("sgd", size) for size in SIZES]
PAIRS += [(name, SIZES[i % 3]) for i, name in enumerate(RULES) if name != "sgd"]


@pytest.mark.thin(5)
@pytest.mark.parametrize(("name", "batch_size"), PAIRS)
def test_rules_equal_a_hand_written_loop(name, batch_size):
    rule, arguments = RULES[name]
    # A line search near the optimum amplifies rounding: few steps for those.
    steps = 8 if "lbfgs" in name or name == "polyak" else 50
    params, values = hand_loop(rule, batch_size, steps)
    for stop in (jaxgd.target_value(-1.0), None)[: 2 if batch_size == 7 else 1]:
        result = jaxgd.minimize(
            least_squares,
            jnp.ones(D),
            DATA,
            batch_size=batch_size,
            max_steps=steps,
            key=3,
            stop=stop,
            **arguments,
        )
        assert result.steps == steps
        np.testing.assert_allclose(result.params, params, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(result.history.value, values, rtol=2e-4, atol=2e-5)


@pytest.mark.full
def test_learning_rates_in_the_history():
    steps = np.arange(50)
    for name, expected in (
        ("sgd", np.full(50, 0.05)),
        ("adam schedule", np.asarray(SCHEDULE(steps))),
        ("clipping chain", np.full(50, np.nan)),
        ("prodigy factory", np.ones(50)),
    ):
        result = jaxgd.minimize(
            least_squares,
            jnp.ones(D),
            DATA,
            max_steps=50,
            stop=jaxgd.target_value(-1.0),
            **RULES[name][1],
        )
        np.testing.assert_allclose(
            result.history.learning_rate, expected, rtol=1e-5, atol=1e-7
        )
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE)
    result = jaxgd.minimize(
        least_squares, jnp.ones(D), DATA, optimizer=injected, max_steps=50, stop=None
    )
    np.testing.assert_allclose(
        result.history.learning_rate, SCHEDULE(steps), rtol=1e-5, atol=1e-7
    )


def test_line_search_rates_and_trial_points():
    rule = optax.chain(
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),
    )
    params, evaluations, rates = jnp.ones(D), 0, []
    state = rule.init(params)
    fun = lambda p: least_squares(p, DATA)
    for _ in range(6):
        value, grad = jax.value_and_grad(fun)(params)
        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=fun
        )
        params = optax.apply_updates(params, updates)
        evaluations += 1 + int(optax.tree.get(state, "num_linesearch_steps"))
        rates.append(float(optax.tree.get(state, "learning_rate")))
    result = jaxgd.minimize(
        least_squares,
        jnp.ones(D),
        DATA,
        optimizer=rule,
        max_steps=6,
        stop=jaxgd.target_value(-1.0),
    )
    assert result.evaluations == evaluations + 1
    np.testing.assert_allclose(result.history.learning_rate, rates, rtol=1e-6)


def test_history_rows_describe_the_updates():
    result = jaxgd.minimize(
        least_squares, jnp.ones(D), DATA, learning_rate=0.05, max_steps=20, batch_size=7
    )
    again = jaxgd.minimize(
        least_squares,
        jnp.ones(D),
        DATA,
        optimizer=optax.sgd(0.05),
        max_steps=20,
        batch_size=7,
    )
    params = jnp.ones(D)
    for step in range(20):
        rows = jaxgd.batch_rows(0, N, 7, step)
        batch = jax.tree.map(lambda x: x[rows], DATA)
        value, grad = jax.value_and_grad(least_squares)(params, batch)
        for history in (result.history, again.history):
            assert history.step[step] == step
            np.testing.assert_allclose(history.value[step], value, rtol=1e-5)
            np.testing.assert_allclose(
                history.grad_norm[step], np.linalg.norm(grad), rtol=1e-5
            )
            np.testing.assert_allclose(
                history.update_norm[step], 0.05 * np.linalg.norm(grad), rtol=1e-5
            )
        params = params - 0.05 * grad
    np.testing.assert_allclose(result.params, params, rtol=1e-5)


def test_ridge_on_diabetes_equals_the_closed_form(x64):
    x, y = datasets.load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    problem = problems.ridge(x, y, 0.1, dtype=np.float64)
    for arguments in (
        {"learning_rate": 0.2, "max_steps": 20_000},
        {"optimizer": optax.lbfgs()},
    ):
        result = jaxgd.minimize(
            problem.fun,
            problem.init,
            problem.data,
            stop=jaxgd.gradient_norm(atol=1e-9),
            **arguments,
        )
        assert result.status == jaxgd.Status.GRADIENT_SMALL
        for name in ("weights", "intercept"):
            np.testing.assert_allclose(
                result.params[name], problem.solution[name], rtol=1e-6, atol=1e-6
            )


def test_logistic_on_breast_cancer_equals_scikit_learn(x64):
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    penalty = 0.01
    problem = problems.logistic(x, y, penalty, dtype=np.float64)
    result = jaxgd.minimize(
        problem.fun, problem.init, problem.data, learning_rate=0.5, max_steps=20_000
    )
    assert result.converged
    model = linear_model.LogisticRegression(
        C=1 / (penalty * len(y)), tol=1e-10, max_iter=10_000
    ).fit(x, y)
    np.testing.assert_allclose(result.params["weights"], model.coef_[0], atol=1e-5)
    np.testing.assert_allclose(
        result.params["intercept"], model.intercept_[0], atol=1e-5
    )


@pytest.mark.full
def test_multinomial_on_digits_equals_scikit_learn(x64):
    x, y = datasets.load_digits(return_X_y=True)
    x = x / 16.0
    penalty = 0.01
    problem = problems.multinomial(x, y, 10, penalty, dtype=np.float64)
    result = jaxgd.minimize(
        problem.fun, problem.init, problem.data, optimizer=optax.lbfgs(), max_steps=500
    )
    assert result.converged
    model = linear_model.LogisticRegression(
        C=1 / (penalty * len(y)), tol=1e-10, max_iter=10_000
    ).fit(x, y)
    np.testing.assert_allclose(result.params["weights"], model.coef_.T, atol=1e-5)
    intercept = result.params["intercept"]
    np.testing.assert_allclose(
        intercept - intercept.mean(),
        model.intercept_ - model.intercept_.mean(),
        atol=1e-5,
    )
