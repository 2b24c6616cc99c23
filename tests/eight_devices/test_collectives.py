"""Contract: a step brings numbers together once; no rows travel, nothing is sorted."""

import importlib.util
import math
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import LAYOUTS
from objectives import DATA, MEANS, START, linear, off

import jaxgd
from jaxgd._call.arguments import checked
from jaxgd._call.call import Call
from jaxgd._files.resume import begin
from jaxgd._loop.program import go


def load():
    """The reader of HLO of the benchmark, imported by path."""
    path = Path(__file__).parents[2] / "benchmarks" / "ahead_of_time.py"
    spec = importlib.util.spec_from_file_location("ahead_of_time", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ahead = load()


def program(fun, params, data, **how):
    """What ``minimize`` runs, compiled."""
    spec, numbers, limit = checked(Call(fun, params, data, **how))
    compiled = go.lower(spec, numbers, begin(spec, numbers, None), limit).compile()
    return compiled


def jitted(fun, params, data, **how):
    """The same within a jit, where only the partitioner knows where rows lie."""
    run = partial(jaxgd.minimize, fun, **{"strata": 8, **how})
    return jax.jit(lambda *given: run(*given).params).lower(params, data).compile()


def own(module, name):
    """Operations of a computation and of those it calls, but not of its loops."""
    for one in module[name]:
        yield one
        if one.opcode != "while":
            for called in one.calls:
                yield from own(module, called)


def reduces(text):
    """{body of a loop: numbers in each of its all-reduces}, those of loops in it aside.

    And the numbers in all of the program. Fails where rows travel or are sorted.
    """
    module = ahead.parse(text)
    every = [one for body in module.values() for one in body]
    kinds = {one.opcode.removesuffix("-start") for one in every}
    moved = {"sort", *ahead._COLLECTIVES} - {"all-reduce"}
    assert moved.isdisjoint(kinds), moved & kinds

    def numbers(operations):
        return [
            sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in shapes)
            for one in operations
            if one.opcode.removesuffix("-start") == "all-reduce"
            for shapes in [re.findall(r"\w\d+\[([\d,]*)\]", one.shape)]
        ]

    bodies = {ahead._called(one, "body") for one in every if one.opcode == "while"}
    return {name: numbers(own(module, name)) for name in bodies}, numbers(every)


def with_aux(params, batch):
    return linear(params, batch), jnp.mean(jnp.abs(off(params, batch)))


def with_key(params, batch, key):
    keep = jax.random.bernoulli(key, 0.8, (6,))
    return linear({**params, "w": params["w"] * keep}, batch)


MINI = {"batch_size": 32, "learning_rate": 0.1, "max_steps": 50}
FULL = {"learning_rate": 0.1, "max_steps": 50}
ADAM = {**MINI, "optimizer": optax.adam}
SOFTMAX, LAYERS, _ = MEANS["softmax"]

APART = {
    "mean": (linear, START, MINI, "8 devices"),
    "mean, 2 devices": (linear, START, MINI, "2 devices"),
    "mean, two axes": (linear, START, MINI, "both axes"),
    "mean, explicit": (linear, START, MINI, "explicit mesh"),
    "MLP, Adam": (SOFTMAX, LAYERS, ADAM, "8 devices"),
    "blocks": (linear, START, {**MINI, "microbatch_size": 16}, "8 devices"),
    "all rows": (linear, START, FULL, "8 devices"),
    "all rows, blocks": (linear, START, {**FULL, "microbatch_size": 40}, "8 devices"),
}


def once_a_step(text, params):
    """One of gradient and value in each loop of steps, and in full passes: no rows."""
    found, every = reduces(text)
    size = 1 + sum(np.size(x) for x in jax.tree.leaves(params))
    steps = [sizes for sizes in found.values() if sizes]
    assert steps
    assert all(sizes == [size] for sizes in steps), found
    assert len(every) <= len(steps) + 2
    assert max(every) <= size + 1  # a number of auxiliary output


@pytest.mark.parametrize("name", APART)
def test_one_all_reduce_a_step(name):
    fun, params, how, layout = APART[name]
    compiled = program(fun, params, LAYOUTS[layout](DATA), **how)
    once_a_step(compiled.as_text(), params)


PARTITIONED = {
    "aux": (with_aux, {**MINI, "has_aux": True}),
    "key": (with_key, {**MINI, "with_key": True}),
}


@pytest.mark.parametrize("name", PARTITIONED)
def test_one_all_reduce_a_step_by_the_partitioner(name):
    fun, how = PARTITIONED[name]
    compiled = program(fun, START, LAYOUTS["8 devices"](DATA), **how)
    once_a_step(compiled.as_text(), START)


@pytest.mark.parametrize("how", [MINI, ADAM], ids=["SGD", "Adam"])
def test_one_all_reduce_a_step_within_jit(how):
    compiled = jitted(linear, START, LAYOUTS["8 devices"](DATA), **how)
    once_a_step(compiled.as_text(), START)


def test_the_reader_sees_what_it_should():
    """Steps that reduce rows from everywhere, and steps that reduce twice."""
    data = LAYOUTS["8 devices"](DATA)

    def bad(params, data):
        def step(i, params):
            rows = jaxgd.batch_rows(0, len(DATA[0]), 32, i)
            grad = jax.grad(linear)(params, jax.tree.map(lambda x: x[rows], data))
            return jax.tree.map(lambda p, g: p - g, params, grad)

        return jax.lax.fori_loop(0, 5, step, params)

    def twice(params, data):
        def step(i, params):
            params = jax.tree.map(jnp.subtract, params, jax.grad(linear)(params, data))
            return jax.tree.map(jnp.subtract, params, jax.grad(linear)(params, data))

        return jax.lax.fori_loop(0, 5, step, params)

    for fun in (bad, twice):
        text = jax.jit(fun).lower(START, data).compile().as_text()
        with pytest.raises(AssertionError):
            once_a_step(text, START)


def test_temporaries_do_not_grow_with_the_rows():
    def temporaries(n):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(n, 100)).astype("f"), rng.normal(size=n).astype("f")

        def squares(params, batch):
            return jnp.mean((batch[0] @ params - batch[1]) ** 2)

        data = LAYOUTS["8 devices"]((x, y))
        how = {"batch_size": 64, "learning_rate": 0.1, "max_steps": 9}
        compiled = program(squares, np.zeros(100, "f"), data, **how)
        return compiled.memory_analysis().temp_size_in_bytes

    # A full pass reads rows in blocks of bounded size, of 40,000 as of more.
    assert temporaries(320_000) <= 1.1 * temporaries(40_000) <= 2**21
