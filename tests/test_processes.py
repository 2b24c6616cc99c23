"""One run on several processes, as on several machines: two of them, over gloo."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgd
from jaxgd._devices import processes

pytestmark = pytest.mark.full

WORKER = Path(__file__).parent / "processes" / "worker.py"
EXAMPLE = Path(__file__).parent.parent / "examples" / "two_processes.py"
SECONDS = 240  # of wall time, after which a test has failed
N, STRATA = 640, 8


@contextlib.contextmanager
def started(task, folder, processes, devices):
    """The processes of a task, killed at the latest at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flag = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), task, str(folder), port, str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([*command, str(i)], env=env, **pipes) for i in range(processes)
    ]
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.communicate()


def found_by(task, folder, processes, devices):
    """What each process found, and printed."""
    with started(task, folder, processes, devices) as running:
        end = time.monotonic() + SECONDS
        texts = []
        for one in running:
            texts.append(one.communicate(timeout=max(1, end - time.monotonic()))[0])
        for one, text in zip(running, texts, strict=True):
            assert one.returncode == 0, text[-3000:]
    return [dict(np.load(folder / f"{i}.npz")) for i in range(processes)], texts


_known = {}


def alone(task, folder):
    """The same on one device of one process."""
    if task not in _known:
        (_known[task],), _ = found_by(task, folder, 1, 1)
    return _known[task]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def assert_near(found, reference, by):
    for name, value in reference.items():
        if value.dtype.kind in "biu":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        elif value.dtype.kind == "f":
            scale = max(1.0, np.nanmax(np.abs(value), initial=0))
            np.testing.assert_allclose(
                found[name], value, rtol=0, atol=by * scale, err_msg=name
            )


def test_the_rows_of_every_step(tmp_path):
    both, _ = found_by("rows", tmp_path, 2, 4)
    for found in both:
        bits = found["bits"].astype(int)
        for step in range(12):
            taken = np.flatnonzero(bits >> (11 - step) & 1)
            rows = jaxgd.batch_rows(0, N, 32, step, STRATA)
            assert taken.tolist() == sorted(rows.tolist())


@pytest.mark.parametrize(
    ("task", "devices", "by"),
    [
        ("agreement", 1, 1e-5),
        ("agreement", 4, 1e-5),
        ("long", 1, 1e-4),
        ("batch_descent", 4, 1e-5),
        ("stopped", 1, 1e-5),
    ],
)
def test_the_run_of_one_device(task, devices, by, tmp_path):
    (first, second), _ = found_by(task, tmp_path, 2, devices)
    assert_same(first, second)  # to the bit, and the report to the letter
    assert_near(first, alone(task, tmp_path), by)


def test_cut_saved_and_loaded(tmp_path):
    (first, second), texts = found_by("resumed", tmp_path, 2, 1)
    assert_same(first, second)
    for way in ("loaded", "straight", "pieces"):
        np.testing.assert_array_equal(first[way], first["whole"], err_msg=way)
    assert first["steps"] == 60
    assert "step" in texts[0]
    assert "60/60" in texts[0]
    assert "60/60" not in texts[1]  # one bar for all
    state = jaxgd.load(tmp_path / "half.jaxgd")  # here, on one device
    assert int(state.step) == 25


def test_parameters_spread_over_processes(tmp_path):
    (first, second), _ = found_by("spread_parameters", tmp_path, 2, 1)
    assert_same(first, second)
    assert not first["whole"].all()
    reference = alone("spread_parameters", tmp_path)
    np.testing.assert_allclose(first["params"], reference["params"], atol=1e-5)
    np.testing.assert_allclose(first["value"], reference["value"], atol=1e-5)


WORDS = {
    "rows": "ValueError: data must have equally many rows on every process, got 4 on "
    "process 0, 8 on process 1: cut them to 4",
    "kind": r"data must be of one structure, shape and dtype on every process, got "
    r"data float64\[rows, 2\] on process 0 and data float64\[rows, 3\] on process 1",
    "divide": "data must have a number of rows that the 4 devices of this process "
    "divide, got 9: cut it to 8 rows",
    "devices": "devices must be those of process 0, then of process 1",
    "params": "params must be the same on every process, got .* process 1",
    "key": "key must be the same on every process",
    "learning_rate": "learning_rate must be the same on every process",
    "max_steps": "max_steps or epochs must be the same on every process",
}


def test_what_processes_are_told_that_do_not_pass_the_same(tmp_path):
    (first, second), _ = found_by("refused", tmp_path, 2, 4)
    for name, words in WORDS.items():
        for told in (first, second):
            assert re.search(words, str(told[name])), (name, told[name])
    assert "FileNotFoundError" in str(first["folder"])
    assert "could not be written by process 0" in str(second["folder"])
    assert first["after"] == second["after"]
    assert (first["alone"], second["alone"]) == (4, 8)  # each for itself


def test_a_process_that_dies_leaves_no_one_waiting(tmp_path):
    with started("orphaned", tmp_path, 2, 1) as (survivor, dying):
        assert dying.wait(timeout=SECONDS) == 9
        start = time.monotonic()
        text, _ = survivor.communicate(timeout=90)
        assert survivor.returncode not in (0, None)
        assert "heard of it" in text or "another task died" in text, text[-3000:]
        assert time.monotonic() - start < 90


def test_the_example(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Stopped after 320 steps") == 1
    assert "2 processes, 2 devices" in done.stdout
    away = float(done.stdout.split()[-1])
    assert away < 0.005


def test_the_example_fails_where_a_process_does(tmp_path, monkeypatch):
    broken = tmp_path / "two_processes.py"
    text = EXAMPLE.read_text()
    text = text.replace('"""What every process runs."""', "1 / jax.process_index()")
    broken.write_text(text)
    done = subprocess.run(
        [sys.executable, str(broken)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "a process failed: its error is above" in done.stderr


class Layer:
    """Parameters beside a function, as modules of other libraries have them."""

    def __init__(self, weights, activation):
        self.weights, self.activation = weights, activation


jax.tree_util.register_pytree_node(
    Layer,
    lambda layer: ((layer.weights,), layer.activation),
    lambda activation, children: Layer(children[0], activation),
)


def test_arguments_are_told_apart_by_numbers_not_by_addresses():
    def told(weights, activation):
        return processes._print_of({"layer": Layer(weights, activation)})

    same = told(np.ones(3, "f"), lambda x: x)
    assert told(np.ones(3, "f"), lambda x: x) == same  # of another address
    assert told(jnp.ones(3), lambda x: x) == same
    for other in (
        np.ones(4, "f"),
        np.ones(3),
        np.full(3, 2, "f"),
        np.ones((3, 1), "f"),
    ):
        assert told(other, lambda x: x) != same
    key = jax.random.key(0)
    assert processes._print_of(key) != processes._print_of(jax.random.key(1))
