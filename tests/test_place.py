"""Where a run is in its rows: cut, resumed, on other rows, in batches of another size.

The place is arithmetic on the position, so it is tested against a list of rows that is
written down: epoch after epoch of ``shuffled_rows``, taken from the front.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd
from jaxgd._rows.order import (
    Place,
    first_place,
    next_epoch_end,
    place_at,
    place_taken_up,
    rows_of_steps,
)

KEY = jax.random.key(3)


def stream(n, strata, epochs):
    """Rows of each stratum, epoch after epoch: (strata, epochs, n / strata)."""
    m = n // strata
    own = [
        [
            jaxgd.shuffled_rows(jax.random.fold_in(KEY, s), m, e, jnp.arange(m)) + s * m
            for e in range(epochs)
        ]
        for s in range(strata)
    ]
    return np.asarray(own)


@pytest.mark.parametrize("strata", [1, 3])
def test_places_are_counted_from_anywhere(strata):
    n, first, then = 21, 6, 9
    flat = stream(n, strata, 8).reshape(strata, -1)
    place = first_place(n, first, strata, 7)
    place = place_at(place, jnp.int32(5), n, first, strata)  # 30 rows
    assert Place(*place.tolist())[:5] == (5, 1, (30 - n) // strata, 0, 30)
    place = place_taken_up(place, jnp.int32(5), n, then, strata, 7)
    rows = rows_of_steps(KEY, n, then, strata, jnp.int32(5), 9, place)
    c = then // strata
    for t, found in enumerate(np.asarray(rows)):
        start = 30 // strata + t * c
        np.testing.assert_array_equal(found, flat[:, start : start + c].ravel())
    place = place_at(place, jnp.int32(14), n, then, strata)
    assert Place(*place.tolist())[3:5] == (0, 30 + 81)


def test_fresh_places_are_batch_rows():
    place = place_at(first_place(10, 4, 2, 0), jnp.int32(17), 10, 4, 2)
    for since in (None, first_place(10, 4, 2, 0), place):
        rows = rows_of_steps(KEY, 10, 4, 2, jnp.int32(17), 3, since)
        expected = jaxgd.batch_rows(KEY, 10, 4, np.arange(17, 20), strata=2)
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
    ("n", "strata", "mark"),
    [(9, 1, 7), (8, 2, 7), (8, 1, 8)],
    ids=["n", "strata", "mark"],
)
def test_other_rows_begin_an_epoch(n, strata, mark):
    old = place_at(first_place(8, 2, 1, 7), jnp.int32(5), 8, 2, 1)  # 10 rows
    new = Place(*place_taken_up(old, jnp.int32(5), n, 2, strata, mark).tolist())
    assert new == (5, 2, 0, 0, 10, n, 2, strata, mark)
    at_an_end = place_at(first_place(8, 2, 1, 7), jnp.int32(4), 8, 2, 1)
    new = Place(*place_taken_up(at_an_end, jnp.int32(4), n, 2, strata, mark).tolist())
    assert new[:3] == (4, 1, 0)


def test_rows_that_cannot_be_seen_are_taken_for_the_same():
    for old_mark, new_mark in ((0, 5), (5, 0), (5, 5)):
        old = place_at(first_place(8, 3, 1, old_mark), jnp.int32(5), 8, 3, 1)
        new = place_taken_up(old, jnp.int32(5), 8, 3, 1, new_mark)
        assert Place(*new.tolist())[:5] == Place(*old.tolist())[:5]
        assert Place(*new.tolist()).mark == 5


def ends(n, first, then, cut, count):
    """Steps that end an epoch, by counting rows one by one."""
    found, rows, steps = [], 0, 0
    while len(found) < count:
        before = rows // n
        rows += first if steps < cut else then
        steps += 1
        if rows // n > before and steps > cut:
            found.append(steps)
    return found


@pytest.mark.parametrize(
    "sizes", [(7, 2, 2), (7, 2, 5), (21, 6, 9), (8, 8, 3), (5, 1, 5)]
)
def test_epochs_end_with_the_step_that_takes_their_last_row(sizes):
    n, first, then = sizes
    cut = 3
    place = place_at(first_place(n, first, 1, 0), jnp.int32(cut), n, first, 1)
    place = place_taken_up(place, jnp.int32(cut), n, then, 1, 0)
    expected, step = ends(n, first, then, cut, 12), cut
    for end in expected:
        due = int(next_epoch_end(place, n, then, 1, jnp.int32(step), jnp.int32(step)))
        assert due == end
        step = due
        # A check that was not made yet is due where it is.
        again = next_epoch_end(place, n, then, 1, jnp.int32(step), jnp.int32(cut))
        assert int(again) == end


@pytest.mark.parametrize(
    ("n", "b"), [(1_000_003, 64), (2**31 - 1, 2**31 - 1), (24, 23)]
)
def test_the_next_end_saturates(n, b):
    last = 2**31 - 1
    place = first_place(n, b, 1, 0)
    for step in (last - 1, last):
        due = next_epoch_end(place, n, b, 1, jnp.int32(step), jnp.int32(step - 1))
        assert step <= int(due) <= last
        rows = Place(*(int(x) for x in place_at(place, jnp.int32(step), n, b, 1)))
        assert rows.seen_high * 2**32 + rows.seen_low == step * b
        assert (rows.epoch, rows.place) == divmod(step * b, n)


# Runs.

X = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)


def which(params, rows):
    """The gradient tells which rows came: each adds its own power of two."""
    return jnp.mean(rows["bit"] @ params)


def bits(n):
    return {"bit": np.eye(n, dtype=np.float32)}


@pytest.mark.parametrize("n", [7, 9])
def test_each_row_of_other_data_comes_once(n):
    first = jaxgd.minimize(
        which,
        np.zeros(7, np.float32),
        bits(7),
        learning_rate=1.0,
        batch_size=2,
        epochs=1,
    )
    assert first.rows_seen == 8
    # The other rows in the form of the objective: the same numbers, in another order.
    data = {"bit": np.eye(7, dtype=np.float32)[::-1].copy()} if n == 7 else bits(9)
    state = first.state
    zeros = np.zeros(n, np.float32)
    state = state.__class__(zeros, state.opt_state, state.step, state.run)
    found = jaxgd.minimize(
        which, zeros, data, learning_rate=1.0, batch_size=2, epochs=1, state=state
    )
    taken = np.round(-np.asarray(found.params) * 2)
    assert (taken >= 1).all(), taken
    assert taken.sum() == 2 * -(-n // 2)
    assert found.steps == 4 + -(-n // 2)
    assert found.rows_seen == 8 + 2 * -(-n // 2)


def test_batches_of_another_size_go_on_where_the_others_ended():
    def loss(p, x):
        return jnp.mean((x @ p - 1) ** 2)

    how = {"learning_rate": 0.01}
    first = jaxgd.minimize(loss, np.zeros(3), X, batch_size=8, epochs=1, **how)
    more = jaxgd.minimize(
        loss, np.zeros(3), X, batch_size=100, max_steps=4, state=first.state, **how
    )
    assert (first.rows_seen, more.rows_seen) == (400, 800)
    assert "800 in steps of 100: 2 epochs of 400" in more.report()
    assert int(more.steps) == 54
    params = np.asarray(first.params)
    order = np.asarray(
        jaxgd.shuffled_rows(
            jax.random.fold_in(jax.random.key(0), 0), 400, 1, np.arange(400)
        )
    )
    for rows in order.reshape(4, 100):
        params = params - 0.01 * np.asarray(
            jax.grad(loss)(jnp.asarray(params), X[rows])
        )
    np.testing.assert_allclose(more.params, params, rtol=1e-5)


def test_a_cut_changes_no_place():
    def loss(p, x):
        return jnp.mean((x @ p - 1) ** 2)

    how = {"learning_rate": 0.01, "batch_size": 7}
    whole = jaxgd.minimize(loss, np.zeros(3), X, max_steps=130, **how)
    part = jaxgd.minimize(loss, np.zeros(3), X, max_steps=61, **how)
    rest = jaxgd.minimize(loss, np.zeros(3), X, max_steps=69, state=part.state, **how)
    np.testing.assert_array_equal(rest.params, whole.params)
    np.testing.assert_array_equal(rest.state.run.rows, whole.state.run.rows)
    assert rest.rows_seen == whole.rows_seen == 910


def test_a_run_with_a_rule_ends_at_the_last_step_there_can_be():
    def loss(p, x):
        return jnp.mean((x @ p - 1) ** 2)

    how = {"learning_rate": 0.01, "batch_size": 7, "stop": jaxgd.target_value(-1.0)}
    first = jaxgd.minimize(loss, np.zeros(3), X, max_steps=3, **how)
    state = first.state
    late = state.__class__(
        state.params, state.opt_state, jnp.int32(2**31 - 4), state.run
    )
    found = jaxgd.minimize(loss, np.zeros(3), X, max_steps=100, state=late, **how)
    assert int(found.steps) == 2**31 - 1
    assert found.status == jaxgd.Status.MAX_STEPS
