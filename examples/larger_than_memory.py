"""Training from a file that is larger than the memory it may take.

What it shows: ``jaxgd.Stream`` in place of ``data``. The script writes a table of
measurements to a ``.npy`` file, several times the stated budget, and learns from it to
tell three kinds of signals apart. The rows come in the order that they would have if
they were all in memory; reading happens in a thread while the steps run. Checks and the
final value are of all rows, and a second call goes on where the first one ended.
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

COLUMNS, KINDS = 64, 3


def write_signals(folder, n, seed=0, at_once=10_000):
    """``n`` noisy sine waves of three frequencies, written a few rows at a time."""
    rng = np.random.default_rng(seed)
    create = np.lib.format.open_memmap
    x = create(folder / "signals.npy", "w+", np.float32, (n, COLUMNS))
    y = create(folder / "kinds.npy", "w+", np.int32, (n,))
    time = np.linspace(0, 2 * np.pi, COLUMNS)
    for start in range(0, n, at_once):
        kinds = rng.integers(0, KINDS, min(at_once, n - start))
        phases = rng.uniform(0, 1.5, (kinds.size, 1))
        signals = np.sin(time * (2 + kinds[:, None]) + phases)
        x[start : start + kinds.size] = signals + 1.5 * rng.normal(size=signals.shape)
        y[start : start + kinds.size] = kinds
    x.flush()
    y.flush()
    return folder / "signals.npy", folder / "kinds.npy"


def loss(params, batch):
    """Mean cross-entropy of a linear classifier over the rows of a batch."""
    signals, kinds = batch
    logits = signals @ params["weights"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, kinds)
    return jnp.mean(losses)


def main(folder=None, n=400_000, budget_bytes=2**24):
    """Writes, trains in two calls, reports; returns result, accuracy and sizes."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        paths = write_signals(Path(inner), n)
        sizes = {"file": sum(p.stat().st_size for p in paths), "budget": budget_bytes}
        print(f"{n:,} rows, {sizes['file'] / 2**20:.0f} MB in two files")
        print(f"budget: {budget_bytes / 2**20:.0f} MB of rows in memory\n")
        stream = jaxgd.Stream(paths, budget_bytes=budget_bytes)
        how = {
            "batch_size": 256,
            "optimizer": optax.adam,
            "learning_rate": 3e-4,
            "stop": jaxgd.value_change(rtol=1e-4),
        }
        params = {
            "weights": jnp.zeros((COLUMNS, KINDS)),
            "bias": jnp.zeros(KINDS),
        }
        first = jaxgd.minimize(loss, params, stream, epochs=1, **how)
        print(f"after one epoch, {first.steps} steps: {float(first.value):.4f}")
        result = jaxgd.minimize(
            loss, params, stream, epochs=4, state=first.state, **how
        )
        print(result)
        print("\nfull objective at every check")
        for step, value in zip(result.checks.step, result.checks.value, strict=True):
            print(f"  step {step:5}  {value:.5f}")
        signals, kinds = (np.load(path, mmap_mode="r")[-10_000:] for path in paths)
        logits = signals @ result.params["weights"] + result.params["bias"]
        accuracy = float(jnp.mean(logits.argmax(axis=-1) == kinds))
        print(f"\naccuracy on the last 10,000 rows: {accuracy:.4f}")
    return result, accuracy, sizes


if __name__ == "__main__":
    main()
