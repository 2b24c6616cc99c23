"""Contract: rows on many devices give the steps of one device."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from layouts import FEW, LAYOUTS, close, minimize

import jaxgd
from jaxgd import problems

N, B = 160, 24  # 20 rows a stratum, 3 a step: batches straddle epochs


@lru_cache
def problem(name):
    if name == "linear":
        return problems.least_squares(*problems.linear_data(N, 5))
    if name == "logistic":
        return problems.logistic(*problems.blobs(N, 6, 2), penalty=0.01)
    return problems.mlp(*problems.blobs(N, 6, 3), sizes=(6, 8, 3))


RULES = {
    "sgd": (optax.sgd, {}, 0.1),
    "momentum": (optax.sgd, {"momentum": 0.9}, 0.02),
    "adam": (optax.adam, {"b1": 0.8}, 0.01),
}


@lru_cache
def by_hand(name, rule, steps, key=5):
    """(params, values of batches) of a loop that shares only the order of rows."""
    fun, params, data = problem(name).fun, problem(name).init, problem(name).data
    factory, more, rate = RULES[rule]
    optimizer = factory(rate, **more)

    def step(carry, rows):
        params, state = carry
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
        value, grad = jax.value_and_grad(fun)(params, batch)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def loop(params):
        of = lambda t: jaxgd.batch_rows(jax.random.key(key), N, B, t, strata=8)
        rows = jax.vmap(of)(jnp.arange(steps))
        return lax.scan(step, (params, optimizer.init(params)), rows)

    (params, _), values = loop(jax.tree.map(jnp.asarray, params))
    return params, values


SHORT = [(layout, "logistic", "sgd") for layout in LAYOUTS]
LONG = [
    *(("8 devices", name, rule) for name in ("linear", "mlp") for rule in RULES),
    ("both axes, explicit", "mlp", "adam"),
]


@pytest.mark.parametrize(("layout", "name", "rule"), SHORT + LONG)
def test_steps_are_those_of_a_loop_by_hand(layout, name, rule):
    factory, more, rate = RULES[rule]
    own = problem(name)
    long = [(2000, 1e-4)] if (layout, name, rule) in LONG else []
    for steps, tolerance in [(200, 1e-5), *long]:
        result = minimize(
            layout,
            own.fun,
            own.init,
            own.data,
            optimizer=factory,
            hyperparams=more,
            learning_rate=rate,
            batch_size=B,
            max_steps=steps,
            key=5,
        )
        params, values = by_hand(name, rule, steps)
        for a, b in zip(
            jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        value, grad = jax.value_and_grad(own.fun)(params, own.data)
        np.testing.assert_allclose(result.value, value, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            result.grad_norm, optax.tree.norm(grad), rtol=1e-2, atol=1e-5
        )
        kept = result.history.step
        np.testing.assert_allclose(
            result.history.value, values[kept], rtol=10 * tolerance, atol=tolerance
        )
        assert (int(result.steps), int(result.evaluations)) == (steps, steps + 1)


@pytest.mark.parametrize("layout", ["one device", "4 devices", *FEW])
def test_every_step_takes_the_rows_of_its_strata(layout):
    """Rates of 4**t leave in the parameters who came how often at step t."""
    n, b, steps = 40, 16, 10

    def picks(params, ids):
        return jnp.mean(params[ids])

    result = minimize(
        layout,
        picks,
        np.zeros(n, "f"),
        np.arange(n, dtype=np.int32),
        learning_rate=lambda t: 4.0**t,
        batch_size=b,
        max_steps=steps,
        key=3,
    )
    left = np.round(-np.asarray(result.params) * b).astype(np.int64)
    np.testing.assert_array_equal(left, -np.asarray(result.params) * b)  # exact
    for t in range(steps):
        rows = jaxgd.batch_rows(3, n, b, t, strata=8)
        np.testing.assert_array_equal(
            left // 4**t % 4, np.bincount(rows, minlength=n), str(t)
        )


@pytest.mark.parametrize("count", [8, 4])
def test_strata_are_the_pieces_by_default(count):
    own = problem("linear")
    how = {"learning_rate": 0.1, "batch_size": B, "max_steps": 30, "key": 5}
    data = LAYOUTS[f"{count} devices"](own.data)
    result = jaxgd.minimize(own.fun, own.init, data, **how)
    one = jaxgd.minimize(own.fun, own.init, own.data, strata=count, **how)
    close(result.params, one.params)
    assert not np.allclose(result.params["weights"], own.init["weights"])


@pytest.mark.parametrize("layout", FEW)
def test_results_are_on_all_devices(layout):
    own = problem("linear")
    how = {"learning_rate": 0.1, "batch_size": B, "max_steps": 30}
    result = minimize(layout, own.fun, own.init, own.data, **how)
    for leaf in jax.tree.leaves((result.params, result.state, result.value)):
        if isinstance(leaf, jax.Array):
            assert leaf.sharding.is_fully_replicated
            assert leaf.sharding.device_set == set(jax.devices())
