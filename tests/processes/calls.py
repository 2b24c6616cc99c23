"""Twenty calls in one process, in the order given; run by test_same_bits.

It prints, for each call, its number and a hash of all that it returned.
"""

import hashlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40_000, 64)).astype(np.float32)
Y = (X @ np.ones(64) + RNG.normal(size=40_000)).astype(np.float32)
NOTHING = np.zeros_like(X), np.zeros_like(Y)
START = np.zeros(64, np.float32)
SMALL = X[:300, :5].copy(), Y[:300].copy()
NAUGHT = np.zeros((300, 5), np.float32), np.zeros(300, np.float32)


def loss(p, rows):
    x, y = rows
    return jnp.mean((x @ p - y) ** 2) / 2


def root(p, rows):
    return jnp.sqrt(loss(p, rows) + 1e-3)


def weighted(p, rows):
    x, y = rows
    w = 1 + x[:, 0] ** 2
    return jnp.sum(w * (x @ p - y) ** 2) / jnp.sum(w)


BATCH = {"learning_rate": 0.1, "max_steps": 20}
MINI = {"batch_size": 16, "learning_rate": 0.01, "max_steps": 300}


def small(rows=SMALL, fun=loss, **how):
    return jaxgd.minimize(fun, START[:5], rows, **{**MINI, **how})


# Of each pair of calls one could leave behind what changes the other.
CALLS = [
    lambda: jaxgd.minimize(loss, START, NOTHING, **BATCH),
    lambda: jaxgd.minimize(loss, START, (X, Y), **BATCH),
    lambda: jaxgd.minimize(loss, START, NOTHING, max_steps=20),
    lambda: jaxgd.minimize(loss, START, (X, Y), max_steps=20),
    lambda: jaxgd.minimize(weighted, START, NOTHING, microbatch_size=4096, **BATCH),
    lambda: jaxgd.minimize(weighted, START, (X, Y), microbatch_size=4096, **BATCH),
    lambda: small(NAUGHT),
    lambda: small(),
    lambda: small(NAUGHT, root),
    lambda: small(SMALL, root),
    lambda: small(NAUGHT, weighted, key=3),
    lambda: small(SMALL, weighted, key=3),
    lambda: small(optimizer=optax.adam, learning_rate=0.01),
    lambda: small(optimizer=optax.adam(0.01), learning_rate=None),
    lambda: small(batch_size=None, optimizer=optax.lbfgs(), learning_rate=None),
    lambda: small(stop=jaxgd.value_change(1e-4, patience=2)),
    lambda: small(learning_rate=None),
    lambda: (
        jaxgd.sweep(
            loss,
            START[:5],
            SMALL,
            over={"learning_rate": [0.01, 10.0]},
            batch_size=16,
            max_steps=300,
        ).results
    ),
    lambda: small(jaxgd.Stream(SMALL)),
    lambda: list(jaxgd.iterate(loss, START[:5], SMALL, every=100, **MINI))[-1],
]


def digest(result) -> str:
    told = hashlib.sha256()
    for leaf in jax.tree.leaves(result):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        told.update(np.ascontiguousarray(leaf).tobytes())
    return told.hexdigest()


warnings.filterwarnings("ignore", "fun is no mean")
for number in map(int, sys.argv[1:]):
    print(number, digest(CALLS[number]()), flush=True)
