"""How runs end: converged, at rest, at the precision of their dtype, or stalled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from benchmarks.classical_problems import classical
from jaxgd import Status

pytestmark = pytest.mark.thin(4)

# Where a small gradient is no convergence.


def steep_and_flat(p):
    return 0.5 * (1e4 * p[0] ** 2 + 1e-2 * (p[1] - 1) ** 2)


@pytest.mark.parametrize("optimizer", [None, optax.lbfgs()], ids=["none", "lbfgs"])
def test_a_steep_direction_does_not_stand_for_all(optimizer):
    result = jaxgd.minimize(steep_and_flat, jnp.array([1.0, 0.0]), optimizer=optimizer)
    assert result.converged
    np.testing.assert_allclose(result.params, [0, 1], atol=1e-3)


def test_a_rate_that_fits_the_steep_direction_alone_ends_at_its_limit():
    result = jaxgd.minimize(
        steep_and_flat, jnp.array([1.0, 0.0]), learning_rate=1e-4, max_steps=200
    )
    assert result.status == Status.MAX_STEPS
    (criterion,) = result.criteria
    # The flat direction is what is left: 0.5 * 1e-2 * 1.
    np.testing.assert_allclose(criterion.measured, 5e-3, rtol=0.1)


X = np.linspace(0, 1e5, 101)


def line(p, data):
    x, y = data
    return jnp.mean((p[0] * x + p[1] - y) ** 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", [None, optax.lbfgs()], ids=["none", "lbfgs"])
def test_a_line_on_a_raw_column(dtype, optimizer):
    with jax.enable_x64(dtype == "float64"):
        data = X.astype(dtype), (X + 1e5).astype(dtype)
        result = jaxgd.minimize(line, np.zeros(2, dtype), data, optimizer=optimizer)
        assert result.converged
        np.testing.assert_allclose(result.params, [1, 1e5], rtol=1e-4)
        assert result.value < 1e-6 * np.var(data[1])


@pytest.mark.parametrize("rate", [None, 0.02])
def test_no_factor_of_the_objective_changes_the_verdict(rate):
    ends = []

    def fun(p, factor):
        return factor * (jnp.sum(jnp.array([1.0, 25.0]) * (p - 1) ** 2) + 1)

    for exponent in (-60, 0, 60):  # exact in binary
        factor = np.float32(2.0**exponent)
        own = None if rate is None else np.float32(rate) / factor
        result = jaxgd.minimize(
            fun, jnp.zeros(2), args=(factor,), learning_rate=own, max_steps=2000
        )
        assert result.status == Status.GRADIENT_SMALL
        ends.append((int(result.steps), *result.params.tolist()))
    assert ends[0] == ends[1] == ends[2]


# Of the table in docs/judging.md: some that were false by a small gradient.

ELSEWHERE = pytest.mark.xfail(
    reason="descent ends at 14691, a second minimum; in other units near 15300, on a"
    " plateau towards infinity: stationary to rounding, but 1e-4 of the fall is left"
)
HARD = ("misra1a", "kirby2", "brown_dennis", pytest.param("thurber", marks=ELSEWHERE))


@pytest.mark.full
@pytest.mark.parametrize("name", HARD)
def test_what_says_it_has_converged_has(name):
    with jax.enable_x64(True):
        (problem,) = [p for p in classical(dtype=np.float64) if p.name == name]
        unit = np.geomspace(1e-3, 1e3, problem.init.size)
        for own in (np.ones_like(unit), unit):
            result = jaxgd.minimize(
                lambda p, unit: problem.fun(p * unit),
                problem.init / own,
                args=(own,),
                max_steps=5000,
            )
            if not result.converged:
                continue
            first = problem.fun(problem.init)
            assert result.value - problem.value <= 1e-6 * (first - problem.value)
        assert result.converged


# In float32 rounding may hide a direction of far smaller curvature: the intercept.

RULES = {  # rule, rate times the largest curvature
    "plain": (None, 0.6),
    "bold": (None, 1.8),
    "momentum": (lambda learning_rate: optax.sgd(learning_rate, momentum=0.9), 0.3),
}


@pytest.mark.parametrize("width", [1.5e4, 2e5])
@pytest.mark.parametrize("name", RULES)
def test_a_given_rate_is_no_false_success_on_a_raw_column(name, width):
    rng = np.random.default_rng(1)
    x = np.linspace(0, width, 400)
    y = 5 + 10 / width * x + rng.normal(size=400)
    optimizer, share = RULES[name]
    result = jaxgd.minimize(
        line,
        jnp.zeros(2),
        (x.astype("f"), y.astype("f")),
        optimizer=optimizer,
        learning_rate=share / (2 * np.mean(x**2)),
        max_steps=4000,
    )
    possible = np.var(y - np.polyval(np.polyfit(x, y, 1), x))
    assert result.value > 1.5 * possible  # it would take millions of steps
    assert not result.converged


@pytest.mark.parametrize(
    ("name", "width", "n"),
    [("plain", 519135, 600), ("plain", 602571, 104), ("momentum", 15304, 149)],
)
def test_a_gradient_that_is_level_tells_of_a_small_curvature(name, width, n):
    """All of the estimates but that of the level gradient see the slope alone."""
    rng = np.random.default_rng({519135: 4, 602571: 10, 15304: 0}[width])
    rng.uniform(size=2)
    x = np.linspace(0, width, n)
    y = rng.uniform(-10, 10) + rng.normal() * 10 / width * x
    y = y + rng.normal(size=n) * rng.uniform(0.1, 1)
    optimizer, share = RULES[name]
    result = jaxgd.minimize(
        line,
        jnp.zeros(2),
        (x.astype("f"), y.astype("f")),
        optimizer=optimizer,
        learning_rate=share / (2 * np.mean(x**2)),
        max_steps=5000,
    )
    assert not result.converged


def test_a_leaf_of_few_bits_does_not_loosen_the_verdict():
    """In bfloat16 alone 0.8 % of the objective are its rounding."""

    def fun(p):
        return 1 + (p["a"] - 1) ** 2 + 0.01 * (p["b"] - 1) ** 2

    params = {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.zeros(())}
    result = jaxgd.minimize(fun, params, learning_rate=0.8, max_steps=2000)
    assert result.value - 1 < 1e-6
    few = jaxgd.minimize(fun, params, learning_rate=0.8, max_steps=20)
    assert not few.converged


def test_what_has_been_lower_can_be_so_again():
    """Adam's rate is so large that it dances far above its lowest value."""
    rng = np.random.default_rng(1)
    x = np.linspace(0, 1e5, 100)
    y = 5 + 1e-4 * x + rng.normal(size=100)
    result = jaxgd.minimize(
        line,
        jnp.zeros(2),
        (x.astype("f"), y.astype("f")),
        optimizer=optax.adam(1.0),
        max_steps=5000,
    )
    assert not result.converged
    assert result.value > 2


