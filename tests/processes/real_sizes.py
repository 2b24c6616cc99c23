"""Every driver with its defaults, at so many rows and columns; run by test_real_sizes.

    python real_sizes.py ROWS COLUMNS

It prints the name of a driver before it runs it, so that the last line names the one
that ended the process, and compares every value with the objective of all rows.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

N, D = int(sys.argv[1]), int(sys.argv[2])
RNG = np.random.default_rng(0)
SCALES = np.geomspace(0.1, 10, D)  # raw columns
X = (RNG.normal(size=(N, D)) * SCALES + SCALES / 2).astype(np.float32)
TRUTH = RNG.normal(size=D) / SCALES
Y = (X @ TRUTH + RNG.normal(size=N)).astype(np.float32)
LABELS = (Y > 0).astype(np.float32)
START = np.zeros(D, np.float32)
RATE = 1e-4


def linear(p, rows):
    x, y = rows
    return jnp.mean((x @ p - y) ** 2) / 2


def logistic(p, rows):
    x, y = rows
    return jnp.mean(jnp.logaddexp(0.0, x @ p) - y * (x @ p))


def exact(fun, p, data):
    """The objective of all rows in double precision, by NumPy."""
    z = data[0].astype(np.float64) @ np.asarray(p, np.float64)
    if fun is linear:
        return np.mean((z - data[1]) ** 2) / 2
    return np.mean(np.logaddexp(0.0, z) - data[1] * z)


def run(fun, data, **how):
    result = jaxgd.minimize(fun, START, data, **how)
    assert int(result.status) in list(jaxgd.Status)
    if result.status not in (jaxgd.Status.DIVERGED, jaxgd.Status.NON_FINITE):
        np.testing.assert_allclose(result.value, exact(fun, result.params, data), 1e-3)
    str(result)
    return result


def resident():
    for name, (fun, y) in {
        "linear": (linear, Y),
        "logistic": (logistic, LABELS),
    }.items():
        rows = X, y
        yield f"{name}, batch", lambda fun=fun, rows=rows: run(fun, rows)
        yield (
            f"{name}, no rate",
            lambda fun=fun, rows=rows: run(fun, rows, batch_size=32),
        )
        given = {"batch_size": 32, "learning_rate": RATE}
        yield (
            f"{name}, mini-batch",
            lambda fun=fun, rows=rows, given=given: run(fun, rows, **given),
        )
        adam = {**given, "optimizer": optax.adam}
        yield f"{name}, Adam", lambda fun=fun, rows=rows, h=adam: run(fun, rows, **h)


def drivers():
    rows = X, Y
    mini = {"batch_size": 32, "learning_rate": RATE}
    yield from resident()
    yield "one row", lambda: run(linear, rows, batch_size=1, learning_rate=RATE / 10)
    rule = jaxgd.value_change(1e-4)
    yield "a rule", lambda: run(linear, rows, **mini, stop=rule)
    yield "no rule", lambda: run(linear, rows, **mini, max_steps=500, stop=None)
    yield "a rate", lambda: run(linear, rows, learning_rate=RATE, max_steps=100)
    yield "L-BFGS", lambda: run(linear, rows, optimizer=optax.lbfgs())
    yield "microbatches", lambda: run(linear, rows, microbatch_size=4096, max_steps=20)
    yield "float64 rows", lambda: run(linear, tuple(map(np.float64, rows)), **mini)
    yield (
        "iterate",
        lambda: list(
            jaxgd.iterate(
                linear, START, rows, every=N // 64, epochs=2, **mini, stop=rule
            )
        ),
    )
    grid = {"learning_rate": [RATE / 10, RATE]}
    yield (
        "sweep",
        lambda: str(
            jaxgd.sweep(linear, START, rows, batch_size=32, epochs=1, over=grid)
        ),
    )
    yield (
        "Stream",
        lambda: jaxgd.minimize(
            linear, START, jaxgd.Stream(rows), epochs=2, **mini, stop=rule
        ),
    )
    yield "sharpness", lambda: float(jaxgd.sharpness(linear, START, rows))
    yield (
        "find_learning_rate",
        lambda: str(
            jaxgd.find_learning_rate(linear, START, rows, batch_size=32, max_steps=500)
        ),
    )
    yield (
        "benchmark",
        lambda: str(jaxgd.benchmark(linear, START, rows, repeats=3, **mini)),
    )
    yield (
        "shard_rows",
        lambda: run(linear, jax.device_get(jaxgd.shard_rows(rows)), **mini),
    )
    yield (
        "vmap",
        lambda: jax.vmap(
            lambda rate: jaxgd.minimize(
                linear, START, rows, batch_size=32, learning_rate=rate, epochs=1
            )
        )(jnp.array([RATE, RATE / 2])).value.block_until_ready(),
    )
    yield (
        "jit",
        lambda: jax.jit(
            lambda p: jaxgd.minimize(linear, p, rows, **mini, epochs=1).value
        )(START).block_until_ready(),
    )


for name, call in drivers():
    print(name, flush=True)
    call()
print("all")
