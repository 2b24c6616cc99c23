"""Full batches split to fit a cache: only where that changes nothing but rounding."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.tree_util import Partial

import jaxgd
from jaxgd import _source, _spec
from jaxgd._check import check_all

N, D = 30_000, 100
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = np.sign(X @ RNG.normal(size=D)).astype(np.float32)
G = RNG.integers(0, 20, N).astype(np.int32)
START = np.zeros(D, np.float32)
WEIGHTS = RNG.uniform(size=N).astype(np.float32)


def squares(w, batch):
    x, y, _ = batch
    return jnp.mean((x @ w - y) ** 2) / 2 + 0.05 * w @ w


def logistic(w, batch):
    x, y, _ = batch
    return jnp.mean(jnp.logaddexp(-y * (x @ w), 0.0))


def network(w, batch):
    x, y, _ = batch
    return jnp.mean((jnp.tanh(x * w) @ jnp.ones(D) / 10 - y) ** 2)


def hinge_sum(w, batch):
    x, y, _ = batch
    return 0.5 * w @ w + 1e-4 * jnp.sum(jnp.maximum(0.0, 1 - y * (x @ w)))


def of_a_group(w, batch):
    x, y, g = batch
    chosen = g == 7
    return jnp.sum(chosen * (x @ w - y) ** 2) / jnp.maximum(jnp.sum(chosen), 1)


def of_an_absent_group(w, batch):
    x, y, g = batch
    return jnp.sum((g == 77) * (x @ w - y) ** 2) + w @ w


def median(w, batch):
    x, y, _ = batch
    return jnp.median(jnp.abs(x @ w - y))


def log_of_a_mean(w, batch):
    x, y, _ = batch
    return jnp.log(jnp.mean(jnp.exp(0.1 * (x @ w - y))))


def normalized(w, batch):
    x, y, _ = batch
    z = x @ w
    return jnp.mean(((z - z.mean()) / (z.std() + 1) - y) ** 2)


def length(w, batch):
    x, y, _ = batch
    return jnp.sum((x @ w - y) ** 2) / N


def in_half_precision(w, batch):
    return length(w, batch).astype(jnp.bfloat16)


def of_all_rows_only(w, batch):
    x, y, _ = batch
    return jnp.mean(WEIGHTS * (x @ w - y) ** 2)


def printing(w, batch):
    jax.debug.print("{}", w[0])
    return squares(w, batch)


MEANS = [squares, logistic, network]
OTHERS = [
    hinge_sum,
    of_a_group,
    of_an_absent_group,
    median,
    log_of_a_mean,
    normalized,
    length,
    in_half_precision,
    of_all_rows_only,
    printing,
]


def block_of(fun, **how):
    given = {**jaxgd.minimize.__kwdefaults__, "learning_rate": 0.1, **how}
    spec, _, _ = check_all(fun, START, (X, Y, G), **given)
    return spec.cpu_block


@pytest.mark.parametrize("fun", MEANS)
def test_means_are_split(fun):
    block = block_of(fun)
    assert 100 < block < N
    assert block_of(fun, microbatch_size=7000) is None
    assert block_of(fun, batch_size=32) is None
    how = {"learning_rate": 0.1, "max_steps": 20}
    split = jaxgd.minimize(fun, START, (X, Y, G), **how)
    whole = jaxgd.minimize(fun, START, (X, Y, G), microbatch_size=N, **how)
    np.testing.assert_allclose(split.value, whole.value, rtol=1e-5)
    np.testing.assert_allclose(split.params, whole.params, rtol=1e-4, atol=1e-6)
    direct = fun(split.params, (X, Y, G))
    np.testing.assert_allclose(split.value, direct, rtol=1e-5)


@pytest.mark.parametrize("fun", OTHERS)
def test_others_stay_whole(fun):
    assert block_of(fun) is None
    result = jaxgd.minimize(fun, START, (X, Y, G), learning_rate=1e-3, max_steps=2)
    direct = jax.jit(fun)(result.params, (X, Y, G))
    np.testing.assert_allclose(
        np.float32(result.value), np.float32(direct), rtol=1e-4, atol=1e-6
    )


def test_small_or_traced_data_stays_whole():
    given = {**jaxgd.minimize.__kwdefaults__, "learning_rate": 0.1}
    small, _, _ = check_all(squares, START, (X[:99], Y[:99], G[:99]), **given)
    assert small.cpu_block is None
    seen = []

    def traced(w):
        seen.append(check_all(squares, w, (X, Y, G), **given)[0].cpu_block)
        return w

    jax.jit(traced)(START)
    assert seen == [None]


def test_what_was_found_is_kept(monkeypatch):
    block_of(squares)
    monkeypatch.setattr(_spec, "is_mean_over_rows", lambda *_: pytest.fail("again"))
    assert block_of(squares) is not None


# What is remembered between calls must not tie one call to another.


def loss(w, x):
    return jnp.mean((x @ w - 1.0) ** 2)


def test_a_seed_used_under_a_mesh_serves_elsewhere():
    mesh = jax.make_mesh((1,), ("r",), axis_types=(AxisType.Explicit,))
    how = {"learning_rate": 0.1, "batch_size": 4, "max_steps": 5, "key": 12345}
    with jax.set_mesh(mesh):
        inside = jaxgd.minimize(loss, np.zeros(3, np.float32), X[:20, :3], **how)
    outside = jaxgd.minimize(loss, np.zeros(3, np.float32), X[:20, :3], **how)
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
            X[:20, :3],
            learning_rate=0.1,
            batch_size=4,
            max_steps=3,
            stop=None,
            final_evaluation=False,
        ).params

    starts = RNG.normal(size=(2, 3)).astype(np.float32)
    for lane, start in zip(jax.vmap(fit)(starts), starts, strict=True):
        np.testing.assert_allclose(lane, fit(start), rtol=1e-5)


def test_a_look_at_rows_leaves_them_as_they_are():
    """Looks are for data beyond a cache; nothing in it may change which rows come."""
    x = X.copy()
    x[::3], x[1::7], x[2::5, 16] = np.nan, np.inf, -np.inf
    data = x, Y, G
    assert x.nbytes > _source._IN_CACHE
    rows = jnp.asarray(RNG.integers(0, N, (50, 4)), jnp.int32)
    looked = jax.jit(_source._touched)(data, rows)
    np.testing.assert_array_equal(looked, rows)
    assert "gather" in str(jax.make_jaxpr(_source._touched)(data, rows))
    few = x[:100], Y[:100], G[:100]
    assert "gather" not in str(jax.make_jaxpr(_source._touched)(few, rows))
