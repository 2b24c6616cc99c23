"""Contract: objectives that couple the rows of a batch descend as on one device."""

import jax
import numpy as np
import pytest
from layouts import LAYOUTS, close, minimize
from objectives import BATCH, COUPLED, DATA, EXPERTS, MEANS, START

from jaxgd._check import check_all
from jaxgd._minimize import DEFAULTS


def taken_apart(fun, params, data, layout="8 devices", **how):
    """Whether each device takes the mean of its own rows."""
    data = LAYOUTS[layout](data)
    return check_all(fun, params, data, **{**DEFAULTS, **how})[0].mean_of_shards


@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken_apart(name, batch_size):
    fun, params, data = MEANS[name]
    assert taken_apart(fun, params, data, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_rows_are_not(name, batch_size):
    params = EXPERTS if name == "mixture" else START
    assert not taken_apart(COUPLED[name], params, DATA, batch_size=batch_size)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_wherever_the_start_is(scale):
    params = jax.tree.map(lambda x: np.float32(scale) * x, START)
    assert taken_apart(MEANS["linear"][0], params, DATA)
    assert taken_apart(MEANS["logistic"][0], params, DATA)
    assert not taken_apart(COUPLED["root"], params, DATA)
    assert not taken_apart(COUPLED["weighted"], params, DATA)


# A full pass runs in blocks of rows, which is another objective for them: these runs
# have none.
MINI = {"batch_size": BATCH, "final_evaluation": False, "history_rows": 64, "key": 2}
FULL = {}
RUNS = [
    ("root", MINI, "both axes"),
    ("root", FULL, "8 devices"),
    ("normalized", MINI, "8 devices"),
    ("normalized", FULL, "explicit mesh"),
    ("median", MINI, "explicit mesh"),
    ("hard_coded", MINI, "2 devices"),
    ("contrastive", MINI, "explicit mesh"),
    ("contrastive", FULL, "both axes"),
    ("weighted", MINI, "8 devices"),
    ("ranked", FULL, "4 devices"),
    ("flooded", {**MINI, "learning_rate": 0.3}, "8 devices"),
    ("rarely_weighted", MINI, "explicit mesh"),
    ("added_up", MINI, "8 devices"),
    ("in_pairs", {**FULL, "learning_rate": 1e-3}, "8 devices"),
    ("clipped_backwards", {**MINI, "learning_rate": 0.3}, "8 devices"),
    ("solved", MINI, "4 devices"),
]


@pytest.mark.parametrize(("name", "how", "layout"), RUNS)
def test_steps_are_those_of_one_device(name, how, layout):
    fun = COUPLED[name]
    how = {"learning_rate": 0.05, "max_steps": 60, "stop": None, **how}
    many = minimize(layout, fun, START, DATA, **how)
    one = minimize("one device", fun, START, DATA, **how)
    close(many.params, one.params)
    close(many.history, one.history, 1e-4)
    if how["batch_size" if "batch_size" in how else "stop"] is None:
        close((many.value, many.grad_norm), (one.value, one.grad_norm))