@pytest.mark.parametrize("rate", [0.5, 1.8])
def test_a_given_rate_says_so_where_it_has_converged(rate):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)).astype("f")
    y = (x @ [1, 2, 3] + 0.1 * rng.normal(size=300)).astype("f")

    def squares(p, batch):
        return jnp.mean((batch[0] @ p - batch[1]) ** 2) / 2

    curvature = np.linalg.norm(x, 2) ** 2 / 300
    result = jaxgd.minimize(
        squares, jnp.zeros(3), (x, y), learning_rate=rate / curvature
    )
    assert result.converged
    np.testing.assert_allclose(result.params, np.linalg.lstsq(x, y)[0], rtol=1e-4)


# Fixed points of the rule.


def bowl(p):
    return (p["a"] - 1) ** 2 + (p["b"] + 1) ** 2


REST = {  # rule, start, where it comes to rest
    "projection": (
        lambda rate: optax.chain(optax.sgd(rate), optax.keep_params_nonnegative()),
        (0.0, 1.0),
        (1.0, 0.0),
    ),
    "decay": (
        lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate)),
        (1.0, 1.0),
        (2 / 2.1, -2 / 2.1),
    ),
    "frozen": (
        lambda rate: optax.chain(
            optax.sgd(rate),
            optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
        ),
        (0.0, 1.0),
        (1.0, 1.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in REST] + [("decay", "float64")],
)
def test_a_rule_at_rest(name, dtype):
    rule, start, end = REST[name]
    with jax.enable_x64(dtype == "float64"):
        params = dict(zip("ab", np.array(start, dtype), strict=True))
        result = jaxgd.minimize(
            bowl, params, optimizer=rule, learning_rate=0.1, max_steps=4000
        )
        assert result.status == Status.AT_REST
        assert bool(result.converged)
        assert "has come to rest" in result.message
        assert result.grad_norm > 1e-2
        np.testing.assert_allclose([*result.params.values()], end, rtol=1e-5)


