"""A training loop of one's own: validation, early stopping, checkpoints, resumption.

What it shows: a small network learns handwritten digits by Adam. After every epoch the
loop's body looks at a validation set, keeps the best parameters in a file, writes a
line to a CSV log, and stops when the validation loss has not improved for some epochs.
Then a second part of the script, which knows nothing but the file, goes on from the
checkpoint as if nothing had been in between.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxgd


def network(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params, batch):
    x, y = batch
    logits = network(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def validate(params, x, y):
    return loss(params, (x, y)), jnp.mean(network(params, x).argmax(axis=1) == y)


def start(width, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.normal(0, 64**-0.5, (64, width)).astype(np.float32),
        "b1": np.zeros(width, np.float32),
        "w2": rng.normal(0, width**-0.5, (width, 10)).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }


def main(folder=None, width=64, epochs=100, patience=5):
    with tempfile.TemporaryDirectory() as temporary:
        return _main(Path(folder or temporary), width, epochs, patience)


def _main(folder, width, epochs, patience):
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    mixed = np.random.default_rng(0).permutation(len(y))
    train, held = mixed[:1400], mixed[1400:]
    call = {
        "fun": loss,
        "params": start(width),
        "data": (x[train], y[train]),
        "batch_size": 50,
        "optimizer": optax.adam,
        "learning_rate": 3e-3,
        "epochs": epochs,
    }
    an_epoch = len(train) // call["batch_size"]

    best, since, checkpoint = np.inf, 0, folder / "best.npz"
    with (folder / "log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "validation loss", "accuracy"])
        for snapshot in jaxgd.iterate(every=an_epoch, **call):
            value, accuracy = validate(snapshot.params, x[held], y[held])
            log.writerow([int(snapshot.steps), float(value), float(accuracy)])
            since += 1
            if value < best:
                best, since = value, 0
                jaxgd.save(checkpoint, snapshot.state)
            if since == patience:
                break
    lines = (folder / "log.csv").read_text().splitlines()
    print(f"Stopped after {len(lines) - 1} epochs; the log ends with")
    print("\n".join([lines[0], *lines[-3:]]))

    state = jaxgd.load(checkpoint)
    value, accuracy = validate(state.params, x[held], y[held])
    print(f"\nThe checkpoint of step {int(state.step)} has validation loss {value:.4f}")
    print(f"and accuracy {accuracy:.1%}. Two more epochs from there, at a third of the")
    print("rate:\n")
    more = call | {"learning_rate": 1e-3, "epochs": 2}
    result = jaxgd.minimize(**more, state=state)
    print(result)
    after, accuracy = validate(result.params, x[held], y[held])
    print(
        f"\nValidation loss {after:.4f}, accuracy {accuracy:.1%}: the objective still"
    )
    print("falls, validation no longer improves. The checkpoint is what to keep.")
    return float(best), float(value), float(after), result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to keep log and checkpoint")
    main(parser.parse_args().folder)
