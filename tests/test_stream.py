"""Streams against the resident run: the same rows, the same bits, whatever fails."""

import copy
import functools
import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from jaxgd import Status, Stream, StreamError
from jaxgd._rows import reader as _reader
from jaxgd._rows import resident as _source
from jaxgd._rows.source import Form

pytestmark = pytest.mark.thin(4)

ROOT = Path(__file__).parent.parent
N = 101
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 5)).astype(np.float32)
Y = (X @ np.arange(5.0) + 0.1 * RNG.normal(size=N)).astype(np.float32)
START = jnp.zeros(5)
LARGE, TINY = 2**28, 6 * 120 * 72


def least_squares(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


def bits(tree):
    def plain(x):
        typed = jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
        x = np.asarray(jax.random.key_data(x) if typed else x)
        return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(plain, tree)


def assert_same(a, b):
    a, b = bits(a), bits(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        assert x.dtype == y.dtype


def blocks_of(*arrays, size=13):
    """A function that yields blocks of rows."""

    def factory():
        for start in range(0, len(arrays[0]), size):
            yield tuple(x[start : start + size] for x in arrays)

    return factory


RULES = {
    "plain": {"learning_rate": 0.05},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.02},
    "momentum": {"optimizer": optax.sgd(0.03, momentum=0.9)},
    "default": {},
}
STOPS = {
    "auto": "auto",
    "value": jaxgd.value_change(1e-3, patience=2),
    "any": jaxgd.any_of(jaxgd.gradient_norm(rtol=1e-2), jaxgd.params_change(1e-3)),
}


@pytest.mark.optimized
@pytest.mark.full
@pytest.mark.parametrize(
    ("rule", "stop", "batch_size", "strata"),
    [
        ("plain", "value", 7, None),
        ("plain", "any", 1, None),
        ("adam", "any", 32, None),
        ("momentum", "value", 32, None),
        ("default", "value", 7, None),
        ("plain", "value", 4, 2),
        ("adam", "auto", 10, 5),
    ],
)
def test_bits_of_the_resident_run(rule, stop, batch_size, strata):
    n = 100 if strata else N
    data = X[:n], Y[:n]
    run = functools.partial(
        jaxgd.minimize,
        least_squares,
        START,
        batch_size=batch_size,
        stop=STOPS[stop],
        strata=strata,
        epochs=3.3,
        key=3,
        **RULES[rule],
    )
    resident = run(data)
    assert_same(resident, run(Stream(data, budget_bytes=TINY)))
    if rule == "adam":
        assert_same(resident, run(Stream(data)))


def mlp(params, batch, scale):
    hidden = jnp.tanh(batch["x"] @ params["w"] * scale + params["b"])
    logits = hidden @ params["v"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(losses), {
        "losses": losses,
        "right": jnp.sum(logits.argmax(1) == batch["label"]),
        "mean": jnp.mean(hidden),
        "finite": jnp.all(jnp.isfinite(logits)),
    }


def mlp_start(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    sizes = {"w": (5, 8), "b": (8,), "v": (8, 3)}
    return {
        name: jnp.asarray(rng.normal(size=size) / 3, dtype)
        for name, size in sizes.items()
    }


LABELLED = {"x": X, "label": RNG.integers(0, 3, N).astype(np.int32)}


def noisy(params, batch, scale, key):
    value, aux = mlp(params, batch, scale)
    noise = jax.random.normal(key, params["b"].shape)
    return value + 0.01 * jnp.mean(params["b"] * noise), aux


def dropped(fun):
    """The objective without auxiliary output, a function of its own."""
    return lambda *args, **kw: fun(*args, **kw)[0]


@pytest.mark.optimized
@pytest.mark.full
@pytest.mark.parametrize(
    ("fun", "how", "in_blocks"),
    [
        (mlp, {"has_aux": True}, True),
        (mlp, {"has_aux": True, "final_evaluation": False}, False),
        (
            mlp,
            {"has_aux": True, "final_evaluation": False, "stop": STOPS["value"]},
            False,
        ),
        (mlp, {"has_aux": True, "stop": STOPS["any"], "microbatch_size": 3}, True),
        (noisy, {"has_aux": True, "with_key": True, "stop": STOPS["value"]}, True),
        (
            dropped(mlp),
            {"optimizer": optax.contrib.schedule_free_adamw(0.01)},
            False,
        ),
        (
            dropped(mlp),
            {
                "optimizer": None,
                "learning_rate": optax.exponential_decay(0.1, 9, 0.9),
                "stop": STOPS["value"],
            },
            True,
        ),
        (dropped(mlp), {"history_rows": 0, "epochs": 0}, False),
    ],
)
def test_passes_of_every_kind(monkeypatch, fun, how, in_blocks):
    if in_blocks:
        monkeypatch.setattr(_source, "_PASS_BYTES", 0)
    how = {"optimizer": optax.sgd(0.1), "epochs": 4, "batch_size": 9} | how
    own = lambda *args, **kw: fun(*args, **kw)  # the patch is no part of a program
    run = functools.partial(jaxgd.minimize, own, mlp_start(), args=(0.7,), **how)
    assert_same(run(LABELLED), run(Stream(LABELLED, budget_bytes=TINY)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "row_dtype"), [(jnp.bfloat16, np.float16), (jnp.float64, np.float64)]
)
@pytest.mark.usefixtures("x64")
def test_dtypes(dtype, row_dtype):
    data = LABELLED | {"x": RNG.normal(size=X.shape).astype(row_dtype)}
    run = functools.partial(
        jaxgd.minimize,
        dropped(mlp),
        mlp_start(dtype),
        args=(jnp.asarray(0.7, dtype),),
        learning_rate=0.2,
        batch_size=9,
        epochs=3,
        stop=STOPS["value"],
    )
    assert_same(run(data), run(Stream(data, budget_bytes=TINY)))


@pytest.mark.full
def test_wide_rows_are_narrowed_as_resident_ones_are():
    data = {"x": X.astype(np.float64), "label": LABELLED["label"].astype(np.int64)}
    odd = data | {"x": np.asfortranarray(data["x"].astype(">f8"))}
    run = functools.partial(
        jaxgd.minimize,
        dropped(mlp),
        mlp_start(),
        args=(1.0,),
        batch_size=9,
        epochs=2,
        learning_rate=0.1,
    )
    assert_same(run(data), run(Stream(odd)))


def test_cuts_between_streams_and_resident_rows():
    how = {"batch_size": 7, "stop": STOPS["any"], **RULES["adam"]}
    run = functools.partial(jaxgd.minimize, least_squares, START)
    streamed = Stream((X, Y), budget_bytes=TINY)
    whole = run((X, Y), key=5, max_steps=120, **how)
    for legs in ([30, 90], [1, 14, 15, 60, 30], [28, 1, 1, 90]):
        for kinds in ([(X, Y), streamed], [streamed, (X, Y)], [streamed] * 2):
            result = run(kinds[0], key=5, max_steps=legs[0], **how)
            for i, leg in enumerate(legs[1:], 1):
                data = kinds[i % 2]
                result = run(data, state=result.state, max_steps=leg, **how)
            assert_same(whole, result)


@pytest.mark.full
@pytest.mark.parametrize("limit", [12, 500])
def test_divergence_ends_at_the_same_iterate(limit):
    run = functools.partial(
        jaxgd.minimize,
        least_squares,
        START,
        batch_size=5,
        learning_rate=3.0,
        max_steps=limit,
    )
    resident = run((X, Y))
    for budget in (LARGE, TINY):
        streamed = run(Stream((X, Y), budget_bytes=budget))
        assert_same(resident, streamed)
    assert (resident.status == Status.DIVERGED) == (limit == 500)
    bad = X.copy()
    bad[60] = np.nan
    assert_same(run((bad, Y)), run(Stream((bad, Y), budget_bytes=TINY)))


def test_files_and_memory_maps(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    run = functools.partial(
        jaxgd.minimize, least_squares, START, learning_rate=0.05, batch_size=7, epochs=2
    )
    resident = run((X, Y))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    for source in (
        (str(tmp_path / "x.npy"), tmp_path / "y.npy"),
        (x, Y),
        (jnp.asarray(X), Y),
    ):
        stream = Stream(source)
        assert stream.n == N
        assert_same(resident, run(stream))


@pytest.mark.parametrize("rows", [None, N])
@pytest.mark.parametrize("size", [1, 13, 101, 200])
def test_a_function_yields_rows_in_its_own_order(rows, size):
    stream = Stream(blocks_of(X, Y, size=size), rows=rows, budget_bytes=TINY)
    steps = 40
    how = {"batch_size": 7, "learning_rate": 0.05, "stop": STOPS["value"]}
    streamed = jaxgd.minimize(least_squares, START, stream, max_steps=steps, **how)
    assert streamed.status == Status.MAX_STEPS
    places = np.arange(steps * 7).reshape(steps, 7) % N
    assert_same(
        places, np.array([stream.batch_rows(0, 7, step) for step in range(steps)])
    )
    by_hand(streamed, places, optax.sgd(0.05))
    cut = jaxgd.minimize(least_squares, START, stream, max_steps=19, **how)
    on = jaxgd.minimize(
        least_squares, START, stream, max_steps=steps - 19, state=cut.state, **how
    )
    assert_same(streamed, on)


def by_hand(result, places, rule):
    """The same steps on the same rows, one after the other."""
    step = jaxgd.make_step(least_squares, rule)
    batches = jnp.asarray(X)[places], jnp.asarray(Y)[places]
    state, _ = jax.lax.scan(step, jaxgd.init_state(START, rule), batches)
    np.testing.assert_allclose(result.params, state.params, rtol=2e-5, atol=1e-6)
    value = least_squares(state.params, (X, Y))
    np.testing.assert_allclose(result.value, value, rtol=1e-5)


@pytest.mark.parametrize(
    ("block_rows", "mixed", "batch_size"), [(10, 3, 7), (1, 101, 4), (200, 1, 32)]
)
def test_block_order(block_rows, mixed, batch_size):
    budget = TINY + 200 * 56
    make = functools.partial(
        Stream, shuffle="blocks", block_rows=block_rows, mixed_blocks=mixed
    )
    stream = make((X, Y), budget_bytes=budget)
    steps = -(-5 * N // batch_size)
    rows = np.concatenate(
        [stream.batch_rows(1, batch_size, step) for step in range(steps)]
    )
    epochs = rows[: 5 * N].reshape(5, N)
    assert (np.sort(epochs, axis=1) == np.arange(N)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    if block_rows == 10:  # groups of three blocks come together
        held = [set((epochs[0, a : a + 30] // 10).tolist()) for a in (0,)]
        assert all(len(blocks) <= 4 for blocks in held)
    how = {"batch_size": batch_size, "learning_rate": 0.02, "key": 1}
    streamed = jaxgd.minimize(least_squares, START, stream, max_steps=steps, **how)
    places = rows.reshape(steps, batch_size)
    by_hand(streamed, places, optax.sgd(0.02))
    wide = make((X, Y))
    assert_same(
        streamed, jaxgd.minimize(least_squares, START, wide, max_steps=steps, **how)
    )
    how.pop("key")
    cut = jaxgd.minimize(least_squares, START, stream, max_steps=8, **how | {"key": 1})
    on = jaxgd.minimize(
        least_squares, START, stream, max_steps=steps - 8, state=cut.state, **how
    )
    assert_same(streamed, on)


def test_what_the_block_order_loses():
    """Sorted labels: the variance of a batch mean is what the docstring says."""
    n, block, size = 4096, 64, 16
    labels = np.repeat([0.0, 1.0], n // 2)
    found = {}
    for mixed in (4, 16, 64):
        stream = Stream(labels, shuffle="blocks", block_rows=block, mixed_blocks=mixed)
        epochs = [labels[stream.batch_rows(key, n, 0)] for key in range(20)]
        means = np.reshape(epochs, (-1, size)).mean(axis=1)
        found[mixed] = np.var(means)
    uniform = 0.25 / size
    for mixed, variance in found.items():
        expected = 0.25 * (1 / size + (1 - mixed * block / n) / mixed)
        assert variance == pytest.approx(expected, rel=0.15), mixed
    assert found[4] > 3 * uniform


def count_windows(monkeypatch):
    counted = []
    original = _reader.Reader._memory

    def memory(self, rows):
        counted.append(rows)
        return original(self, rows)

    monkeypatch.setattr(_reader.Reader, "_memory", memory)
    return counted


def test_small_budgets_read_many_windows_of_one_shape(monkeypatch):
    shapes = count_windows(monkeypatch)
    stream = Stream((X, Y), budget_bytes=TINY)
    jaxgd.minimize(
        least_squares, START, stream, batch_size=7, learning_rate=0.1, epochs=5
    )
    assert len(shapes) > 4
    assert sum(6 * 56 * rows <= TINY for rows in shapes) == len(shapes)
    assert len(set(shapes)) <= 2  # windows of steps, and of a pass


def test_memory_is_taken_again(monkeypatch):
    """And no run sees that: it is written only when the steps are done."""
    made = []
    original = Form.empty
    monkeypatch.setattr(
        Form,
        "empty",
        lambda form, rows: made.append(rows) or original(form, rows),
    )
    shapes = count_windows(monkeypatch)
    kw = {"batch_size": 7, "learning_rate": 0.1, "epochs": 9}
    kw |= {"stop": jaxgd.value_change(1e-9)}
    stream = Stream((X, Y), budget_bytes=TINY)
    streamed = jaxgd.minimize(least_squares, START, stream, **kw)
    of_steps = max(shapes)
    assert made.count(of_steps) <= 2 < 4 < shapes.count(of_steps)
    resident = jaxgd.minimize(least_squares, START, (X, Y), **kw)
    np.testing.assert_array_equal(streamed.checks.value, resident.checks.value)
    np.testing.assert_array_equal(streamed.history.value, resident.history.value)


def test_a_second_stream_costs_no_compilation(count_compilations):
    run = functools.partial(
        jaxgd.minimize, least_squares, START, batch_size=7, stop=STOPS["value"]
    )
    run(Stream((X, Y)), learning_rate=0.05, epochs=3)
    with count_compilations() as count:
        run(Stream((X + 1, Y)), learning_rate=0.06, epochs=5, key=9)
        run(Stream(blocks_of(X, Y)), learning_rate=0.01, max_steps=44)
    assert count() == 0


MEMORY = """
    import sys, numpy as np, jax, jax.numpy as jnp, jaxgd

    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

    folder, how = sys.argv[1:]
    budget, columns = 16 * 2**20, 256
    peak = 0

    def loss(theta, batch):
        jax.debug.callback(seen)
        return jnp.mean((batch @ theta - 1) ** 2)

    def seen():
        global peak
        peak = max(peak, anonymous())

    def run(n):
        path = f"{folder}/{n}.npy"
        file = np.lib.format.open_memmap(path, "w+", np.float32, (n, columns))
        for start in range(0, n, 4096):
            file[start : start + 4096] = start / n
        del file
        more = {"shuffle": "blocks", "mixed_blocks": 4} if how == "blocks" else {}
        stream = jaxgd.Stream(path, budget_bytes=budget, **more)
        return jaxgd.minimize(
            loss, jnp.zeros(columns), stream, batch_size=256, learning_rate=1e-3,
            epochs=2, stop=jaxgd.value_change(1e-9),
        )

    for n in (8192, 8 * 8192):  # compiles
        run(n)
    before, peak = anonymous(), 0
    run(8192)
    small, peak = peak, 0
    run(8 * 8192)
    print(small - before, peak - before, budget)
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["rows", "blocks"])
def test_memory_stays_under_the_budget(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            # What is freed goes back: else the heap may keep a block or two.
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    assert done.returncode == 0, done.stderr
    small, large, budget = map(int, done.stdout.split())
    assert max(small, large) < budget, done.stdout  # of 8 and 64 MB of rows


class Failing(np.ndarray):
    """Rows that cannot be read from the n-th reading on."""

    left = 10**9

    def take(self, *args, **kw):
        Failing.left -= 1
        if Failing.left < 0:
            raise OSError("the disk is gone")
        return np.asarray(self).take(*args, **kw)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("jaxgd-stream")]


def test_what_was_reached_survives_a_failing_array(monkeypatch):
    how = {"batch_size": 7, **RULES["adam"]}
    run = functools.partial(jaxgd.minimize, least_squares, START)
    whole = run((X, Y), epochs=10, **how)
    source = X.view(Failing), Y
    monkeypatch.setattr(Failing, "left", 3)
    with pytest.raises(StreamError, match=r"window 3 \(the rows of steps") as caught:
        run(Stream(source, budget_bytes=TINY), epochs=10, **how)
    error = caught.value
    assert error.block == 3
    assert isinstance(error.__cause__, OSError)
    assert not threads()
    reached = int(error.state.step)
    assert 0 < reached < whole.steps
    Failing.left = 10**9
    left = int(whole.steps) - reached
    assert_same(whole, run((X, Y), state=error.state, max_steps=left, **how))


BAD_BLOCKS = {
    "raises": (lambda block, i: 1 / 0 if i == 3 else block, "block 3 .*ZeroDivision"),
    "structure": (lambda block, i: list(block) if i == 3 else block, "block 3 .*struc"),
    "columns": (
        lambda block, i: (block[0][:, :4], block[1]) if i == 3 else block,
        r"block 3 .*float32\[13, 4\] as \[0\] where .* float32\[5\]",
    ),
    "dtype": (
        lambda block, i: (block[0], block[1].astype(int)) if i == 3 else block,
        r"block 3 .*int64\[13\] as \[1\]",
    ),
    "lengths": (
        lambda block, i: (block[0], block[1][:2]) if i == 3 else block,
        r"block 3 .*different lengths \(\[2, 13\]\)",
    ),
    "more": (
        lambda block, i: (
            tuple(np.tile(x, (2, 1)[: x.ndim]) for x in block) if i == 7 else block
        ),
        "block 7 .*20 rows, more than the 101",
    ),
    "fewer": (
        lambda block, i: tuple(x[:0] for x in block) if i == 7 else block,
        "ended after 91 rows of 101",
    ),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
@pytest.mark.parametrize("bad_reading", [2, 4])
def test_what_was_reached_survives_a_failing_function(case, bad_reading):
    """Readings: 1 counts the rows, then epochs of steps and passes in turn."""
    change, message = BAD_BLOCKS[case]
    readings = []

    def factory():
        readings.append(1)
        bad = len(readings) == bad_reading
        for i, block in enumerate(blocks_of(X, Y)()):
            yield change(block, i) if bad else block

    how = {"batch_size": 7, "stop": STOPS["value"], **RULES["plain"]}
    run = functools.partial(jaxgd.minimize, least_squares, START)
    whole = run(Stream(blocks_of(X, Y)), max_steps=60, **how)
    with pytest.raises(StreamError, match=message) as caught:
        run(Stream(factory, budget_bytes=TINY), max_steps=60, **how)
    assert not threads()
    state = caught.value.state
    left = 60 - int(state.step)
    again = run(Stream(blocks_of(X, Y)), state=state, max_steps=left, **how)
    assert_same(whole, again)


def test_the_thread_ends_and_iterators_are_closed():
    closed = []

    def factory():
        try:
            yield from blocks_of(X, Y)()
        finally:
            closed.append(1)

    stream = Stream(factory, rows=N, budget_bytes=TINY)
    how = {"batch_size": 7, "learning_rate": 0.1, "max_steps": 50}
    jaxgd.minimize(least_squares, START, stream, **how)
    assert not threads()
    assert closed
    started = len(closed)

    def interrupted(theta, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxgd.minimize(interrupted, START, stream, **how)
    gc.collect()
    assert not threads()
    assert len(closed) >= started


def test_an_interrupt_in_the_source_ends_the_run():
    def factory():
        for i, block in enumerate(blocks_of(X, Y)()):
            if i == 5 and threading.current_thread() is not threading.main_thread():
                raise KeyboardInterrupt
            yield block

    with pytest.raises(KeyboardInterrupt):
        jaxgd.minimize(
            least_squares,
            START,
            Stream(factory, rows=N),
            batch_size=7,
            learning_rate=0.1,
            epochs=2,
        )
    assert not threads()


def test_writing_to_the_source_changes_only_what_is_not_read(monkeypatch):
    """Rows are copies: the source is wiped once all of them have been read."""
    x, y = X.copy(), Y.copy()
    how = {"batch_size": 7, "learning_rate": 0.05, "max_steps": 12}
    how["final_evaluation"] = False
    resident = jaxgd.minimize(least_squares, START, (X, Y), **how)
    original = _reader.step_windows

    def wiping(*args):
        for window in original(*args):
            x[:], y[:] = np.nan, np.nan
            yield window

    monkeypatch.setattr(_reader, "step_windows", wiping)
    streamed = jaxgd.minimize(least_squares, START, Stream((x, y)), **how)
    assert np.isnan(x).all()
    assert_same(resident, streamed)


def run_stream(**how):
    how = {"batch_size": 7, "learning_rate": 0.1} | how
    source = how.pop("source", (X, Y))
    keywords = {
        name: how.pop(name) for name in ("shuffle", "budget_bytes") if name in how
    }
    return jaxgd.minimize(least_squares, START, Stream(source, **keywords), **how)


def inside(transform):
    stream = Stream((X, Y))

    def call(rate):
        return jaxgd.minimize(
            least_squares, START, stream, batch_size=7, learning_rate=rate
        ).value

    return transform(call)


REFUSED = [
    (lambda: Stream((X, Y[:5])), ValueError, r"source\[0\] has 101, source\[1\] has 5"),
    (lambda: Stream("absent.npy"), FileNotFoundError, "absent.npy"),
    (lambda: Stream(__file__), ValueError, "source must be a .npy file"),
    (lambda: Stream({"x": np.array([{}])}), TypeError, r"source\['x'\].*dtype object"),
    (lambda: Stream({"x": 3.0}), TypeError, r"source\['x'\].*path of a .npy"),
    (lambda: Stream(np.array(1.0)), ValueError, "scalar"),
    (lambda: Stream(()), ValueError, "at least one array"),
    (lambda: Stream(np.ones((0, 2))), ValueError, "got 0"),
    (lambda: Stream(blocks_of(X)()), TypeError, "read only once"),
    (lambda: Stream(lambda: 3), TypeError, "must return an iterator"),
    (lambda: Stream(lambda: iter([])), ValueError, "no block"),
    (lambda: Stream(lambda: iter([X, Y])), ValueError, "block 1 has float32"),
    (lambda: Stream(blocks_of(X), shuffle="rows"), ValueError, "shuffle is for arrays"),
    (lambda: Stream(X, rows=3), ValueError, "rows is for a function"),
    (lambda: Stream(X, shuffle="best"), ValueError, '"rows" or "blocks"'),
    (lambda: Stream(X, block_rows=3), ValueError, 'block_rows is for shuffle="blocks"'),
    (lambda: Stream(X, budget_bytes=0), ValueError, "budget_bytes must be at least 1"),
    (lambda: Stream(X, budget_bytes=1e6), TypeError, "budget_bytes must be a whole"),
    (lambda: run_stream(batch_size=None), ValueError, "batch_size must be given"),
    (lambda: run_stream(stop=None, max_steps=3), ValueError, "stop=None"),
    (lambda: run_stream(budget_bytes=999), ValueError, "at least 33936 .* got 999"),
    (
        lambda: run_stream(shuffle="blocks", strata=7, source=(X[:98], Y[:98])),
        ValueError,
        "strata needs",
    ),
    (lambda: run_stream(batch_size=102), ValueError, "number of rows"),
    (lambda: inside(jax.jit)(0.1), TypeError, "inside jit"),
    (lambda: inside(jax.grad)(0.1), TypeError, "inside jit"),
    (lambda: inside(jax.vmap)(jnp.ones(2)), TypeError, "inside jit"),
    (
        lambda: jax.jit(
            lambda data: jaxgd.minimize(least_squares, START, data, batch_size=7).value
        )(Stream((X, Y))),
        TypeError,
        "inside jit",
    ),
    (
        lambda: jaxgd.sharpness(least_squares, START, Stream((X, Y))),
        TypeError,
        "in sharpness, got a Stream",
    ),
    (
        lambda: jaxgd.find_learning_rate(
            least_squares, START, Stream((X, Y)), batch_size=7
        ),
        TypeError,
        "in find_learning_rate, got a Stream",
    ),
    (
        lambda: jaxgd.benchmark(least_squares, START, Stream((X, Y)), batch_size=7),
        TypeError,
        "in benchmark, got a Stream",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
    assert not threads()


def test_the_budget_that_an_error_names_suffices():
    run_stream(budget_bytes=33936, epochs=1)
    with pytest.raises(ValueError, match="at least 33936"):
        run_stream(budget_bytes=33935, epochs=1)


def test_a_stream_says_what_it_is():
    assert repr(Stream((X, Y), budget_bytes=2**20)) == (
        "Stream(float32[101, 5], float32[101], budget_bytes=1048576)"
    )


class Counted:
    """A function as source that counts its openings, and the rows it yields."""

    def __init__(self, *arrays, size=13):
        self.make, self.opened, self.rows = blocks_of(*arrays, size=size), 0, 0

    def __call__(self):
        self.opened += 1
        for block in self.make():
            self.rows += len(block[0])
            yield block


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("stop", ["auto", "value"])
@pytest.mark.parametrize(("n", "batch_size", "steps"), [(100, 10, 20), (101, 7, 28)])
def test_a_function_is_read_once_per_epoch_and_pass(n, batch_size, steps, stop, final):
    how = {"batch_size": batch_size, "max_steps": steps, "learning_rate": 0.05}
    how |= {"stop": jaxgd.value_change(0.0) if stop == "value" else None}
    if stop == "auto":
        how.pop("stop")
    run = functools.partial(
        jaxgd.minimize, least_squares, START, final_evaluation=final, **how
    )
    data, found = (X[:n], Y[:n]), []
    for rows in (n, None):
        for budget in (LARGE, TINY):
            source = Counted(*data)
            stream = Stream(source, rows=rows, budget_bytes=budget)
            found.append(run(stream))
            passes = found[-1].checks.step.size
            passes += int(final and found[-1].checks.step[-1:].tolist() != [steps])
            counting = 0 if rows else 1
            assert source.opened == 2 + passes + counting
            assert source.rows <= source.opened * n
            if n == 100 or not passes:
                assert source.rows >= (source.opened - 1) * n
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.parametrize("every", [1, 3, 10, 14])
def test_cuts_of_iterate_share_one_reading(every):
    source = Counted(X[:100], Y[:100])
    stream = Stream(source, rows=100, budget_bytes=TINY)
    how = {"batch_size": 10, "max_steps": 20, "learning_rate": 0.05}
    seen = []
    for snapshot in jaxgd.iterate(least_squares, START, stream, every=every, **how):
        seen.append(int(snapshot.steps))
        epochs = -(-seen[-1] * 10 // 100)
        assert source.opened == epochs + snapshot.checks.step.size
    assert seen[-1] == 20
    assert not threads()
    whole = jaxgd.minimize(least_squares, START, stream, final_evaluation=False, **how)
    assert_same(whole, snapshot)


def test_a_stream_is_copied_without_its_open_iterator():
    stream = Stream(Counted(X, Y), rows=N)
    other = copy.deepcopy(stream)  # of a generator there is no copy
    assert_same(run_stream_of(stream), run_stream_of(other))


def run_stream_of(stream):
    how = {"batch_size": 7, "learning_rate": 0.1, "max_steps": 14}
    return jaxgd.minimize(least_squares, START, stream, **how)


class Tallied(np.ndarray):
    """Rows that count how often they are read."""

    tally = np.zeros(100, int)

    def take(self, rows, **kw):
        np.add.at(Tallied.tally, rows, 1)
        return np.asarray(self).take(rows, **kw)

    def __getitem__(self, rows):
        np.add.at(Tallied.tally, rows, 1)
        return np.asarray(self)[rows]


@pytest.mark.parametrize("budget", [LARGE, TINY + 30 * 56])
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_arrays_are_read_once_per_epoch_and_pass(shuffle, budget):
    Tallied.tally[:] = 0
    options = {"block_rows": 5, "mixed_blocks": 4} if shuffle == "blocks" else {}
    source = X[:100].view(Tallied), Y[:100]
    stream = Stream(source, shuffle=shuffle, budget_bytes=budget, **options)
    how = {"batch_size": 10, "max_steps": 20, "learning_rate": 0.05}
    result = jaxgd.minimize(least_squares, START, stream, **how)
    readings = 2 + max(1, result.checks.step.size)
    assert Tallied.tally.min() >= readings
    looks = 2 * 64  # which rows these are, and whether their objective is a mean
    assert Tallied.tally.sum() == readings * 100 + looks + 10  # and a batch ahead


def failing(where, opening, made):
    """A function as source that fails in one of its openings."""
    openings = []

    class Lazy:
        def __array__(self, *_, **__):
            raise made

    def blocks():
        bad = len(openings) == opening
        try:
            for i, block in enumerate(blocks_of(X, Y)()):
                if bad and i == 3 and where == "block":
                    raise made
                yield (
                    (Lazy(), block[1]) if bad and i == 3 and where == "lazy" else block
                )
        finally:
            if bad and where == "end":
                raise made

    def factory():
        openings.append(1)
        if len(openings) == opening and where == "start":
            raise made
        return blocks()

    return factory


FAILURES = [
    ("block", KeyError("gone"), 3),
    ("block", OSError("gone"), 3),
    ("block", StreamError("of another stream"), 3),
    ("lazy", OSError("gone"), 3),
    ("start", StopIteration("gone"), 0),
    ("end", OSError("gone"), 8),
]


@pytest.mark.parametrize("drive", ["minimize", "iterate"])
@pytest.mark.parametrize("opening", [1, 2, 3, 4])  # epoch, epoch, pass, epoch
@pytest.mark.parametrize(("where", "made", "block"), FAILURES)
def test_what_fails_is_told_with_what_was_reached(where, made, block, opening, drive):
    how = {"batch_size": 7, "learning_rate": 0.05, "stop": STOPS["value"]}
    stream = Stream(failing(where, opening + 1, made), budget_bytes=TINY)
    seen = []

    def run():
        given = least_squares, START, stream
        if drive == "minimize":
            return jaxgd.minimize(*given, max_steps=40, **how)
        snapshots = jaxgd.iterate(*given, every=6, max_steps=40, **how)
        return seen.extend(int(snapshot.steps) for snapshot in snapshots)

    with pytest.raises(StreamError) as caught:
        run()
    error, steps = caught.value, max(seen, default=0)
    assert error.block == block or where == "end"
    assert error.__cause__ is made
    assert not threads()
    reached = int(error.state.step)
    assert reached >= steps
    assert (opening, reached) not in {(3, 0), (4, 0)}
    whole, source = known_run(**how)
    on = jaxgd.minimize(
        least_squares, START, source, state=error.state, max_steps=40 - reached, **how
    )
    assert_same(whole, on)


@functools.lru_cache
def known_run(**how):
    source = Stream(blocks_of(X, Y))
    return jaxgd.minimize(least_squares, START, source, max_steps=40, **how), source


CUT = """
    import os, sys, numpy as np, jax.numpy as jnp, jaxgd

    path, when = sys.argv[1:]
    np.save(path, np.ones((200_000, 2), np.float32))
    def loss(theta, batch):
        return jnp.mean((batch @ theta - 1) ** 2)
    def cut():
        os.truncate(path, 1000)
    array = np.load(path, mmap_mode="r")
    rows = np.asarray(array)[10:]  # no memmap by itself
    if when == "before":
        cut()
    stream = jaxgd.Stream(rows)
    cut()
    jaxgd.minimize(loss, jnp.zeros(2), stream, batch_size=5, learning_rate=0.1)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_was_cut_does_not_end_the_process(tmp_path, when):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CUT), str(tmp_path / "x.npy"), when],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1, done.stderr
    assert "ValueError" in done.stderr.splitlines()[-1]
    assert "1600128 bytes, got 1000" in done.stderr


@pytest.mark.parametrize("kind", ["memmap", "view", "function"])
def test_a_cut_file_is_named(tmp_path, kind):
    path = tmp_path / "x.dat"
    X.tofile(path)
    rows = np.memmap(path, np.float32, "r", shape=X.shape)
    leaf = {"memmap": rows, "view": np.asarray(rows)[1:], "function": rows}[kind]
    source = {"x": leaf, "y": Y[: len(leaf)]}
    given = (lambda: iter([source])) if kind == "function" else source
    stream = Stream(given)
    os.truncate(path, 100)
    message = rf"source\['x'\] .*x\.dat' should have {X.nbytes} bytes, got 100"
    if kind != "function":
        with pytest.raises(ValueError, match=message):
            Stream(source)
    loss = lambda theta, batch: least_squares(theta, (batch["x"], batch["y"]))
    # Before a run; of a block of a function within it.
    kinds = StreamError if kind == "function" else ValueError
    with pytest.raises(kinds, match=message) as caught:
        jaxgd.minimize(loss, START, stream, batch_size=7, learning_rate=0.1, epochs=1)
    if kind == "function":
        assert caught.value.block == 0
        assert int(caught.value.state.step) == 0


def of_ids(kind, ids):
    if kind == "function":
        return Stream(lambda: iter([{"id": ids[:50]}, {"id": ids[50:]}]))
    strided = np.repeat(ids, 2)[::2] if kind == "strided" else ids
    options = {"block_rows": 10} if kind == "blocks" else {}
    shuffle = "blocks" if kind == "blocks" else "rows"
    return Stream({"id": strided}, shuffle=shuffle, **options)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, ">i8"])
@pytest.mark.parametrize("kind", ["rows", "strided", "blocks", "function"])
def test_integers_that_do_not_fit_are_refused(kind, dtype):
    ids = np.arange(101).astype(dtype)
    fits = 2**32 - 1 if ids.dtype.kind == "u" else -(2**31)
    loss = lambda theta, batch: jnp.mean((theta - batch["id"] % 7) ** 2)
    how = {"batch_size": 5, "learning_rate": 0.1, "epochs": 1}
    ids[70] = np.array(fits).astype(dtype)
    jaxgd.minimize(loss, 0.0, of_ids(kind, ids), **how)
    ids[70] = 2**32 + 70
    message = r"source\['id'\] must hold .*int32, got 4294967366 .*jax_enable_x64"
    with pytest.raises(StreamError, match=message) as caught:
        jaxgd.minimize(loss, 0.0, of_ids(kind, ids), **how)
    assert isinstance(caught.value.__cause__, ValueError)
    if kind == "function":
        assert caught.value.block == 1
    with jax.enable_x64(True):
        found = jaxgd.minimize(loss, np.float32(0), of_ids(kind, ids), **how)
    assert found.status == Status.MAX_STEPS


@pytest.mark.parametrize("kind", ["rows", "blocks", "function"])
def test_rows_of_the_other_byte_order(kind):
    """As FITS and HDF5 files have them."""
    data = {"x": X, "id": np.arange(N)}
    odd = {"x": X.astype(">f4"), "id": np.arange(N).astype(">i8")}

    def stream(arrays):
        if kind == "function":
            cut = lambda *at: jax.tree.map(lambda x: x[slice(*at)], arrays)
            return Stream(lambda: iter([cut(0, 40), cut(40, N)]))
        return Stream(arrays, shuffle=kind)

    def loss(theta, batch):
        return jnp.mean((batch["x"] @ theta - jnp.sin(batch["id"])) ** 2)

    how = {"batch_size": 7, "learning_rate": 0.05, "epochs": 2}
    run = functools.partial(jaxgd.minimize, loss, START, **how)
    assert_same(run(stream(data)), run(stream(odd)))
    if kind == "rows":
        assert_same(run({k: jnp.asarray(v) for k, v in data.items()}), run(stream(odd)))


def test_a_file_that_is_cut_before_the_pass(tmp_path, monkeypatch):
    path = tmp_path / "x.dat"
    X.tofile(path)
    stream = Stream((np.memmap(path, np.float32, "r", shape=X.shape), Y))
    original = _reader.Reader.blocks

    def blocks(reader):
        os.truncate(path, 100)
        return original(reader)

    monkeypatch.setattr(_reader.Reader, "blocks", blocks)
    with pytest.raises(StreamError, match=r"source\[0\] must have its file") as caught:
        run_stream_of(stream)
    assert int(caught.value.state.step) == 14