@pytest.mark.thin(2)
@pytest.mark.parametrize("rate", [1e-9, 1e-12])
def test_steps_that_are_too_small_are_not_at_rest(rate):
    params = {"a": jnp.float32(0.5), "b": jnp.float32(1.0)}
    for optimizer in (
        optax.sgd(rate),
        optax.adam(rate),
        optax.chain(optax.sgd(rate), optax.keep_params_nonnegative()),
    ):
        result = jaxgd.minimize(bowl, params, optimizer=optimizer)
        assert result.status == Status.STALLED


STOPS = ["auto", "value"]  # names of cases, alike in every process


def decaying(factor):
    """A decay that optax does not know to be one."""

    def update(updates, scale, params=None):
        return jax.tree.map(lambda u: u * scale, updates), scale * factor

    return optax.GradientTransformation(lambda params: jnp.float32(1), update)


SLOW = {
    "plain": optax.chain(optax.sgd(1e-3), decaying(0.9)),
    "Adam": optax.chain(optax.adam(1e-3), decaying(0.9)),
    "gathered": optax.MultiSteps(
        optax.chain(optax.sgd(1e-3), decaying(0.8)), 4
    ).gradient_transformation(),
    "nothing": optax.set_to_zero(),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("stop", ["auto", jaxgd.value_change(rtol=1e-6)], ids=STOPS)
@pytest.mark.parametrize("name", SLOW)
def test_a_rule_that_anneals_itself_is_not_at_rest(name, stop):
    params = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    result = jaxgd.minimize(bowl, params, optimizer=SLOW[name], stop=stop)
    assert result.status == Status.STALLED


def test_a_rule_that_remembers_one_large_gradient_is_not_at_rest():
    def fun(x):
        return x**2 / 2 + 1e8 * jnp.maximum(jnp.abs(x) - 1, 0)

    result = jaxgd.minimize(fun, 1.5, optimizer=optax.adagrad(0.6))
    assert 0.5 < result.params < 1
    assert result.status == Status.STALLED


@pytest.mark.parametrize("stop", ["auto", jaxgd.value_change(rtol=1e-6)], ids=STOPS)
def test_a_rule_at_rest_while_a_schedule_goes_on(stop):
    params = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    schedule = optax.cosine_decay_schedule(0.1, 3000)
    rule = optax.chain(
        optax.adam(schedule),
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
    )
    result = jaxgd.minimize(bowl, params, optimizer=rule, stop=stop)
    assert result.status == Status.AT_REST
    assert result.steps < 1000
    np.testing.assert_allclose(result.params["a"], 1, atol=1e-2)


def test_a_schedule_that_has_ended_is_not_at_rest():
    params = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    schedule = optax.linear_schedule(1e-2, 0.0, 50)
    result = jaxgd.minimize(bowl, params, optimizer=optax.sgd(schedule))
    assert not result.converged


def test_a_rate_that_a_plateau_has_reduced_is_not_at_rest():
    params = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    rule = optax.chain(
        optax.adam(1e-6),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=5, rtol=1e-4),
    )
    result = jaxgd.minimize(bowl, params, optimizer=rule, max_steps=3000)
    assert result.grad_norm > 1
    assert not result.converged


# Settled, by steps that are too small.


@pytest.mark.parametrize("batch_size", [None, 25])
def test_a_value_that_settles_by_a_rate_far_too_small_has_stalled(batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5)).astype("f") * 3
    y = (x @ np.arange(5) / 3 + rng.logistic(size=500) > 0).astype("f")

    def logistic(p, batch):
        x, y = batch
        return jnp.mean(jnp.logaddexp(0, x @ p) - y * (x @ p))

    def run(rate):
        return jaxgd.minimize(
            logistic,
            jnp.zeros(5),
            (x, y),
            batch_size=batch_size,
            learning_rate=rate,
            stop=jaxgd.value_change(rtol=1e-3),
            epochs=None if batch_size is None else 300,
        )

    stable = 2 / float(jaxgd.sharpness(logistic, jnp.zeros(5), (x, y)))
    assert run(stable / 2).status == Status.VALUE_SETTLED
    steps = 1 if batch_size is None else 500 // batch_size
    assert run(stable / 860 / steps).status == Status.STALLED


def test_lbfgs_that_arrives_in_six_steps_says_so():
    """It stands still before five estimates have come down."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype("f")
    y = (x @ [1, 2, 3] + 0.1 * rng.normal(size=200)).astype("f")

    def squares(p, batch):
        return jnp.mean((batch[0] @ p - batch[1]) ** 2)

    result = jaxgd.minimize(squares, jnp.zeros(3), (x, y), optimizer=optax.lbfgs())
    assert result.converged
    assert result.steps < 20
    np.testing.assert_allclose(result.params, np.linalg.lstsq(x, y)[0], rtol=1e-4)
