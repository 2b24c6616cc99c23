"""Ordinary calls that once went wrong, each kind in every regime."""

import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from jax.tree_util import Partial

import jaxgd
from benchmarks.classical_problems import classical

pytestmark = pytest.mark.thin(4)

ROWS = 32
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("f")
Y = (X @ np.array([1, -2, 0.5, 3], "f") + 0.5).astype("f")


def line(params, batch):
    """Least squares whose parameters are as many as the test likes."""
    x, y = batch
    out = x @ params["w"][:4] + params["b"]
    return jnp.mean((out - y) ** 2) + 1e-3 * jnp.sum(params["w"] ** 2)


REGIMES = {
    "batch": {},
    "mini": {"batch_size": 8},
    "row": {"batch_size": 1, "learning_rate": 0.02},
    "scan": {"stop": None, "learning_rate": 0.1},
    "lbfgs": {"optimizer": optax.lbfgs()},
    "mini_stop": {
        "batch_size": 8,
        "learning_rate": 0.05,
        "stop": jaxgd.params_change(1e-9),
    },
}


def with_leaves(size):
    """Scalar, complex and empty leaves beside one of so many numbers."""
    return {
        "w": np.zeros(size, "f"),
        "b": np.zeros((), "f"),
        "c": np.zeros((), "F"),
        "none": np.zeros(0, "f"),
        "wide": np.zeros((0, 3), "f"),
        "tall": np.zeros((3, 0), "f"),
    }


