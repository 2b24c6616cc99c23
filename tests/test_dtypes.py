"""Contract: parameters and optimizer state keep their dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import START, X, Y, least_squares

import jaxgd


@pytest.mark.thin(5)
@pytest.mark.parametrize("optimizer", [None, optax.sgd, optax.adam, optax.rmsprop])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("wide", [False, True])
def test_dtypes_stay(dtype, optimizer, wide):
    if dtype == "float64" and not wide:
        pytest.skip("needs x64")
    with jax.enable_x64(wide):
        start = {"w": jnp.zeros(4, dtype), "b": jnp.zeros((), dtype)}
        data = (jnp.asarray(X, dtype), jnp.asarray(Y, dtype))
        arguments = {"learning_rate": 0.02}
        if optimizer is not None:
            arguments["optimizer"] = optimizer
        if optimizer is optax.sgd:
            arguments["hyperparams"] = {"momentum": 0.9}
        result = jaxgd.minimize(
            least_squares, start, data, batch_size=5, epochs=60, **arguments
        )
        leaves = jax.tree.leaves((result.params, result.state.opt_state))
        kinds = {leaf.dtype.name for leaf in leaves if leaf.dtype != jnp.int32}
        assert kinds == {dtype}
        reported = "float64" if dtype == "float64" else "float32"
        assert result.value.dtype == result.grad_norm.dtype == reported
        assert result.history.value.dtype == reported
        assert not any(getattr(x, "weak_type", False) for x in leaves)
        w = np.asarray(result.params["w"], np.float64)
        np.testing.assert_allclose(w, np.arange(4), atol=1.1)


@pytest.mark.full
def test_x64_with_float32_parameters(x64):
    start = {"w": np.zeros(4, np.float32), "b": np.zeros((), np.float32)}
    for arguments in (
        {"learning_rate": 0.05},
        {
            "optimizer": optax.adam,
            "learning_rate": optax.cosine_decay_schedule(0.1, 99),
        },
    ):
        for batch_size in (None, 5):
            result = jaxgd.minimize(
                least_squares, start, (X, Y), batch_size=batch_size, **arguments
            )
            assert result.params["w"].dtype == np.float32
            assert result.steps.dtype == np.int32
            assert result.history.step.dtype == np.int32
            assert result.value.dtype == np.float32


def test_strict_promotion():
    rule = jaxgd.any_of(jaxgd.value_change(1e-3), jaxgd.params_change(1e-3))
    with jax.numpy_dtype_promotion("strict"):
        for arguments in (
            {},
            {"batch_size": 5, "microbatch_size": 2, "stop": rule},
            {"batch_size": 5, "stop": None, "max_steps": 9},
        ):
            result = jaxgd.minimize(
                least_squares, START, (X, Y), learning_rate=0.05, **arguments
            )
            assert np.isfinite(result.value)
