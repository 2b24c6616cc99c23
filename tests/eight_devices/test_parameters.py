"""Contract: split parameters stay where they are, and so does optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import close

import jaxgd
from jaxgd._call.arguments import checked
from jaxgd._call.call import Call
from jaxgd._files.resume import begin
from jaxgd._loop.program import go

WORDS, WIDTH, N = 96, 8, 320
_rng = np.random.default_rng(7)
DATA = (
    _rng.integers(0, WORDS, N).astype(np.int32),
    _rng.normal(size=N).astype("f"),
)
START = {
    "table": 0.3 * _rng.normal(size=(WORDS, WIDTH)).astype("f"),
    "head": 0.3 * _rng.normal(size=WIDTH).astype("f"),
}


def loss(params, batch):
    words, y = batch
    return jnp.mean((params["table"][words] @ params["head"] - y) ** 2)


# Axes of the mesh, where the rows are, where the table is.
SPLITS = {
    "rows and table by one axis": (("a",), P("a"), P("a")),
    "table alone": (("a",), None, P("a")),
    "words by an axis of their own": (("a", "b"), P("a"), P("b")),
    "width by an axis of its own": (("a", "b"), P("a"), P(None, "b")),
    "both": (("a", "b"), P(("a", "b")), P("a", "b")),
}
MINI = {"batch_size": 32, "strata": 8, "max_steps": 60}
RUNS = {
    "SGD": {**MINI, "learning_rate": 0.1},
    "Adam": {**MINI, "optimizer": optax.adam, "learning_rate": 0.02},
    "no rate": MINI,
    "checks": {**MINI, "learning_rate": 0.1, "stop": jaxgd.value_change(1e-9)},
    "blocks": {**MINI, "learning_rate": 0.1, "microbatch_size": 16},
    "all rows": {"learning_rate": 0.1, "max_steps": 30},
    "all rows, no rate": {"max_steps": 12},
    "L-BFGS": {"optimizer": optax.lbfgs(), "max_steps": 5},
    "exactly": {**MINI, "learning_rate": 0.1, "stop": None},
}
CASES = [(run, "words by an axis of their own", AxisType.Auto) for run in RUNS]
CASES += [("Adam", split, AxisType.Auto) for split in SPLITS]
CASES += [("Adam", split, AxisType.Explicit) for split in SPLITS]
CASES += [("all rows, no rate", "both", AxisType.Explicit)]


def placed(split, kind):
    axes, of_rows, of_table = SPLITS[split]
    shape = (8,) if len(axes) == 1 else (4, 2)
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
    data = (
        DATA if of_rows is None else jax.device_put(DATA, NamedSharding(mesh, of_rows))
    )
    specs = {"table": of_table, "head": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return jax.device_put(START, shardings), data


def minimize(params, data, **how):
    return jaxgd.minimize(loss, params, data, **how)


def assert_as(params, leaves):
    """Every array of the form of a parameter lies as that parameter does."""
    found = 0
    for leaf in jax.tree.leaves(leaves):
        for own in (params["table"], params["head"]):
            more = leaf.ndim - own.ndim
            if more in (0, 1) and leaf.shape[more:] == own.shape:
                spec = P(*[None] * more, *own.sharding.spec)
                expected = NamedSharding(own.sharding.mesh, spec)
                assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
                found += 1
                break
    return found


@pytest.mark.parametrize(("run", "split", "kind"), dict.fromkeys(CASES))
def test_stay_where_they_are(run, split, kind):
    how = RUNS[run]
    params, data = placed(split, kind)
    many, one = minimize(params, data, **how), minimize(START, DATA, **how)
    by = 1e-3 if "rate" in run or run == "L-BFGS" else 1e-5
    close(many.params, one.params, by)
    close(many.value, one.value, by)
    assert many.status == one.status
    assert assert_as(params, many.params) == 2
    held = assert_as(params, many.state.opt_state)
    assert held >= {"Adam": 4, "no rate": 4, "L-BFGS": 10}.get(run, 0)
    for leaf in jax.tree.leaves((many.value, many.state.run.key, many.state.step)):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("way", ["in memory", "in a file", "in pieces"])
def test_a_cut_changes_no_bit(way, kind, tmp_path, count_compilations):
    params, data = placed("words by an axis of their own", kind)
    how = RUNS["Adam"] | {"max_steps": 40}
    whole = minimize(params, data, **how)
    if way == "in pieces":
        *_, last = jaxgd.iterate(loss, params, data, every=13, **how)
    else:
        state = minimize(params, data, **how | {"max_steps": 17}).state
        if way == "in a file":
            jaxgd.save(tmp_path / "state", state)
            state = jaxgd.load(tmp_path / "state")
        with count_compilations() as count:
            last = minimize(params, data, **how | {"max_steps": 23}, state=state)
        assert count() == 0
    assert assert_as(params, last.params) == 2
    for a, b in zip(*map(jax.tree.leaves, (whole.params, last.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_from_many_devices_to_one_and_back(tmp_path):
    params, data = placed("both", AxisType.Auto)
    how = RUNS["Adam"] | {"max_steps": 20}
    whole = minimize(START, DATA, **how | {"max_steps": 60})
    state = minimize(params, data, **how).state
    state = minimize(START, DATA, **how, state=state).state
    last = minimize(params, data, **how, state=state)
    close(last.params, whole.params)
    assert assert_as(params, last.state.opt_state) == 4


def test_no_device_holds_a_large_table():
    """Table, gradient, update and sum of gradients: an eighth of each."""
    words = 2**16
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    params = {"table": np.ones((words, 16), "f"), "head": np.ones(16, "f")}
    specs = {"table": NamedSharding(mesh, P("a")), "head": NamedSharding(mesh, P())}
    params = jax.device_put(params, specs)
    how = {**MINI, "optimizer": optax.sgd, "learning_rate": 0.1, "max_steps": 5}

    data = jax.device_put(DATA, NamedSharding(mesh, P("a")))
    spec, numbers, limit = checked(Call(loss, params, data, **how))
    state = begin(spec, numbers)
    compiled = go.lower(spec, numbers, state, limit).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * words * 16 * 4 / 8


def mesh_of(kind, shape, *axes):
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


@pytest.mark.parametrize("split", [((8,), "m"), ((4, 2), "m", "b")])
def test_on_a_mesh_of_their_own(split):
    """Of the devices of the rows, but other axes: neither is moved."""
    mesh = mesh_of(AxisType.Auto, *split)
    places = {"table": NamedSharding(mesh, P("m")), "head": NamedSharding(mesh, P())}
    params, how = jax.device_put(START, places), RUNS["Adam"]
    many = minimize(params, jaxgd.shard_rows(DATA), **how)
    close(many.params, minimize(START, DATA, **how).params)
    assert many.params["table"].sharding.is_equivalent_to(places["table"], 2)


@pytest.mark.parametrize("other", [AxisType.Auto, AxisType.Explicit])
def test_meshes_with_explicit_axes_do_not_mix(other):
    mesh, its = mesh_of(AxisType.Explicit, (8,), "m"), mesh_of(other, (8,), "x")
    params = jax.device_put(START, NamedSharding(mesh, P()))
    data = jax.device_put(DATA, NamedSharding(its, P("x")))
    with pytest.raises(ValueError, match=r"params.* must be on the mesh of data"):
        minimize(params, data, **RUNS["SGD"])


def test_a_history_of_their_shape_is_not_split():
    mesh = mesh_of(AxisType.Auto, (8,), "m")
    table = jax.device_put(np.ones((64,), "f"), NamedSharding(mesh, P("m")))

    def away(params, batch):
        return jnp.mean((params[batch[0] % 64] - batch[1]) ** 2)

    how = RUNS["checks"] | {"history_rows": 64, "max_steps": 5}
    spec, numbers, limit = checked(Call(away, table, DATA, **how))
    state = go(spec, numbers, begin(spec, numbers), limit).state
    assert not state.params.sharding.is_fully_replicated
    for leaf in jax.tree.leaves((state.run.history, state.run.checks)):
        assert leaf.sharding.is_fully_replicated
