"""The contracts: compile once, chunk invisibly, resume, jit, vmap, grad, dtypes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.tree_util import Partial

import jaxgd
from jaxgd import Status

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 4)).astype("f")
Y = (X @ np.arange(4) + RNG.normal(size=23)).astype("f")
START = {"w": jnp.zeros(4), "b": jnp.zeros(())}


def least_squares(p, batch, penalty=0.0):
    x, y = batch
    return jnp.mean((x @ p["w"] + p["b"] - y) ** 2) + penalty * jnp.sum(p["w"] ** 2)


def logistic(p, batch):
    x, y = batch
    z = x @ p["w"] + p["b"]
    return jnp.mean(jnp.logaddexp(0, z) - (y > 0) * z)


def decay(first, step):
    return first * 0.9**step


# Compile once.

NUMBERS = {
    "rate": [
        {"learning_rate": rate}
        for rate in (
            0.01,
            1,
            0,
            np.float32(0.02),
            np.float64(0.02),
            np.asarray(0.03),
            jnp.asarray(0.03),
            jnp.float32(0.04),
            jnp.asarray(1),
        )
    ],
    "limit": [
        *({"max_steps": n} for n in (0, 1, 7, np.int64(3), np.int32(9), jnp.int32(4))),
        *({"epochs": n} for n in (1, 0.3, np.float32(2))),
    ],
    "key": [
        {"key": key}
        for key in (1, np.int64(2), jax.random.key(3), jax.random.PRNGKey(4), 2**32 - 1)
    ],
    "args": [
        {"args": args}
        for args in (
            (0.1,),
            [0.2],
            (np.float64(0.3),),
            (np.float32(0.4),),
            (jnp.float32(1),),
        )
    ],
    "data": [
        {"data": data}
        for data in (
            (X + 1, Y),
            (jnp.asarray(X), jnp.asarray(Y)),
            (X.astype(np.float64), Y.astype(np.float64)),
        )
    ],
    "start": [{"params": {"w": w, "b": 0.5}} for w in (np.ones(4, "f"), np.ones(4))],
    "tolerance": [
        {"stop": jaxgd.value_change(rtol=r, patience=p)}
        for r, p in ((1e-3, 1), (np.float64(1e-2), 2), (jnp.asarray(1e-1), np.int64(3)))
    ],
    "rule": [
        {"stop": jaxgd.any_of(jaxgd.gradient_norm(a), jaxgd.target_value(t))}
        for a, t in ((1e-3, 0.1), (np.float32(1e-4), -1), (1, np.float64(0.2)))
    ],
    "hyperparams": [
        {"optimizer": optax.adam, "hyperparams": {"b1": b1, "eps": 1e-8}}
        for b1 in (0.9, np.float32(0.8), np.float64(0.7), jnp.asarray(0.6))
    ],
    "schedule": [
        {"learning_rate": Partial(decay, first)}
        for first in (0.1, np.float32(0.2), np.float64(0.1), jnp.asarray(0.3))
    ],
}


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("name", NUMBERS)
def test_new_numbers_cost_no_compilation(name, batch_size, count_compilations):
    def call(variant):
        arguments = {"learning_rate": 0.05, "args": (0.0,), "batch_size": batch_size}
        arguments |= {"fun": least_squares, "params": START, "data": (X, Y)}
        return jaxgd.minimize(**arguments | variant)

    if batch_size is None and name == "key":
        pytest.skip("batch descent draws no rows")
    call(NUMBERS[name][0])
    for variant in NUMBERS[name][1:]:
        with count_compilations() as count:
            call(variant)
        assert count() == 0, variant


def test_going_on_costs_no_compilation(count_compilations):
    run = lambda **kw: jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=0.05, batch_size=8, **kw
    )
    result = run(max_steps=9)
    for variant in ({}, {"max_steps": 1}, {"epochs": 2}):
        with count_compilations() as count:
            run(state=result.state, **variant)
        assert count() == 0


def test_callable_pytrees_are_data(count_compilations):
    def objective(scale, x):
        return jnp.sum((scale * x - 1) ** 2)

    run = lambda scale: jaxgd.minimize(
        Partial(objective, scale), jnp.zeros(3), learning_rate=0.05
    )
    first = run(np.float32(1.0))
    with count_compilations() as count:
        second = run(np.float32(2.0))
    assert count() == 0
    np.testing.assert_allclose(first.params, 1.0, atol=1e-3)
    np.testing.assert_allclose(second.params, 0.5, atol=1e-3)


# Chunking is invisible.


def bits(tree):
    def plain(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    return jax.tree.map(plain, tree)


def assert_same_bits(a, b):
    fields = ("params", "value", "grad_norm", "aux", "status", "steps", "evaluations")
    for field in (*fields, "history", "checks", "state"):
        left, right = bits(getattr(a, field)), bits(getattr(b, field))
        jax.tree.map(np.testing.assert_array_equal, left, right)


def in_legs(legs, **arguments):
    result = jaxgd.minimize(max_steps=legs[0], **arguments)
    arguments.pop("key", None)
    for leg in legs[1:]:
        if result.status != Status.MAX_STEPS:
            break
        result = jaxgd.minimize(max_steps=leg, state=result.state, **arguments)
    return result


STOPS = {
    "auto": "auto",
    "value": jaxgd.value_change(1e-3, patience=2),
    "any": jaxgd.any_of(jaxgd.gradient_norm(1e-3), jaxgd.params_change(1e-4)),
}
UPDATES = {
    "plain": {"learning_rate": 0.05},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.05},
    "schedule": {"learning_rate": optax.exponential_decay(0.1, 10, 0.9)},
    "momentum": {"optimizer": optax.sgd(0.03, momentum=0.9)},
}
CUTS = list(
    zip(
        itertools.cycle(UPDATES),
        itertools.product((least_squares, logistic), STOPS, (None, 1, 5, 23)),
        strict=False,
    )
)


@pytest.mark.parametrize(("update", "case"), CUTS)
def test_cuts_change_no_bit(update, case):
    fun, stop, batch_size = case
    arguments = {
        "fun": fun,
        "params": START,
        "data": (X, Y),
        "batch_size": batch_size,
        "stop": STOPS[stop],
        "history_rows": 37,
        "key": 5,
        **UPDATES[update],
    }
    whole = jaxgd.minimize(max_steps=130, **arguments)
    generator = np.random.default_rng(batch_size or 0)
    for size in (1, 40):
        legs = []
        while sum(legs) < 130:
            leg = 1 if size == 1 and sum(legs) < 20 else int(generator.integers(0, 41))
            legs.append(min(leg, 130 - sum(legs)))
        parts = in_legs(legs, **arguments)
        assert_same_bits(whole, parts)
    if whole.converged:
        arguments.pop("key")
        again = jaxgd.minimize(state=whole.state, **arguments)
        assert_same_bits(whole, again)


@pytest.mark.parametrize("fun", [lambda x: -jnp.sum(jnp.tanh(x)) + jnp.sum(x**4)])
def test_cuts_of_a_diverging_run(fun):
    arguments = {"fun": fun, "params": jnp.array([1.5, -0.2]), "learning_rate": 0.5}
    whole = jaxgd.minimize(max_steps=50, **arguments)
    assert whole.status == Status.DIVERGED
    steps = int(whole.steps)
    assert steps > 0
    for legs in ([1] * 50, [steps, 50], [steps + 1, 50], [steps - 1, 50]):
        parts = in_legs(legs, **arguments)
        assert parts.status == Status.DIVERGED
        assert_same_bits(whole, parts)


def test_cuts_of_a_diverging_mini_batch_run():
    arguments = {
        "fun": least_squares,
        "params": START,
        "data": (X, Y),
        "learning_rate": 3.0,
        "batch_size": 5,
    }
    whole = jaxgd.minimize(max_steps=500, **arguments)
    assert whole.status == Status.DIVERGED
    steps = int(whole.steps)
    for legs in ([1] * 50, [steps, 50], [steps + 1, 50]):
        parts = in_legs(legs, **arguments)
        assert parts.status == Status.DIVERGED
        assert_same_bits(whole, parts)


def test_another_rule_starts_afresh_and_the_same_goes_on():
    run = lambda **kw: jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=0.02, batch_size=5, **kw
    )
    patient = jaxgd.value_change(rtol=0.2, patience=6)
    whole = run(stop=patient, epochs=100)
    assert whole.status == Status.VALUE_SETTLED
    cut = run(stop=patient, max_steps=int(whole.steps) - 1)
    same = run(stop=jaxgd.value_change(rtol=0.2, patience=6), state=cut.state)
    assert same.steps == whole.steps
    for other in (
        jaxgd.value_change(rtol=0.200001, patience=6),
        jaxgd.value_change(atol=1e9, patience=6),
    ):
        fresh = run(stop=other, state=cut.state, epochs=100)
        # Six changes need seven checks, all of them its own.
        assert fresh.steps > whole.steps + 5 * 23 / 5
    # A rule of another form, and none at all, go on from the state as well.
    for other in (jaxgd.gradient_norm(rtol=1e-6), "auto", None):
        more = run(stop=other, state=whole.state, max_steps=3)
        assert more.steps == whole.steps + 3


def test_other_programs_agree_to_rounding():
    arguments = {"learning_rate": 0.05, "batch_size": 5, "key": 2}
    run = jaxgd.minimize(least_squares, START, (X, Y), max_steps=60, **arguments)
    static = jaxgd.minimize(
        least_squares, START, (X, Y), max_steps=60, stop=None, **arguments
    )
    mixed = jaxgd.minimize(
        least_squares,
        START,
        (X, Y),
        max_steps=50,
        stop=None,
        learning_rate=0.05,
        batch_size=5,
        state=jaxgd.minimize(
            least_squares, START, (X, Y), max_steps=10, **arguments
        ).state,
    )
    step = jaxgd.make_step(least_squares, optax.sgd(0.05))
    rows = jaxgd.batch_rows(2, 23, 5, jnp.arange(60))
    state, infos = jax.lax.scan(
        step, jaxgd.init_state(START, optax.sgd(0.05)), (X[rows], Y[rows])
    )
    for other in (static, mixed):
        for name in ("value", "grad_norm", "history"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
                getattr(run, name),
                getattr(other, name),
            )
    for other in (static.params, mixed.params, state.params):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), run.params, other
        )
    np.testing.assert_allclose(infos.value, run.history.value, rtol=1e-4)


# jit, vmap, grad, export.


def test_inside_jit():
    @jax.jit
    def fit(rate, steps, data):
        return jaxgd.minimize(
            least_squares,
            START,
            data,
            learning_rate=rate,
            max_steps=steps,
            batch_size=5,
        )

    inside = fit(0.05, 60, (X, Y))
    outside = jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=0.05, max_steps=60, batch_size=5
    )
    assert inside.history.step.shape == (1000,)
    assert (np.asarray(inside.history.step)[60:] == -1).all()
    assert np.isnan(np.asarray(inside.history.value)[60:]).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        inside.params,
        outside.params,
    )
    assert inside.report() == outside.report()
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda r: fit(r, 3, (X, Y)).report())(0.1)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("form", ["vmap", "jit vmap", "vmap jit"])
def test_under_vmap(form, batch_size):
    starts = {
        "w": jnp.asarray(RNG.normal(size=(4, 4)).astype("f")),
        "b": jnp.arange(4.0),
    }
    rates = jnp.array([0.01, 0.05, 0.1, 50.0])
    penalties = jnp.array([0.0, 0.1, 0.2, 0.3])
    tolerances = jnp.array([1e-2, 1e-3, 1e-2, 1e-3])
    keys = jnp.arange(4)
    data = (jnp.stack([X, X + 0.1, X - 0.1, X]), jnp.stack([Y] * 4))

    def run(start, data, penalty, rate, tolerance, b1, key):
        return jaxgd.minimize(
            least_squares,
            start,
            data,
            args=(penalty,),
            learning_rate=rate,
            optimizer=optax.sgd,
            hyperparams={"momentum": b1},
            stop=jaxgd.value_change(tolerance),
            max_steps=200,
            batch_size=batch_size,
            key=key,
        )

    transform = {
        "vmap": jax.vmap,
        "jit vmap": lambda f: jax.jit(jax.vmap(f)),
        "vmap jit": lambda f: jax.vmap(jax.jit(f)),
    }[form]
    momenta = jnp.array([0.0, 0.5, 0.3, 0.9])
    inputs = (starts, data, penalties, rates, tolerances, momenta, keys)
    lanes = transform(run)(*inputs)
    assert lanes.status.shape == (4,)
    assert lanes.converged.shape == (4,)
    assert lanes[3].status == Status.DIVERGED
    assert lanes[0].status == Status.VALUE_SETTLED
    for i in range(4):
        single = run(*jax.tree.map(lambda x, i=i: x[i], inputs))
        assert lanes[i].status == single.status
        assert lanes[i].steps == single.steps
        assert lanes[i].evaluations == single.evaluations
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
            lanes[i].params,
            single.params,
        )
        assert len(lanes[i].history.step) == len(single.history.step)
    assert "4 runs" in repr(lanes)
    with pytest.raises(TypeError, match=r"result\[i\]"):
        lanes.report()


GRADIENTS = {
    "batch": {},
    "blocks": {"microbatch_size": 7},
    "mini-batch": {"batch_size": 5},
    "mini-batch blocks": {"batch_size": 5, "microbatch_size": 3},
    "adam": {"optimizer": optax.adam, "batch_size": 5},
    "no history": {"history_rows": 0},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_reverse_mode_matches_finite_differences(name, x64):
    start = {"w": np.full(4, 0.1), "b": np.zeros(())}
    data = (X.astype(float), Y.astype(float))

    def outcome(rate, penalty, start, data):
        result = jaxgd.minimize(
            least_squares,
            start,
            data,
            args=(penalty,),
            learning_rate=rate,
            stop=None,
            max_steps=33,
            **GRADIENTS[name],
        )
        return result.value + jnp.sum(result.params["w"] ** 2)

    inputs = (jnp.asarray(0.03), jnp.asarray(0.1), start, data)
    found = jax.grad(outcome, argnums=(0, 1, 2, 3))(*inputs)
    for i in range(4):
        leaves, treedef = jax.tree.flatten(inputs[i])
        direction = [np.random.default_rng(i).normal(size=np.shape(x)) for x in leaves]

        def along(t, i=i, leaves=leaves, treedef=treedef, direction=direction):
            moved = [x + t * d for x, d in zip(leaves, direction, strict=True)]
            return outcome(
                *inputs[:i], jax.tree.unflatten(treedef, moved), *inputs[i + 1 :]
            )

        expected = (along(1e-6) - along(-1e-6)) / 2e-6
        slope = sum(
            jnp.sum(g * d)
            for g, d in zip(jax.tree.leaves(found[i]), direction, strict=True)
        )
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-8)


def test_reverse_mode_through_hyperparameters_and_at_a_minimum():
    def outcome(b1):
        return jaxgd.minimize(
            least_squares,
            START,
            (X, Y),
            optimizer=optax.adam,
            learning_rate=0.1,
            hyperparams={"b1": b1},
            stop=None,
            max_steps=10,
        ).value

    assert np.isfinite(jax.grad(outcome)(0.9))
    # At a zero gradient the norms of the history have no derivative to spoil.
    at_minimum = lambda rate: (
        jaxgd.minimize(
            lambda x: jnp.sum(x**2),
            jnp.zeros(3),
            learning_rate=rate,
            stop=None,
            max_steps=5,
        ).value
    )
    assert jax.grad(at_minimum)(0.1) == 0


def test_a_diverged_static_run_says_so():
    run = lambda rate: jaxgd.minimize(
        least_squares, START, (X, Y), learning_rate=rate, stop=None, max_steps=200
    )
    assert run(10.0).status == Status.DIVERGED
    assert run(0.01).status == Status.MAX_STEPS
    assert np.isnan(jax.grad(lambda rate: run(rate).value)(10.0))


def test_forward_mode_through_a_stop_rule():
    outcome = lambda rate: (
        jaxgd.minimize(
            least_squares, START, (X, Y), learning_rate=rate, max_steps=30
        ).value
    )
    _, slope = jax.jvp(outcome, (0.05,), (1.0,))
    expected = (outcome(0.0505) - outcome(0.0495)) / 1e-3
    np.testing.assert_allclose(slope, expected, rtol=0.01)


def test_closing_over_traced_values():
    def fit(target):
        return jaxgd.minimize(
            lambda x: jnp.sum((x - target) ** 2), jnp.zeros(2), learning_rate=0.3
        ).params

    for transform in (
        jax.vmap,
        lambda f: jax.jit(jax.vmap(f)),
        lambda f: jax.vmap(jax.jit(f)),
    ):
        found = transform(fit)(jnp.arange(3.0))
        np.testing.assert_allclose(
            found, np.arange(3.0)[:, None] * np.ones(2), atol=1e-4
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_size": 5},
        {"batch_size": 5, "stop": jaxgd.value_change(1e-3)},
        {"stop": None, "max_steps": 10},
        {"optimizer": optax.adam, "batch_size": 1, "final_evaluation": False},
    ],
)
def test_export_for_other_platforms(arguments):
    def fit(params, data, rate):
        return jaxgd.minimize(
            least_squares, params, data, learning_rate=rate, **arguments
        ).params

    exported = export.export(jax.jit(fit), platforms=["cpu", "cuda", "tpu"])(
        START, (X, Y), jnp.float32(0.05)
    )
    assert "callback" not in exported.mlir_module()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        exported.call(START, (X, Y), jnp.float32(0.05)),
        fit(START, (X, Y), 0.05),
    )


def test_static_chunks_agree_with_the_traced_loop(monkeypatch):
    # What GPUs and TPUs run, run here.
    from jaxgd import _loop

    for stop, batch_size in itertools.product(
        ("auto", jaxgd.value_change(1e-3)), (None, 5)
    ):
        arguments = {"batch_size": batch_size, "stop": stop, "learning_rate": 0.05}
        fun = lambda p, batch: least_squares(p, batch)
        traced = jaxgd.minimize(fun, START, (X, Y), max_steps=3000, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(
                _loop.lax,
                "platform_dependent",
                lambda x, cpu, default: default(x),
            )
            fun = lambda p, batch: least_squares(p, batch)
            static = jaxgd.minimize(fun, START, (X, Y), max_steps=3000, **arguments)
        assert static.status == traced.status
        assert static.steps == traced.steps
        for name in ("value", "history", "checks"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
                getattr(static, name),
                getattr(traced, name),
            )


# Dtypes.


@pytest.mark.parametrize("optimizer", [None, optax.sgd, optax.adam, optax.rmsprop])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("wide", [False, True])
def test_dtypes_stay(dtype, optimizer, wide):
    if dtype == "float64" and not wide:
        pytest.skip("needs x64")
    with jax.enable_x64(wide):
        start = {"w": jnp.zeros(4, dtype), "b": jnp.zeros((), dtype)}
        data = (jnp.asarray(X, dtype), jnp.asarray(Y, dtype))
        arguments = {"learning_rate": 0.02}
        if optimizer is not None:
            arguments["optimizer"] = optimizer
        if optimizer is optax.sgd:
            arguments["hyperparams"] = {"momentum": 0.9}
        result = jaxgd.minimize(
            least_squares, start, data, batch_size=5, epochs=60, **arguments
        )
        leaves = jax.tree.leaves((result.params, result.state.opt_state))
        kinds = {leaf.dtype.name for leaf in leaves if leaf.dtype != jnp.int32}
        assert kinds == {dtype}
        reported = "float64" if dtype == "float64" else "float32"
        assert result.value.dtype == result.grad_norm.dtype == reported
        assert result.history.value.dtype == reported
        assert not any(getattr(x, "weak_type", False) for x in leaves)
        w = np.asarray(result.params["w"], np.float64)
        np.testing.assert_allclose(w, np.arange(4), atol=1.1)


def test_x64_with_float32_parameters(x64):
    start = {"w": np.zeros(4, np.float32), "b": np.zeros((), np.float32)}
    for arguments in (
        {"learning_rate": 0.05},
        {
            "optimizer": optax.adam,
            "learning_rate": optax.cosine_decay_schedule(0.1, 99),
        },
    ):
        for batch_size in (None, 5):
            result = jaxgd.minimize(
                least_squares, start, (X, Y), batch_size=batch_size, **arguments
            )
            assert result.params["w"].dtype == np.float32
            assert result.steps.dtype == np.int32
            assert result.history.step.dtype == np.int32
            assert result.value.dtype == np.float32
