"""Contract: cuts change no bit, and a run goes on from its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import START, X, Y, least_squares, logistic

import jaxgd
from jaxgd import Status


def bits(tree):
    def plain(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    return jax.tree.map(plain, tree)


def assert_same_bits(a, b):
    fields = ("params", "value", "grad_norm", "aux", "status", "steps", "evaluations")
    for field in (*fields, "history", "checks", "state"):
        left, right = bits(getattr(a, field)), bits(getattr(b, field))
        jax.tree.map(np.testing.assert_array_equal, left, right)


def in_legs(legs, **arguments):
    result = jaxgd.minimize(max_steps=legs[0], **arguments)
    arguments.pop("key", None)
    for leg in legs[1:]:
        if result.status != Status.MAX_STEPS:
            break
        result = jaxgd.minimize(max_steps=leg, state=result.state, **arguments)
    return result


STOPS = {
    "auto": "auto",
    "value": jaxgd.value_change(1e-3, patience=2),
    "any": jaxgd.any_of(jaxgd.gradient_norm(1e-3), jaxgd.params_change(1e-4)),
}
UPDATES = {
    "plain": {"learning_rate": 0.05},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.05},
    "schedule": {"learning_rate": optax.exponential_decay(0.1, 10, 0.9)},
    "momentum": {"optimizer": optax.sgd(0.03, momentum=0.9)},
}
# All pairs of a stop rule and a size, updates and objectives by turns.
SIZES = [None, 1, 5, 23]
CUTS = [
    (
        list(UPDATES)[(at + turn) % 4],
        ((least_squares, logistic)[(at // 2 + turn) % 2], stop, size),
    )
    for turn, stop in enumerate(STOPS)
    for at, size in enumerate(SIZES)
]


@pytest.mark.thin(3)
@pytest.mark.parametrize(("update", "case"), CUTS)
def test_cuts_change_no_bit(update, case):
    fun, stop, batch_size = case
    arguments = {
        "fun": fun,
        "params": START,
        "data": (X, Y),
        "batch_size": batch_size,
        "stop": STOPS[stop],
        "history_rows": 37,
        "key": 5,
        **UPDATES[update],
    }
    whole = jaxgd.minimize(max_steps=130, **arguments)
    generator = np.random.default_rng(batch_size or 0)
    for size in (1, 40):
        legs = []
        while sum(legs) < 130:
            leg = 1 if size == 1 and sum(legs) < 20 else int(generator.integers(0, 41))
            legs.append(min(leg, 130 - sum(legs)))
        parts = in_legs(legs, **arguments)
        assert_same_bits(whole, parts)
    if whole.converged:
        arguments.pop("key")
        again = jaxgd.minimize(state=whole.state, **arguments)
        assert_same_bits(whole, again)


@pytest.mark.parametrize("fun", [lambda x: -jnp.sum(jnp.tanh(x)) + jnp.sum(x**4)])
def test_cuts_of_a_diverging_run(fun):
    arguments = {"fun": fun, "params": jnp.array([1.5, -0.2]), "learning_rate": 0.5}
    whole = jaxgd.minimize(max_steps=50, **arguments)
    assert whole.status == Status.DIVERGED
    steps = int(whole.steps)
    assert steps > 0
    for legs in ([1] * 50, [steps, 50], [steps + 1, 50], [steps - 1, 50]):
        parts = in_legs(legs, **arguments)
        assert parts.status == Status.DIVERGED
        assert_same_bits(whole, parts)


def test_cuts_of_a_diverging_mini_batch_run():
    arguments = {
        "fun": least_squares,
        "params": START,
        "data": (X, Y),
        "learning_rate": 3.0,
        "batch_size": 5,
    }
    whole = jaxgd.minimize(max_steps=500, **arguments)
    assert whole.status == Status.DIVERGED
    steps = int(whole.steps)
    for legs in ([1] * 50, [steps, 50], [steps + 1, 50]):
        parts = in_legs(legs, **arguments)
        assert parts.status == Status.DIVERGED
        assert_same_bits(whole, parts)


def test_another_rule_starts_afresh_and_the_same_goes_on():
    run = lambda **kw: jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=0.02, batch_size=5, **kw
    )
    patient = jaxgd.value_change(rtol=0.2, patience=6)
    whole = run(stop=patient, epochs=100)
    assert whole.status == Status.VALUE_SETTLED
    cut = run(stop=patient, max_steps=int(whole.steps) - 1)
    same = run(stop=jaxgd.value_change(rtol=0.2, patience=6), state=cut.state)
    assert same.steps == whole.steps
    for other in (
        jaxgd.value_change(rtol=0.200001, patience=6),
        jaxgd.value_change(atol=1e9, patience=6),
    ):
        fresh = run(stop=other, state=cut.state, epochs=100)
        # Six changes need seven checks, all of them its own.
        assert fresh.steps > whole.steps + 5 * 23 / 5
    # A rule of another form, and none at all, go on from the state as well.
    for other in (jaxgd.gradient_norm(rtol=1e-6), "auto", None):
        more = run(stop=other, state=whole.state, max_steps=3)
        assert more.steps == whole.steps + 3


def test_other_programs_agree_to_rounding():
    arguments = {"learning_rate": 0.05, "batch_size": 5, "key": 2}
    run = jaxgd.minimize(least_squares, START, (X, Y), max_steps=60, **arguments)
    static = jaxgd.minimize(
        least_squares, START, (X, Y), max_steps=60, stop=None, **arguments
    )
    mixed = jaxgd.minimize(
        least_squares,
        START,
        (X, Y),
        max_steps=50,
        stop=None,
        learning_rate=0.05,
        batch_size=5,
        state=jaxgd.minimize(
            least_squares, START, (X, Y), max_steps=10, **arguments
        ).state,
    )
    step = jaxgd.make_step(least_squares, optax.sgd(0.05))
    rows = jaxgd.batch_rows(2, 23, 5, jnp.arange(60))
    state, infos = jax.lax.scan(
        step, jaxgd.init_state(START, optax.sgd(0.05)), (X[rows], Y[rows])
    )
    for other in (static, mixed):
        for name in ("value", "grad_norm", "history"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
                getattr(run, name),
                getattr(other, name),
            )
    for other in (static.params, mixed.params, state.params):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), run.params, other
        )
    np.testing.assert_allclose(infos.value, run.history.value, rtol=1e-4)