@pytest.mark.thin(4)
@pytest.mark.parametrize("regime", REGIMES)
def test_scalar_and_empty_leaves_in_trees_of_any_size(regime):
    size = [6, 20000][list(REGIMES).index(regime) % 2]
    start = with_leaves(size)
    result = jaxgd.minimize(line, start, (X, Y), max_steps=60, **REGIMES[regime])
    assert result.steps > 0
    assert result.value < 0.9 * line(start, (X, Y))
    # The norm is that over all leaves.
    grad = jax.grad(line)(result.params, (X, Y))
    norm = np.sqrt(sum(np.sum(np.abs(g) ** 2.0) for g in jax.tree.leaves(grad)))
    np.testing.assert_allclose(result.grad_norm, norm, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("size", [6, 20000])
def test_scalar_leaves_elsewhere(size):
    start = with_leaves(size)
    del start["c"]
    found = jaxgd.sweep(
        line, start, (X, Y), over={"learning_rate": [0.01, 0.1]}, max_steps=20
    )
    assert found.best_settings["learning_rate"] == pytest.approx(0.1)
    *_, last = jaxgd.iterate(line, start, (X, Y), every=5, max_steps=9)
    assert last.steps == 9
    rule = optax.sgd(0.1)
    step = jaxgd.make_step(line, rule)
    _, info = step(jaxgd.init_state(start, rule), (X, Y))
    np.testing.assert_allclose(info.update_norm, 0.1 * info.grad_norm, rtol=1e-5)
    assert jaxgd.sharpness(line, start, (X, Y), max_products=20) > 0


def mixed(x):
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def shuffled(key, n, epoch, index):
    """The order of up to 24 rows as version 0.1.0 wrote it down, in NumPy."""
    epoch = np.atleast_1d(np.asarray(epoch, np.uint32))
    index = np.asarray(index, np.uint32) + 0 * epoch
    first = np.full_like(epoch, 0x243F6A88)
    second = np.full_like(epoch, 0xB7E15162)
    for word in np.asarray(jax.random.key_data(key)).ravel():
        first, second = mixed(first ^ word), mixed(second + word)
    low = mixed(epoch * np.uint32(0x9E3779B1) + first)
    high = mixed(low ^ second) | np.uint32(1)
    for k in range(n - 1, 0, -1):
        hashed = mixed(mixed(low + np.uint32(k) * high) ^ high)
        long = hashed.astype(np.uint64) * np.uint64(k + 1)
        draw = (long >> np.uint64(32)).astype(np.uint32)
        index = np.where(index == k, draw, np.where(index == draw, np.uint32(k), index))
    return index.astype(np.int32)


@pytest.mark.parametrize("n", range(2, 25))
def test_few_rows_keep_their_order(n):
    epochs = np.array([0, 1, 2, 77, 2**20 + 3, 2**31 - 1])[:, None]
    index = np.arange(n)
    for key in (jax.random.key(0), jax.random.key(123456789), jax.random.PRNGKey(5)):
        expected = shuffled(key, n, epochs, index)
        found = jaxgd.shuffled_rows(key, n, epochs, index)
        np.testing.assert_array_equal(found, expected)


def test_few_rows_keep_their_order_in_programs_strata_and_lanes():
    n = 24
    keys = jax.random.split(jax.random.key(1), 3)
    one = lambda key: jaxgd.shuffled_rows(key, n, 3, jnp.arange(n))
    lanes = jax.jit(jax.vmap(one))(keys)
    for key, rows in zip(keys, lanes, strict=True):
        np.testing.assert_array_equal(rows, shuffled(key, n, 3, np.arange(n)))
    # Two strata of 12 rows, 8 rows a step: 4 of each, every third step a new epoch.
    steps = np.arange(7)
    rows = np.asarray(jaxgd.batch_rows(keys[0], n, 8, steps, strata=2))
    for s in range(2):
        own = jax.random.fold_in(keys[0], s)
        places = np.arange(7 * 4)
        expected = shuffled(own, 12, places // 12, places % 12) + 12 * s
        found = rows[:, 4 * s : 4 * s + 4].reshape(-1)
        np.testing.assert_array_equal(found, expected)


def equations(jaxpr):
    """How many equations a program has, those of its inner programs included."""
    count = 0
    for eqn in jaxpr.eqns:
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [getattr(x, "jaxpr", x) for x in inner]
        count += 1 + sum(equations(x) for x in inner if hasattr(x, "eqns"))
    return count


def test_the_program_of_the_row_order_does_not_grow():
    def size(n):
        order = lambda key: jaxgd.shuffled_rows(key, n, 0, np.arange(n))
        return equations(jax.make_jaxpr(order)(jax.random.key(0)).jaxpr)

    assert 20 < size(3) == size(24) < 200


def test_batches_of_few_rows_compile_in_seconds():
    x, y = np.ones((24, 1), "f"), np.ones(24, "f")
    fun = lambda p, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2)
    before = time.perf_counter()
    result = jaxgd.minimize(
        fun, np.zeros(1, "f"), (x, y), batch_size=24, max_steps=60, learning_rate=0.01
    )
    assert time.perf_counter() - before < 30
    np.testing.assert_allclose(result.params, 1 - 0.98**60, rtol=1e-5)


COMPILATIONS = """
import jax, jax.numpy as jnp, numpy as np, optax, jaxgd

count = 0

def listen(name, *_, **__):
    global count
    count += name == "/jax/core/compile/backend_compile_duration"

jax.monitoring.register_event_duration_secs_listener(listen)

def loss(params, batch, scale):
    x, y = batch
    return jnp.mean(jnp.abs(x @ params["w"] + params["b"] - scale * y) ** 2)

def compilations(put, dtype, **settings):
    jax.clear_caches()
    before, rate = count, settings.get("learning_rate")
    if rate is not None:
        settings["learning_rate"] = put(np.float32(rate))
    params = {"w": put(np.zeros(3, dtype)), "b": put(np.zeros((), dtype))}
    data = put(np.ones((8, 3), "f")), put(np.ones(8, "i"))
    jaxgd.minimize(loss, params, data, args=(put(np.float32(2)),), **settings)
    return count - before

compilations(np.asarray, "f")  # makes the key of the seed
for dtype, settings in (
    ("F", {}),
    ("f", {"batch_size": 2}),
    ("f", {"learning_rate": 0.1, "optimizer": optax.adam}),
):
    host = compilations(np.asarray, dtype, **settings)
    device = compilations(jax.device_put, dtype, **settings)
    assert host == device > 0, (host, device, settings, dtype)
"""


@pytest.mark.full
def test_arrays_of_the_device_cost_no_compilation_more():
    command = [sys.executable, "-c", COMPILATIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def other_order(x):
    """The same numbers as another machine may have written them to a file."""
    x = np.asarray(x)
    return x.astype(x.dtype.newbyteorder())


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def kinds(params, batch, scale, shift):
    x, y = batch
    out = jnp.real(x @ params["w"]) + params["b"] + shift["by"]
    return jnp.mean((out - scale * y) ** 2)


@pytest.mark.full
def test_arrays_of_another_byte_order():
    def run(order):
        fun = Partial(lambda by, *given: kinds(*given, {"by": by}), order(np.ones(1)))
        result = jaxgd.minimize(
            fun,
            {"w": order(np.zeros(4, "F")), "b": order(np.float64(0.5))},
            (order(X), order(np.arange(ROWS))),
            args=(order(np.full(1, 2, "u8")),),
            batch_size=8,
            optimizer=lambda rate, b1, shift: optax.adam(rate, b1 + shift[0]),
            learning_rate=order(np.array(0.01)),
            hyperparams={"b1": order(np.array(0.9)), "shift": order(np.zeros(2, "f"))},
            max_steps=order(np.array(20)),
        )
        return result.params, result.value, result.history

    assert bits(run(other_order)) == bits(run(np.asarray))


@pytest.mark.full
def test_other_doors_take_another_byte_order():
    order = other_order
    rows = jaxgd.shard_rows({"x": order(X), "ids": order(np.arange(ROWS))})
    np.testing.assert_array_equal(rows["x"], X)
    np.testing.assert_array_equal(rows["ids"], np.arange(ROWS))
    assert jaxgd.init_state(order(np.ones(3)), optax.sgd(0.1)).params.sum() == 3
    found = jaxgd.sweep(
        lambda p, a, b: jnp.sum((p - a) ** 2 + b**2),
        np.zeros((), "f"),
        over={
            "learning_rate": order(np.array([0.1, 0.2])),
            "args": (order(np.arange(3)), order(np.ones((3, 2), int))),
        },
        max_steps=9,
    )
    np.testing.assert_allclose(
        found.results.params,
        np.outer(1 - np.array([0.6, 0.2]) ** 9, np.arange(3)),
        rtol=1e-5,
    )


@pytest.mark.full
def test_whole_numbers_that_fit_are_taken_and_all_are_in_64_bits():
    most = np.full(ROWS, 2**32 - 1, np.uint64)
    low = np.full(ROWS, -(2**31))

    def fun(p, batch, c, d):
        held = jnp.all(batch[0] == c) & jnp.all(batch[1] == d)
        return jnp.sum(p**2) + jnp.where(held, 0.0, 1.0)

    def value(a, b):
        data, args = (a, b), (a[:1], b[:1])
        return jaxgd.minimize(fun, np.zeros(1, "f"), data, args=args).value

    assert value(most, low) == 0
    with jax.enable_x64(True):
        assert value(most + 5, low - 5) == 0


@pytest.mark.full
def test_sparse_arguments_work():
    rows = np.arange(ROWS)

    def run(x, dense):
        return jaxgd.minimize(
            lambda p, batch, x: jnp.mean((dense(x[batch[0]]) @ p - batch[1]) ** 2),
            np.zeros(4, "f"),
            (rows, Y),
            args=(x,),
            batch_size=8,
            learning_rate=0.1,
        ).params

    found = run(sparse.BCOO.fromdense(X), lambda x: x.todense())
    np.testing.assert_allclose(found, run(X, lambda x: x), rtol=1e-5)


def aligned(x):
    """A copy where JAX on a CPU would take over the memory: at a multiple of 64."""
    x = np.asarray(x)
    room = np.empty(x.nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    out = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def spoil(tree):
    for x in jax.tree.leaves(tree):
        x[...] = 17


def least_squares(params, batch, *args):
    x, y = batch if isinstance(batch, tuple) else (batch["x"], batch["y"])
    return jnp.mean((x @ params - y - sum(jnp.sum(a) for a in args)) ** 2)


def without_rows(x, y, params):
    return least_squares(params, (x, y))


GIVEN = {
    "tuple": lambda x, y, z: ((x, y), {}),
    "dict": lambda x, y, z: ({"x": x, "y": y}, {}),
    "args": lambda x, y, z: ((x, y), {"args": (z,)}),
    "hyperparams": lambda x, y, z: (
        (x, y),
        {
            "optimizer": lambda rate, shift: optax.chain(
                optax.sgd(rate),
                optax.stateless(lambda u, p: u + 1e-4 * shift[:4].mean()),
            ),
            "hyperparams": {"shift": z},
        },
    ),
}


@pytest.mark.parametrize(
    ("given", "batch_size"),
    [*((given, 8) for given in GIVEN), ("tuple", None), ("fun", None), ("state", 8)],
)
def test_a_body_that_writes_into_its_arrays_changes_no_run(given, batch_size):
    call = {"learning_rate": 0.01, "batch_size": batch_size, "max_steps": 40}

    def run(body):
        arrays = aligned(X), aligned(Y), aligned(np.linspace(0, 0.1, 32, dtype="f"))
        fun, data, more = least_squares, arrays[:2], {}
        if given == "fun":
            fun, data = Partial(without_rows, *arrays[:2]), None
            more = {"batch_size": None}
        elif given == "state":
            done = jaxgd.minimize(fun, np.zeros(4, "f"), (X, Y), **call).state
            params = aligned(np.asarray(done.params))
            more = {"state": replace(done, params=params)}
            arrays = (*arrays, params)
        else:
            data, more = GIVEN[given](*arrays)
        snapshots = jaxgd.iterate(
            fun, np.zeros(4, "f"), data, every=10, **{**call, **more}
        )
        body(arrays)
        seen = []
        for snapshot in snapshots:
            body(arrays)
            seen.append((snapshot.params, snapshot.steps, snapshot.history))
        return seen

    assert bits(run(spoil)) == bits(run(lambda arrays: None))


def test_rows_that_were_sharded_are_copies():
    x = aligned(X)
    rows = jaxgd.shard_rows({"x": x}, devices=jax.devices()[:1])
    spoil(x)
    np.testing.assert_array_equal(rows["x"], X)


def of_one_rank(params, batch, *, key=None):
    x, y = batch
    shift = 0.0 if key is None else 0.1 * jax.random.normal(key)
    out = jnp.real(x @ params["w"]) + params["b"]
    return jnp.mean((out - y) ** 2) + shift


ONE_RANK = {"w": np.zeros(4, "f"), "b": np.zeros((), "f")}
SCHEDULE = optax.cosine_decay_schedule(0.1, 30)
RANKS = {
    "batch": {},
    "mini": {"batch_size": 8},
    "one row": {"batch_size": 1, "learning_rate": 0.1},
    "strata": {"batch_size": 8, "strata": 4, "learning_rate": SCHEDULE},
    "scan": {"batch_size": 8, "learning_rate": 0.1, "stop": None},
    "blocks": {"microbatch_size": 7, "learning_rate": SCHEDULE},
    "blocks of batches": {"batch_size": 8, "microbatch_size": 3},
    "keys": {"batch_size": 8, "with_key": True, "learning_rate": 0.1},
    "keys of passes": {"with_key": True, "learning_rate": 0.1},
    "lbfgs": {"optimizer": optax.lbfgs()},
    "average": {"optimizer": optax.contrib.schedule_free_sgd(0.1), "batch_size": 8},
    **{
        f"{rule.__name__} {size}": {
            "optimizer": rule(),
            "batch_size": size,
            "stop": jaxgd.params_change(1e-3),
        }
        for rule in (jaxgd.barzilai_borwein, jaxgd.parabolic_rms)
        for size in (None, 8)
    },
    **{
        f"stop {i} {size}": {"learning_rate": 0.1, "batch_size": size, "stop": stop}
        for size in (None, 8)
        for i, stop in enumerate(
            (
                jaxgd.gradient_norm(1e-3),
                jaxgd.target_value(0.1),
                jaxgd.any_of(jaxgd.value_change(1e-3), jaxgd.params_change(1e-3)),
                jaxgd.all_of(
                    jaxgd.value_change(1e-3, patience=2), jaxgd.target_value(1)
                ),
            )
        )
    },
}


@pytest.fixture
def one_rank():
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS)
def test_ranks_are_never_promoted(settings):
    def run(params):
        call = {"max_steps": 30, **settings}
        return jaxgd.minimize(of_one_rank, params, (X, Y), **call)

    jax.eval_shape(run, ONE_RANK)


@pytest.mark.full
@pytest.mark.usefixtures("one_rank")
def test_ranks_are_never_promoted_in_lanes_and_loops():
    call = {"batch_size": 8, "max_steps": 20}
    given = of_one_rank, ONE_RANK, (X, Y)
    jaxgd.sweep(*given, over={"learning_rate": [0.01, 0.1]}, seeds=2, **call)
    list(jaxgd.iterate(*given, every=10, **call))
    jaxgd.find_learning_rate(*given, **call)
    jaxgd.sharpness(*given)
    jaxgd.minimize(*given[:2], jaxgd.Stream((X, Y)), **call)
    jaxgd.batch_rows(0, 32, 8, np.arange(3), strata=2)
    jaxgd.shuffled_rows(0, 32, np.arange(3)[:, None], np.arange(32))


@pytest.mark.full
@pytest.mark.usefixtures("one_rank")
def test_ranks_are_never_promoted_in_problems():
    made = [
        jaxgd.problems.least_squares(),
        jaxgd.problems.ridge(),
        jaxgd.problems.logistic(),
        jaxgd.problems.multinomial(),
        jaxgd.problems.mlp(),
        *classical(),
    ]
    for problem in made:
        given = () if problem.data is None else (problem.data,)
        jax.eval_shape(jax.value_and_grad(problem.fun), problem.init, *given)


def rate_line(result):
    lines = [x for x in str(result).splitlines() if x.startswith("  learning rate")]
    assert len(lines) == 1, result
    return lines[0].removeprefix("  learning rate").strip()


def halving(step):
    return 0.1 * 0.5**step


injected = optax.inject_hyperparams(optax.sgd)
# settings, the line, the number
RATES = {
    "number": ({"learning_rate": 0.1}, "0.1", 0.1),
    "number, no steps": ({"learning_rate": 0.1, "max_steps": 0}, "0.1", 0.1),
    "number, no history": ({"learning_rate": 0.1, "history_rows": 0}, "0.1", 0.1),
    "schedule": ({"learning_rate": halving}, "0.025 ... 0.1", 0.0125),
    "schedule, no history": (
        {"learning_rate": halving, "history_rows": 0, "batch_size": 8},
        "0.0125",
        0.0125,
    ),
    "schedule, scan": (
        {"learning_rate": halving, "stop": None},
        "0.025 ... 0.1",
        0.0125,
    ),
    "schedule, no steps": ({"learning_rate": halving, "max_steps": 0}, "0.1", 0.1),
    "factory": ({"learning_rate": 0.1, "optimizer": optax.adam}, "0.1", 0.1),
    "ready rule": ({"optimizer": optax.adam(0.1)}, "set within the optimizer", np.nan),
    "ready rule, one row": (
        {"optimizer": optax.adam(0.1), "batch_size": 1, "history_rows": 0},
        "set within the optimizer",
        np.nan,
    ),
    "reported": ({"optimizer": injected(0.1), "history_rows": 0}, "0.1", 0.1),
    "search, no steps": ({"max_steps": 0}, "found on the way", np.nan),
    "not finite": (
        {"learning_rate": 0.1, "params": np.full(4, np.nan, "f")},
        "0.1",
        0.1,
    ),
    "not finite, no rate": (
        {"params": np.full(4, np.nan, "f"), "batch_size": 8},
        "found on the way",
        np.nan,
    ),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize(("settings", "line", "rate"), RATES.values(), ids=RATES)
def test_the_report_always_tells_of_the_rate(settings, line, rate):
    call = {"params": np.zeros(4, "f"), "data": (X, Y), "max_steps": 3, **settings}
    result = jaxgd.minimize(least_squares, **call)
    assert rate_line(result) == line
    np.testing.assert_allclose(result.learning_rate, rate, rtol=1e-6)
    assert result.learning_rate.dtype == np.float32
    np.testing.assert_allclose(result.to_dict()["learning_rate"], rate, rtol=1e-6)


@pytest.mark.full
def test_the_rate_is_a_number_of_every_lane_snapshot_and_stream():
    given = least_squares, np.zeros(4, "f"), (X, Y)
    rates = np.array([0.01, 0.02], "f")
    call = {"max_steps": 3, "history_rows": 0, "batch_size": 8}
    found = jaxgd.sweep(*given, over={"learning_rate": rates}, seeds=2, **call)
    np.testing.assert_array_equal(
        found.results.learning_rate, rates[:, None] + 0 * rates
    )
    assert rate_line(found[1, 0]) == "0.02"
    run = jax.jit(
        lambda r: jaxgd.minimize(*given, learning_rate=r, **call).learning_rate
    )
    assert run(rates[1]) == rates[1]
    seen = jaxgd.iterate(*given, every=1, learning_rate=halving, **call)
    assert [rate_line(x) for x in seen] == ["0.05", "0.025", "0.0125"]
    stream = jaxgd.minimize(
        *given[:2], jaxgd.Stream((X, Y)), learning_rate=halving, **call
    )
    assert rate_line(stream) == "0.0125"


def test_the_rate_of_a_search_is_that_of_its_last_step():
    result = jaxgd.minimize(least_squares, np.zeros(4, "f"), (X, Y), max_steps=3)
    assert result.learning_rate == result.history.learning_rate[-1] > 0
