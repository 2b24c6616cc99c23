"""What comes back: a pytree, a report that a person can read, plain numbers."""

import json
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd
from jaxgd import Status
from jaxgd._rows.order import first_place, place_at

X = np.linspace(-1, 1, 8, dtype=np.float32)
DATA = (X, 2 * X)


def bowl(x, center):
    return jnp.sum((x - center) ** 2)


def line(w, batch):
    x, y = batch
    return jnp.mean((w * x - y) ** 2)


descend = partial(jaxgd.minimize, bowl, jnp.zeros(2), args=(2.0,), learning_rate=0.25)
fit = partial(jaxgd.minimize, line, 0.0, DATA, learning_rate=0.5, batch_size=4)


@pytest.fixture(scope="module")
def single():
    return descend()


@pytest.fixture(scope="module")
def lanes():
    one = lambda center, rate: jaxgd.minimize(
        bowl, jnp.zeros(2), args=(center,), learning_rate=rate, max_steps=25
    )
    return jax.vmap(one)(jnp.array([2.0, 0.0, 2.0]), jnp.array([0.25, 0.25, 0.01]))


# Status.


def test_codes_are_fixed():
    assert issubclass(Status, IntEnum)
    assert [(s.name, s.value) for s in Status] == [
        ("RUNNING", 0),
        ("GRADIENT_SMALL", 1),
        ("VALUE_SETTLED", 2),
        ("PARAMS_SETTLED", 3),
        ("TARGET_REACHED", 4),
        ("MAX_STEPS", 5),
        ("STALLED", 6),
        ("DIVERGED", 7),
        ("NON_FINITE", 8),
        ("AT_REST", 9),
        ("PRECISION_REACHED", 10),
    ]


@pytest.mark.parametrize("status", Status)
def test_every_status_has_a_sentence(status):
    sentence = status.message
    assert sentence.endswith(".")
    assert sentence[0].isupper()
    assert "\n" not in sentence
    assert len(sentence.split()) >= 4
    assert [s.message for s in Status].count(sentence) == 1


# The report, as a person reads it.

