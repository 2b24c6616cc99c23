"""One run on two processes, each with its own rows: as on two machines.

What it shows: ``jaxgd.shard_rows`` after ``jax.distributed.initialize()``. Each process
reads its half of a regression problem and passes it; the run is one, with the same rows
at every step, value and report as on one process with all rows. The first process
prints the report, saves the state and compares with the closed form.

    python examples/two_processes.py

starts both on this machine. On a cluster whose scheduler starts the processes, ``work``
is the script: there ``jax.distributed.initialize()`` finds the others by itself.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxgd

PROCESSES, ROWS, COLUMNS = 2, 4096, 8


def read_rows(first, count):
    """Rows ``first ... first + count - 1`` of a table, as from a file of many."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    y = x @ np.arange(COLUMNS) + 0.1 * rng.normal(size=ROWS)
    part = slice(first, first + count)
    return x[part], y[part].astype(np.float32)


def loss(weights, batch):
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2) / 2


def work(folder):
    """What every process runs."""
    own = ROWS // jax.process_count()
    data = jaxgd.shard_rows(read_rows(jax.process_index() * own, own))
    result = jaxgd.minimize(
        loss,
        np.zeros(COLUMNS, np.float32),
        data,
        batch_size=64,
        learning_rate=lambda step: 0.2 / (1 + step / 50),
        epochs=5,
    )
    jaxgd.save(Path(folder) / "state.jaxgd", result.state)  # all call, the first writes
    if jax.process_index() == 0:
        x, y = read_rows(0, ROWS)
        solution = np.linalg.lstsq(x, y, rcond=None)[0]
        away = np.abs(np.asarray(result.params) - solution).max()
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(result)
        print(f"largest distance from the closed form: {away:.2g}", flush=True)


def start_all(folder, seconds=240):
    """The processes, as a scheduler would start them; an error if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, address, str(folder)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}  # they would fight over one GPU
    running = [subprocess.Popen([*command, str(i)], env=env) for i in range(PROCESSES)]
    end = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                raise RuntimeError("a process failed: its error is above")
            if time.monotonic() > end:
                raise TimeoutError(f"not done within {seconds} seconds")
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        raise RuntimeError("a process failed: its error is above")


def main():
    """Starts the processes; returns the state that they saved."""
    with tempfile.TemporaryDirectory() as folder:
        start_all(folder)
        return jaxgd.load(Path(folder) / "state.jaxgd")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        address, folder, process = sys.argv[1:]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address, num_processes=PROCESSES, process_id=int(process)
        )
        work(folder)
