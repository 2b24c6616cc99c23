"""A neural network on handwritten digits, trained by mini-batch Adam.

What it shows: parameters are any pytree, here a list of layers. The optimizer is given
as a factory, ``optimizer=optax.adam``, so that rates and other hyperparameters are data
and trying new ones costs no compilation. The stop rule looks at the full training
objective once per epoch, never at the noise of one batch.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxgd


def init_layers(key, sizes):
    """A list of layers with He-normal weights and zero biases."""
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    init = jax.nn.initializers.he_normal()
    return [
        {"weights": init(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(keys, shapes, strict=True)
    ]


def logits(layers, images):
    *hidden, last = layers
    for layer in hidden:
        images = jax.nn.relu(images @ layer["weights"] + layer["bias"])
    return images @ last["weights"] + last["bias"]


def loss(layers, batch):
    """Mean cross-entropy over the rows of a batch."""
    images, labels = batch
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits(layers, images), labels)
    )


def main(hidden=(64, 64), epochs=60):
    """Trains, prints the report and the test accuracy; returns both."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    result = jaxgd.minimize(
        loss,
        init_layers(jax.random.key(0), (64, *hidden, 10)),
        (x, y),
        batch_size=32,
        optimizer=optax.adam,
        learning_rate=2e-3,
        hyperparams={"b1": 0.9},
        epochs=epochs,
        stop=jaxgd.any_of(
            jaxgd.target_value(1e-2),
            jaxgd.value_change(rtol=1e-3, patience=3),
        ),
    )
    print(result)
    print("\nfull training objective at every fifth check")
    for step, value in zip(
        result.checks.step[::5], result.checks.value[::5], strict=True
    ):
        print(f"  step {step:4}  {value:.5f}")
    predicted = logits(result.params, x_test).argmax(axis=-1)
    accuracy = float(jnp.mean(predicted == y_test))
    print(f"\ntest accuracy: {accuracy:.4f}")
    return result, accuracy


if __name__ == "__main__":
    main()
