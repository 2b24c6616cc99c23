"""Objectives of users: honest means over rows, and such that couple the rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N, BATCH = 160, 32
_rng = np.random.default_rng(4)
X = _rng.normal(size=(N, 6)).astype("f")
FAR = 50_000 + 1000 * X  # features that nobody has centered
Y = (X @ _rng.normal(size=6) + 0.3 * _rng.normal(size=N)).astype("f")
LABELS = (Y > 0.2).astype("f")
CLASSES = np.digitize(Y, [-1.0, 1.0]).astype(np.int32)
IMAGES = _rng.normal(size=(N, 8, 8, 1)).astype("f")
WEIGHTS = (0.5 + _rng.random(N)).astype("f")

DATA = (X, Y, LABELS, CLASSES, WEIGHTS)
START = {"w": 0.1 * np.ones(6, "f"), "b": np.float32(0.2)}


def predict(params, x):
    return x @ params["w"] + params["b"]


def off(params, batch):
    return predict(params, batch[0]) - batch[1]


def losses(params, batch):
    z = predict(params, batch[0])
    return jnp.logaddexp(0.0, z) - batch[2] * z


# Honest means.


def linear(params, batch):
    return jnp.mean(off(params, batch) ** 2)


def logistic(params, batch):
    return jnp.mean(losses(params, batch)) + 0.01 * jnp.sum(params["w"] ** 2)


def as_sum(params, batch):
    return jnp.sum(losses(params, batch)) / batch[0].shape[0]


def one_by_one(params, batch):
    return jnp.mean(lax.map(lambda row: off(params, row) ** 2, batch))


def one_by_one_from_zero(params, batch):
    """A carry of zeros: what a type of values that vary over devices would refuse."""

    def of_row(row):
        def add(total, _):
            return total + losses(params, row) / 3, None

        return lax.scan(add, jnp.float32(0), length=3)[0]

    return jnp.mean(lax.map(of_row, batch))


def solved(params, batch):
    """Each row solves a system of its own."""
    x, y = batch[:2]
    matrix = jnp.eye(6) + x[:, :, None] * x[:, None, :]
    solution = jax.vmap(jnp.linalg.solve)(matrix, x * params["w"])
    return jnp.mean((solution.sum(axis=1) + params["b"] - y) ** 2)


def robust(params, batch):
    error = off(params, batch)
    return jnp.mean(jnp.where(jnp.abs(error) < 1, error**2 / 2, jnp.abs(error) - 0.5))


def pinball(params, batch):
    error = off(params, batch)
    return jnp.mean(jnp.maximum(0.9 * error, -0.1 * error))


def softmax(params, batch):
    hidden = jnp.tanh(batch[0] @ params["in"])
    log_p = jax.nn.log_softmax(hidden @ params["out"])
    one_hot = jax.nn.one_hot(batch[3], 3)
    return -jnp.mean(jnp.sum(one_hot * log_p, axis=1))


def convolution(params, batch):
    images, labels = batch
    out = lax.conv_general_dilated(
        images,
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    logits = jax.nn.relu(out).mean(axis=(1, 2)) @ params["w"]
    return -jnp.mean(
        jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 3), axis=1)
    )


def deep(params, batch):
    hidden = batch[0]
    for weights in params:
        hidden = jnp.tanh(2 * hidden @ weights)
    return jnp.mean((hidden.sum(axis=1) - batch[1]) ** 2)


def recurrence(params, batch):
    x, y = batch[:2]

    def step(hidden, _):
        return jnp.tanh(hidden @ params["own"] + x @ params["in"]), None

    hidden, _ = lax.scan(step, jnp.zeros((len(x), 8)), None, length=100)
    return jnp.mean((hidden.sum(axis=1) - y) ** 2)


def _small(*shape):
    return (0.3 * np.random.default_rng(1).normal(size=shape)).astype("f")


LAYERS = {"in": _small(6, 5), "out": _small(5, 3)}
KERNELS = {"kernel": _small(3, 3, 1, 4), "w": _small(4, 3)}

MEANS = {
    fun.__name__: (fun, START, DATA)
    for fun in (
        *(linear, logistic, as_sum, one_by_one, one_by_one_from_zero),
        *(robust, pinball),
    )
}
MEANS["far from zero"] = linear, START, (FAR, *DATA[1:])
MEANS["deep"] = deep, [_small(6, 6)] * 20, DATA
MEANS["recurrence"] = recurrence, {"in": _small(6, 8), "own": _small(8, 8)}, DATA
MEANS["softmax"] = softmax, LAYERS, DATA
MEANS["convolution"] = convolution, KERNELS, (IMAGES, CLASSES)


# Coupled rows.


def root(params, batch):
    return jnp.sqrt(linear(params, batch))


def normalized(params, batch):
    z = predict(params, batch[0])
    z = (z - z.mean()) / jnp.sqrt(z.var() + 1e-5)
    return jnp.mean((params["b"] + z - batch[1]) ** 2)


def median(params, batch):
    return jnp.median(jnp.abs(off(params, batch)))


def hard_coded(params, batch):
    return jnp.sum(losses(params, batch)) / BATCH


def total(params, batch):
    return jnp.sum(losses(params, batch))


def contrastive(params, batch):
    """Which target belongs to which row, among those of the batch."""
    z = predict(params, batch[0])
    logits = -((z[:, None] - batch[1][None, :]) ** 2)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits))


def worst(params, batch):
    return jnp.max(losses(params, batch))


def log_mean(params, batch):
    """Tilted losses."""
    return jax.nn.logsumexp(losses(params, batch)) - jnp.log(len(batch[0]))


def weighted(params, batch):
    weights = batch[4]
    return jnp.sum(weights * losses(params, batch)) / jnp.sum(weights)


def correlation(params, batch):
    z, y = predict(params, batch[0]), batch[1]
    z, y = z - z.mean(), y - y.mean()
    return 1 - z @ y / (jnp.linalg.norm(z) * jnp.linalg.norm(y) + 1e-3)


def overlap(params, batch):
    """Dice loss."""
    p, y = jax.nn.sigmoid(predict(params, batch[0])), batch[2]
    return 1 - 2 * jnp.sum(p * y) / (jnp.sum(p) + jnp.sum(y) + 1e-3)


def spread_out(params, batch):
    """A mean, and a penalty on how predictions vary."""
    return linear(params, batch) + 0.1 * jnp.var(predict(params, batch[0]))


def ranked(params, batch):
    z, y = predict(params, batch[0]), batch[1]
    sign = jnp.sign(y[:, None] - y[None, :])
    return jnp.mean(jax.nn.softplus(-sign * (z[:, None] - z[None, :])))


def differences(params, batch):
    z = off(params, batch)
    return jnp.mean((z[1:] - z[:-1]) ** 2) + 0.01 * jnp.mean(z**2)


def halves(params, batch):
    """Siamese pairs: row i and row i + b / 2."""
    z = predict(params, batch[0])
    half = len(z) // 2
    return jnp.mean(jax.nn.softplus(z[:half] - z[half:])) + 0.01 * jnp.sum(z[0] ** 2)


def per_row_penalty(params, batch):
    """The penalty of a textbook: divided by the number of rows."""
    rows = len(batch[0])
    return linear(params, batch) + jnp.sum(params["w"] ** 2) / (2 * rows)


def slightly_spread_out(params, batch):
    return linear(params, batch) + 1e-3 * jnp.var(predict(params, batch[0]))


def small_per_row_penalty(params, batch):
    rows = len(batch[0])
    return linear(params, batch) + 0.02 * jnp.sum(params["w"] ** 2) / (2 * rows)


def mixture(params, batch):
    """Experts, and a small penalty that balances their load."""
    x, y = batch[:2]
    scores = x @ params["gate"]
    share = jax.nn.softmax(scores)
    first = jax.nn.one_hot(jnp.argmax(scores, axis=1), 4)
    value = jnp.mean((jnp.sum(share * (x @ params["experts"]), axis=1) - y) ** 2)
    return value + 0.004 * jnp.sum(first.mean(axis=0) * share.mean(axis=0))


EXPERTS = {"gate": _small(6, 4), "experts": _small(6, 4)}

# Coupled where a trial on some rows, at some parameters, would not see it.


def flooded(params, batch):
    return jnp.abs(linear(params, batch) - 0.3) + 0.3


def capped(params, batch):
    return jnp.minimum(linear(params, batch), 1e3)


def fair(params, batch):
    group, z = batch[2], predict(params, batch[0])
    gap = jnp.mean(group * z) - jnp.mean((1 - group) * z)
    return logistic(params, batch) + jax.nn.relu(jnp.abs(gap) - 100)


def rarely_weighted(params, batch):
    weight = jnp.where(batch[4] > 1.499, 10.0, 1.0)
    return jnp.sum(weight * losses(params, batch)) / jnp.sum(weight)


def of_known_rows(params, batch):
    error = off(params, batch) ** 2
    known = ~jnp.isnan(batch[1])
    return jnp.sum(jnp.where(known, error, 0)) / jnp.sum(known)


def by_length(params, batch):
    value = linear(params, batch)
    return value if len(batch[0]) % 8 == 0 else jnp.sqrt(value)


def in_pairs(params, batch):
    error, group = off(params, batch), batch[3]
    apart = (error[:, None] - error[None]) ** 2
    return jnp.mean(error**2) + jnp.mean(
        jnp.sum(jnp.where(group[:, None] == group[None], apart, 0), axis=1)
    )


def by_frequency(params, batch):
    group = batch[3]
    count = jnp.sum(group[:, None] == group[None], axis=1)
    return jnp.mean(off(params, batch) ** 2 / count)


def in_order(params, batch):
    return jnp.mean((jnp.sort(predict(params, batch[0])) - jnp.sort(batch[1])) ** 2)


def scaled_in_layers(params, batch):
    """A recurrence that divides by the size of the batch's largest row."""

    def layer(hidden, _):
        return hidden / jnp.maximum(jnp.max(jnp.abs(hidden)), 100.0) + 0.1, None

    hidden, _ = lax.scan(layer, predict(params, batch[0]), length=3)
    return jnp.mean((hidden - batch[1]) ** 2)


