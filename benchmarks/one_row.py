"""Claim: stochastic descent by one row at a time outruns compiled Cython.

One shuffled epoch of 100,000 rows with 20 features, one row a step: least squares
against scikit-learn's ``SGDRegressor`` and logistic regression against its
``SGDClassifier``, whose inner loops are Cython, from the same start with the same rate.
scikit-learn shuffles the same rows in an order of its own, so here the parameters are
alike, not equal. Adam, one row a step, is measured against the jitted optax step called
from Python, and everything against a bare hand-written scan of the same steps.
"""

from functools import partial

import jax.numpy as jnp
import optax

from benchmarks import peers
from benchmarks._measure import Options, compare
from benchmarks.mini_batch import runner
from jaxgd import problems

# Without a penalty, as scikit-learn is asked to do it.


def half_mean_square(params, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ params["weights"] + params["intercept"] - y) ** 2)


def cross_entropy(params, batch):
    x, y = batch
    z = x @ params["weights"] + params["intercept"]
    return jnp.mean(jnp.logaddexp(z, 0.0) - y * z)


def run(options: Options) -> list[dict]:
    n = options.rows(100_000)
    linear = problems.least_squares(*problems.linear_data(n, 20))
    linear = linear._replace(fun=half_mean_square)
    labels = problems.logistic(*problems.blobs(n, 20, 2))._replace(fun=cross_entropy)
    size, rate = f"{n:,} x 20", 1e-3
    rows = []
    for problem, estimator, settings in (
        (linear, "SGDRegressor", {}),
        (labels, "SGDClassifier", {"loss": "log_loss"}),
    ):
        rows += compare(
            f"one-row SGD, {problem.name}",
            size,
            options,
            runner(problem, 1, n, learning_rate=rate),
            {
                f"sklearn {estimator}": partial(
                    peers.sklearn_epoch, problem, rate, estimator, **settings
                ),
                "bare scan": partial(
                    peers.bare_scan, problem, optax.sgd(rate), n, batch_size=1
                ),
            },
            units=n,
            agree=1e-2,
            alike=(f"sklearn {estimator}",),
        )
    steps = options.steps(20_000)
    rows += compare(
        "one-row Adam, least_squares",
        size,
        options,
        runner(linear, 1, steps, optimizer=optax.adam, learning_rate=rate),
        {
            "optax loop": partial(
                peers.optax_loop, linear, optax.adam(rate), steps, batch_size=1
            ),
            "bare scan": partial(
                peers.bare_scan, linear, optax.adam(rate), steps, batch_size=1
            ),
        },
        units=steps,
        agree=1e-2,
    )
    return rows
