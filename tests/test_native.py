"""Small loops as one native function: everything the emitter is trusted with."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

import jaxgd
from jaxgd import _native, problems

X = jnp.array([[-2.5, -1.0, -0.0], [0.25, 0.5, 1.5]])
INT = jnp.array([[-7, -1, 0], [1, 5, 2**20]], jnp.int32)
U = INT.astype(jnp.uint32)
B = X > 0
BAD = jnp.array([[jnp.nan, jnp.inf, -jnp.inf], [1.0, -1.0, 0.0]])

# Before XLA sees the program: it marks loops of its own, too.
MARK = re.compile(r'xla_cpu_small_call = "true"')


@jax.custom_vjp
def with_rule(x):
    return x * x


with_rule.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))


def keyed(name):
    def draw(x):
        key = jax.random.key(3)
        key = {
            "split": lambda: jax.random.split(key)[1],
            "fold_in": lambda: jax.random.fold_in(key, 5),
            "wrap": lambda: jax.random.wrap_key_data(jax.random.key_data(key)),
        }[name]()
        return x + jax.random.normal(key, x.shape)

    return draw


UNARY = [
    "abs",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctanh",
    "cbrt",
    "ceil",
    "cos",
    "cosh",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "isfinite",
    "log",
    "log1p",
    "negative",
    "rint",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "tan",
    "tanh",
]
BINARY = [
    "add",
    "arctan2",
    "divide",
    "maximum",
    "minimum",
    "multiply",
    "nextafter",
    "remainder",
    "subtract",
]
COMPARE = ["equal", "greater", "greater_equal", "less", "less_equal", "not_equal"]

OPERATIONS = {
    **{f: lambda x, f=f: getattr(jnp, f)(x) + x for f in UNARY},
    **{f: lambda x, f=f: getattr(jnp, f)(x, x[::-1]) for f in BINARY},
    **{f: lambda x, f=f: getattr(jnp, f)(x, x[::-1]) * x for f in COMPARE},
    "power": lambda x: jnp.abs(x) ** x,
    "integer_power": lambda x: x**3,
    "rsqrt": lax.rsqrt,
    "rem": lambda x: lax.rem(x, jnp.float32(0.7)),
    "clamp": lambda x: jnp.clip(x, -1, 1) + lax.clamp(-1.0, x, 1.0),
    "logistic": jax.nn.sigmoid,
    "logaddexp": lambda x: jnp.logaddexp(x, 0.0),
    "relu": lambda x: jax.grad(lambda x: jnp.sum(jax.nn.relu(x) ** 2))(x),
    "special": lambda x: sum(
        f(jnp.clip(x, -0.9, 0.9) * 0.5)
        for f in (lax.erf, lax.erfc, lax.erf_inv, lax.lgamma, lax.digamma)
    ),
    "complex": lambda x: sum(
        f(lax.conj(lax.complex(x, x[::-1]))) for f in (jnp.real, jnp.imag, jnp.abs)
    ),
    "integers": lambda x: (
        x
        + (
            (INT << 1)
            + (INT >> 1)
            + lax.population_count(INT)
            + lax.clz(INT)
            + (INT & 3)
            + (INT | 4)
        )
        + ((U >> 3) ^ ~U).astype(jnp.float32)
        + (-INT // 3) % 5
    ),
    "bits": lambda x: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) ^ 1, jnp.float32
    ),
    "booleans": lambda x: x * (jnp.all(B) | jnp.any(B)),
    "reductions": lambda x: x + x.sum() + x.max(0) + x.min() + x.prod(0),
    "arguments": lambda x: x + jnp.argmax(x) + jnp.argmin(x, axis=1)[:, None],
    "shapes": lambda x: (
        jnp.concatenate([x.T.reshape(2, 3), jnp.tile(x, (1, 1))])[:2]
        + jnp.stack([x[0], x[1]])
        + jnp.pad(x, 1)[1:-1, 1:-1]
        + lax.rev(x, (0,))
        + jnp.squeeze(x[None])
        + jnp.arange(3)
        + sum(jnp.split(x, 3, axis=1))
        + sum(jnp.unstack(x))
        + lax.tile(x, (1, 1))
        + lax.empty((2, 3), x.dtype) * 0
    ),
    "slices": lambda x: lax.dynamic_update_slice(
        x, lax.dynamic_slice(x, (0, 1), (1, 2)), (1, 0)
    ),
    "gather": lambda x: x[jnp.array([1, 0])] + x.at[1].get(mode="promise_in_bounds"),
    "where": lambda x: jnp.where(x > 0, x, -x),
    "vector_products": lambda x: x + x @ x[0] @ x + jnp.vdot(x[0], x[1]),
    "gradient_of_products": lambda x: (
        x + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(x[0])
    ),
    "precision": lambda x: lax.reduce_precision(x, 8, 7) + x.astype(jnp.bfloat16),
    "round": lambda x: lax.round(x),
    "loops": lambda x: (
        lax.fori_loop(0, 3, lambda i, y: y * 0.5 + i, x)
        + lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y + 1, jnp.abs(X))
    ),
    "scan": lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x)[1],
    "cond": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(jnp.int32(x[1, 1] * 4), [jnp.sin, jnp.cos, abs], x),
    "jit": jax.jit(lambda x: x + 1),
    "custom_vjp": lambda x: with_rule(x) + jax.grad(lambda x: with_rule(x).sum())(x),
    "checkpoint": lambda x: jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum())(x),
    "remat": jax.checkpoint(lambda x: checkpoint_name(x * 2, "a")),
    "stop_gradient": lambda x: lax.stop_gradient(x) * 2,
    "copy": jnp.copy,
    "platform": lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos),
    **{f"key_{name}": keyed(name) for name in ("split", "fold_in", "wrap")},
    "key_seed": lambda x: x + jax.random.uniform(jax.random.key(jnp.int32(x[1, 1]))),
}


def looped(fun, x):
    """``fun`` within a loop, as the steps of a run are."""

    def body(i, carry):
        total, last = carry
        last = jnp.asarray(fun(x + 0.01 * i)).astype(jnp.float32)
        return total + last, last

    shape = jax.eval_shape(fun, x).shape
    blank = jnp.zeros(shape, jnp.float32)
    return lax.fori_loop(0, jnp.int32(4), body, (blank, blank))


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for sub in jaxprs_in_params(eqn.params):
            yield from primitives(sub)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_in_one_function(name):
    fun = OPERATIONS[name]
    closed = jax.make_jaxpr(lambda x: looped(fun, x))(X)
    assert _native.can_be_one_function(closed.jaxpr)
    one = jax.jit(lambda x: _native.one_function(lambda x: looped(fun, x), x))
    assert MARK.search(one.lower(X).as_text())
    plain = jax.jit(lambda x: looped(fun, x))
    for x in (X, BAD):
        np.testing.assert_allclose(
            np.asarray(one(x)), np.asarray(plain(x)), rtol=2e-5, atol=1e-6
        )


def test_no_operation_is_trusted_untested():
    seen = set()
    for fun in OPERATIONS.values():
        seen |= set(primitives(jax.make_jaxpr(lambda x, f=fun: looped(f, x))(X).jaxpr))
    assert seen == set(_native._CAN)


def scattered(x):
    return x.at[jnp.array([0, 0])].add(1.0)


def called_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((2, 3), x.dtype), x)


OTHERS = {
    "product": lambda x: x @ x.T @ x,
    "products": lambda x: jnp.einsum("bi,bi->b", x, x)[:, None] * x,
    "sort": lambda x: jnp.sort(x),
    "scatter": scattered,
    "callback": called_back,
    "fft": lambda x: jnp.fft.fft(x).real,
    "cumulative": lambda x: jnp.cumsum(x, axis=0),
    "solve": lambda x: jnp.linalg.solve(jnp.eye(3), x.T).T,
    "nested": lambda x: _native.one_function(lambda x: x * 2 + 1, x),
}


@pytest.mark.parametrize("fun", OTHERS.values(), ids=OTHERS)
def test_other_operations_stay_as_they_are(fun):
    one = jax.jit(lambda x: _native.one_function(lambda x: looped(fun, x), x))
    # Of one within another, the inner one stays.
    marks = MARK.findall(one.lower(X).as_text())
    assert len(marks) == (fun is OTHERS["nested"])
    plain = jax.jit(lambda x: looped(fun, x))
    np.testing.assert_array_equal(np.asarray(one(X)), np.asarray(plain(X)))


def test_inputs_that_xla_finds_no_use_for():
    """An input used nowhere, or only until XLA simplifies, would end the process."""

    def fun(x, i, unused):
        return lax.fori_loop(0, jnp.int32(4), lambda _, y: jnp.sin(y) + (i & 0), x)

    for shape in (3, 1_000_000):  # the longer one is split over threads elsewhere
        for f in (fun, lambda x, i, unused: (x * 2, i * 0), lambda x, *_: x + 1):
            args = jnp.ones(shape), jnp.int32(3), jnp.int32(2)
            one = jax.jit(lambda *a, f=f: _native.one_function(f, *a))
            for ours, plain in zip(
                jax.tree.leaves(one(*args)), jax.tree.leaves(f(*args)), strict=True
            ):
                np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_long_sums_stay_as_they_are():
    """XLA would hand them to a library that the emitter cannot call."""
    for n, possible in ((2048, True), (2049, False)):
        x = jnp.ones((n // 2, 2) if n % 2 == 0 else (n,))
        for fun in (jnp.sum, jnp.max, lambda x: jnp.sum(x.ravel() @ x.ravel())):
            jaxpr = jax.make_jaxpr(fun)(x).jaxpr
            assert _native.can_be_one_function(jaxpr) is possible
            looped_sum = jax.jit(
                lambda x, fun=fun: _native.one_function(
                    lambda x: looped(lambda y: y + fun(y), x), x
                )
            )
            plain = jax.jit(lambda x, fun=fun: looped(lambda y: y + fun(y), x))
            np.testing.assert_allclose(looped_sum(x)[0], plain(x)[0], rtol=1e-5)


def test_transformations_take_the_plain_form():
    weights = jnp.arange(3.0)

    def fun(x):
        return looped(lambda x: jnp.tanh(x @ weights), x)[0]

    def one(x):
        return _native.one_function(fun, x)

    stack = jnp.stack([X, X + 1])
    np.testing.assert_allclose(jax.vmap(one)(stack), jax.vmap(fun)(stack), rtol=1e-6)
    batched = jax.jit(jax.vmap(jax.jit(one)))
    np.testing.assert_allclose(batched(stack), jax.vmap(fun)(stack), rtol=1e-6)
    for ours, plain in zip(
        jax.jvp(one, (X,), (X,)), jax.jvp(fun, (X,), (X,)), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


RUNS = {
    "one row": {"batch_size": 1, "learning_rate": 0.01},
    "mini-batch": {"batch_size": 8, "learning_rate": 0.1},
    "batch": {"learning_rate": 0.1},
    "Adam": {"batch_size": 8, "optimizer": optax.adam, "learning_rate": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_in_one_function(name, monkeypatch):
    problem = problems.logistic(*problems.blobs(40, 3, 2))

    def run():
        return jaxgd.minimize(
            problem.fun, problem.init, problem.data, max_steps=300, **RUNS[name]
        )

    def lowered(params):
        return jaxgd.minimize(
            problem.fun, params, problem.data, max_steps=300, **RUNS[name]
        ).params

    def text():  # a new function each time, or the trace would be remembered
        return jax.jit(lambda p: lowered(p)).lower(problem.init).as_text()

    assert MARK.search(text())
    one = run()
    jax.clear_caches()
    monkeypatch.setattr(_native, "_TESTED", False)
    assert not MARK.search(text())
    many = run()
    jax.clear_caches()
    assert (one.status, one.steps) == (many.status, many.steps)
    for a, b in zip(
        jax.tree.leaves((one.params, one.value)),
        jax.tree.leaves((many.params, many.value)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_environment_switches_it_off():
    script = """
import jax, jax.numpy as jnp, jaxgd
fit = lambda x: jaxgd.minimize(lambda p: jnp.sum(p * p), x, learning_rate=0.1).params
print("small_call" in jax.jit(fit).lower(jnp.ones(2)).as_text())
"""
    for value, expected in (("0", "False"), ("1", "True")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "JAXGD_NATIVE_LOOPS": value},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert done.stdout.strip() == expected
