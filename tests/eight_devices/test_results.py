"""Contract: what a run on many devices tells of itself is what one device tells."""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from layouts import FEW, close, minimize, same_result

import jaxgd
from jaxgd import problems

LINEAR = problems.least_squares(*problems.linear_data(160, 5))
LOGISTIC = problems.logistic(*problems.blobs(160, 6, 2), penalty=0.01)
# At zero the gradient of the intercept is rounding alone, which Adam makes a step of.
LOGISTIC = LOGISTIC._replace(init=jax.tree.map(lambda x: x + 0.1, LOGISTIC.init))
MLP = problems.mlp(*problems.blobs(160, 6, 3), sizes=(6, 8, 3))


class Case(NamedTuple):
    problem: object
    how: dict
    status: str = "MAX_STEPS"
    tolerance: float = 1e-5
    rough: bool = False  # whether rounding may shift the end by a step
    layout: str = ""  # else one in turn; two cases of one program share it


class Own(NamedTuple):
    fun: object
    init: object
    data: object


def with_aux(params, batch):
    x, y = batch
    off = x @ params["w"] + params["b"] - y
    aux = {
        "rows": off**2,
        "table": jnp.stack([off, off + 1], axis=1),
        "mean": jnp.mean(jnp.abs(off)),
        "count": jnp.sum(off > 0),
        "all": jnp.all(jnp.isfinite(off)),
    }
    return jnp.mean(off**2), aux


def dropped(params, batch, key):
    x, y = batch
    keep = jax.random.bernoulli(key, 0.8, (x.shape[1],))
    return jnp.mean((x * keep @ params["w"] + params["b"] - y) ** 2)


def noisy_rows(params, batch, key):
    """Each row of a batch gets noise of its own."""
    x, y = batch
    x = x + 0.1 * jax.random.normal(key, x.shape)
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def waves(params, batch):
    x, y = batch
    return jnp.mean(jnp.abs(x @ params - y) ** 2)


def weighted(weight, params, batch, penalty):
    x, y = batch
    off = x @ params["w"] + params["b"] - y
    return weight * jnp.mean(off**2) + penalty["l2"] * jnp.sum(params["w"] ** 2)


START = {"w": np.zeros(5, "f"), "b": np.float32(0)}


def of(fun, init=START, data=LINEAR.data):
    return Own(fun, init, data)


def as_dtype(problem, dtype):
    cast = lambda x: np.asarray(x, dtype) if x.dtype.kind == "f" else x
    return of(
        problem.fun,
        jax.tree.map(lambda x: np.asarray(x, dtype), problem.init),
        jax.tree.map(cast, problem.data),
    )


@lru_cache
def complex_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 3)) + 1j * rng.normal(size=(160, 3))
    return x.astype("c8"), (x @ np.array([1, 1j, 2 - 1j])).astype("c8")


BATCH = {"learning_rate": 0.1, "max_steps": 60}
MINI = {**BATCH, "batch_size": 24, "key": 7}
BAD = jax.tree.map(lambda x: np.full_like(x, np.nan), LINEAR.init)

CASES = {
    "value settles": Case(
        LINEAR,
        {**MINI, "max_steps": 400, "stop": jaxgd.value_change(rtol=1e-2, patience=2)},
        "VALUE_SETTLED",
    ),
    "full gradient": Case(
        LOGISTIC,
        {**MINI, "max_steps": 900, "stop": jaxgd.gradient_norm(atol=0.05)},
        "GRADIENT_SMALL",
    ),
    "target": Case(
        LOGISTIC,
        {
            "optimizer": optax.sgd,
            "hyperparams": {"momentum": 0.9},
            "learning_rate": 0.05,
            "history_rows": 5,
            "stop": jaxgd.target_value(0.4),
        },
        "TARGET_REACHED",
    ),
    "no rate, batch": Case(
        LOGISTIC, {"max_steps": 300}, "GRADIENT_SMALL", 1e-3, True, FEW[0]
    ),
    "no rate, batch, cut": Case(
        LOGISTIC, {"max_steps": 12}, tolerance=1e-4, layout=FEW[0]
    ),
    "no rate, mini-batch": Case(MLP, {**MINI, "learning_rate": None}, tolerance=1e-4),
    "L-BFGS": Case(
        LOGISTIC,
        {"optimizer": optax.lbfgs(), "max_steps": 100},
        "GRADIENT_SMALL",
        1e-3,
        rough=True,
    ),
    "blocks, batch": Case(LINEAR, {**BATCH, "microbatch_size": 24}),
    "blocks, mini-batch": Case(MLP, {**MINI, "microbatch_size": 8, "epochs": 2.5}),
    "aux, batch": Case(of(with_aux), {**BATCH, "has_aux": True}),
    "aux, blocks": Case(of(with_aux), {**MINI, "has_aux": True, "microbatch_size": 16}),
    "key, batch": Case(of(noisy_rows), {**BATCH, "with_key": True}),
    "key, mini-batch": Case(
        of(dropped), {**MINI, "with_key": True, "final_evaluation": False}
    ),
    "diverges, batch": Case(
        LINEAR, {"learning_rate": 1e6, "max_steps": 200}, "DIVERGED"
    ),
    "diverges, mini-batch": Case(
        LINEAR,
        {**MINI, "learning_rate": 1e6, "max_steps": 200},
        "DIVERGED",
        layout=FEW[2],
    ),
    "NaN at the start": Case(of(LINEAR.fun, BAD), MINI, "NON_FINITE", layout=FEW[2]),
    "complex": Case(of(waves, np.zeros(3, "c8"), complex_data()), MINI),
    "bfloat16": Case(
        as_dtype(LINEAR, jnp.bfloat16), {**MINI, "max_steps": 20}, "MAX_STEPS", 0.05
    ),
    "static scan": Case(MLP, {**MINI, "optimizer": optax.adam, "stop": None}),
    "schedule-free": Case(
        LOGISTIC,
        {
            **MINI,
            "optimizer": optax.contrib.schedule_free_adamw,
            "learning_rate": optax.linear_schedule(0.01, 0.1, 30),
        },
    ),
    "arrays in fun and args": Case(
        of(Partial(weighted, jnp.float32(0.5))), {**MINI, "args": ({"l2": 0.1},)}
    ),
    "no step": Case(LINEAR, {**MINI, "max_steps": 0}, layout=FEW[2]),
}


@pytest.mark.parametrize(("place", "name"), list(enumerate(CASES)))
def test_result(place, name):
    case = CASES[name]
    fun, init, data = case.problem.fun, case.problem.init, case.problem.data
    if "epochs" in case.how:
        case.how.pop("max_steps", None)
    one = minimize("one device", fun, init, data, **case.how)
    layout = case.layout or FEW[place % len(FEW)]
    many = minimize(layout, fun, init, data, **case.how)
    assert jaxgd.Status(int(one.status)) == jaxgd.Status[case.status]
    for leaf in jax.tree.leaves(many):
        assert not isinstance(leaf, jax.Array) or leaf.is_fully_replicated
    if case.rough:
        names = ("status", "params", "value")
        close(
            *([getattr(r, name) for name in names] for r in (many, one)), case.tolerance
        )
    else:
        same_result(many, one, case.tolerance)


def test_float64(x64):
    own = as_dtype(LOGISTIC, np.float64)
    runs = [
        minimize(layout, own.fun, own.init, own.data, **MINI)
        for layout in ("one device", "8 devices")
    ]
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(runs[1].params))
    same_result(runs[1], runs[0], 1e-13)
    close(runs[1].params, runs[0].params, 1e-13)
