"""States in files: the same bits, in another process too, and no file half written."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple
from copy import copy
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saved_runs
from optax import contrib
from regression import START, X, Y, least_squares

import jaxgd
from jaxgd import Check, Status
from jaxgd._files import checkpoint, resume
from jaxgd._files.resume import Node
from jaxgd._loop.memory import Run
from jaxgd._loop.step import State
from jaxgd._result.history import Record
from jaxgd._stop.judge import Fall, Watch

pytestmark = pytest.mark.thin(4)

HERE = Path(__file__).parent


def plain(leaf):
    """(dtype, shape, bytes) of a leaf."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).data
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def assert_same_leaves(a, b):
    assert list(map(plain, jax.tree.leaves(a))) == list(map(plain, jax.tree.leaves(b)))


def assert_same_result(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert_same_leaves(a, b)


def passed(state, folder):
    """``state`` by way of a file."""
    jaxgd.save(folder / "state", state)
    return jaxgd.load(folder / "state")


def state_of(params) -> State:
    """A state of a manual loop that never saw a device."""
    return State(params, (), np.int32(0))


# Dtypes and containers

ARRAYS = {
    **{
        name: (lambda name=name: np.linspace(-2, 2, 6).reshape(2, 3).astype(name))
        for name in ("float16", "float32", "float64", "complex64", "complex128")
    },
    **{
        f"{sign}int{bits}": (
            lambda sign=sign, bits=bits: np.arange(6).astype(f"{sign}int{bits}")
        )
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    **{
        name: (lambda name=name: jnp.linspace(-2, 2, 5).astype(name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")
    },
    "bool": lambda: np.array([[True], [False]]),
    "big_endian": lambda: np.arange(3, dtype=">f4"),
    "strided": lambda: np.arange(12.0, dtype="f").reshape(3, 4).T[::2],
    "scalar": lambda: jnp.float32(3),
    "bfloat16_scalar": lambda: jnp.bfloat16(3),
    "empty": lambda: np.zeros((0, 3), np.float32),
    "nan_with_payload": lambda: np.array([0x7FC00123, 0xFFC00000], "u4").view("f4"),
    "threefry": lambda: jax.random.key(3),
    "threefry_many": lambda: jax.random.split(jax.random.key(3), (2, 2)),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
    "raw_key": lambda: jax.random.PRNGKey(3),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_keep_dtype_shape_and_bits(name, tmp_path):
    array = ARRAYS[name]()
    loaded = passed(state_of(array), tmp_path).params
    if name == "big_endian":
        array = array.astype("f4")
    assert loaded.dtype == array.dtype
    assert plain(loaded) == plain(array)


def test_doubles_survive_as_jax_arrays_and_without_x64(x64, tmp_path):
    state = state_of({"z": jnp.array([1 + 1e-15j]), "x": jnp.float64(1 / 3)})
    jaxgd.save(tmp_path / "state", state)
    with jax.enable_x64(False):
        loaded = jaxgd.load(tmp_path / "state")
    assert_same_leaves(loaded, state)


Pair = namedtuple("Pair", "left right")


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    weight: Any
    bias: Any = None


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A class that names none of its parts."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, aux, parts):
        return cls(*parts)


def one(number):
    return np.full((2,), number, np.float32)


CONTAINERS = {
    "leaf": one(1),
    "nested": {"b": [one(1), (one(2), None)], "a": {"c": one(3)}, "d": {}},
    "numbered": {10: one(1), 9: one(2), -1: one(3)},
    "text": {"": one(1), "a/b": one(2), "é\ud800": one(3), "__class__": one(4)},
    "none": None,
    "empty": ((), [], {}),
}
OTHERS = {
    "named_tuple": (Pair(one(1), [one(2)]), "Pair", (".left", ".right")),
    "dataclass": (Layer(one(1)), "Layer", (".weight", ".bias")),
    "ordered": (
        OrderedDict(b=one(1), a=one(2)),
        "OrderedDict",
        ("['b']", "['a']"),
    ),
    "opaque": (
        Opaque(one(1), one(2)),
        "Opaque",
        ("[<flat index 0>]", "[<flat index 1>]"),
    ),
    "tuple_keys": ({(0, "a"): one(1)}, "dict", ("[(0, 'a')]",)),
    "partial": (jax.tree_util.Partial(max, one(1)), "Partial", None),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_plain_containers_come_back(name, tmp_path):
    params = CONTAINERS[name]
    loaded = passed(state_of(params), tmp_path)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert_same_leaves(loaded.params, params)


@pytest.mark.parametrize("name", OTHERS)
def test_other_containers_come_back_as_nodes(name, tmp_path):
    params, kind, names = OTHERS[name]
    loaded = passed(state_of([one(0), params, one(9)]), tmp_path).params
    node = loaded[1]
    assert isinstance(node, Node)
    assert node.kind == kind
    assert names is None or node.names == names
    assert_same_leaves(loaded, [one(0), params, one(9)])
    back = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(node))
    assert_same_leaves(back, params)
    if names is not None:  # paths read as those of the class itself
        paths = [
            [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)]
            for t in (node, params)
        ]
        assert paths[0] == paths[1]
    again = passed(state_of(node), tmp_path).params
    assert jax.tree.structure(again) == jax.tree.structure(node)


def test_a_file_is_a_zip_of_arrays_and_a_manifest(tmp_path):
    jaxgd.save(tmp_path / "a", state_of({"w": one(1)}))
    jaxgd.save(str(tmp_path / "b"), state_of({"w": one(1)}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["0"], one(1))
        assert file["0"].dtype == np.float32
        assert file["1"].shape == ()
        manifest = json.loads(file["manifest.json"])
    assert manifest["leaves"] == [
        {"path": ".params['w']", "dtype": "float32", "shape": [2]},
        {"path": ".step", "dtype": "int32", "shape": []},
    ]
    assert manifest["format"] == "jaxgd state"
    assert manifest["version"] == 2
    assert manifest["jaxgd"] == jaxgd.__version__


def test_files_beyond_32_bit_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    state = state_of([np.zeros(10, "f"), np.arange(1000)])
    loaded = passed(state, tmp_path)
    assert b"PK\x06\x06" in (tmp_path / "state").read_bytes()
    assert_same_leaves(loaded, state)


# Runs that go on


def settled(check, patience):
    """A stop rule of one's own, with a memory of one's own."""
    return Pair(check.value, Layer({"patience": patience}, jnp.int32(0)))


def still_settled(memory, check):
    near = jnp.abs(check.value - memory.left) <= 1e-3
    count = jnp.where(near, memory.right.bias + 1, 0)
    new = Pair(check.value, Layer(memory.right.weight, count))
    return new, count >= memory.right.weight["patience"]


OWN = jaxgd.StopRule(
    lambda check: settled(check, jnp.float32(30)), still_settled, Status.VALUE_SETTLED
)
STOPS = {
    "auto": "auto",
    "value": jaxgd.value_change(1e-7, patience=50),
    "any": jaxgd.any_of(jaxgd.gradient_norm(1e-9), jaxgd.params_change(1e-9)),
    "own": OWN,
    "fixed": None,
}
RULES = {
    "adam": {"optimizer": optax.adam, "learning_rate": 0.05},
    "momentum": {"optimizer": optax.sgd(0.03, momentum=0.9)},
    "lbfgs": {"optimizer": optax.lbfgs(memory_size=3)},
    "adamw": {"optimizer": optax.adamw(optax.cosine_decay_schedule(0.1, 40))},
    "inject": {"optimizer": optax.inject_hyperparams(optax.adam)(learning_rate=0.05)},
    "multi": {"optimizer": optax.MultiSteps(optax.adam(0.05), 3)},
    "masked": {"optimizer": optax.masked(optax.adam(0.05), {"w": True, "b": False})},
    "default": {},  # quasi-Newton steps, or the parabola along each
    "schedule_free": {"optimizer": contrib.schedule_free_adamw(0.05)},
}
RUNS = {
    f"{rule}-{size}-{stop}": (rule, size, stop)
    for (rule, size), stop in zip(
        itertools.product(RULES, (None, 5)), itertools.cycle(STOPS), strict=False
    )
}


def call(name, steps, **more):
    rule, size, stop = RUNS[name]
    return jaxgd.minimize(
        least_squares,
        START,
        (X, Y),
        batch_size=size,
        stop=STOPS[stop],
        max_steps=steps,
        history_rows=13,
        **RULES[rule],
        **more,
    )


def test_the_runs_cover_every_stop_rule_in_both_regimes():
    assert {(size, stop) for _, size, stop in RUNS.values()} == set(
        itertools.product((None, 5), STOPS)
    )


@pytest.mark.thin(6)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_a_file(name, tmp_path, count_compilations):
    half = call(name, 17, key=3)
    with count_compilations() as count:
        expected = call(name, 17, state=half.state)
        loaded = passed(half.state, tmp_path)
        result = call(name, 17, state=loaded)
        assert count() == 0
    assert int(result.steps) > 0
    assert_same_leaves(loaded, half.state)
    assert_same_result(result, expected)
    if RUNS[name][2] != "fixed":  # another length is another program there
        assert_same_result(result, call(name, 34, key=3))


def resume_here(path, target, name):
    """What the other process does."""
    result = call(name, 17, state=jaxgd.load(path))
    jaxgd.save(target, result.state)


def in_another_process(code, *arguments, python=sys.executable, **settings):
    # The XLA of another version may not know the flags of this one.
    own = {} if python == sys.executable else {"XLA_FLAGS": ""}
    return subprocess.run(
        [python, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=HERE,
        env={
            **os.environ,
            **own,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        },
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    ).stdout


@pytest.mark.full
def test_runs_go_on_in_a_new_process(tmp_path):
    names = [n for n in RUNS if "own" in n][:3]
    assert {RUNS[name][1] for name in names} == {None, 5}
    for i, name in enumerate(names):
        jaxgd.save(tmp_path / f"{i}.half", call(name, 17, key=3).state)
    code = (
        "import sys, test_checkpoint as t\n"
        "for i, name in enumerate(sys.argv[2:]):\n"
        "    path = f'{sys.argv[1]}/{i}'\n"
        "    t.resume_here(path + '.half', path + '.whole', name)\n"
    )
    in_another_process(code, tmp_path, *names)
    for i, name in enumerate(names):
        there = jaxgd.load(tmp_path / f"{i}.whole")
        assert_same_leaves(there, call(name, 34, key=3).state)


def test_a_run_that_has_ended_has_ended(tmp_path, count_compilations):
    rule = jaxgd.value_change(0.1, patience=2)
    setting = {"learning_rate": 0.1, "stop": rule}
    ended = jaxgd.minimize(least_squares, START, (X, Y), batch_size=5, **setting)
    assert ended.status == Status.VALUE_SETTLED
    loaded = passed(ended.state, tmp_path)
    with count_compilations() as count:
        again = jaxgd.minimize(
            least_squares, START, (X, Y), batch_size=5, state=loaded, **setting
        )
        assert count() == 0
    assert again.status == Status.VALUE_SETTLED
    assert_same_leaves(again.state, ended.state)
    setting["stop"] = jaxgd.target_value(-1.0)  # fresh memory: it goes on
    other = jaxgd.minimize(
        least_squares, START, (X, Y), batch_size=5, state=loaded, epochs=1, **setting
    )
    assert other.steps > ended.steps


def test_params_of_ones_own_classes(tmp_path):
    def fun(p, batch):
        return least_squares({"w": p.left, "b": p.right.weight}, batch)

    start = Pair(START["w"], Layer(START["b"]))
    setting = {"optimizer": optax.adam(0.1), "max_steps": 9}
    half = jaxgd.minimize(fun, start, (X, Y), **setting)
    expected = jaxgd.minimize(fun, start, (X, Y), state=half.state, **setting)
    loaded = passed(half.state, tmp_path)
    result = jaxgd.minimize(fun, start, (X, Y), state=loaded, **setting)
    assert isinstance(result.params.right, Layer)
    assert_same_result(result, expected)


def test_lanes(tmp_path):
    def one(rate, state=None):
        return jaxgd.minimize(
            least_squares,
            START,
            (X, Y),
            learning_rate=rate,
            max_steps=6,
            state=state,
            stop=None,
            history_rows=4,
        )

    rates = jnp.array([0.1, 0.01])
    half = jax.vmap(one)(rates)
    loaded = passed(half.state, tmp_path)
    assert_same_result(jax.vmap(one)(rates, loaded), jax.vmap(one)(rates, half.state))
    lane = jax.tree.map(lambda x: x[1], loaded)
    assert_same_result(one(0.01, lane), one(0.01, half[1].state))


def test_params_bound_to_a_device(tmp_path, count_compilations):
    setting = {"optimizer": optax.adam, "learning_rate": 0.1, "max_steps": 5}
    start = jax.device_put(START, jax.devices()[0])
    half = jaxgd.minimize(least_squares, start, (X, Y), **setting)
    expected = jaxgd.minimize(least_squares, start, (X, Y), state=half.state, **setting)
    loaded = passed(half.state, tmp_path)
    with count_compilations() as count:
        result = jaxgd.minimize(least_squares, start, (X, Y), state=loaded, **setting)
        assert count() == 0
    assert_same_result(result, expected)


def test_a_manual_loop_goes_on(tmp_path):
    optimizer = optax.chain(optax.clip(1.0), optax.adam(0.1))
    step = jaxgd.make_step(least_squares, optimizer)
    scan = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: step(s, (X, Y)), state, length=5)
    )
    fresh = jaxgd.init_state(START, optimizer)
    half, _ = scan(fresh)
    loaded = passed(half, tmp_path)
    assert loaded.run is None
    loaded = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(loaded))
    (whole, infos), (expected, likes) = scan(loaded), scan(half)
    assert_same_result((whole, infos), (expected, likes))


# Other versions of the library, of Python and of JAX

BY_0_1_0 = json.loads((saved_runs.FILES / "0.1.0.json").read_text())


def assert_ends_as(result, told):
    """Where a run of another version ended, up to rounding."""
    came = saved_runs.uncut(result)
    for name in ("steps", "status", "evaluations"):
        assert came[name] == told[name], name
    np.testing.assert_allclose(came["value"], told["value"], rtol=1e-5)
    assert came["params"].keys() == told["params"].keys()
    for name, param in told["params"].items():
        np.testing.assert_allclose(came["params"][name], param, atol=1e-5, rtol=1e-5)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", saved_runs.RUNS)
def test_files_of_version_0_1_0_go_on(name, tmp_path):
    """``python tests/saved_runs.py tests/files`` of 0.1.0 wrote the files."""
    cut, run = saved_runs.RUNS[name]
    state = jaxgd.load(saved_runs.FILES / f"{name}-0.1.0.jaxgd")
    assert state.step == cut
    assert state.run.rule[0] is None  # its bytecode tells no one anything
    memory = jax.tree.leaves(state.run.watch.memory)
    assert 3 in [x for x in memory if x.shape == ()]  # checks in a row, so far
    assert_ends_as(run(1000, state), BY_0_1_0[name])
    assert_ends_as(run(1000, passed(state, tmp_path)), BY_0_1_0[name])
    assert_ends_as(run(1000), BY_0_1_0[name])  # this version cuts nothing shorter


OTHER_RULES = {
    "number": jaxgd.any_of(
        jaxgd.value_change(rtol=0.0116, patience=8), jaxgd.gradient_norm(atol=1e-7)
    ),
    "memory": jaxgd.any_of(
        jaxgd.params_change(rtol=0.0115, patience=8), jaxgd.gradient_norm(atol=1e-7)
    ),
}


@pytest.mark.parametrize("name", OTHER_RULES)
def test_another_rule_starts_afresh_from_a_file_of_version_0_1_0(name):
    state = jaxgd.load(saved_runs.FILES / "batch-0.1.0.jaxgd")
    rule = OTHER_RULES[name]
    result = saved_runs.call(1000, state, learning_rate=0.1, stop=rule)
    bare = replace(state, run=replace(state.run, watch=None, rule=None, status=None))
    expected = saved_runs.call(1000, bare, learning_rate=0.1, stop=rule)
    assert_same_result(result, expected)
    assert result.steps > BY_0_1_0["batch"]["steps"]


def without(kind, *names):
    """A class of the library, as a version would have it that lacks some fields."""
    kept = [name for name in resume.fields_of(kind) if name not in names]
    return of_another_version(kind, kept)


def of_another_version(kind, names):
    other = jax.tree_util.register_dataclass(make_dataclass(kind.__name__, names))
    other.__qualname__ = kind.__name__
    return other


def saved_by_another_version(path, state, classes, values, monkeypatch):
    """Saves ``state`` with its containers of some names made of ``classes``."""

    def remade(part):
        if type(part) not in resume.OWN.values():
            return part
        fields = {n: getattr(part, n) for n in resume.fields_of(type(part))}
        fields = {n: remade(x) for n, x in fields.items()} | values
        kind = classes.get(type(part).__name__, type(part))
        return kind(**{n: fields[n] for n in resume.fields_of(kind)})

    remade = remade(state)
    with monkeypatch.context() as patch:
        for name, kind in classes.items():
            patch.setitem(resume.OWN, name, kind)
        leaves = []
        tree = checkpoint._described(remade, "", leaves)
        checkpoint._write_file(os.fsdecode(path), tree, leaves)


# Fields that a file may lack without harm to the step where the rule stops.
LACKING = {
    "met": (Run, ["met"]),
    "arrived": (Run, ["arrived"]),
    "seen": (Run, ["seen"]),
    "anchor": (Run, ["anchor"]),
    "history": (Run, ["history"]),
    "counters": (Run, ["evaluations", "met", "history"]),
    "still": (Watch, ["still"]),
    "extremes": (Watch, ["lowest", "largest"]),
    "grad_max": (Check, ["grad_max"]),
    "rows": (Record, ["count"]),
}


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("run", ["batch", "mini_batch"])
def test_a_field_that_a_file_lacks_starts_afresh(run, name, tmp_path, monkeypatch):
    kind, names = LACKING[name]
    cut, go = saved_runs.RUNS[run]
    state = go(cut).state
    older = {kind.__name__: without(kind, *names)}
    saved_by_another_version(tmp_path / "state", state, older, {}, monkeypatch)
    loaded = jaxgd.load(tmp_path / "state")
    whole = jax.tree.structure(passed(state, tmp_path))
    assert (jax.tree.structure(loaded) == whole) == ((run, name) == ("batch", "anchor"))
    if kind is Run:
        assert [getattr(loaded.run, name) for name in names] == [None] * len(names)
    result = go(1000, loaded)
    assert jax.tree.structure(result.state) == jax.tree.structure(state)
    if (run, name) == ("mini_batch", "anchor"):  # the change is that of one check
        assert cut < result.steps < 200
        return
    whole = go(1000)
    assert result.steps == whole.steps
    assert_same_leaves(result.params, whole.params)
    taken = 0 if "evaluations" not in names else int(state.run.evaluations)
    assert result.evaluations == whole.evaluations - taken
    if "history" not in names and name != "rows":
        assert_same_leaves(result.history, whole.history)


def test_a_state_without_params_is_refused(tmp_path, monkeypatch):
    state = saved_runs.batch(3).state
    older = {"State": without(State, "params")}
    saved_by_another_version(tmp_path / "state", state, older, {}, monkeypatch)
    loaded = jaxgd.load(tmp_path / "state")
    assert loaded.params is None
    with pytest.raises(ValueError, match=r"^state\.params is of another problem"):
        saved_runs.batch(3, loaded)


Later = of_another_version(Check, ["x", "y"])


@pytest.mark.parametrize("run", ["batch", "mini_batch"])
def test_a_field_that_is_not_known_is_passed_over(run, tmp_path, monkeypatch):
    cut, go = saved_runs.RUNS[run]
    state = go(cut).state
    later = {
        kind.__name__: of_another_version(
            kind, ["first", *resume.fields_of(kind), "last", "nothing"]
        )
        for kind in (State, Run, Watch, Fall, Check, Record)
    }
    Later.__qualname__ = "Later"
    later["Later"] = Later
    values = {
        "first": {"a": [one(1), None, (one(2),)], "b": Pair(one(3), Later(one(4), {}))},
        "last": jax.random.key(0),
        "nothing": None,
    }
    path = tmp_path / "state"
    saved_by_another_version(path, state, later, values, monkeypatch)

    def of_dtypes_to_come(manifest, _):
        for leaf in manifest["leaves"]:
            if "first" in leaf["path"]:
                leaf.update(dtype="float256", shape="many", later=True)

    edit(path, of_dtypes_to_come)
    loaded = jaxgd.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(passed(state, tmp_path))
    assert_same_leaves(loaded, state)
    assert_same_result(go(1000, loaded), go(1000, state))


def test_members_and_keys_that_are_not_known_are_passed_over(tmp_path):
    def more(manifest, members):
        members["../../evil"] = b"x"
        members["3.npy"] = b"of no leaf"
        manifest["later"] = {"parts": [1, 2, 3]}
        manifest["leaves"][0]["later"] = 3
        manifest["tree"]["later"] = [[]]

    change(tmp_path / "a", lambda *_: None)
    change(tmp_path / "b", more)
    with zipfile.ZipFile(tmp_path / "b", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notes.txt", "of mine " * 1000)
    a, b = (jaxgd.load(tmp_path / name) for name in "ab")
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert_same_leaves(a, b)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_run_goes_on_in_another_version_of_python_and_jax(tmp_path):
    """``JAXGD_OTHER_PYTHON`` is its interpreter, and has JAX and optax."""
    python = os.environ.get("JAXGD_OTHER_PYTHON")
    if not python:
        pytest.skip("JAXGD_OTHER_PYTHON names no interpreter of another version")
    code = (
        "import json, sys, jax, saved_runs\n"
        "steps = saved_runs.cut_and_go_on(sys.argv[1], 'there', 'here')\n"
        "print(json.dumps([[*sys.version_info[:2]], jax.__version__, steps]))"
    )
    here = saved_runs.cut_and_go_on(tmp_path, "here", None)
    told = in_another_process(code, tmp_path, python=python)
    version, jax_version, there = json.loads(told)
    assert (version, jax_version) != ([*sys.version_info[:2]], jax.__version__)
    again = saved_runs.cut_and_go_on(tmp_path, "here", "there")
    # No step depends on rounding, so all four agree.
    assert here["uncut"] == there["uncut"] == there["resumed"] == again["resumed"]


# What does not fit is named


def network(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["w1"]) @ p["w2"] - y) ** 2)


def weights(width, **more):
    return {"w1": jnp.ones((4, width)) / 3, "w2": jnp.ones(width), **more}


def train(width=3, state=None, **setting):
    setting = {"learning_rate": 0.1, "optimizer": optax.adam, **setting}
    params = setting.pop("params", weights(width))
    return jaxgd.minimize(network, params, (X, Y), state=state, max_steps=2, **setting)


MISMATCHES = {
    "width": (
        {"width": 5},
        "state.params['w1'] is of another problem: expected float32[4, 5], got "
        "float32[4, 3];",
    ),
    "dtype": (
        {"params": {**weights(3), "w2": jnp.ones(3, jnp.bfloat16)}},
        "state.params['w2'] is of another problem: expected bfloat16[3], got "
        "float32[3];",
    ),
    "more": (
        {"params": weights(3, b={"c": jnp.ones(2)})},
        "state.params['b'] is of another problem: expected dict(['c']), got nothing;",
    ),
    "fewer": (
        {"params": {"w1": jnp.ones((4, 3))}},
        "state.params['w2'] is of another problem: expected nothing, got float32[3];",
    ),
    "container": (
        {"params": [jnp.ones(3)]},
        "state.params is of another problem: expected list([0]), got dict(['w1'], "
        "['w2']);",
    ),
    "leaf": (
        {"params": {"w1": [jnp.ones(1)], "w2": jnp.ones(3)}},
        "state.params['w1'] is of another problem: expected list([0]), got "
        "float32[4, 3];",
    ),
    "rule_of_equal_shapes": (
        {"optimizer": optax.adabelief},
        "state.opt_state[0] is of another problem: expected ScaleByBeliefState(.count, "
        ".mu, .nu), got ScaleByAdamState(.count, .mu, .nu);",
    ),
    "rule": (
        {"optimizer": optax.sgd, "hyperparams": {"momentum": 0.9}},
        "state.opt_state[0] is of another problem: expected TraceState(.trace), got "
        "ScaleByAdamState(.count, .mu, .nu);",
    ),
    "schedule": (
        {"learning_rate": optax.constant_schedule(0.1)},
        "state.opt_state[1] is of another problem: expected ScaleByScheduleState("
        ".count), got EmptyState();",
    ),
    "dtype_of_moments": (
        {"optimizer": lambda rate: optax.adam(rate, mu_dtype=jnp.bfloat16)},
        "state.opt_state[0].mu['w1'] is of another problem: expected bfloat16[4, 3], "
        "got float32[4, 3];",
    ),
    "history": (
        {"history_rows": 7},
        "state.run.history has room for 1000 rows, this call for 7: pass the "
        "history_rows of the first run",
    ),
    "regime": (
        {"batch_size": 5},
        "state.run.checks has room for 0 rows, this call for 1000: pass the",
    ),
}


@pytest.fixture(scope="module")
def trained():
    return train().state


@pytest.mark.parametrize("way", ["memory", "file"])
@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_names_the_first_part_that_differs(name, way, trained, tmp_path):
    setting, message = MISMATCHES[name]

    def fun(p, batch):  # takes all of these params
        return sum(jnp.sum(jnp.square(x.astype("f"))) for x in jax.tree.leaves(p))

    state = trained if way == "memory" else passed(trained, tmp_path)
    setting = {"optimizer": optax.adam, "learning_rate": 0.1, **setting}
    params = setting.pop("params", weights(setting.pop("width", 3)))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        jaxgd.minimize(fun, params, (X, Y), state=state, **setting)


def test_doubles_do_not_turn_into_floats_unnoticed(trained, tmp_path):
    doubles = {name: np.asarray(w, "f8") for name, w in trained.params.items()}
    loaded = passed(replace(trained, params=doubles), tmp_path)
    with pytest.raises(ValueError, match=r"params\['w1'\].*expected float32.*float64"):
        train(state=loaded)


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ({"history": one(1)}, "state.run.history"),
        ({"checks": {"step": one(1)}}, "state.run.checks"),
        ({"evaluations": np.float32(1)}, "state.run.evaluations"),
        ({"status": one(1)}, "state.run.status"),
        ({"checked": ()}, "state.run.checked"),
    ],
)
def test_a_run_that_no_run_leaves_is_refused(parts, path, trained, tmp_path):
    run = replace(trained.run, **parts)
    loaded = passed(replace(trained, run=run), tmp_path)
    with pytest.raises(ValueError, match=f"^{path} (is of another|has room)"):
        train(state=loaded)


