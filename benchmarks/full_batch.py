"""Claim: batch descent through ``jax.grad`` keeps up with a gradient by hand in NumPy.

Least squares, ``theta <- theta - rate * x.T @ (x @ theta - y) / m``, from three rows to
400,000, in the textbook's NumPy loop (BLAS does its products), a bare hand-written
``lax.scan`` of ``jax.grad``, jaxopt and optimistix; the largest at once, and in blocks
that fit a cache (``microbatch_size``). On a CPU all are measured twice, on all cores
and, in a process of its own, on one.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import jaxgd
from benchmarks import peers
from benchmarks._measure import Options, compare
from benchmarks.mini_batch import runner
from jaxgd import problems

BLOCK = 5000  # rows of 100 numbers: 2 MB
NEVER = jaxgd.gradient_norm(atol=0.0)  # the cost of the default rule, all steps taken


def half_mean_square(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


def problem(n, d):
    data = problems.linear_data(n, d)
    return problems.Problem(
        "least_squares", half_mean_square, np.zeros(d, np.float32), data
    )


def run(options: Options) -> list[dict]:
    three = problems.Problem(
        "three rows",
        half_mean_square,
        np.zeros(2, np.float32),
        (
            np.array([[1, 2], [1, 3], [1, 4]], np.float32),
            np.array([2, 5, 9], np.float32),
        ),
    )
    small, large = options.rows(3200), options.rows(400_000)
    most = problem(large, 100)
    table = (
        ("three rows", "3 x 2", three, 0.01, 1000, None),
        ("full batch", f"{small:,} x 32", problem(small, 32), 1e-3, 1000, None),
        ("full batch", f"{large:,} x 100", most, 1e-2, 24, None),
        ("full batch, blocks", f"{large:,} x 100", most, 1e-2, 24, BLOCK),
    )
    rows = []
    for name, size, of, rate, steps, block in table:
        steps = steps if name == "three rows" else options.steps(steps)
        rows += compare(
            name,
            size,
            options,
            runner(
                *(of, None, steps),
                learning_rate=rate,
                stop=NEVER,
                microbatch_size=block,
            ),
            {
                "NumPy": partial(peers.numpy_loop, of, rate, steps),
                "bare scan": partial(peers.bare_scan, of, optax.sgd(rate), steps),
                "jaxopt": partial(peers.jaxopt_solver, of, optax.sgd(rate), steps),
                "optimistix": partial(
                    peers.optimistix_minimiser, of, optax.sgd(rate), steps
                ),
            },
            units=steps,
        )
    if (
        options.device == "cpu"
        and options.cores is None
        and hasattr(os, "sched_setaffinity")
    ):
        rows += on_one_core(options)
    return rows


def on_one_core(options: Options) -> list[dict]:
    """The same in a process that may use one core."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks", "full_batch", "--cores", "1"]
        command += [
            "--device",
            "cpu",
            "--json",
            str(file),
            "--scale",
            str(options.scale),
        ]
        command += ["--quick"] if options.quick else []
        subprocess.run(command, check=True)
        return json.loads(file.read_text())
