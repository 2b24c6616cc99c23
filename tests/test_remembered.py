"""What is remembered between calls must not tie one call to another."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.tree_util import Partial

import jaxgd

pytestmark = pytest.mark.full

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)


def loss(w, x):
    return jnp.mean((x @ w - 1.0) ** 2)


def test_a_seed_used_under_a_mesh_serves_elsewhere():
    mesh = jax.make_mesh((1,), ("r",), axis_types=(AxisType.Explicit,))
    how = {"learning_rate": 0.1, "batch_size": 4, "max_steps": 5, "key": 12345}
    with jax.set_mesh(mesh):
        inside = jaxgd.minimize(loss, np.zeros(3, np.float32), X, **how)
    outside = jaxgd.minimize(loss, np.zeros(3, np.float32), X, **how)
    np.testing.assert_allclose(inside.params, outside.params, rtol=1e-6)


def test_arrays_of_an_objective_are_let_go():
    class Array(np.ndarray):
        pass

    array = np.ones((5, 3), np.float32).view(Array)
    alive = weakref.ref(array)
    fun = Partial(lambda a, w: jnp.mean((a @ w - 1) ** 2), array)
    jaxgd.minimize(fun, np.zeros(3, np.float32), learning_rate=0.1, max_steps=2)
    del fun, array
    gc.collect()
    assert alive() is None


def test_vmap_of_an_exact_run_without_final_evaluation():
    def fit(start):
        return jaxgd.minimize(
            loss,
            start,
            X,
            learning_rate=0.1,
            batch_size=4,
            max_steps=3,
            stop=None,
            final_evaluation=False,
        ).params

    starts = RNG.normal(size=(2, 3)).astype(np.float32)
    for lane, start in zip(jax.vmap(fit)(starts), starts, strict=True):
        np.testing.assert_allclose(lane, fit(start), rtol=1e-5)
