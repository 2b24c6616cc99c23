"""Contract: objectives that couple the rows of a batch descend as on one device."""

import warnings

import jax
import numpy as np
import pytest
from layouts import LAYOUTS, close, minimize
from objectives import BATCH, COUPLED, DATA, MEANS, START

from jaxgd._call.arguments import checked, tried
from jaxgd._call.call import Call

# That rows are no mean is said, of some of them: see test_a_trial.
pytestmark = pytest.mark.filterwarnings("ignore:fun is no mean")


def said(fun, params, data, layout="8 devices"):
    """What a trial on sharded rows says of an objective."""
    data = LAYOUTS[layout](data)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        found_spec = checked(Call(fun, params, data, batch_size=BATCH))
        tried(*found_spec[:2])
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("name", MEANS)
def test_a_trial_says_nothing_of_means(name):
    assert not said(*MEANS[name])


@pytest.mark.parametrize("layout", ["8 devices", "both axes, explicit"])
@pytest.mark.parametrize("name", ["weighted", "ranked", "total"])
def test_a_trial(name, layout):
    (words,) = said(COUPLED[name], START, DATA, layout)
    assert words.startswith("fun is no mean over rows")


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_wherever_the_start_is(scale):
    params = jax.tree.map(lambda x: np.float32(scale) * x, START)
    assert not said(MEANS["linear"][0], params, DATA)
    assert not said(MEANS["logistic"][0], params, DATA)
    assert said(COUPLED["root"], params, DATA)
    assert said(COUPLED["weighted"], params, DATA)


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
