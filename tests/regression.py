"""A small regression that the tests of contracts share."""

import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 4)).astype("f")
Y = (X @ np.arange(4) + RNG.normal(size=23)).astype("f")
START = {"w": jnp.zeros(4), "b": jnp.zeros(())}


def least_squares(p, batch, penalty=0.0):
    x, y = batch
    return jnp.mean((x @ p["w"] + p["b"] - y) ** 2) + penalty * jnp.sum(p["w"] ** 2)


def logistic(p, batch):
    x, y = batch
    z = x @ p["w"] + p["b"]
    return jnp.mean(jnp.logaddexp(0, z) - (y > 0) * z)
