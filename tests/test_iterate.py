"""The host's loop against the run it cuts."""

import builtins
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import START, X, Y, least_squares, logistic
from test_chunks import assert_same_bits

import jaxgd
from jaxgd import Status


def noisy(p, batch, *, key):
    x, y = batch
    x = x + 0.1 * jax.random.normal(key, x.shape)
    return jnp.mean((x @ p["w"] + p["b"] - y) ** 2), jnp.max(x)


SETTLED = jaxgd.any_of(jaxgd.value_change(1e-3, patience=2), jaxgd.gradient_norm(1e-3))
RUNS = {
    "batch": (least_squares, {"learning_rate": 0.05}),
    "no rate": (least_squares, {}),
    "no rate, mini-batch": (logistic, {"batch_size": 5}),
    "one row": (logistic, {"learning_rate": 0.05, "batch_size": 1}),
    "checks": (
        least_squares,
        {"learning_rate": 0.05, "batch_size": 5, "stop": SETTLED},
    ),
    "adam, settled": (
        least_squares,
        {"optimizer": optax.adam, "learning_rate": 0.1, "stop": SETTLED},
    ),
    "schedule": (
        logistic,
        {"learning_rate": optax.exponential_decay(0.1, 10, 0.9), "batch_size": 7},
    ),
    "lbfgs": (logistic, {"optimizer": optax.lbfgs()}),
    "diverges": (least_squares, {"learning_rate": 10.0, "batch_size": 5}),
    "diverges, batch": (least_squares, {"learning_rate": 3.0}),
    "keys and aux": (
        noisy,
        {"learning_rate": 0.05, "batch_size": 5, "with_key": True, "has_aux": True},
    ),
    "schedule-free": (
        least_squares,
        {
            "optimizer": optax.contrib.schedule_free_sgd,
            "learning_rate": 0.1,
            "batch_size": 5,
            "stop": SETTLED,
        },
    ),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", RUNS)
def test_every_cut_has_the_same_bits(name):
    fun, kw = RUNS[name]
    kw = {"max_steps": 70, "final_evaluation": True, "history_rows": 16, **kw}
    whole = jaxgd.minimize(fun, START, (X, Y), **kw)
    for every in (1, 2, 9, 64, 10**9):
        *middle, last = jaxgd.iterate(fun, START, (X, Y), every=every, **kw)
        assert_same_bits(last, whole)
        assert last.limit == whole.limit
        assert len(middle) == max(-(-int(whole.steps) // every) - 1, 0) or (
            whole.status == Status.DIVERGED
        )
        for i, snapshot in enumerate(middle):
            assert snapshot.status == Status.RUNNING
            assert snapshot.steps == (i + 1) * every
            assert snapshot.limit == 70


FUNCTIONS = {
    "bowl": (lambda p: 2 * p[0] ** 2 + p[1] ** 2 / 2, [1.0, 1.0]),
    "himmelblau": (
        lambda p: (p[0] ** 2 + p[1] - 11) ** 2 + (p[0] + p[1] ** 2 - 7) ** 2,
        [-1.0, 1.0],
    ),
    "beale": (
        lambda p: (
            (1.5 - p[0] * (1 - p[1])) ** 2
            + (2.25 - p[0] * (1 - p[1] ** 2)) ** 2
            + (2.625 - p[0] * (1 - p[1] ** 3)) ** 2
        ),
        [1.0, 1.0],
    ),
    "valley": (lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2, [-1.2, 1.0]),
    "valley and flat": (
        lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2 + 0 * p[2],
        [-1.2, 1.0, 0.3],
    ),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("optimizer", [None, optax.lbfgs()], ids=["no rate", "lbfgs"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_line_search_does_not_see_the_cuts(name, optimizer):
    """What it keeps of the last evaluation, the program of a cut may round apart."""
    fun, start = FUNCTIONS[name]
    kw = {"optimizer": optimizer, "max_steps": 150}
    whole = jaxgd.minimize(fun, np.array(start, "f"), **kw)
    for every in (1, 2, 7, 10):
        *_, last = jaxgd.iterate(fun, np.array(start, "f"), every=every, **kw)
        assert_same_bits(last, whole)


def test_snapshots_are_results():
    kw = {"learning_rate": 0.05, "max_steps": 30}
    for snapshot in jaxgd.iterate(least_squares, START, (X, Y), every=7, **kw):
        steps = int(snapshot.steps)
        alone = jaxgd.minimize(
            least_squares, START, (X, Y), learning_rate=0.05, max_steps=steps
        )
        jax.tree.map(np.testing.assert_array_equal, snapshot.params, alone.params)
        assert snapshot.value == alone.value
        assert snapshot.evaluations == alone.evaluations
        np.testing.assert_array_equal(snapshot.history.value, alone.history.value)
        assert not snapshot.converged
        first = str(snapshot).splitlines()[0]
        ended = steps == 30
        assert first.startswith("Stopped" if ended else f"Running after {steps} steps")
        assert snapshot.to_dict()["status"] == ("MAX_STEPS" if ended else "RUNNING")
        assert snapshot.diagnosis.curvature > 0


@pytest.mark.parametrize("batch_size", [None, 5])
def test_goes_on_from_any_snapshot(batch_size):
    kw = {"learning_rate": 0.05, "batch_size": batch_size}
    whole = jaxgd.minimize(least_squares, START, (X, Y), max_steps=40, **kw)
    for snapshot in jaxgd.iterate(
        least_squares, START, (X, Y), every=11, max_steps=40, **kw
    ):
        rest = 40 - int(snapshot.steps)
        on = jaxgd.minimize(
            least_squares, START, (X, Y), max_steps=rest, state=snapshot.state, **kw
        )
        assert_same_bits(on, whole)
        *_, on = jaxgd.iterate(
            least_squares,
            START,
            (X, Y),
            every=3,
            max_steps=rest,
            state=snapshot.state,
            final_evaluation=True,
            **kw,
        )
        assert_same_bits(on, whole)


class Stop(Exception):
    pass


def raise_stop():
    raise Stop


ENDS = {
    "exception": (raise_stop, Stop),
    "interrupt": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


@pytest.fixture
def _interruptible():
    """A process that was started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("name", ENDS)
def test_the_last_snapshot_survives(name):
    end, kind = ENDS[name]
    kw = {"learning_rate": 0.05, "batch_size": 5}
    snapshot = None
    try:
        for snapshot in jaxgd.iterate(least_squares, START, (X, Y), every=6, **kw):
            if snapshot.steps >= 18:
                end()
    except kind:
        pass
    assert snapshot is not None
    assert snapshot.steps == 18
    on = jaxgd.minimize(
        least_squares, START, (X, Y), max_steps=5, state=snapshot.state, **kw
    )
    whole = jaxgd.minimize(least_squares, START, (X, Y), max_steps=23, **kw)
    assert_same_bits(on, whole)


def test_no_rule_is_no_rule():
    """With a static scan in its place the numbers agree to rounding."""
    kw = {"learning_rate": 0.3, "max_steps": 200, "stop": None}
    whole = jaxgd.minimize(least_squares, START, (X, Y), **kw)
    *_, last = jaxgd.iterate(least_squares, START, (X, Y), every=50, **kw)
    assert last.status == whole.status == Status.MAX_STEPS
    np.testing.assert_allclose(last.value, whole.value, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_always_a_snapshot(batch_size):
    kw = {"learning_rate": 0.05, "batch_size": batch_size, "stop": SETTLED}
    run = lambda **more: list(
        jaxgd.iterate(least_squares, START, (X, Y), every=5, **kw, **more)
    )
    (only,) = run(max_steps=0)
    assert (only.steps, only.status) == (0, Status.MAX_STEPS)
    *_, last = run(max_steps=500)
    assert last.converged
    (again,) = run(state=last.state)
    assert (again.steps, again.status) == (last.steps, last.status)


def test_cuts_cost_no_compilation(count_compilations):
    kw = {"learning_rate": 0.05, "batch_size": 5, "final_evaluation": False}
    jaxgd.minimize(least_squares, START, (X, Y), max_steps=9, **kw)
    list(jaxgd.iterate(least_squares, START, (X, Y), every=4, max_steps=9, **kw))
    for every in (1, 5, 100):
        with count_compilations() as count:
            list(
                jaxgd.iterate(
                    least_squares, START, (X, Y), every=every, max_steps=12, **kw
                )
            )
        assert count() == 0


@pytest.mark.parametrize("batch_size", [None, 5])
def test_bar(batch_size, capsys):
    pytest.importorskip("tqdm")
    threads = threading.active_count()
    kw = {"learning_rate": 0.05, "batch_size": batch_size, "max_steps": 60}
    run = jaxgd.iterate(
        least_squares, START, (X, Y), every=20, progress=True, **kw, stop=SETTLED
    )
    *_, last = run
    text = capsys.readouterr().err
    end = text.split("\r")[-1]
    assert f"{int(last.steps)}/60" in end
    assert ("ended=" in end) == bool(last.converged)
    for word in ("gradient=", "rate=0.05", "rows/s=", "step/s"):
        assert word in end
    assert ("objective=" if batch_size is None else "check=") in end
    assert threading.active_count() <= threads + 1  # tqdm has a monitor of its own
    for _ in jaxgd.iterate(least_squares, START, (X, Y), every=20, progress=True, **kw):
        break
    assert "20/60" in capsys.readouterr().err


def test_no_tqdm(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("tqdm")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"jaxgd\[progress\]"):
        jaxgd.iterate(least_squares, START, (X, Y), every=5, progress=True)


@pytest.mark.parametrize(
    ("kind", "text", "kw"),
    [
        (ValueError, "every must be at least 1", {"every": 0}),
        (TypeError, "every must be a whole number", {"every": 1.5}),
        (TypeError, "did you mean 'learning_rate'", {"every": 1, "learning_rat": 1.0}),
        (TypeError, "progress", {"every": 1, "progress": "yes"}),
        (ValueError, "batch_size must be at most 23", {"every": 1, "batch_size": 24}),
    ],
)
def test_errors_come_with_the_call(kind, text, kw, count_compilations):
    with count_compilations() as count, pytest.raises(kind, match=text):
        jaxgd.iterate(least_squares, START, (X, Y), **kw)
    assert count() == 0


def test_not_inside_jit():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda p: jaxgd.iterate(least_squares, p, (X, Y), every=1))(START)
