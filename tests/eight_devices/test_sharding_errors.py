"""Contract: what several devices can have wrong is named before anything compiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from layouts import AUTO, EXPLICIT, LAYOUTS, mesh_of

import jaxgd

X, Y = np.ones((48, 3), "f"), np.ones(48, "f")
START = np.zeros(3, "f")
ROWS = LAYOUTS["8 devices"]
DEVICES = jax.devices()


def loss(params, batch, *args):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


def bound(x, device):
    return jax.device_put(x, DEVICES[device])


_PLACE_B = NamedSharding(mesh_of((4, 2), AUTO), P("b"))


def other_mesh(x):
    return jax.device_put(x, NamedSharding(mesh_of((4, 2), AUTO), P("a")))


def call(data=None, params=START, fun=loss, **how):
    data = ROWS((X, Y)) if data is None else data
    how = {"learning_rate": 0.1, "batch_size": 16, "max_steps": 3, **how}
    return lambda: jaxgd.minimize(fun, params, data, **how)


def test_devices_of_a_mesh_serve():
    mesh = mesh_of((4, 2), AUTO)
    assert jaxgd.shard_rows(X, devices=mesh.devices).sharding.num_devices == 8


def rows(*args, **how):
    return lambda: jaxgd.shard_rows(*args, **how)


# What is wrong: (call, error, words of the message in their order).
ERRORS = {
    # Of shard_rows.
    "rows that eight do not divide": (
        rows(np.ones((42, 3))),
        ValueError,
        ["data must", "8 devices", "divide", "got 42", "40 rows", "fewer devices"],
    ),
    "fewer rows than devices": (
        rows(np.ones(5)),
        ValueError,
        ["data must", "8 devices", "got 5", "more rows"],
    ),
    "a list": (
        rows([1.0, 2.0]),
        TypeError,
        ["data[0]", "array", "float", "np.asarray"],
    ),
    "words": (rows(np.array(["a", "b"])), TypeError, ["data", "numbers", "<U1"]),
    "nothing": (rows(None), TypeError, ["data", "array", "None"]),
    "no array": (rows(()), ValueError, ["data", "at least one array", "()"]),
    "a scalar": (rows(np.float32(3)), ValueError, ["data", "leading axis", "args"]),
    "two lengths": (
        rows((np.ones(16), np.ones(8))),
        ValueError,
        ["data", "equally many rows", "data[0] has 16", "data[1] has 8", "cut"],
    ),
    "an iterator": (rows(iter([1.0])), TypeError, ["data", "iterator", "arrays"]),
    "a stream": (
        rows(jaxgd.Stream((X, Y))),
        TypeError,
        ["data", "Stream", "arrays"],
    ),
    "no devices": (rows(X, devices=[]), ValueError, ["devices", "one or more", "[]"]),
    "a device twice": (
        rows(X, devices=[DEVICES[0]] * 2),
        ValueError,
        ["devices", "each once"],
    ),
    "a number of devices": (rows(X, devices=4), TypeError, ["devices", "list", "4"]),
    "names of devices": (rows(X, devices=["cpu"]), TypeError, ["devices", "'cpu'"]),
    "a mesh": (
        rows(X, devices=mesh_of((8,), AUTO)),
        TypeError,
        ["devices", "list", "Mesh", "devices.flat"],
    ),
    "traced rows": (
        lambda: jax.jit(jaxgd.shard_rows)(X),
        TypeError,
        ["data", "traced", "outside jit"],
    ),
    # Of batches and strata.
    "a batch that eight do not divide": (
        call(batch_size=20),
        ValueError,
        ["batch_size", "multiple of the 8 pieces", "got 20", "16"],
    ),
    "a batch of fewer rows than pieces": (
        call(batch_size=4),
        ValueError,
        ["batch_size", "8 pieces", "got 4", "8"],
    ),
    "strata that are no multiple of the pieces": (
        call(strata=4),
        ValueError,
        ["strata", "multiple of the 8 pieces", "got 4", "pass 8"],
    ),
    "strata that do not divide the rows": (
        call(strata=32, batch_size=32),
        ValueError,
        ["strata", "number of rows = 48", "got 32", "divisor of 16"],
    ),
    "strata that do not divide the batch": (
        call(strata=24),
        ValueError,
        ["strata", "batch_size = 16", "got 24"],
    ),
    "strata without a batch": (
        call(strata=8, batch_size=None),
        ValueError,
        ["strata", "batch_size", "8"],
    ),
    # Of places.
    "two meshes": (
        call(data=(ROWS(X), other_mesh(Y))),
        ValueError,
        ["data", "one mesh", "data[0]", "data[1]", "shard_rows"],
    ),
    "two kinds of one mesh": (
        call(
            data=(
                ROWS(X),
                jax.device_put(Y, NamedSharding(mesh_of((8,), EXPLICIT), P("a"))),
            )
        ),
        ValueError,
        ["data", "data[0]", "data[1]", "shard_rows"],
    ),
    "one mesh, two axes": (
        call(data=(other_mesh(X), jax.device_put(Y, _PLACE_B))),
        ValueError,
        ["data[0]", "{'a': 4}", "data[1]", "{'b': 2}"],
    ),
    "one array in one place": (
        call(data=(ROWS(X), bound(Y, 0))),
        ValueError,
        ["data[0]", "data[1]", "whole on each device", "shard_rows"],
    ),
    "one array of NumPy": (
        call(data=(ROWS(X), Y)),
        ValueError,
        ["data[0]", "data[1]", "whole on each device", "shard_rows"],
    ),
    "fewer devices": (
        call(data=(ROWS(X), LAYOUTS["4 devices"](Y))),
        ValueError,
        ["data[0]", "8 devices", "data[1]", "4 devices"],
    ),
    "devices in another order": (
        call(data=(ROWS(X), jaxgd.shard_rows(Y, devices=DEVICES[::-1]))),
        ValueError,
        ["data[0]", "data[1]", "order"],
    ),
    "params on one device": (
        call(params=bound(START, 3)),
        ValueError,
        ["params", "devices of data", "got [cpu:3]", "NumPy"],
    ),
    "params on other devices": (
        call(
            params=jaxgd.shard_rows(np.zeros((4, 1), "f"), devices=DEVICES[:4])[:3, 0]
        ),
        ValueError,
        ["params", "devices of data", "NumPy"],
    ),
    "one of the params": (
        call(
            params={"a": START, "b": bound(START, 1)},
            fun=lambda params, batch: loss(params["a"] + params["b"], batch),
        ),
        ValueError,
        ["params['b']", "devices of data"],
    ),
    "args on one device": (
        call(args=(1.0, bound(START, 2))),
        ValueError,
        ["args[1]", "devices of data", "cpu:2"],
    ),
    "a key on one device": (
        call(key=bound(jax.random.key(1), 5)),
        ValueError,
        ["key", "devices of data", "cpu:5"],
    ),
    "an array in fun on one device": (
        call(
            fun=Partial(
                lambda w, params, batch: loss(params * w, batch), bound(START, 4)
            )
        ),
        ValueError,
        ["fun", "devices of data", "cpu:4"],
    ),
    "two devices without sharding": (
        call(data=(bound(X, 1), bound(Y, 2))),
        ValueError,
        ["data[1]", "data[0]", "cpu:2"],
    ),
    "params and data on two devices": (
        call(data=(bound(X, 1), bound(Y, 1)), params=bound(START, 2)),
        ValueError,
        ["params", "devices of data[0], [cpu:1]", "got [cpu:2]", "device_put it there"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name, count_compilations):
    wrong, error, words = ERRORS[name]
    with count_compilations() as count, pytest.raises(error) as raised:
        wrong()
    message = str(raised.value)
    print(f"{name}: {message}")
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message
    assert count() == 0
    assert message.endswith(".")
