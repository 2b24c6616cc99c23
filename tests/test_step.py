"""The manual loop: a step that is a scan body, and nothing hidden in it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxgd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("f")
Y = (X @ np.array([1, -2, 3]) + 0.3 * RNG.normal(size=24)).astype("f")
BATCHES = (X.reshape(6, 4, 3), Y.reshape(6, 4))
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


def trees_close(a, b, **kw):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(close, **kw), a, b)


def least_squares(w, batch, penalty=0.0):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + penalty * jnp.sum(w**2)


def bowl(x, *_):
    return jnp.sum(x**2) / 2


# The four lines of the documentation.


def test_the_manual_loop_with_data():
    fun, optimizer, params, batches = least_squares, optax.sgd(0.1), X[0], BATCHES
    step = jaxgd.make_step(fun, optimizer)
    state, infos = jax.lax.scan(step, jaxgd.init_state(params, optimizer), batches)
    for i in range(6):
        batch = (BATCHES[0][i], BATCHES[1][i])
        value, grad = jax.value_and_grad(fun)(params, batch)
        close(infos.value[i], value)
        close(infos.grad_norm[i], np.linalg.norm(grad))
        close(infos.update_norm[i], 0.1 * np.linalg.norm(grad))
        params = params - 0.1 * grad
    close(state.params, params)
    assert state.step == 6
    assert state.step.dtype == jnp.int32
    assert state.run is None


def test_the_manual_loop_without_data():
    optimizer = optax.sgd(0.5)
    step = jaxgd.make_step(lambda x: bowl(x), optimizer)
    start = jaxgd.init_state({"x": 8.0}["x"], optimizer)
    state, infos = jax.lax.scan(step, start, None, length=3)
    assert state.params == 1
    assert state.step == 3
    assert infos.value.tolist() == [32, 8, 2]
    assert infos.grad_norm.tolist() == [8, 4, 2]
    assert infos.update_norm.tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.1), optax.sgd(optax.exponential_decay(0.1, 5, 0.5))]
)
def test_minimize_takes_the_same_steps(optimizer):
    rows = jaxgd.batch_rows(3, 24, 5, jnp.arange(20))
    step = jaxgd.make_step(least_squares, optimizer, args=(0.1,))
    start = jaxgd.init_state(np.zeros(3), optimizer)
    state, infos = jax.lax.scan(step, start, (X[rows], Y[rows]))
    result = jaxgd.minimize(
        least_squares,
        np.zeros(3),
        (X, Y),
        args=(0.1,),
        optimizer=optimizer,
        batch_size=5,
        key=3,
        max_steps=20,
    )
    close(state.params, result.params, rtol=1e-4)
    trees_close(state.opt_state, result.state.opt_state, rtol=1e-4)
    for name in ("value", "grad_norm", "update_norm"):
        close(getattr(infos, name), getattr(result.history, name), rtol=1e-4)
    assert result.state.step == state.step


def test_numbers_in_args_have_the_precision_of_the_parameters(x64):
    data = (X.astype(float), Y.astype(float))
    run = partial(jaxgd.minimize, least_squares, np.zeros(3), data, learning_rate=0.1)
    result = run(args=(0.1,), max_steps=5, stop=None)
    optimizer = optax.sgd(0.1)
    step = jaxgd.make_step(
        lambda w, p: least_squares(w, data, p), optimizer, args=(0.1,)
    )
    state, _ = jax.lax.scan(step, jaxgd.init_state(np.zeros(3), optimizer), None, 5)
    assert state.params.dtype == np.float64
    np.testing.assert_allclose(state.params, result.params, rtol=1e-13)


# State and Info.


def test_state_and_info_are_pytrees():
    optimizer = optax.adam(0.1)
    state = jaxgd.init_state({"w": np.zeros(3), "b": 0.0}, optimizer)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert not any(leaf.weak_type for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, jaxgd.State)
    assert jax.tree.structure(again) == treedef
    fun = lambda p, batch: least_squares(p["w"], batch) + p["b"] ** 2
    after, info = jax.jit(jaxgd.make_step(fun, optimizer))(state, (X, Y))
    # A scan body: what comes out has the form of what went in.
    forms = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert forms(after) == forms(state)
    assert isinstance(info, jaxgd.Info)
    assert len(jax.tree.leaves(info)) == 3
    assert jax.tree.map(lambda x: x + 1, info).value == info.value + 1
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(after)]
    assert names[0] == ".params['b']"


# Transformations.


def scanned(rate, start, batches):
    optimizer = optax.sgd(rate)
    step = jaxgd.make_step(least_squares, optimizer)
    return jax.lax.scan(step, jaxgd.init_state(start, optimizer), batches)


def test_under_vmap():
    rates, starts = jnp.array([0.01, 0.1, 0.2]), jnp.asarray(X[:3])
    states, infos = jax.vmap(scanned, in_axes=(0, 0, None))(rates, starts, BATCHES)
    assert infos.value.shape == (3, 6)
    assert states.step.tolist() == [6, 6, 6]
    for i in range(3):
        state, info = scanned(rates[i], starts[i], BATCHES)
        close(states.params[i], state.params)
        close(infos.value[i], info.value)


def test_under_grad():
    def last(rate, start):
        optimizer = optax.sgd(rate)
        step = jaxgd.make_step(bowl, optimizer)
        state = jaxgd.init_state(start, optimizer)
        state, infos = jax.lax.scan(step, state, None, length=7)
        return jnp.sum(state.params) + 0 * jnp.sum(infos.update_norm), infos

    # x_T = (1 - rate)^T x_0
    (_, infos), slopes = jax.value_and_grad(last, (0, 1), has_aux=True)(
        0.1, jnp.array([2.0, 0.0])
    )
    close(slopes[0], -7 * 0.9**6 * 2)
    close(slopes[1], [0.9**7] * 2)
    close(infos.value, 2 * 0.81 ** np.arange(7))
    # At a minimum, where a norm has no derivative.
    slope = jax.grad(lambda rate: last(rate, jnp.zeros(2))[0])(0.1)
    assert slope == 0


def test_auxiliary_output():
    def fun(w, batch):
        errors = batch[0] @ w - batch[1]
        return jnp.mean(errors**2), {"errors": errors, "mean": jnp.mean(errors)}

    optimizer = optax.sgd(0.1)
    step = jaxgd.make_step(fun, optimizer, has_aux=True)
    state = jaxgd.init_state(np.zeros(3), optimizer)
    _, infos = jax.lax.scan(step, state, BATCHES)
    assert infos.aux["errors"].shape == (6, 4)
    close(infos.aux["errors"][0], -BATCHES[1][0])
    close(infos.aux["mean"], infos.aux["errors"].mean(axis=1))
    close(infos.value, (infos.aux["errors"] ** 2).mean(axis=1))
    plain = jaxgd.make_step(least_squares, optimizer)
    assert plain(state, (X, Y))[1].aux is None


@pytest.mark.parametrize("size", [1, 5, 8, 24, 100])
def test_microbatches(size):
    optimizer, seen = optax.sgd(0.1), []

    def fun(w, batch):
        seen.append(batch[0].shape[0])
        return least_squares(w, batch)

    state = jaxgd.init_state(np.ones(3), optimizer)
    blocks = jaxgd.make_step(fun, optimizer, microbatch_size=size)(state, (X, Y))
    assert max(seen) <= max(size, 2)  # 2: a look at shapes
    trees_close(blocks, jaxgd.make_step(least_squares, optimizer)(state, (X, Y)))


def test_microbatches_without_data_change_nothing():
    optimizer = optax.sgd(0.5)
    step = jaxgd.make_step(lambda x: bowl(x), optimizer, microbatch_size=3)
    assert step(jaxgd.init_state(8.0, optimizer), None)[0].params == 4


# Rules of optax.


def test_rules_that_ask_for_values():
    whole = lambda w: least_squares(w, (X, Y))
    best = np.linalg.lstsq(X, Y)[0]
    for optimizer in (optax.lbfgs(), optax.polyak_sgd(1.0, f_min=float(whole(best)))):
        step = jaxgd.make_step(whole, optimizer)
        start = jaxgd.init_state(np.zeros(3), optimizer)
        state, infos = jax.lax.scan(step, start, None, length=40)
        close(state.params, best, atol=2e-2)
        assert infos.value[-1] < infos.value[0]


def test_value_fn_is_the_objective_of_the_batch_of_the_step():
    def update(updates, state, params, *, value, grad, value_fn, **_):
        found, slope = jax.value_and_grad(value_fn)(params)
        gap = jnp.abs(found - value) + jnp.max(jnp.abs(slope - grad))
        return jax.tree.map(lambda g: -0.1 * g, updates), jnp.maximum(state, gap)

    optimizer = optax.GradientTransformationExtraArgs(lambda p: jnp.float32(0), update)
    step = jaxgd.make_step(least_squares, optimizer, args=(0.1,))
    start = jaxgd.init_state(np.ones(3), optimizer)
    state, infos = jax.lax.scan(step, start, BATCHES)
    assert state.opt_state < 1e-4
    assert np.std(infos.value) > 0.1


def test_accumulated_gradients():
    optimizer = optax.MultiSteps(optax.sgd(0.1), 3)
    step = jaxgd.make_step(least_squares, optimizer)
    start = jaxgd.init_state(np.ones(3), optimizer)
    state, infos = jax.lax.scan(step, start, BATCHES)
    assert (np.asarray(infos.update_norm) > 0).tolist() == [False, False, True] * 2
    plain = optax.sgd(0.1)
    merged = jax.tree.map(lambda x: x.reshape(2, 12, *x.shape[2:]), BATCHES)
    whole, _ = jax.lax.scan(
        jaxgd.make_step(least_squares, plain),
        jaxgd.init_state(np.ones(3), plain),
        merged,
    )
    close(state.params, whole.params, rtol=1e-4)
    assert (state.step, whole.step) == (6, 2)


def test_a_schedule_free_state_is_a_scan_carry():
    optimizer = contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9)
    step = jaxgd.make_step(least_squares, optimizer)
    start = jaxgd.init_state(np.zeros(3), optimizer)
    state, _ = jax.lax.scan(step, start, BATCHES)
    judged = contrib.schedule_free_eval_params(state.opt_state, state.params)
    assert least_squares(judged, (X, Y)) < least_squares(np.zeros(3), (X, Y))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1),
        optax.adamw(0.1),
        optax.rmsprop(0.1),
    ],
    ids=["momentum", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_stay(dtype, optimizer):
    start = jaxgd.init_state(jnp.ones(3, dtype), optimizer)
    step = jaxgd.make_step(least_squares, optimizer, args=(0.1,))
    state, infos = step(start, (X, Y))
    kinds = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert kinds(state) == kinds(start)
    assert kinds(infos) == [np.float32] * 3
    assert (state.params != 1).all()
