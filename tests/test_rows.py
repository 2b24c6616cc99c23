"""The row order: a bijection, as random as a shuffle, portable, exact."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxgd
from jaxgd._rows.order import divide_product, rows_of_steps


def orders(n, keys=None, epochs=None):
    """Permutations of n rows, one for each key or each epoch: (count, n)."""
    index = jnp.arange(n)
    if keys is not None:
        one = lambda k: jaxgd.shuffled_rows(k, n, 0, index)
        return np.asarray(jax.jit(jax.vmap(one))(keys))
    one = lambda e: jaxgd.shuffled_rows(3, n, e, index)
    return np.asarray(jax.jit(jax.vmap(one))(epochs))


def chi_square(counts, cells):
    """p-value of equal frequencies in ``cells`` cells (unseen cells count as 0)."""
    counts = np.concatenate([counts, np.zeros(cells - len(counts))])
    return stats.chisquare(counts).pvalue


SIZES = [1, 2, 3, 5, 24, 25, 26, 31, 36, 37, 100, 997, 1024, 65537]


@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_is_a_permutation(n):
    for epoch in (0, 1, 2**31 - 1):
        rows = jaxgd.shuffled_rows(jax.random.key(7), n, epoch, jnp.arange(n))
        assert rows.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(rows), np.arange(n))


def test_a_large_permutation_is_one():
    n = 1_000_003
    rows = jaxgd.shuffled_rows(1, n, 5, jnp.arange(n))
    assert np.bincount(rows, minlength=n).max() == 1


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("source", ["keys", "seeds", "strata", "epochs"])
def test_every_order_is_equally_likely(n, source):
    count = 60_000
    base = jax.random.key(11)
    numbers = jnp.arange(count)
    if source == "epochs":
        found = orders(n, epochs=numbers)
    else:
        keys = {
            "keys": lambda: jax.random.split(base, count),
            "seeds": lambda: jax.vmap(jax.random.key)(numbers),
            "strata": lambda: jax.vmap(lambda s: jax.random.fold_in(base, s))(numbers),
        }[source]()
        found = orders(n, keys=keys)
    _, counts = np.unique(found @ n ** np.arange(n), return_counts=True)
    assert chi_square(counts, math.factorial(n)) > 1e-4


@pytest.mark.parametrize("n", [7, 24, 25, 31, 60])
def test_positions_are_uniform_and_neighbors_independent(n):
    found = orders(n, keys=jax.random.split(jax.random.key(n), 40_000))
    for place in (0, 1, n // 2, n - 1):
        assert chi_square(np.bincount(found[:, place], minlength=n), n) > 1e-4
    column = math.isqrt(n - 1) + 1  # neighbors along the grid of the Feistel network
    for i, j in ((0, 1), (0, n - 1), (n - 2, n - 1), (0, min(column, n - 1))):
        pairs = np.bincount(found[:, i] * n + found[:, j], minlength=n * n)
        off_diagonal = ~np.eye(n, dtype=bool).ravel()
        assert pairs[~off_diagonal].sum() == 0
        assert chi_square(pairs[off_diagonal], n * (n - 1)) > 1e-4


@pytest.mark.parametrize("n", [5, 25, 60])
def test_epochs_keys_and_strata_are_independent(n):
    count = 40_000
    numbers = jnp.arange(2 * count)
    by_epoch = orders(n, epochs=numbers)
    base = jax.random.key(2)
    by_stratum = orders(
        n, keys=jax.vmap(lambda s: jax.random.fold_in(base, s))(numbers)
    )
    by_seed = orders(n, keys=jax.vmap(jax.random.key)(numbers))
    for found in (by_epoch, by_stratum, by_seed):
        for place in (0, n - 1):
            pairs = found[::2, 0] * n + found[1::2, place]
            assert chi_square(np.bincount(pairs, minlength=n * n), n * n) > 1e-4


def test_batch_means_vary_like_sampling_without_replacement():
    n, b = 1000, 50
    values = np.random.default_rng(0).normal(size=n)
    steps = jnp.arange(4000)
    rows = np.asarray(jaxgd.batch_rows(0, n, b, steps))
    means = values[rows].mean(axis=1)
    variance = values.var(ddof=1) / b * (1 - b / n)
    # Within an epoch the batches are one partition: compare across epochs.
    first_of_epoch = means[:: n // b]
    ratio = first_of_epoch.var(ddof=1) / variance
    degrees = len(first_of_epoch) - 1
    assert stats.chi2(degrees).cdf(ratio * degrees) == pytest.approx(0.5, abs=0.4999)
    np.testing.assert_allclose(means.reshape(-1, n // b).mean(axis=1), values.mean())


@pytest.mark.parametrize(
    ("n", "b", "strata"),
    [
        (10, 4, 1),
        (10, 10, 1),
        (7, 1, 1),
        (7, 5, 1),
        (24, 6, 3),
        (40, 24, 8),
        (30, 10, 10),
    ],
)
def test_batches_are_the_documented_places_of_the_streams(n, b, strata):
    key = jax.random.key(5)
    c, m = b // strata, n // strata
    for step in (0, 1, 2, 13, 1000):
        expected = []
        for s in range(strata):
            for place in range(step * c, step * c + c):
                own = jax.random.fold_in(key, s)
                row = jaxgd.shuffled_rows(own, m, place // m, place % m)
                expected.append(int(row) + s * m)
        rows = jaxgd.batch_rows(key, n, b, step, strata)
        assert rows.dtype == jnp.int32
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(("n", "b", "strata"), [(10, 4, 1), (12, 5, 1), (24, 9, 3)])
def test_every_row_comes_once_per_epoch(n, b, strata):
    steps = 3 * n  # b whole epochs, times three
    rows = np.asarray(jaxgd.batch_rows(9, n, b, jnp.arange(steps), strata))
    c, m = b // strata, n // strata
    for s in range(strata):
        stream = rows[:, s * c : (s + 1) * c].reshape(-1, m)
        for epoch in stream:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(m) + s * m)


def test_chunks_take_the_rows_of_their_steps():
    key = jax.random.key(1)
    chunk = rows_of_steps(key, 23, 6, 1, jnp.int32(37), 50)
    one_by_one = jaxgd.batch_rows(key, 23, 6, jnp.arange(37, 87))
    np.testing.assert_array_equal(chunk, one_by_one)


def test_positions_beyond_32_bits():
    generator = np.random.default_rng(0)
    for m in (1, 3, 1000, 10**6, 2**30 + 1, 2**31 - 1):
        for a in {1, max(1, m // 2), m, max(1, m - 1)}:
            t = generator.integers(0, 2**31 - 1, 100)
            quotient, remainder = divide_product(jnp.asarray(t, jnp.int32), a, m)
            exact = [divmod(int(x) * a, m) for x in t]
            np.testing.assert_array_equal(quotient, [q for q, _ in exact])
            np.testing.assert_array_equal(remainder, [r for _, r in exact])


def test_the_order_depends_on_nothing_else(x64):
    keys = (jax.random.key(4), jax.random.PRNGKey(4), 4, np.int64(4))
    index = np.arange(50)
    rows = [np.asarray(jaxgd.shuffled_rows(k, 50, 2, index)) for k in keys]
    with jax.enable_x64(False):
        rows.append(np.asarray(jaxgd.shuffled_rows(4, 50, 2, index)))
        rows.append(np.asarray(jax.jit(lambda: jaxgd.shuffled_rows(4, 50, 2, index))()))
    with jax.threefry_partitionable(False):
        rows.append(np.asarray(jaxgd.shuffled_rows(4, 50, 2, index)))
    for other in rows[1:]:
        np.testing.assert_array_equal(rows[0], other)


def test_published_order():
    # The order is part of the interface: a new release must not change runs.
    first = [jaxgd.shuffled_rows(0, n, 0, jnp.arange(6)).tolist() for n in (6, 1000)]
    assert first == [[5, 1, 0, 2, 3, 4], [459, 898, 916, 766, 166, 117]]


def test_shapes_broadcast():
    epochs = jnp.arange(3)[:, None]
    rows = jaxgd.shuffled_rows(0, 10, epochs, jnp.arange(10))
    assert rows.shape == (3, 10)
    np.testing.assert_array_equal(
        rows[2], jaxgd.shuffled_rows(0, 10, 2, jnp.arange(10))
    )
    assert jaxgd.batch_rows(0, 10, 4, jnp.zeros((2, 3), int)).shape == (2, 3, 4)