@jax.custom_vjp
def _clipped(params):
    return params


def _clip(_, grad):
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grad)))
    return (jax.tree.map(lambda g: g / jnp.maximum(norm / 10, 1), grad),)


_clipped.defvjp(lambda params: (params, None), _clip)


def clipped_backwards(params, batch):
    return linear(_clipped(params), batch)


def by_place(params, batch):
    error = off(params, batch) ** 2
    return jnp.mean(error * (1 + 1e-3 * jnp.arange(len(error))))


def added_up(params, batch):
    """A mean, though no one can tell from outside: its rows are summed in a loop."""

    def add(total, row):
        return total + losses(params, row), None

    total, _ = lax.scan(add, jnp.float32(0), batch)
    return total / len(batch[0])


COUPLED = {
    fun.__name__: fun
    for fun in (
        *(flooded, capped, fair, rarely_weighted, of_known_rows, by_length),
        *(in_pairs, by_frequency, in_order, scaled_in_layers, clipped_backwards),
        *(by_place, added_up, solved),
        *(root, normalized, median, hard_coded, total, contrastive, worst, log_mean),
        *(weighted, correlation, overlap, spread_out, ranked, differences, halves),
        *(per_row_penalty, small_per_row_penalty, slightly_spread_out, mixture),
    )
}