REPORTS = {
    "converged": (
        lambda: descend(),
        """\
Converged after 25 steps. The gradient is small.
  objective      8 -> 0
  gradient norm  5.65685 -> 0
  stop rule      expected decrease 0 <= 0: holds
  learning rate  0.25
  steps          25 of at most 1000
  evaluations    26
  diagnosis      good: The rate is 0.25 times the stable limit 1 (2 over the \
curvature 2).""",
    ),
    "one step": (
        lambda: descend(max_steps=1),
        """\
Stopped after 1 step. The limit on steps was reached.
  objective      8 -> 2
  gradient norm  5.65685 -> 2.82843
  stop rule      expected decrease <= 6e-10: not known yet
  learning rate  0.25
  steps          1, the limit
  evaluations    2
  diagnosis      good: The rate is 0.25 times the stable limit 1 (2 over the \
curvature 2).""",
    ),
    "stalled": (
        lambda: descend(learning_rate=0.0),
        """\
Stopped after 100 steps. The run stands still before the gradient is small: the steps \
are too small, or the numbers are at the limit of their precision.
  objective      8 -> 8
  gradient norm  5.65685 -> 5.65685
  stop rule      expected decrease: not known yet
  learning rate  0
  steps          100 of at most 1000
  evaluations    101""",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports(name):
    make, expected = REPORTS[name]
    result = make()
    assert result.report() == repr(result) == str(result) == expected
    assert result.message == Status(int(result.status)).message
    assert result.message in expected.splitlines()[0]


def test_the_report_of_a_mini_batch_run():
    rules = jaxgd.target_value(-1), jaxgd.value_change(rtol=0.1, patience=2)
    result = fit(epochs=1.5, stop=jaxgd.any_of(*rules))
    first, value = result.history, float(result.value)
    assert result.report() == (
        "Stopped after 3 steps. The limit on steps was reached.\n"
        f"  objective      {first.value[0]:.6g} (first batch of 4) -> {value:.6g} "
        "(all 8 rows)\n"
        f"  gradient norm  {first.grad_norm[0]:.6g} (first batch of 4) -> "
        f"{float(result.grad_norm):.6g} (all 8 rows)\n"
        f"  stop rule      objective {result.checks.value[-1]:.6g} <= -1: does not "
        "hold\n"
        f"                 change of objective <= "
        f"{0.1 * result.checks.value[-1]:.6g}: nothing to compare with yet\n"
        "  learning rate  0.5\n"
        "  steps          3, the limit\n"
        "  rows           12 in steps of 4: 1.5 epochs of 8\n"
        "  evaluations    5"
    )


def test_the_report_of_bad_ends():
    diverged = descend(learning_rate=4.0)
    first = diverged.report().splitlines()[0]
    assert first == (
        f"Diverged after {diverged.steps} steps. An iterate was not finite; the last "
        "finite one is returned."
    )
    bad = jaxgd.minimize(bowl, jnp.full(2, jnp.nan), args=(2.0,), learning_rate=4.0)
    assert bad.report() == (
        "Stopped after 0 steps. The start itself is not finite. params[0] is NaN.\n"
        "  objective      nan\n"
        "  gradient norm  nan\n"
        "  stop rule      expected decrease: does not hold\n"
        "  learning rate  4\n"
        "  steps          0 of at most 1000\n"
        "  evaluations    1"
    )
    plain = descend(stop=None, max_steps=2).report().splitlines()
    assert plain[3] == "  stop rule      none"


def test_a_pass_left_out_is_not_reported_as_nan():
    result = fit(max_steps=3, final_evaluation=False)
    assert np.isnan(result.value)
    assert "nan" not in result.report()


# A pytree.


def test_it_is_a_pytree(single):
    leaves, treedef = jax.tree.flatten(single)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, jaxgd.Result)
    assert again.report() == single.report()
    assert jax.tree.structure(again) == treedef
    assert jax.block_until_ready(single).status == single.status
    on_host = jax.device_get(single)
    assert isinstance(on_host.value, np.ndarray | np.generic)
    assert on_host.report() == single.report()
    paths = {
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(single)
    }
    assert {".params", ".value", ".history.step", ".state.step"} <= paths


def test_it_goes_through_jit_and_vmap(single, lanes):
    @jax.jit
    def seen(result):
        return result.value + 1, result.converged, result

    value, converged, again = seen(single)
    assert value == single.value + 1
    assert converged.dtype == bool
    assert converged
    assert again.report() == single.report()
    norms = jax.vmap(lambda r: jnp.sum(r.params) + r.steps)(lanes)
    np.testing.assert_allclose(norms, lanes.params.sum(1) + lanes.steps, rtol=1e-6)
    chosen = jax.tree.map(lambda x: x[jnp.argmin(lanes.value)], lanes)
    assert chosen.report() == lanes[int(jnp.argmin(lanes.value))].report()


def test_converged_has_the_shape_of_status(single, lanes):
    assert single.converged.shape == ()
    assert bool(single.converged)
    assert lanes.status.tolist() == [1, 1, 5]
    assert lanes.converged.dtype == bool
    assert lanes.converged.tolist() == [True, True, False]
    every = replace(single, status=np.arange(12, dtype=np.int32).reshape(4, 3))
    assert every.converged.tolist() == [
        [False, True, True],
        [True, True, False],
        [False] * 3,
        [True, True, False],
    ]


def test_lanes(single, lanes):
    assert lanes[0].report() == single.report().replace("most 1000", "most 25").replace(
        "25 of at most 25", "25, the limit"
    )
    assert lanes[1].steps == 0
    assert lanes[1].history.step.shape == (0,)
    assert lanes[-1].status == lanes[2].status
    assert lanes[:2].status.shape == (2,)
    assert lanes[1:][1].status == Status.MAX_STEPS
    assert lanes[np.array([2, 0])].steps.tolist() == [25, 25]
    grid = jax.tree.map(lambda x: jnp.stack([x, x]), lanes)
    assert grid[1, 2].report() == grid[1][2].report() == lanes[2].report()
    with pytest.raises(TypeError, match="no lanes"):
        single[0]


def test_lanes_end(lanes):
    for lane in (3, -4):
        with pytest.raises(IndexError):
            lanes[lane]
    assert len(list(islice(lanes, 10))) == 3
    assert [int(one.status) for one in islice(lanes, 3)] == [1, 1, 5]


def test_representations(lanes):
    assert repr(lanes) == "Result of 3 runs, shape (3,): 2 GRADIENT_SMALL, 1 MAX_STEPS"
    said = []

    @jax.jit
    def traced(center):
        result = jaxgd.minimize(bowl, jnp.zeros(2), args=(center,), learning_rate=0.25)
        said.append(repr(result))
        return result.value

    traced(1.0)
    assert said[0].startswith("Result(inside jit, status=")
    for name in ("report", "to_dict"):
        with pytest.raises(TypeError, match=rf"result\[i\]\.{name}"):
            getattr(lanes, name)()
    with pytest.raises(TypeError, match=r"result\[i\]\.message"):
        _ = lanes.message


# Counts.


def test_rows_seen(single, lanes):
    assert single.rows_seen == 0  # no data
    assert type(single.rows_seen) is int
    result = fit(max_steps=3)
    assert result.rows_seen == 12
    for size in (4, 2**20):  # beyond 32 bits, and 2 * 32 of two lanes
        rows = place_at(
            first_place(2**20, size, 1, 0), jnp.int32(2**31 - 1), 2**20, size, 1
        )
        run = replace(result.state.run, rows=rows)
        long = replace(result, state=replace(result.state, run=run))
        assert long.rows_seen == size * (2**31 - 1)
        run = replace(run, rows=jnp.stack([rows, rows]))
        both = replace(result, state=replace(result.state, run=run))
        assert both.rows_seen == 2 * size * (2**31 - 1)
    whole = jaxgd.minimize(line, 0.0, DATA, learning_rate=0.5, max_steps=3)
    assert whole.rows_seen == 24


# Plain numbers.


def test_to_dict(single):
    plain = single.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["status"] == "GRADIENT_SMALL"
    assert plain["message"] == "The gradient is small."
    assert plain["converged"] is True
    assert plain["steps"] == 25
    assert plain["evaluations"] == 26
    assert plain["rows_seen"] == 0
    assert plain["aux"] is None
    assert plain["params"] == np.asarray(single.params).tolist()
    assert plain["value"] == float(single.value)
    assert plain["history"]["step"] == list(range(25))
    assert plain["history"]["learning_rate"] == [0.25] * 25
    assert plain["checks"]["step"] == []
    assert "state" not in plain


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclass
class Module:
    weight: jax.Array
    bias: jax.Array


def test_to_dict_of_every_dtype_and_container():
    def fun(p, args):
        z = p["z"]
        parts = [jnp.abs(z) ** 2, p["half"] ** 2, p["pair"].first ** 2]
        aux = {"z": z, "n": jnp.int8(3), "flag": z.real > 9, "half": p["half"]}
        return sum(jnp.sum(x).astype(jnp.float32) for x in parts) * args, aux

    start = {
        "z": np.array([1 + 2j], np.complex64),
        "half": jnp.full((1, 2), 1.5, jnp.bfloat16),
        "pair": Pair(jnp.float16(0.5), jnp.zeros(())),
        "nothing": None,
    }
    result = jaxgd.minimize(
        fun, start, args=(1.0,), learning_rate=0.1, max_steps=0, has_aux=True
    )
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["params"] == {
        "z": {"real": [1.0], "imag": [2.0]},
        "half": [[1.5, 1.5]],
        "pair": [0.5, 0.0],
        "nothing": None,
    }
    assert plain["aux"] == {
        "z": {"real": [1.0], "imag": [2.0]},
        "n": 3,
        "flag": [False],
        "half": [[1.5, 1.5]],
    }


def test_to_dict_of_a_module(single):
    module = Module(np.ones(2, np.float32), np.float32(3))
    text = json.dumps(replace(single, params={"layers": [module]}).to_dict())
    assert "[1.0, 1.0]" in text
    assert "3.0" in text
