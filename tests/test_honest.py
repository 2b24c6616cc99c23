"""The outcome of a run: the right status, true numbers, the exact number of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd
from jaxgd import Status

pytestmark = pytest.mark.thin(4)

SCALES = jnp.array([1.0, 10.0])


def quadratic(x):
    return jnp.sum(SCALES * (x - 1) ** 2) / 2


def shifted(x):
    return quadratic(x) + 1


def flat(x):
    return 0 * jnp.sum(x) + 3


def cone(x):  # its gradient at 0 is NaN while its value is 0
    return jnp.sqrt(jnp.sum(x**2))


def cliff(x):  # the gradient is NaN where x[0] <= 0, the value is not
    return jnp.sqrt(jnp.maximum(x[0], 0.0)) + x[1] ** 2


def logarithm(x):
    return jnp.sum(jnp.log(x))


def fine_grained(x):  # rounding decides about the last bits of its minimizer
    return jnp.sum((x - 0.1) ** 2 * jnp.array([1.0, 3.0])) + jnp.sum(jnp.sin(x))


ZERO, ONE = jnp.zeros(2), jnp.ones(2)
VALUE, PARAMS = jaxgd.value_change, jaxgd.params_change

# name: objective, start, rate, further arguments, status, steps or None
OUTCOMES = {
    "small gradient": (quadratic, ZERO, 0.1, {}, Status.GRADIENT_SMALL, None),
    "start at the minimum": (quadratic, ONE, 0.1, {}, Status.GRADIENT_SMALL, 0),
    "no steps": (quadratic, ZERO, 0.1, {"max_steps": 0}, Status.MAX_STEPS, 0),
    "one step": (quadratic, ZERO, 0.1, {"max_steps": 1}, Status.MAX_STEPS, 1),
    "no steps, at the minimum": (
        quadratic,
        ONE,
        0.1,
        {"max_steps": 0},
        Status.GRADIENT_SMALL,
        0,
    ),
    "target": (
        quadratic,
        ZERO,
        0.1,
        {"stop": jaxgd.target_value(0.01)},
        Status.TARGET_REACHED,
        19,
    ),
    "value settled": (
        shifted,
        ZERO,
        0.1,
        {"stop": VALUE(1e-3)},
        Status.VALUE_SETTLED,
        None,
    ),
    "params settled": (
        quadratic,
        ZERO,
        0.1,
        {"stop": PARAMS(1e-5)},
        Status.PARAMS_SETTLED,
        None,
    ),
    "value settled at the minimum": (
        quadratic,
        ONE,
        0.1,
        {"stop": VALUE(1e-6)},
        Status.VALUE_SETTLED,
        1,
    ),
    "params settled at the minimum": (
        quadratic,
        ONE,
        0.1,
        {"stop": PARAMS(1e-6)},
        Status.PARAMS_SETTLED,
        1,
    ),
    "value settled within rounding of the minimum": (
        quadratic,
        ONE + 1e-7,
        0.1,
        {"stop": VALUE(1e-6)},
        Status.STALLED,  # at rounding from its start: no gradient has become small
        None,
    ),
    "tiny rate, value": (
        quadratic,
        ZERO,
        1e-8,
        {"stop": VALUE(1e-6)},
        Status.STALLED,
        1,
    ),
    "tiny rate, params": (
        quadratic,
        ZERO + 5,
        1e-8,
        {"stop": PARAMS(1e-6)},
        Status.STALLED,
        1,
    ),
    "tiny rate, gradient": (quadratic, ZERO + 5, 1e-8, {}, Status.MAX_STEPS, 1000),
    "rate without effect": (quadratic, ZERO + 5, 1e-12, {}, Status.STALLED, 100),
    "rate zero": (quadratic, ZERO, 0.0, {}, Status.STALLED, 100),
    "float32 floor, value": (
        lambda x: quadratic(x) + 1000,
        ZERO + 3,
        1e-4,
        {"stop": VALUE(rtol=0.0, patience=3), "max_steps": 50_000},
        Status.STALLED,
        None,
    ),
    "float32 floor, gradient": (
        fine_grained,
        ZERO,
        0.2,
        {"stop": jaxgd.gradient_norm(1e-30), "max_steps": 50_000},
        Status.PRECISION_REACHED,
        None,
    ),
    "flat": (flat, ZERO, 0.1, {}, Status.GRADIENT_SMALL, 0),
    "flat, value": (flat, ZERO, 0.1, {"stop": VALUE(1e-6)}, Status.VALUE_SETTLED, 1),
    "NaN at the start": (logarithm, ZERO - 1, 0.1, {}, Status.NON_FINITE, 0),
    "infinity at the start": (logarithm, ZERO, 0.1, {}, Status.NON_FINITE, 0),
    "NaN parameters": (quadratic, ZERO * jnp.nan, 0.1, {}, Status.NON_FINITE, 0),
    "NaN gradient at the start": (cone, ZERO, 0.1, {}, Status.NON_FINITE, 0),
    "NaN gradient later": (
        cliff,
        jnp.array([0.5, 1.0]),
        0.1,
        {},
        Status.DIVERGED,
        None,
    ),
    "too large a rate": (quadratic, ZERO, 1.0, {}, Status.DIVERGED, None),
    "overflow of the parameters alone": (
        lambda x: jnp.sum(jax.nn.sigmoid(x)) - 1e30 * jnp.tanh(x[0]),
        ZERO,
        1e9,
        {},
        Status.DIVERGED,
        0,
    ),
}


@pytest.mark.thin(6)
@pytest.mark.parametrize("name", OUTCOMES)
def test_status_steps_and_numbers(name):
    fun, start, rate, arguments, status, steps = OUTCOMES[name]
    result = jaxgd.minimize(fun, start, learning_rate=rate, **arguments)
    assert Status(int(result.status)) == status
    if steps is not None:
        assert result.steps == steps
    good = [*list(Status)[1:5], Status.AT_REST, Status.PRECISION_REACHED]
    assert bool(result.converged) == (status in good)
    if status is not Status.NON_FINITE:
        assert np.isfinite(result.params).all()
    # The numbers are those at the returned parameters.
    value, grad = jax.value_and_grad(fun)(result.params)
    np.testing.assert_allclose(result.value, value, rtol=1e-6)
    norm = np.linalg.norm(np.asarray(grad, np.float64))
    np.testing.assert_allclose(result.grad_norm, norm, rtol=1e-5)
    assert result.evaluations == result.steps + 1
    assert len(result.history.step) == result.steps or result.steps > 1000
    # What was not finite, or a gradient of zero everywhere, is told after that.
    only_gradient = status is Status.NON_FINITE and np.isfinite(value)
    first = "At the start the value is finite" if only_gradient else status.message
    assert result.message.startswith(first)
    np.testing.assert_array_equal(
        result.history.value[:1], fun(start) if result.steps else []
    )


@pytest.mark.parametrize("name", ["too large a rate", "NaN gradient later"])
def test_the_last_finite_iterate_comes_back(name):
    fun, start, rate, *_ = OUTCOMES[name]
    finite, params = [], start
    while True:
        value, grad = jax.value_and_grad(fun)(params)
        good = np.isfinite(value) and np.isfinite(
            np.linalg.norm(grad.astype(jnp.float32))
        )
        if not (good and np.isfinite(params).all()):
            break
        finite.append(params)
        params = params - rate * grad
    for arguments in ({}, {"history_rows": 0}, {"stop": jaxgd.target_value(-1e30)}):
        result = jaxgd.minimize(fun, start, learning_rate=rate, **arguments)
        assert result.status == Status.DIVERGED
        assert result.steps == len(finite) - 1
        np.testing.assert_allclose(result.params, finite[-1], rtol=1e-5)
        # The state holds that iterate: a smaller rate goes on from it.
        again = jaxgd.minimize(
            fun, start, learning_rate=rate, state=result.state, **arguments
        )
        assert again.steps == result.steps
        assert again.status == Status.DIVERGED


def test_an_iterate_that_only_its_parameters_betray():
    # The value saturates: no value and no gradient is ever other than finite.
    def saturated(x):
        return -jnp.tanh(x[0]) + 0 * x[1]

    def rule():
        import optax

        def update(grad, state, params=None):
            step = jnp.where(state == 23, jnp.inf, -1e-3)
            return jax.tree.map(lambda g: jnp.full_like(g, step), grad), state + 1

        return optax.GradientTransformation(lambda p: jnp.int32(0), update)

    for rows in (0, 1000):
        result = jaxgd.minimize(
            saturated,
            ZERO,
            optimizer=rule(),
            history_rows=rows,
            stop=jaxgd.target_value(-2.0),
        )
        assert result.status == Status.DIVERGED
        assert result.steps == 23
        np.testing.assert_allclose(result.params, -0.023, rtol=1e-4)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 2)).astype("f")
Y = (X @ np.array([1, 2]) + RNG.normal(size=50)).astype("f")


def least_squares(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"stop": None, "max_steps": 9}, {"batch_size": 2}, {"max_steps": 0}],
)
def test_a_start_that_is_not_finite(arguments):
    # One parameter is NaN that the objective does not look at.
    start = {"used": jnp.zeros(2), "unused": jnp.full(3, jnp.nan)}

    def fun(p, batch):
        return least_squares(p["used"], batch)

    result = jaxgd.minimize(fun, start, (X, Y), learning_rate=0.05, **arguments)
    assert result.status == Status.NON_FINITE
    assert not result.converged
    if "stop" not in arguments:
        assert result.steps == 0
    start["unused"] = jnp.zeros(3)
    nan = np.full_like(Y, np.nan)
    result = jaxgd.minimize(fun, start, (X, nan), learning_rate=0.05, **arguments)
    assert result.status == Status.NON_FINITE


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_mini_batch_numbers_are_of_all_rows(batch_size):
    for epochs in (0, 0.5, 1, 2.3):
        result = jaxgd.minimize(
            least_squares,
            ZERO,
            (X, Y),
            learning_rate=0.01,
            batch_size=batch_size,
            epochs=epochs,
        )
        steps = int(np.ceil(round(epochs * 50 / batch_size, 9)))
        assert result.steps == steps
        assert result.status == Status.MAX_STEPS
        assert result.evaluations == steps + 1
        assert result.rows_seen == steps * batch_size
        value, grad = jax.value_and_grad(least_squares)(result.params, (X, Y))
        np.testing.assert_allclose(result.value, value, rtol=1e-5)
        np.testing.assert_allclose(result.grad_norm, np.linalg.norm(grad), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_mini_batch_checks_see_the_full_objective(batch_size):
    result = jaxgd.minimize(
        least_squares,
        ZERO,
        (X, Y),
        learning_rate=0.02,
        batch_size=batch_size,
        stop=jaxgd.value_change(rtol=1e-3, patience=2),
        epochs=100,
    )
    assert result.status == Status.VALUE_SETTLED
    checks = result.checks
    expected = np.ceil(np.arange(1, len(checks.step) + 1) * 50 / batch_size)
    np.testing.assert_array_equal(checks.step, expected)
    assert result.steps == checks.step[-1]
    assert result.value == checks.value[-1]
    assert result.grad_norm == checks.grad_norm[-1]
    assert result.evaluations == result.steps + len(checks.step)
    # The rule by hand on the recorded values: it held at the last check and not before.
    change = np.abs(np.diff(checks.value)) <= 1e-3 * np.abs(checks.value[1:])
    in_a_row = change[1:] & change[:-1]
    assert in_a_row[-1]
    assert not in_a_row[:-1].any()
    for i in (0, len(checks.step) - 1):
        part = jaxgd.minimize(
            least_squares,
            ZERO,
            (X, Y),
            learning_rate=0.02,
            batch_size=batch_size,
            max_steps=int(checks.step[i]),
        )
        np.testing.assert_allclose(part.value, checks.value[i], rtol=1e-5)
        np.testing.assert_allclose(part.grad_norm, checks.grad_norm[i], rtol=1e-4)


@pytest.mark.full
def test_mini_batch_rules():
    run = lambda **kw: jaxgd.minimize(
        least_squares, ZERO, (X, Y), batch_size=10, **({"epochs": 200} | kw)
    )
    tiny = run(learning_rate=1e-8, stop=VALUE(1e-4))
    assert tiny.status == Status.STALLED
    assert tiny.steps == 10
    settled = run(learning_rate=0.01, stop=PARAMS(atol=0.1))
    assert settled.status == Status.PARAMS_SETTLED
    moves = settled.checks.update_norm
    assert np.isnan(moves[0])
    assert moves[-1] <= 0.1 < moves[-2]
    before = run(learning_rate=0.01, epochs=settled.steps / 5 - 1)
    change = np.linalg.norm(settled.params - before.params)
    np.testing.assert_allclose(moves[-1], change, rtol=1e-4)
    target = run(learning_rate=0.05, stop=jaxgd.target_value(1.5))
    assert target.status == Status.TARGET_REACHED
    assert target.value <= 1.5 < target.checks.value[-2]
    relative = run(learning_rate=0.05, stop=jaxgd.gradient_norm(rtol=0.1))
    norms = relative.checks.grad_norm
    assert relative.status == Status.GRADIENT_SMALL
    assert norms[-1] <= 0.1 * norms[0] < norms[-2]


@pytest.mark.parametrize("batch_size", [1, 10, 50])
def test_a_bad_row_is_found(batch_size):
    bad = Y.copy()
    bad[13] = np.nan
    result = jaxgd.minimize(
        least_squares, ZERO, (X, bad), learning_rate=0.05, batch_size=batch_size
    )
    first = next(
        t for t in range(50) if 13 in jaxgd.batch_rows(0, 50, batch_size, t).tolist()
    )
    if first == 0:
        assert result.status == Status.NON_FINITE
    else:
        assert result.status == Status.DIVERGED
        # The iterate of step `first` has a NaN batch; the one before is the last good.
        assert result.steps == first - 1
    assert np.isfinite(result.params).all()
    assert np.isnan(result.value)  # the true value: of all rows, one of them bad


def test_an_overflowing_mini_batch_run_keeps_the_last_finite_iterate():
    rate, params, good = 5.0, np.zeros(2, np.float32), 0
    for t in range(200):
        rows = np.asarray(jaxgd.batch_rows(0, 50, 7, t))
        value, grad = jax.value_and_grad(least_squares)(params, (X[rows], Y[rows]))
        if not (np.isfinite(value) and np.isfinite(grad).all()):
            break
        good, last = t, params
        params = params - rate * grad
    for arguments in ({}, {"final_evaluation": False}, {"stop": VALUE(1e-6)}):
        result = jaxgd.minimize(
            least_squares,
            ZERO,
            (X, Y),
            learning_rate=rate,
            batch_size=7,
            epochs=100,
            **arguments,
        )
        assert result.status == Status.DIVERGED
        assert result.steps == good
        np.testing.assert_allclose(result.params, last, rtol=1e-3)


def test_final_evaluation_can_be_left_out():
    result = jaxgd.minimize(
        least_squares,
        ZERO,
        (X, Y),
        learning_rate=0.05,
        batch_size=5,
        final_evaluation=False,
        max_steps=33,
    )
    assert np.isnan(result.value)
    assert np.isnan(result.grad_norm)
    assert result.evaluations == 33
    stopped = jaxgd.minimize(
        least_squares,
        ZERO,
        (X, Y),
        learning_rate=0.05,
        batch_size=5,
        final_evaluation=False,
        stop=jaxgd.target_value(1.5),
        epochs=50,
    )
    assert stopped.value == stopped.checks.value[-1] <= 1.5


def test_user_arrays_are_neither_changed_nor_kept():
    params = {"w": np.ones(2, np.float32), "b": jnp.zeros(())}
    x, y = X.copy(), Y.copy()

    def fun(p, batch):
        return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)

    for steps in (0, 20):
        result = jaxgd.minimize(fun, params, (x, y), learning_rate=0.1, max_steps=steps)
        np.testing.assert_array_equal(params["w"], np.ones(2))
        assert not params["b"].is_deleted()
        np.testing.assert_array_equal(x, X)
    kept = np.asarray(
        jaxgd.minimize(fun, params, (x, y), learning_rate=0.1, max_steps=0).params["w"]
    )
    params["w"][:] = 7
    np.testing.assert_array_equal(kept, np.ones(2))
    del result


def test_tiny_gradients_are_not_taken_for_zero():
    # Squares of 1e-25 are below the smallest float32.
    small = lambda x: 1e-25 * quadratic(x)
    result = jaxgd.minimize(
        small, ZERO, learning_rate=1e24, stop=jaxgd.gradient_norm(rtol=1e-3)
    )
    assert result.status == Status.GRADIENT_SMALL
    assert result.steps > 10
    np.testing.assert_allclose(result.params, 1, atol=0.02)


@pytest.mark.thin(4)
@pytest.mark.parametrize("start", [3.0, 2.0, 0.0])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_one_parameter_at_every_scale(start, scale):
    # A norm of one entry is what a compiler simplifies most.
    for shape in ((), (1,)):
        result = jaxgd.minimize(
            lambda x: scale * jnp.sum((x - 3) ** 2),
            jnp.full(shape, start),
            learning_rate=0.1 / scale,
            stop=jaxgd.gradient_norm(rtol=1e-3),
        )
        assert result.status == Status.GRADIENT_SMALL
        np.testing.assert_allclose(result.params, 3.0, atol=1e-2)


@pytest.mark.parametrize("size", [1, 2, 5, 30_000])
@pytest.mark.parametrize("entry", [0.0, 1e-25, 1e-17, 1.0, 3e19, 1e30])
def test_norms_beyond_the_range_of_squares(size, entry):
    from jaxgd import _tree

    found = jax.jit(lambda x: _tree.safe_norm(x, np.dtype("float32")))(
        jnp.full(size, entry)
    )
    np.testing.assert_allclose(found, np.float32(entry) * np.sqrt(size), rtol=1e-4)


def bad_batch(p, batch):  # not finite where all rows of a batch are the same
    return jnp.mean((p - batch) ** 2) / jnp.where(jnp.std(batch) > 0, 1.0, 0.0)


@pytest.mark.filterwarnings("ignore:fun is no mean")
def test_a_batch_that_is_bad_at_a_check():
    data = jnp.array([0.0, 0.0, 1.0, 2.0])
    key = next(  # the first bad batch is that of step 2, after the first check
        k
        for k in range(100)
        if [set(jaxgd.batch_rows(k, 4, 2, t).tolist()) == {0, 1} for t in range(3)]
        == [False, False, True]
    )
    arguments = {"learning_rate": 0.1, "batch_size": 2}
    run = lambda **kw: jaxgd.minimize(bad_batch, 0.5, data, **arguments | kw)
    plain = run(key=key)
    ruled = run(key=key, stop=jaxgd.gradient_norm(1e-12))
    cut = run(key=key, stop=jaxgd.gradient_norm(1e-12), max_steps=2)
    resumed = run(state=cut.state, stop=jaxgd.gradient_norm(1e-12))
    for result in (plain, ruled, cut, resumed):
        assert result.status == Status.DIVERGED
        assert result.steps == 1
        np.testing.assert_array_equal(result.params, plain.params)


def test_a_rule_that_takes_over_sees_its_own_changes_only():
    run = lambda params, **kw: jaxgd.minimize(
        least_squares, params, (X, Y), learning_rate=0.01, batch_size=10, **kw
    )
    first = run(ZERO, stop=jaxgd.target_value(-1.0), epochs=1)
    for params in (ZERO, first.params, ZERO + 1e3):
        taken = run(params, stop=PARAMS(atol=1e-6), state=first.state, epochs=3)
        assert taken.status == Status.MAX_STEPS
        assert taken.steps == 20
        moves = taken.checks.update_norm
        assert np.isnan(moves[:2]).all()
        assert (moves[2:] < 1).all()


def test_a_stopped_run_tells_the_same_again():
    run = lambda **kw: jaxgd.minimize(
        least_squares,
        ZERO,
        (X, Y),
        learning_rate=0.05,
        batch_size=5,
        stop=jaxgd.gradient_norm(rtol=0.1),
        **kw,
    )
    for final_evaluation in (True, False):
        whole = run(epochs=100, final_evaluation=final_evaluation)
        again = run(state=whole.state, final_evaluation=final_evaluation)
        assert whole.status == again.status == Status.GRADIENT_SMALL
        assert whole.value == again.value
        assert whole.criteria[0].measured == again.criteria[0].measured
        more = run(state=run(max_steps=25).state, max_steps=3)
        assert np.isfinite(more.criteria[0].measured)


def test_a_schedule_may_begin_with_a_rate_of_zero():
    import optax

    late = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.constant_schedule(0.1)], [150]
    )
    result = jaxgd.minimize(quadratic, ZERO, learning_rate=late)
    assert result.status == Status.GRADIENT_SMALL
    wrapped = jaxgd.minimize(
        quadratic,
        ZERO,
        optimizer=lambda rate: optax.MultiSteps(optax.sgd(rate), 4),
        learning_rate=optax.exponential_decay(0.1, 1, 0.5),
        max_steps=8,
    )
    assert np.isnan(wrapped.history.learning_rate).all()


def test_a_run_that_has_ended_goes_on_with_all_rows():
    """It took the verdict of its last check of mini-batches for one of its own."""
    rule = jaxgd.gradient_norm(rtol=0.3)
    run = lambda **kw: jaxgd.minimize(
        least_squares, ZERO, (X, Y), learning_rate=0.02, stop=rule, history_rows=0, **kw
    )
    ended = run(batch_size=5, max_steps=500)
    assert ended.status == Status.GRADIENT_SMALL
    later = run(state=ended.state, max_steps=500)
    assert later.steps - ended.steps < 20


def test_other_checks_begin_with_a_change_of_their_own():
    """Not with that since the ``params`` of the call, which are structure alone."""
    run = lambda params, **kw: jaxgd.minimize(
        least_squares,
        params,
        (X, Y),
        learning_rate=0.01,
        stop=jaxgd.params_change(1e-6),
        history_rows=0,
        **kw,
    )
    state = run(ZERO, max_steps=5).state
    for params in (ZERO, ZERO + 1e4):
        found = run(params, state=state, batch_size=5, epochs=1)
        assert np.isnan(found.state.run.seen.update_norm)
