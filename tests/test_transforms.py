"""Contract: minimize inside jit, vmap and grad, exported, in static chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from regression import RNG, START, X, Y, least_squares

import jaxgd
from jaxgd import Status


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


@pytest.mark.thin(2)
@pytest.mark.parametrize("batch_size", [5, None])
def test_lanes_at_different_steps(batch_size):
    """Lanes that have come differently far, with limits of their own."""

    def run(state, steps):
        return jaxgd.minimize(
            least_squares,
            START,
            (X, Y),
            optimizer=optax.adam(0.05),
            max_steps=steps,
            batch_size=batch_size,
            state=state,
            stop=jaxgd.gradient_norm(0.3),
        )

    begun = [run(None, steps) for steps in (0, 7, 100)]
    limits = jnp.array([40, 400, 30])
    states = jax.tree.map(lambda *x: jnp.stack(x), *[begin.state for begin in begun])
    found = jax.vmap(run)(states, limits)
    for i, begin in enumerate(begun):
        alone = run(begin.state, int(limits[i]))
        assert found.steps[i] == alone.steps
        assert found.status[i] == alone.status
        assert found.evaluations[i] == alone.evaluations
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, 1e-4, 1e-6),
            found.params,
            alone.params,
        )


@pytest.mark.thin(4)
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


@pytest.mark.thin(4)
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


@pytest.mark.thin(4)
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


@pytest.mark.full
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


@pytest.mark.parametrize(
    ("stop", "batch_size", "rate", "limit"),
    [
        ("auto", None, 0.05, 3000),
        pytest.param("auto", 5, 0.05, 3000, marks=pytest.mark.full),
        pytest.param(
            jaxgd.value_change(1e-3), None, 0.05, 3000, marks=pytest.mark.full
        ),
        (jaxgd.value_change(1e-3), 5, 0.05, 3000),
        (jaxgd.target_value(-1), None, 1e-4, 2047),  # one less than whole chunks
    ],
    ids=["auto", "auto 5", "value", "value 5", "limit"],
)
def test_static_chunks_agree_with_the_traced_loop(
    stop, batch_size, rate, limit, monkeypatch
):
    # What GPUs and TPUs run, run here.
    from jaxgd._loop import advance

    arguments = {"batch_size": batch_size, "stop": stop, "learning_rate": rate}
    arguments["max_steps"] = limit
    fun = lambda p, batch: least_squares(p, batch)
    traced = jaxgd.minimize(fun, START, (X, Y), **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(
            advance.lax,
            "platform_dependent",
            lambda *given, cpu, default: default(*given),
        )
        fun = lambda p, batch: least_squares(p, batch)
        static = jaxgd.minimize(fun, START, (X, Y), **arguments)
    assert static.status == traced.status
    assert static.steps == traced.steps
    for name in ("value", "history", "checks"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            getattr(static, name),
            getattr(traced, name),
        )


def test_rates_as_lanes_of_exact_steps_within_jit():
    """XLA ended the process: the rows of all lanes are computed once, by no lane."""
    problem = jaxgd.problems.logistic(penalty=1e-3)

    def run(rate):
        return jaxgd.minimize(
            problem.fun,
            problem.init,
            problem.data,
            batch_size=32,
            epochs=3,
            stop=None,
            history_rows=0,
            learning_rate=rate,
        ).value

    rates = np.geomspace(1e-3, 1, 4).astype(np.float32)
    together = jax.jit(jax.vmap(run))(rates)
    np.testing.assert_allclose(together, [run(rate) for rate in rates], rtol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        *("alone", "map", "vmap"),
        pytest.param("vmap of jit", marks=pytest.mark.full),
        pytest.param("jit of vmaps", marks=pytest.mark.full),
    ],
)
def test_work_follows_the_steps_taken(how):
    """Not the limit, nor the size of a chunk: the evaluations are counted."""
    seen = []

    def fun(x, to):
        jax.debug.callback(lambda _: seen.append(1), x)
        return jnp.sum((x - to) ** 2)

    def fit(to):
        start, stop = jnp.zeros(2), jaxgd.gradient_norm(1e-3)
        run = jaxgd.minimize(
            fun, start, None, args=(to,), learning_rate=0.2, max_steps=10_000, stop=stop
        )
        return run.params, run.steps

    ways = {
        "alone": (fit, jnp.float32(1.0), 1),
        "map": (lambda to: jax.lax.map(fit, to), jnp.arange(1.0, 4), 3),
        "vmap": (jax.vmap(fit), jnp.arange(1.0, 4), 3),
        "vmap of jit": (jax.vmap(jax.jit(fit)), jnp.arange(1.0, 4), 3),
        "jit of vmaps": (jax.jit(jax.vmap(jax.vmap(fit))), jnp.ones((2, 2)), 4),
    }
    run, to, fits = ways[how]
    params, steps = run(to)
    jax.effects_barrier()
    np.testing.assert_allclose(params, jnp.stack([to, to], axis=-1), atol=1e-3)
    most = int(jnp.max(steps))
    assert 10 < most < 30
    assert most * fits <= len(seen) <= (3 * most + 20) * fits