def test_memory_of_another_form_is_another_rules(trained, tmp_path):
    parts = {"watch": Opaque(one(1)), "seen": (), "met": (), "arrived": one(1)}
    run = replace(trained.run, **parts)
    loaded = passed(replace(trained, run=run), tmp_path)
    assert train(state=loaded).steps == 4


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda: call("adam-None-auto", 2), "pass result.state"),
        (lambda: {"params": one(1)}, "got one of type dict: pass a Result.state"),
        (lambda: state_of({"name": "adam"}), "type str and dtype <U4 as state.params"),
        (lambda: state_of(np.array([object()])), "dtype object as state.params"),
        (lambda: state_of(np.array(["x"])), "type ndarray and dtype <U1"),
    ],
)
def test_what_is_no_state_is_not_saved(thing, message, tmp_path):
    with pytest.raises(TypeError) as error:
        jaxgd.save(tmp_path / "state", thing())
    assert message in str(error.value)
    assert not os.listdir(tmp_path)


def test_traced_states_are_not_saved(tmp_path):
    def inside(x):
        jaxgd.save(tmp_path / "state", state_of(x))
        return x

    with pytest.raises(TypeError, match="traced values: save outside jit"):
        jax.jit(inside)(one(1))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "call", [jaxgd.load, lambda path: jaxgd.save(path, state_of(1.0))]
)
def test_a_path_is_text_or_a_path(call):
    with pytest.raises(TypeError):
        call(3)


