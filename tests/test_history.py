"""The bounded record of a run: which rows are kept, wherever the run is cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd
from jaxgd._result.history import empty_record, extend, history_of, stride, trimmed

K = 16  # rows offered at once; count says how many of them are meant


def power_of_two(total, rows):
    """The smallest power of two k with ``ceil(total / k) <= rows``."""
    k = 1
    while -(-total // k) > rows:
        k *= 2
    return k


@partial(jax.jit, static_argnums=2)
def recorded(counts, first, rows):
    """The record after chunks of ``counts`` rows, and its count."""

    def chunk(record, count):
        steps = first + record.count + jnp.arange(K, dtype=jnp.int32)
        numbers = steps[:, None] * 10 + jnp.arange(4, dtype=jnp.int32)
        # What lies beyond the count must never be seen.
        junk = jnp.arange(K)[:, None] >= count
        numbers = jnp.where(junk, -7.0, numbers.astype(jnp.float32))
        steps = jnp.where(junk[:, 0], -7, steps)
        return extend(record, steps, numbers, count), None

    record, _ = jax.lax.scan(chunk, empty_record(rows, jnp.float32), counts)
    return record


ROWS = [0, 1, 2, 3, 5, 8, 1000]


@pytest.mark.parametrize("rows", ROWS)
def test_the_record_is_that_of_the_definition(rows):
    generator = np.random.default_rng(rows)
    totals = {0, 1, 2, rows, rows + 1, 2 * rows, 2 * rows + 1, 4 * rows + 3, 3000, 8000}
    totals |= set(generator.integers(1, 6000, size=4).tolist())
    for total in sorted(totals):
        for low, high in ((K, K), (0, K), (1, 2)):
            if low < K and high == 2 and total > 1100:
                continue
            counts = generator.integers(low, high + 1, size=9000)
            # Cut to the total; the chunks after it are empty.
            before = np.concatenate([[0], np.cumsum(counts)[:-1]])
            counts = np.clip(total - before, 0, counts).astype(np.int32)
            if counts.sum() != total:
                continue
            record = recorded(counts, 5, rows)
            assert record.count == total
            assert record.step.shape == (rows,)
            if rows == 0:
                continue
            kept = 5 + np.arange(0, total, power_of_two(total, rows))
            assert len(kept) <= rows
            steps = np.asarray(record.step)
            np.testing.assert_array_equal(steps[: len(kept)], kept)
            assert (steps[len(kept) :] == -1).all()
            expected = kept[:, None] * 10 + np.arange(4)
            np.testing.assert_array_equal(record.numbers[: len(kept)], expected)
            assert np.isnan(record.numbers[len(kept) :]).all()


@pytest.mark.parametrize("rows", [r for r in ROWS if r])
def test_the_stride_is_the_smallest_that_fits(rows):
    totals = {1, rows, rows + 1, 2**31 - 1, *(rows * 2**k for k in range(20))}
    totals |= {t + 1 for t in totals} | set(range(1, 70))
    totals = np.array(sorted(t for t in totals if t < 2**31), np.int32)
    found = jax.jit(stride, static_argnums=1)(totals, rows)
    expected = [power_of_two(int(total), rows) for total in totals]
    np.testing.assert_array_equal(found, expected)


def test_the_stride_is_one_up_to_the_bound():
    assert stride(jnp.int32(0), 8) == stride(jnp.int32(8), 8) == 1
    assert stride(jnp.int32(9), 8) == stride(jnp.int32(16), 8) == 2


def test_columns_and_trimming():
    record = recorded(np.array([3], np.int32), 0, 5)
    history = history_of(record)
    assert history._fields == (
        "step",
        "value",
        "grad_norm",
        "learning_rate",
        "update_norm",
    )
    assert history.step.tolist() == [0, 1, 2, -1, -1]
    cut = trimmed(history)
    assert all(isinstance(column, np.ndarray) for column in cut)
    assert [c.tolist() for c in cut] == [
        [0, 1, 2],
        [0, 10, 20],
        [1, 11, 21],
        [2, 12, 22],
        [3, 13, 23],
    ]


# In a run.

X = np.random.default_rng(0).normal(size=(11, 2)).astype("f")


def distance(w, rows):
    return jnp.mean(jnp.sum((w - rows) ** 2, axis=1))


RUN = partial(
    jaxgd.minimize,
    distance,
    jnp.ones(2),
    X,
    learning_rate=lambda step: 0.1 / (1 + step),
    batch_size=3,
    stop=jaxgd.target_value(-1),
)


@pytest.mark.full
def test_a_thinned_history_has_the_rows_of_the_whole_one():
    whole = RUN(max_steps=300, history_rows=1000)
    assert whole.history.step.tolist() == list(range(300))
    assert len(whole.checks.step) == 81  # 3 * 300 // 11
    for rows, k, k_checks in ((10, 32, 16), (299, 2, 1)):
        thin = RUN(max_steps=300, history_rows=rows)
        for a, b, keep in (
            (thin.history, whole.history, k),
            (thin.checks, whole.checks, k_checks),
        ):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left, right[::keep])


def test_a_thinned_history_does_not_see_cuts():
    whole = RUN(max_steps=300, history_rows=10)
    generator = np.random.default_rng(1)
    for _ in range(3):
        cuts = sorted(generator.integers(0, 301, size=9).tolist())
        state, at = {}, 0
        for cut in (*cuts, 300):
            part = RUN(max_steps=cut - at, history_rows=10, **state)
            state, at = {"state": part.state}, cut
            expected = np.arange(0, cut, power_of_two(cut, 10))
            np.testing.assert_array_equal(part.history.step, expected)
        for a, b in ((part.history, whole.history), (part.checks, whole.checks)):
            jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_no_history(batch_size):
    with_history = RUN(max_steps=50, batch_size=batch_size)
    result = RUN(max_steps=50, batch_size=batch_size, history_rows=0)
    for record in (result.history, result.checks):
        assert all(column.shape == (0,) for column in record)
    assert result.state.run.history.step.shape == (0,)
    assert result.steps == with_history.steps
    np.testing.assert_allclose(result.params, with_history.params, rtol=1e-6)
    again = RUN(max_steps=50, batch_size=batch_size, history_rows=0, state=result.state)
    assert again.steps == result.steps + 50
