"""Claim: where a core is free for it, reading rows from a file hides behind the steps.

An MLP 784-128-10 with batches of 128, the same steps on the same rows: resident, and
streamed from ``.npy`` files in the page cache in the order of the resident run, in the
block order, and from a source slowed down so that reading takes half the time of the
steps. Times are per step of whole calls without the final pass; a ratio is streamed
speed over resident speed, so that 1 is as fast.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxgd
from benchmarks._measure import Options, interleaved, show, where
from jaxgd import problems

BATCH_SIZE = 128
BUDGET = 2**28


class Slow(np.memmap):
    """A file whose rows come late, by so many seconds each."""

    seconds = 0.0

    def take(self, indices, *args, **kw):
        time.sleep(len(indices) * Slow.seconds)
        return np.asarray(self).take(indices, *args, **kw)


def of_bytes(fun):
    """The objective on pixels of one byte."""

    def scaled(params, batch):
        pixels, labels = batch
        return fun(params, (pixels.astype(jnp.float32) / 255, labels))

    return scaled


def runner(fun, start, data, steps):
    """``steps`` steps on ``data`` as a function of no arguments."""

    def run():
        result = jaxgd.minimize(
            fun,
            start,
            data,
            batch_size=BATCH_SIZE,
            learning_rate=0.1,
            max_steps=steps,
            final_evaluation=False,
        )
        return result.params

    return run


def measured(name, resident, streamed, options, steps) -> dict:
    """A row of the report: streamed against resident, the same bits at the end."""
    same = jax.tree.map(np.array_equal, resident(), streamed())
    seconds = interleaved({"resident": resident, "streamed": streamed}, options.repeats)
    ratios = seconds["resident"] / seconds["streamed"]
    row = {
        "name": name,
        "size": f"{steps} steps / {BATCH_SIZE}",
        "peer": "resident",
        "unit": "step",
        "jaxgd": float(np.median(seconds["streamed"])) / steps,
        "peer_time": float(np.median(seconds["resident"])) / steps,
        "ratio": float(np.median(ratios)),
        "spread": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "same_bits": all(jax.tree.leaves(same)),
    } | where()
    show(row)
    return row


def run(options: Options) -> list[dict]:
    rows, steps = [], options.steps(3200)
    n = options.rows(65_536)
    x, y = problems.blobs(n, 784, 10)
    problem = problems.mlp(x, y, sizes=(784, 128, 10))
    pixels = np.clip(x * 32 + 128, 0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for kind, fun, images in (
            ("float32", problem.fun, x.astype(np.float32)),
            ("uint8", of_bytes(problem.fun), pixels),
        ):
            path = Path(folder) / f"{kind}.npy"
            np.save(path, images)
            resident = jnp.asarray(images), jnp.asarray(y)
            del images
            resident = runner(fun, problem.init, resident, steps)
            resident()
            start = time.perf_counter()
            jax.block_until_ready(resident())
            seconds = time.perf_counter() - start
            stream = partial(jaxgd.Stream, budget_bytes=BUDGET)
            Slow.seconds = 0.5 * seconds / (steps * BATCH_SIZE)
            late = np.load(path, mmap_mode="r").view(Slow)
            sources = {
                "": stream((path, y)),
                ", slow source": stream((late, y)),
                ", in blocks": stream((path, y), shuffle="blocks"),
            }
            for how, source in sources.items():
                streamed = runner(fun, problem.init, source, steps)
                name = f"MLP 784-128-10, {kind}{how}"
                rows.append(measured(name, resident, streamed, options, steps))
            del resident
    return rows
