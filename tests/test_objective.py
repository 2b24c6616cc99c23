"""How the objective is called: trees, complex leaves, aux, keys, blocks, memory."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from jaxgd import Status
from jaxgd._problem.objective import even_block, make_objective
from jaxgd._rows import resident

pytestmark = pytest.mark.thin(4)

RNG = np.random.default_rng(0)
N = 23
X = RNG.normal(size=(N, 3)).astype("f")
Y = (X @ np.array([1, -2, 3]) + 0.3 * RNG.normal(size=N)).astype("f")
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


def trees_close(a, b, **kw):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(close, **kw), a, b)


def least_squares(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


# Parameters of every form.


@dataclass(frozen=True)
class Affine:
    """A module: its arrays are data, its power is structure."""

    scale: jax.Array
    power: int = field(metadata={"static": True})

    def __call__(self, w, batch):
        x, y = batch
        return jnp.mean(jnp.abs(self.scale * (x @ w) - y) ** self.power)


jax.tree_util.register_dataclass(Affine)


def test_nested_parameters_equal_the_flat_ones():
    def nested(p, batch):
        w = jnp.stack([p["a"], p["rest"][0], p["rest"][1]["c"][0]])
        return least_squares(w, batch)

    start = {"a": 0.5, "rest": (np.float32(0), {"c": np.zeros(1)}), "none": None}
    flat = jaxgd.minimize(
        least_squares, [0.5, 0, 0] * np.ones(3), (X, Y), learning_rate=0.1, max_steps=20
    )
    tree = jaxgd.minimize(nested, start, (X, Y), learning_rate=0.1, max_steps=20)
    assert jax.tree.structure(tree.params) == jax.tree.structure(start)
    close(np.hstack(jax.tree.leaves(tree.params)), flat.params)
    trees_close(tree.history, flat.history)
    assert [x.shape for x in jax.tree.leaves(tree.params)] == [(), (), (1,)]


def test_a_module_is_data_and_structure(count_compilations):
    run = lambda module: jaxgd.minimize(
        module, jnp.zeros(3), (X, Y), learning_rate=0.02, batch_size=5, epochs=40
    )
    first = run(Affine(jnp.float32(1), 2))
    with count_compilations() as count:
        half = run(Affine(jnp.float32(0.5), 2))
    assert count() == 0
    close(half.value, Affine(0.5, 2)(half.params, (X, Y)))
    best = np.linalg.lstsq(X, Y)[0]
    close(first.params, best, atol=0.15)
    close(half.params, 2 * best, atol=2.5)
    assert not np.allclose(half.params, first.params, atol=0.5)
    fourth = run(Affine(jnp.float32(0.5), 4))
    close(fourth.value, Affine(0.5, 4)(fourth.params, (X, Y)))


def test_args_may_be_trees():
    def fun(w, batch, weights, offset):
        return least_squares(w * weights["w"], batch) + offset[0] * jnp.sum(w**2)

    args = ({"w": np.arange(1, 4)}, [0.5])
    result = jaxgd.minimize(
        fun, jnp.zeros(3), (X, Y), args=args, learning_rate=0.01, max_steps=9
    )
    params = jnp.zeros(3)
    for _ in range(9):
        params = params - 0.01 * jax.grad(fun)(params, (X, Y), *args)
    close(result.params, params)


A = (RNG.normal(size=(8, 3)) + 1j * RNG.normal(size=(8, 3))).astype(np.complex64)
B = (RNG.normal(size=8) + 1j * RNG.normal(size=8)).astype(np.complex64)


@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.02, momentum=0.9)])
def test_complex_leaves_descend_like_their_real_coordinates(optimizer):
    def residual(p):
        return jnp.mean(jnp.abs(A @ p["z"] - B * p["s"]) ** 2) + (p["s"] - 1) ** 2

    def in_coordinates(p):
        return residual({"z": jax.lax.complex(p["re"], p["im"]), "s": p["s"]})

    rate = {} if optimizer else {"learning_rate": 0.05}
    arguments = {"optimizer": optimizer, "max_steps": 40} | rate
    z = np.full(3, 1 + 1j, np.complex64)
    found = jaxgd.minimize(residual, {"z": z, "s": 0.5}, **arguments)
    real = jaxgd.minimize(
        in_coordinates, {"re": z.real, "im": z.imag, "s": 0.5}, **arguments
    )
    assert found.params["z"].dtype == np.complex64
    assert found.value.dtype == np.float32
    trees_close(found.history, real.history, rtol=1e-3)
    close(found.params["z"], real.params["re"] + 1j * real.params["im"], rtol=1e-3)
    close(found.grad_norm, real.grad_norm, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_complex_least_squares_reaches_its_solution(batch_size):
    def fun(z, batch):
        a, b = batch
        return jnp.mean(jnp.abs(a @ z - b) ** 2)

    result = jaxgd.minimize(
        fun,
        np.zeros(3, np.complex64),
        (A, B),
        learning_rate=0.1,
        batch_size=batch_size,
        max_steps=1500,
        stop=jaxgd.gradient_norm(5e-5),
    )
    close(result.params, np.linalg.lstsq(A, B)[0], atol=1e-4)
    assert result.grad_norm < 1e-4


# Auxiliary output.


def with_aux(w, batch):
    x, y = batch
    errors = x @ w - y
    aux = {
        "rows": errors,
        "table": jnp.stack([errors, y], axis=1),
        "mean": jnp.mean(errors),
        "vector": jnp.mean(x * errors[:, None], axis=0),
        "count": jnp.sum(errors > 0),
        "signs": jnp.sum(x > 0, axis=0),
        "all": jnp.all(jnp.abs(errors) < 1e6),
        "none": jnp.all(y < 0.2),
        "empty": None,
    }
    return jnp.mean(errors**2), aux


# name: arguments, whether full passes are cut into blocks
AUX = {
    "batch": ({}, False),
    "batch, blocks": ({"microbatch_size": 7}, False),
    "batch, blocks of one row": ({"microbatch_size": 1}, False),
    "mini-batch": ({"batch_size": 5}, False),
    "mini-batch, blocks": (
        {"batch_size": 5, "microbatch_size": 2, "stop": jaxgd.target_value(0.5)},
        True,
    ),
    "stop=None": ({"stop": None}, False),
    "stop=None, mini-batch": ({"stop": None, "batch_size": 5}, True),
}


@pytest.mark.full
@pytest.mark.parametrize("name", AUX)
def test_aux_is_that_of_the_returned_parameters(name, monkeypatch):
    arguments, in_blocks = AUX[name]
    if in_blocks:
        monkeypatch.setattr(resident, "_PASS_BYTES", 0)
    fun = lambda w, batch: with_aux(w, batch)  # a new program, with that block
    result = jaxgd.minimize(
        fun,
        jnp.zeros(3),
        (X, Y),
        learning_rate=0.05,
        max_steps=17,
        has_aux=True,
        **arguments,
    )
    value, aux = with_aux(result.params, (X, Y))
    close(result.value, value)
    trees_close(result.aux, aux)
    assert result.aux["rows"].shape == (N,)
    kinds = lambda tree: jax.tree.map(lambda x: (x.dtype, x.shape), tree)
    assert kinds(result.aux) == kinds(aux)


def test_aux_at_the_start_and_where_a_run_diverged():
    for rate, steps in ((0.1, 0), (1e3, 99)):
        result = jaxgd.minimize(
            with_aux,
            jnp.ones(3),
            (X, Y),
            learning_rate=rate,
            max_steps=steps,
            has_aux=True,
        )
        assert (result.status == Status.DIVERGED) == (steps > 0)
        assert (result.steps > 0) == (steps > 0)
        _, aux = with_aux(result.params, (X, Y))
        trees_close(result.aux["rows"], aux["rows"], rtol=1e-4)


# Keys.


def noisy(w, batch, key):
    return least_squares(w, batch) + jax.random.normal(key)


def noisy_alone(w, key):
    return jnp.sum((w - 1) ** 2) + jax.random.normal(key)


NOISY = {
    "batch": (noisy, {"data": (X, Y)}),
    "mini-batch": (noisy, {"data": (X, Y), "batch_size": 5}),
    "no data": (noisy_alone, {}),
}


@pytest.mark.parametrize("name", NOISY)
def test_keys_of_steps_and_of_full_passes(name):
    fun, arguments = NOISY[name]
    start = jnp.ones(3)
    run = partial(jaxgd.minimize, fun, start, with_key=True, **arguments)
    run = partial(run, learning_rate=0.0, stop=jaxgd.target_value(-1e9))
    still = run(max_steps=12)
    noise = still.history.value
    if name == "no data":
        quiet = np.zeros(12)
    elif name == "batch":
        quiet = np.full(12, least_squares(start, (X, Y)))
    else:
        rows = jaxgd.batch_rows(0, N, 5, np.arange(12))
        quiet = [least_squares(start, (X[r], Y[r])) for r in np.asarray(rows)]
    noise = noise - quiet
    # A key of its own for each step, of which the normal numbers are what they are.
    assert len(np.unique(np.round(noise, 5))) == 12
    assert np.abs(noise).max() < 5
    # The same key for every full pass, whenever it is made, and another than a step's.
    at_start = run(max_steps=0)
    assert at_start.value == still.value
    assert at_start.value == run(max_steps=5).value
    full = 0 if name == "no data" else least_squares(start, (X, Y))
    assert np.abs(noise - (still.value - full)).min() > 1e-4
    if name == "mini-batch":
        assert still.checks.step.tolist() == [5, 10]
        assert (still.checks.value == still.value).all()
    # Another seed, other keys; the same seed, the same ones.
    other = run(max_steps=12, key=1)
    assert other.value != still.value
    assert not np.isin(other.history.value - quiet, noise).any()
    again = run(max_steps=12, key=jax.random.key(0))
    np.testing.assert_array_equal(again.history.value, still.history.value)


@pytest.mark.parametrize("name", NOISY)
def test_keys_do_not_see_cuts(name):
    fun, arguments = NOISY[name]
    # Noise that the gradient feels.
    felt = lambda w, *rest, key: fun(w * (1 + 0.1 * jax.random.normal(key)), *rest, key)
    run = partial(
        jaxgd.minimize,
        felt,
        jnp.ones(3),
        with_key=True,
        learning_rate=0.02,
        **arguments,
    )
    whole, state = run(max_steps=30, key=3), {"key": 3}
    for leg in (1, 7, 2, 20):
        part = run(max_steps=leg, **state)
        state = {"state": part.state}
    for name in ("params", "value", "history"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(part, name), getattr(whole, name)
        )


def comparing():
    """A rule that keeps how far ``value_fn`` at the parameters is from ``value``."""

    def update(updates, state, params, *, value, value_fn, **_):
        gap = jnp.maximum(state, jnp.abs(value - value_fn(params)))
        return jax.tree.map(lambda g: -0.05 * g, updates), gap

    return optax.GradientTransformationExtraArgs(lambda p: jnp.float32(0), update)


@pytest.mark.parametrize("name", NOISY)
def test_value_fn_is_of_the_same_batch_and_key(name):
    fun, arguments = NOISY[name]
    result = jaxgd.minimize(
        fun,
        jnp.zeros(3),
        with_key=True,
        optimizer=comparing(),
        max_steps=20,
        **arguments,
    )
    assert result.state.opt_state < 1e-5
    assert np.std(result.history.value) > 0.1


# Blocks.


@pytest.mark.parametrize("size", [1, 4, 5, 7, 11, 22, 23, 24, 1000])
def test_blocks_give_the_value_and_gradient_of_the_whole(size):
    whole = make_objective(lambda: (with_aux, ()), (), has_aux=True)
    blocks = make_objective(lambda: (with_aux, ()), (), has_aux=True, block=size)
    w = jnp.array([1.0, 2.0, 3.0])
    expected = whole.value_and_grad(w, (X, Y), None)
    trees_close(blocks.value_and_grad(w, (X, Y), None), expected)
    close(blocks.value(w, (X, Y), None), expected[0][0])


@pytest.mark.parametrize(("batch_size", "size"), [(None, 5), (10, 3)])
def test_microbatches_take_the_same_steps(size, batch_size):
    data = (X[:20], Y[:20])
    run = partial(
        jaxgd.minimize,
        least_squares,
        jnp.zeros(3),
        data,
        learning_rate=0.05,
        batch_size=batch_size,
        max_steps=30,
    )
    whole, blocks = run(), run(microbatch_size=size)
    for name in ("params", "value", "grad_norm", "history"):
        trees_close(getattr(blocks, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    assert blocks.evaluations == whole.evaluations


def test_sums_of_blocks_are_wide():
    # 1000 blocks of bfloat16 means would lose most of them.
    rows = np.ones(1000, np.float32)
    fun = lambda w, batch: jnp.mean(w.astype(jnp.bfloat16) * batch.astype(jnp.bfloat16))
    blocks = make_objective(lambda: (fun, ()), (), block=1)
    (value, _), grad = blocks.value_and_grad(jnp.bfloat16(1), rows, None)
    assert value.dtype == grad.dtype == jnp.bfloat16
    assert value == grad == 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_full_passes_in_blocks_equal_a_direct_call(batch_size, monkeypatch):
    sizes = []

    def fun(w, batch):
        sizes.append(batch[0].shape[0])
        return least_squares(w, batch)

    monkeypatch.setattr(resident, "_PASS_BYTES", 0)
    result = jaxgd.minimize(
        fun,
        jnp.zeros(3),
        (X, Y),
        learning_rate=0.02,
        batch_size=batch_size,
        max_steps=46,
        stop=jaxgd.gradient_norm(0.0),
    )
    if batch_size == 1:  # the check there, a pass of its own
        assert result.checks.step[-1] == 46
        close(result.checks.value[-1], result.value)
    assert {32, 64} <= set(sizes)  # the trial
    sizes = set(sizes) - {32, 64}
    assert max(sizes) <= max(batch_size, 2)  # 2: a look at shapes
    value, grad = jax.value_and_grad(least_squares)(result.params, (X, Y))
    close(result.value, value)
    close(result.grad_norm, np.linalg.norm(grad), rtol=1e-4)


def test_even_blocks():
    for n, most, size in (
        (100, 30, 25),
        (100, 50, 50),
        (100, 1000, 100),
        (23, 5, 5),  # no divisor is near
        (23, 1, 1),
        (24, 5, 4),
        (1, 9, 1),
    ):
        assert even_block(n, most) == size


def perceptron(p, batch):
    x, y = batch
    hidden = jnp.tanh(x @ p["in"])
    return jnp.mean((hidden @ p["out"] - y) ** 2)


def test_memory_does_not_grow_with_the_rows():
    params = {"in": jnp.zeros((8, 64)), "out": jnp.zeros(64)}

    def temporaries(n):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 8), (n,))]
        fit = lambda p, data: jaxgd.minimize(
            perceptron,
            p,
            data,
            learning_rate=0.1,
            batch_size=32,
            stop=jaxgd.value_change(1e-3),
        )
        compiled = jax.jit(fit).lower(params, shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2**18), temporaries(2**22)
    activations = 2**22 * 64 * 4
    assert 0 < small < activations / 10
    # 2**22 rows: their activations alone are 1 GB, their data 150 MB.
    assert large < 1.2 * small + 2**20


# Where the rows are, and which.


@pytest.mark.parametrize("batch_size", [None, 5])
def test_data_on_host_or_device(batch_size):
    run = lambda data: jaxgd.minimize(
        least_squares,
        jnp.zeros(3),
        data,
        learning_rate=0.05,
        batch_size=batch_size,
        max_steps=20,
    )
    host, device = run((X, Y)), run((jnp.asarray(X), jax.device_put(Y)))
    fortran = run((np.asfortranarray(X), Y[::-1][::-1]))
    for other in (device, fortran):
        np.testing.assert_array_equal(host.params, other.params)
        jax.tree.map(np.testing.assert_array_equal, host.history, other.history)


def placed(w, batch):
    """A value that tells the rows and their order."""
    return jnp.sum(batch * jnp.sqrt(jnp.arange(1.0, 1 + batch.shape[0]))) + 0 * w


@pytest.mark.filterwarnings("ignore:fun is no mean")
@pytest.mark.parametrize("strata", [None, 1, 2, 6])
def test_strata_take_their_rows(strata):
    rows = RNG.normal(size=24).astype("f")
    result = jaxgd.minimize(
        placed,
        0.0,
        rows,
        learning_rate=0.0,
        batch_size=6,
        strata=strata,
        key=7,
        max_steps=11,
    )
    taken = np.asarray(jaxgd.batch_rows(7, 24, 6, np.arange(11), strata or 1))
    close(result.history.value, [placed(0.0, rows[r]) for r in taken])
    if strata == 6:
        assert (np.sort(taken // 4, axis=1) == np.arange(6)).all()


def test_data_of_several_arrays_and_dtypes():
    data = {"x": X, "label": (Y > 0).astype(np.int32), "keep": np.arange(N) % 2 == 0}

    def fun(w, batch):
        z = batch["x"] @ w
        losses = jnp.logaddexp(0, z) - batch["label"] * z
        return jnp.mean(jnp.where(batch["keep"], losses, 0))

    result = jaxgd.minimize(
        fun, jnp.zeros(3), data, learning_rate=0.5, batch_size=1, max_steps=40
    )
    params = jnp.zeros(3)
    gradient = jax.jit(jax.grad(fun))
    for t in range(40):
        rows = np.asarray(jaxgd.batch_rows(0, N, 1, t))
        batch = jax.tree.map(lambda a, rows=rows: a[rows], data)
        params = params - 0.5 * gradient(params, batch)
    close(result.params, params, rtol=1e-4)


def test_blocks_of_a_loss_over_pairs_of_rows():
    def pairs(p, batch):
        return jnp.mean(jnp.sum(batch.reshape(-1, 2) - p, axis=1) ** 2)

    rows = jnp.arange(8.0)
    run = lambda block: jaxgd.minimize(
        pairs, 0.0, rows, learning_rate=0.01, max_steps=5, microbatch_size=block
    )
    np.testing.assert_allclose(run(4).params, run(None).params, rtol=1e-5)
