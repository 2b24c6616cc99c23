"""One call, three regimes: batch, stochastic and mini-batch gradient descent.

What it shows: a softmax classifier of scikit-learn's handwritten digits is fitted three
times by the same ``jaxgd.minimize`` call until its loss is 0.1. Only ``batch_size``
and the rate that suits it differ: None takes all rows in each step, 1 takes one, 32 a
mini-batch. Each run says why it ended; the picture shows what the same loss costs.
"""

import argparse
import textwrap
from itertools import zip_longest

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxgd

REGIMES = {
    "batch": {"batch_size": None, "learning_rate": 2.0},
    "stochastic": {"batch_size": 1, "learning_rate": 0.05},
    "mini-batch": {"batch_size": 32, "learning_rate": 0.5},
}


def load_data():
    """Train and test rows: images [rows, 64] scaled to 0..1, and labels [rows]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    return (x, y), (x_test, y_test)


def log_probs(params, images):
    return jax.nn.log_softmax(images @ params["weights"] + params["bias"])


def loss(params, batch):
    """Mean cross-entropy over the rows of a batch."""
    images, labels = batch
    return -jnp.mean(log_probs(params, images)[jnp.arange(labels.size), labels])


def accuracy(params, rows):
    images, labels = rows
    return float(jnp.mean(log_probs(params, images).argmax(axis=-1) == labels))


def print_side_by_side(texts, width=45):
    """Prints texts as columns, line beside line, long lines wrapped."""
    for lines in zip_longest(*(text.splitlines() for text in texts), fillvalue=""):
        cells = [
            textwrap.wrap(line, width, subsequent_indent=" " * (17 * (line[:1] == " ")))
            for line in lines
        ]
        for row in zip_longest(*cells, fillvalue=""):
            print("  ".join(cell.ljust(width) for cell in row).rstrip())


def draw_losses(results, n, target, path):
    """Draws the loss of all ``n`` training rows over the epochs."""
    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, result in results.items():
        batch_size = REGIMES[name]["batch_size"]
        # A step of batch descent sees all rows; the others are checked every epoch.
        curve = result.checks if batch_size else result.history
        epochs, end = curve.step * (batch_size or n) / n, result.rows_seen / n
        label = f"{name}: {result.steps} steps, {end:.0f} epochs"
        (line,) = ax.plot(epochs, curve.value, lw=2, label=label)
        ax.plot(end, result.value, "o", color=line.get_color())
    ax.axhline(target, color="gray", lw=1, ls=":")
    ax.set(xscale="log", yscale="log", xlim=(1, None))
    ax.set(xlabel="epochs", ylabel="loss on all training rows")
    ax.set_title(f"The same loss, {target}, at three prices", fontsize="medium")
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(output="quickstart.png", target=0.1):
    """Runs the three regimes; returns their results and test accuracies."""
    train, test = load_data()
    params = {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    results = {
        name: jaxgd.minimize(
            loss, params, train, stop=jaxgd.target_value(target), epochs=1000, **regime
        )
        for name, regime in REGIMES.items()
    }
    accuracies = {name: accuracy(r.params, test) for name, r in results.items()}
    print_side_by_side(
        f"{name}: batch_size={REGIMES[name]['batch_size']}\n"
        f"{result.report()}\n  test accuracy  {accuracies[name]:.4f}"
        for name, result in results.items()
    )
    draw_losses(results, len(train[1]), target, output)
    print(f"\nThe three loss curves are in {output}.")
    return results, accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Digits in three regimes.")
    parser.add_argument(
        "--output", default="quickstart.png", help="path of the picture"
    )
    main(parser.parse_args().output)
