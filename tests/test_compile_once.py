"""Contract: new numbers cost no compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from regression import START, X, Y, least_squares

import jaxgd


def decay(first, step):
    return first * 0.9**step


NUMBERS = {
    "rate": [
        {"learning_rate": rate}
        for rate in (
            0.01,
            1,
            0,
            np.float32(0.02),
            np.float64(0.02),
            np.asarray(0.03),
            jnp.asarray(0.03),
            jnp.float32(0.04),
            jnp.asarray(1),
        )
    ],
    "limit": [
        *({"max_steps": n} for n in (0, 1, 7, np.int64(3), np.int32(9), jnp.int32(4))),
        *({"epochs": n} for n in (1, 0.3, np.float32(2))),
    ],
    "key": [
        {"key": key}
        for key in (1, np.int64(2), jax.random.key(3), jax.random.PRNGKey(4), 2**32 - 1)
    ],
    "args": [
        {"args": args}
        for args in (
            (0.1,),
            [0.2],
            (np.float64(0.3),),
            (np.float32(0.4),),
            (jnp.float32(1),),
        )
    ],
    "data": [
        {"data": data}
        for data in (
            (X + 1, Y),
            (jnp.asarray(X), jnp.asarray(Y)),
            (X.astype(np.float64), Y.astype(np.float64)),
        )
    ],
    "start": [{"params": {"w": w, "b": 0.5}} for w in (np.ones(4, "f"), np.ones(4))],
    "tolerance": [
        {"stop": jaxgd.value_change(rtol=r, patience=p)}
        for r, p in ((1e-3, 1), (np.float64(1e-2), 2), (jnp.asarray(1e-1), np.int64(3)))
    ],
    "rule": [
        {"stop": jaxgd.any_of(jaxgd.gradient_norm(a), jaxgd.target_value(t))}
        for a, t in ((1e-3, 0.1), (np.float32(1e-4), -1), (1, np.float64(0.2)))
    ],
    "hyperparams": [
        {"optimizer": optax.adam, "hyperparams": {"b1": b1, "eps": 1e-8}}
        for b1 in (0.9, np.float32(0.8), np.float64(0.7), jnp.asarray(0.6))
    ],
    "schedule": [
        {"learning_rate": Partial(decay, first)}
        for first in (0.1, np.float32(0.2), np.float64(0.1), jnp.asarray(0.3))
    ],
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("name", NUMBERS)
def test_new_numbers_cost_no_compilation(name, batch_size, count_compilations):
    def call(variant):
        arguments = {"learning_rate": 0.05, "args": (0.0,), "batch_size": batch_size}
        arguments |= {"fun": least_squares, "params": START, "data": (X, Y)}
        return jaxgd.minimize(**arguments | variant)

    call(NUMBERS[name][0])
    for variant in NUMBERS[name][1:]:
        with count_compilations() as count:
            call(variant)
        assert count() == 0, variant


def test_going_on_costs_no_compilation(count_compilations):
    run = lambda **kw: jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=0.05, batch_size=8, **kw
    )
    result = run(max_steps=9)
    for variant in ({}, {"max_steps": 1}, {"epochs": 2}):
        with count_compilations() as count:
            run(state=result.state, **variant)
        assert count() == 0


def test_callable_pytrees_are_data(count_compilations):
    def objective(scale, x):
        return jnp.sum((scale * x - 1) ** 2)

    run = lambda scale: jaxgd.minimize(
        Partial(objective, scale), jnp.zeros(3), learning_rate=0.05
    )
    first = run(np.float32(1.0))
    with count_compilations() as count:
        second = run(np.float32(2.0))
    assert count() == 0
    np.testing.assert_allclose(first.params, 1.0, atol=1e-3)
    np.testing.assert_allclose(second.params, 0.5, atol=1e-3)