# All or nothing


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "fault", "error"),
    [
        ("fsync", no_space, OSError),
        ("replace", no_space, OSError),
        ("replace", interrupt, KeyboardInterrupt),
        ("fsync", interrupt, KeyboardInterrupt),
    ],
)
def test_a_fault_leaves_the_old_file(name, fault, error, tmp_path, monkeypatch):
    jaxgd.save(tmp_path / "state", state_of(one(1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fault)
        with pytest.raises(error):
            jaxgd.save(tmp_path / "state", state_of(one(2)))
    assert os.listdir(tmp_path) == ["state"]
    np.testing.assert_array_equal(jaxgd.load(tmp_path / "state").params, one(1))


@pytest.mark.parametrize("room", [0, 10, 300, 5000, 30_000])
def test_a_full_disk_leaves_the_old_file(room, tmp_path):
    jaxgd.save(tmp_path / "state", state_of(one(1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            jaxgd.save(tmp_path / "state", state_of(np.zeros(10_000, "f")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["state"]
    np.testing.assert_array_equal(jaxgd.load(tmp_path / "state").params, one(1))


def test_a_file_is_made_as_others_are(tmp_path):
    before = os.umask(0o027)
    try:
        jaxgd.save(tmp_path / ("n" * 255), state_of(one(1)))
    finally:
        os.umask(before)
    assert (tmp_path / ("n" * 255)).stat().st_mode & 0o777 == 0o640


def test_where_it_cannot_go(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        jaxgd.save(tmp_path / "nowhere" / "state", state_of(one(1)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        jaxgd.save(tmp_path / "folder", state_of(one(1)))
    assert os.listdir(tmp_path) == ["folder"]


def test_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxgd.save("state", state_of(one(1)))
    assert os.listdir(tmp_path) == ["state"]
    np.testing.assert_array_equal(jaxgd.load("state").params, one(1))


KILLS = """
import json, os, random, signal, sys, time
import numpy as np, jaxgd
from jaxgd import State

# No array of JAX in sight: nothing has started a thread, so forking is sound.
path, kills = sys.argv[1], int(sys.argv[2])

def state(step):
    return State({"w": np.full(30_000, step, np.float32)}, (), np.int32(step))

jaxgd.save(path, state(0))
random.seed(0)
steps, left = [0], 0
for _ in range(kills):
    child = os.fork()
    if not child:
        for step in range(steps[-1] + 1, 10**6):
            jaxgd.save(path, state(step))
        os._exit(1)
    time.sleep(0.002 + 0.03 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = jaxgd.load(path)
    assert (loaded.params["w"] == loaded.step).all()
    steps.append(int(loaded.step))
    for name in os.listdir(os.path.dirname(path)):
        if name.endswith(".tmp"):
            left += 1
            os.unlink(os.path.join(os.path.dirname(path), name))
print(json.dumps([steps, left]))
"""


@pytest.mark.full
def test_a_hundred_kills_leave_no_torn_file(tmp_path):
    steps, left = json.loads(in_another_process(KILLS, tmp_path / "state", 100))
    assert steps == sorted(steps)
    assert steps[-1] > 100  # it did save
    assert left > 30  # and was killed while it did
    assert os.listdir(tmp_path) == ["state"]


# Files that are torn, foreign or hostile


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file of many kinds of leaves and nodes, and its state."""
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": [one(1), Pair(None, one(2))]}
    state = State(params, (jax.random.key(1), {1: np.float64(3)}), np.int32(7))
    path = tmp_path_factory.mktemp("small") / "state"
    jaxgd.save(path, state)
    return path.read_bytes(), jaxgd.load(path)


def equal_or_refused(path, content, state):
    """Whether the file is refused; if not, it must be the state that was saved."""
    path.write_bytes(content)
    loaded = None
    with contextlib.suppress(ValueError):
        loaded = jaxgd.load(path)
    if loaded is None:
        return True
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert_same_leaves(loaded, state)
    return False


def test_every_cut_is_seen(small, tmp_path):
    content, state = small
    assert not equal_or_refused(tmp_path / "f", content, state)
    for length in [*range(0, len(content), 5), len(content) - 1]:
        assert equal_or_refused(tmp_path / "f", content[:length], state), length


def test_every_change_is_seen_or_harmless(small, tmp_path):
    content, state = small
    random = np.random.default_rng(0)
    refused = 0
    for place in range(0, len(content), 2):
        new = bytearray(content)
        new[place] ^= int(random.integers(1, 256))
        refused += equal_or_refused(tmp_path / "f", bytes(new), state)
    # The rest are dates and attributes.
    assert refused > 0.8 * len(content) / 2


def test_pieces_that_are_swapped_doubled_or_zeroed(small, tmp_path):
    content, state = small
    random = np.random.default_rng(1)
    for _ in range(300):
        a, b, c = np.sort(random.integers(0, len(content), 3))
        pieces = {
            "swapped": content[:a] + content[b:c] + content[a:b] + content[c:],
            "doubled": content[:b] + content[a:b] + content[b:],
            "zeroed": content[:a] + bytes(b - a) + content[b:],
        }
        for new in pieces.values():
            equal_or_refused(tmp_path / "f", new, state)


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array):
    """The file that NumPy would write."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def change(path, what, **other):
    """A file in order but for what ``what(manifest, members)`` changes."""
    jaxgd.save(path, state_of({"w": one(1), "k": jax.random.key(0)}))
    edit(path, what, **other)


def edit(path, what, **other):
    """Changes a file by ``what(manifest, members)``."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    text = what(manifest, members)
    text = json.dumps(manifest) if text is None else text
    zipped(path, {"manifest.json": text, **members}, **other)


def setting(place, *path):
    """Puts ``place`` where ``path`` leads in the manifest."""

    def what(manifest, members):
        part = manifest
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = place

    return what


def renamed(manifest, members):
    members["3.npy"] = members.pop("0.npy")


def removed(manifest, members):
    del members["1.npy"]


def other_array(array):
    def what(manifest, members):
        members["1.npy"] = npy(array)

    return what


def own(name, names, parts):
    tree = {"kind": "own", "class": name, "names": names, "parts": parts}
    return setting(tree, "tree", "parts", 1)


def deep(depth):
    return lambda *_: '{"tree": ' + "[" * depth + "]" * depth + "}"


def deep_tree(depth):
    def what(manifest, members):
        text = json.dumps({**manifest, "tree": 0})
        tree = '{"kind": "list", "parts": [' * depth + "]}" * depth
        return text.replace('"tree": 0', f'"tree": {tree}')

    return what


def deep_field(depth):
    """Of a class of the library, and unknown."""

    def what(manifest, members):
        own("Check", [".x"], [77])(manifest, members)
        tree = '{"parts": [' * depth + "]}" * depth
        return json.dumps(manifest).replace("77", tree)

    return what


def node(**parts):
    return setting({"kind": "other", **parts}, "tree", "parts", 1)


HOSTILE = {
    "later": (
        lambda m, _: m.update(version=3, jaxgd="9.1"),
        r"written by a later jaxgd \(9.1, layout 3; this one reads 2\): upgrade",
    ),
    "version_0": (setting(0, "version"), "there is no layout 0"),
    "version_text": (setting("1", "version"), "'version' in its manifest is no int"),
    "version_true": (setting(True, "version"), "'version' in its manifest is no int"),
    "format": (setting("other", "format"), "its format is not 'jaxgd state'"),
    "no_json": (lambda *_: "{", "JSONDecodeError"),
    "no_text": (lambda *_: b"\xff\xfe\xff", "Unicode"),
    "list": (lambda *_: "[]", "the manifest is no JSON object"),
    "deep": (deep(100_000), "RecursionError"),
    "deep_tree": (deep_tree(20_000), "RecursionError"),
    # Python 3.12 has a frame less for each level, and reads on to the end.
    "less_deep_tree": (deep_tree(700), "RecursionError|does not hold all leaves"),
    "huge_number": (lambda *_: '{"version": ' + "9" * 10_000 + "}", "damaged"),
    "leaves_object": (setting({}, "leaves"), "'leaves' in its manifest is no list"),
    "leaf_number": (setting(3, "leaves", 1), "leaf 1 is no JSON object"),
    "leaf_path": (setting(3, "leaves", 1, "path"), "'path' in its manifest is no str"),
    "too_few": (lambda m, _: m["leaves"].clear(), "its tree names leaves out of order"),
    "renamed": (renamed, "manifest and members do not agree"),
    "removed": (removed, "manifest and members do not agree"),
    "dtype_object": (setting("object", "leaves", 1, "dtype"), "unknown dtype 'object'"),
    "dtype_long": (setting("U" * 10**5, "leaves", 1, "dtype"), "unknown dtype 'UUU"),
    "dtype_list": (setting([], "leaves", 1, "dtype"), "'dtype' in its manifest"),
    "dtype_other": (setting("int32", "leaves", 1, "dtype"), "not the array of the"),
    "shape_negative": (setting([-2], "leaves", 1, "shape"), "no possible shape"),
    "shape_float": (setting([2.0], "leaves", 1, "shape"), "no possible shape"),
    "shape_true": (setting([True, 2], "leaves", 1, "shape"), "no possible shape"),
    "shape_huge": (setting([2**62], "leaves", 1, "shape"), "not of the size"),
    "shape_product": (setting([2**40] * 30, "leaves", 1, "shape"), "not of the size"),
    "shape_beyond": (setting([2**70], "leaves", 1, "shape"), "no possible shape"),
    "shape_many": (setting([1] * 1000, "leaves", 1, "shape"), "no possible shape"),
    "shape_none_of": (setting([0, 2**62], "leaves", 1, "shape"), "not of the size"),
    "shape_other": (setting([1, 2], "leaves", 1, "shape"), "not the array of the"),
    "key_unknown": (setting("des", "leaves", 0, "key"), "holds no keys of 'des'"),
    "key_of_floats": (setting("rbg", "leaves", 1, "key"), "holds no keys of 'rbg'"),
    "key_number": (setting(1, "leaves", 0, "key"), "'key' in its manifest is no str"),
    "array_pickled": (other_array(np.array([print], object)), "not of the size"),
    "array_longer": (other_array(one(1).repeat(50)), "not of the size"),
    "array_fortran": (other_array(np.ones((2, 2), "f", "F")), "not of the size"),
    "array_int": (other_array(np.ones(2, np.int32)), "not the array of the manifest"),
    "array_text": (lambda _, m: m.update({"1.npy": b"x" * 136}), "not the array"),
    "tree_none": (setting(None, "tree"), "its tree does not hold all leaves"),
    "tree_leaf": (setting(0, "tree"), "its tree does not hold all leaves"),
    "tree_text": (setting("x", "tree"), "a node of its tree is no JSON object"),
    "tree_other_leaf": (setting(1, "tree", "parts", 0, "parts", 0), "out of order"),
    "tree_twice": (setting(1, "tree", "parts", 2), "out of order"),
    "tree_beyond": (setting(9, "tree", "parts", 2), "out of order"),
    "tree_true": (setting(True, "tree", "parts", 2), "a node of its tree is no JSON"),
    "tree_kind": (setting("set", "tree", "parts", 1, "kind"), "no str|unknown kind"),
    "tree_no_parts": (setting(None, "tree", "parts", 0, "parts"), "'parts' in its"),
    "keys_unsorted": (setting(["w", "k"], "tree", "parts", 0, "keys"), "dict of its"),
    "keys_same": (setting(["k", "k"], "tree", "parts", 0, "keys"), "dict of its tree"),
    "keys_mixed": (setting([1, "k"], "tree", "parts", 0, "keys"), "dict of its tree"),
    "keys_lists": (setting([[], []], "tree", "parts", 0, "keys"), "dict of its tree"),
    "keys_fewer": (setting(["k"], "tree", "parts", 0, "keys"), "dict of its tree"),
    "own_unknown": (own("Result", [], []), "unknown class 'Result'"),
    "own_module": (own("os.system", [], []), "unknown class 'os.system'"),
    "own_names": (own("Check", [".step"], []), "not a name for each part"),
    "own_numbers": (own("Check", [1], [None]), "not a name for each part"),
    "own_twice": (own("Check", [".step"] * 2, [None] * 2), "two fields of one name"),
    "own_parts": (own("Check", [".step"], None), "'parts' in its manifest is no list"),
    "unknown_order": (own("Check", [".x"], [5]), "its tree names leaves out of order"),
    "unknown_text": (own("Check", [".x"], ["y"]), "a node of its tree is no JSON"),
    "unknown_deep": (deep_field(20_000), "RecursionError"),
    "node_names": (node(**{"class": "A", "names": ["a"], "parts": []}), "not a name"),
    "node_numbers": (
        node(**{"class": "A", "names": [1], "parts": [None]}),
        "not a name",
    ),
    "node_class": (node(**{"class": 1, "names": [], "parts": []}), "'class' in its"),
    "no_state": (
        lambda m, _: m.update(tree={"kind": "list", "parts": [0, 1, 2]}),
        "it holds no State",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(name, tmp_path):
    what, message = HOSTILE[name]
    path = tmp_path / "state"
    change(path, what)
    with pytest.raises(ValueError, match=message) as error:
        jaxgd.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_changed_in_nothing_is_read(tmp_path):
    change(tmp_path / "state", lambda *_: None)
    assert jaxgd.load(tmp_path / "state").step == 0


def bomb(path):
    change(path, lambda *_: None, compression=zipfile.ZIP_DEFLATED)


def twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("manifest.json", "{}")


def overlapping(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "x" * 1000)
        for i in range(50):
            again = copy(archive.filelist[0])
            again.filename = f"{i}.npy"
            archive.filelist.append(again)


def larger_than_it_is(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.filelist[0].file_size = archive.filelist[0].compress_size = 2**50


def encrypted(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.filelist[0].flag_bits |= 1


def in_place(path):
    jaxgd.save(path, state_of(np.zeros(10_000, "f")))
    with open(path, "r+b") as file:  # as a writer would leave it that has no fsync
        file.seek(20_000)
        file.write(bytes(range(100)))


FOREIGN = {
    "empty": (lambda p: p.write_bytes(b""), "no zip file, or was cut off"),
    "text": (lambda p: p.write_text("w = 1\n" * 100), "no zip file, or was cut off"),
    "folder": (lambda p: p.mkdir(), "no regular file"),
    "fifo": (os.mkfifo, "no regular file"),
    "npy": (lambda p: p.write_bytes(npy(one(1))), "no zip file"),
    "npz": (
        lambda p: p.write_bytes(npz(w=one(1))),
        "it has no manifest.json, so save did not make it",
    ),
    "zip": (lambda p: zipped(p, {}), "it has no manifest.json"),
    "other_manifest": (lambda p: zipped(p, {"manifest.json": "{}"}), "its format is"),
    "compressed": (bomb, "member 'manifest.json' is compressed"),
    "twice": (twice, "two of its members have one name"),
    "overlapping": (overlapping, "overlap or reach beyond"),
    "larger": (larger_than_it_is, "overlap or reach beyond"),
    "encrypted": (encrypted, "RuntimeError"),
    "checksum": (in_place, "Bad CRC-32"),
}


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(name, tmp_path):
    make, message = FOREIGN[name]
    path = tmp_path / "state"
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        jaxgd.load(path)
    assert f"{str(path)!r} is no state that load can read" in str(error.value)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        jaxgd.load(tmp_path / "absent")


def test_a_disk_that_fails_is_not_the_files_fault(tmp_path, monkeypatch):
    jaxgd.save(tmp_path / "state", state_of(one(1)))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_read", fail)
    with pytest.raises(OSError, match="Input/output"):
        jaxgd.load(tmp_path / "state")
