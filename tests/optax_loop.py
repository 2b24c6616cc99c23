"""An optax loop written by hand, which the tests of optax rules compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

N, BATCH, STEPS, KEY = 10, 4, 8, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 3)).astype("f")
SOLUTION = {"w": RNG.normal(size=(3, 2)).astype("f"), "b": np.array([1.0, -1.0], "f")}
Y = (X @ SOLUTION["w"] + SOLUTION["b"] + 0.1 * RNG.normal(size=(N, 2))).astype("f")
START = {"w": np.full((3, 2), 0.1, "f"), "b": np.full(2, 0.1, "f")}


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, axis=1))


def start_value():
    return float(loss(START, (X, Y)))


def minimize(optimizer, batch_size=None, **settings):
    settings = {"max_steps": STEPS, "key": KEY} | settings
    return jaxgd.minimize(
        loss, START, (X, Y), optimizer=optimizer, batch_size=batch_size, **settings
    )


def rows_of(step, batch_size):
    """The rows of a step, each as often as makes batches of one shape."""
    rows = np.arange(N)
    if batch_size is not None:
        rows = np.asarray(jaxgd.batch_rows(KEY, N, batch_size, step))
    return np.tile(rows, np.lcm(N, BATCH) // rows.size)


def by_hand(rule, batch_size=None, extras=None, jit=False, steps=STEPS, y=Y):
    """(params, opt_state) after ``steps`` steps of a plain loop."""
    if isinstance(rule, optax.GradientTransformation):
        rule = optax.with_extra_args_support(rule)

    def step(params, state, batch):
        def value_fn(params):
            return loss(params, batch)

        value, grad = jax.value_and_grad(value_fn)(params)
        given = {"value": value, "grad": grad, "value_fn": value_fn}
        if extras is not None:
            given = extras(value_fn)
        updates, state = rule.update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params = jax.tree.map(jnp.asarray, START)
    state = rule.init(params)
    for t in range(steps):
        rows = rows_of(t, batch_size)
        params, state = step(params, state, (X[rows], y[rows]))
    return params, state


def assert_close(actual, expected, tolerance=1e-4):
    """Equal to rounding, relative to the largest number of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(pairs, jax.tree.leaves(actual), strict=True):
        a, b = numbers(a), numbers(b)
        off = np.max(np.abs(a - b), initial=0.0)
        most = tolerance * max(np.max(np.abs(b), initial=0.0), 1e-3)
        assert off <= most, f"{jax.tree_util.keystr(path)}: {a} is not {b}"


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert numbers(x).tobytes() == numbers(y).tobytes()


def numbers(leaf):
    if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    return leaf if leaf.dtype.kind == "f" else leaf.astype(np.float64)
