"""Claim: a mini-batch step costs what its arithmetic costs, and no more.

The same mini-batches of the same rows from the same start, for a logistic regression
and two MLPs: against a bare hand-written ``lax.scan`` (what is the price of history,
checks for NaN and resumability?), the jitted optax step called from Python, jaxopt's
solver and PyTorch.
"""

from functools import partial

import optax

import jaxgd
from benchmarks import peers
from benchmarks._measure import Options, compare
from jaxgd import problems

RULES = {"SGD": (optax.sgd, 0.1), "Adam": (optax.adam, 1e-3)}


def runner(problem, batch_size, steps, **how):
    """``steps`` steps of jaxgd as a function of no arguments."""
    data = peers.on_device(problem.data)

    def run():
        result = jaxgd.minimize(
            problem.fun,
            problem.init,
            data,
            batch_size=batch_size,
            max_steps=steps,
            final_evaluation=batch_size is None,
            **how,
        )
        if result.steps != steps:
            raise AssertionError(f"{problem.name} ended early: {result.message}")
        return result.params

    return run


def cases(options: Options):
    """name, size, problem, batch size, rule, steps."""
    n = options.rows(10_000)
    logistic = problems.logistic(*problems.blobs(n, 20, 2))
    for rule in RULES:
        yield f"logistic, {rule}", f"{n:,} x 20", logistic, 32, rule, 20_000
    n = options.rows(4096)
    narrow = problems.mlp(*problems.blobs(n, 64, 10), sizes=(64, 32, 10))
    yield "MLP 64-32-10, SGD", f"{n:,} x 64", narrow, 32, "SGD", 6000
    wide = problems.mlp(*problems.blobs(n, 784, 10), sizes=(784, 128, 10))
    for rule in RULES:
        yield f"MLP 784-128-10, {rule}", f"{n:,} x 784", wide, 128, rule, 400


def run(options: Options) -> list[dict]:
    rows = []
    for name, size, problem, batch_size, rule, steps in cases(options):
        steps = options.steps(steps)
        factory, rate = RULES[rule]
        same = {"steps": steps, "batch_size": batch_size}
        rows += compare(
            name,
            f"{size} / {batch_size}",
            options,
            runner(problem, optimizer=factory, learning_rate=rate, **same)
            if rule != "SGD"
            else runner(problem, learning_rate=rate, **same),
            {
                "bare scan": partial(peers.bare_scan, problem, factory(rate), **same),
                "optax loop": partial(peers.optax_loop, problem, factory(rate), **same),
                "jaxopt": partial(peers.jaxopt_solver, problem, factory(rate), **same),
                "torch": partial(
                    peers.torch_loop,
                    problem,
                    rule.lower(),
                    rate,
                    device=options.device,
                    **same,
                ),
            },
            units=steps,
            agree=2e-2,
        )
    return rows
