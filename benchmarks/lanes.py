"""Claim: 64 runs as lanes of a sweep are at least 3 times faster than 64 calls in turn.

A small logistic regression at 64 learning rates, by mini-batches with and without
checks and with all rows in every step, and 8 rates by 8 decays of Adam. The peer calls
``jaxgd.minimize`` once for each setting: compiled once, as sweep is. Batches are read
once for all lanes; with all rows in every step there is no such gain, and what is left
is the time of starting a kernel.

A short fit is short: 100 least squares of 40 points and 3 numbers, which end within 30
steps of 10,000, by ``jax.vmap``, by ``sweep`` and by ``lax.map``, beside the descent of
jaxopt and the BFGS of optimistix under ``vmap``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd
from benchmarks._measure import Options, compare, needs
from jaxgd import problems


def cases(options: Options):
    """(name, optimizer, over, further arguments)."""
    rates = {"learning_rate": np.geomspace(1e-3, 1, 64)}
    grid = {
        "learning_rate": np.geomspace(1e-3, 0.1, 8),
        "b2": 1 - np.geomspace(1e-3, 0.1, 8),
    }
    mini = {"batch_size": 32, "epochs": 25 if options.quick else 100}
    settled = {"stop": jaxgd.value_change(1e-6)}
    yield "64 rates, mini-batches", None, rates, mini
    yield "64 rates, with checks", None, rates, mini | settled
    yield "8 rates by 8 decays, Adam", optax.adam, grid, mini
    yield "64 rates, all rows", None, rates, {"max_steps": options.steps(1000)}


def run(options: Options) -> list[dict]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.rows(200), 20)).astype(np.float32)
    y = (x @ rng.normal(size=20) + rng.normal(size=len(x)) > 0).astype(np.float32)
    problem = problems.logistic(x, y, penalty=0.01)
    data = jax.tree.map(jnp.asarray, problem.data)
    rows = []
    for name, optimizer, over, how in cases(options):
        call = problem.fun, problem.init, data

        def lanes(call=call, over=over, how=how, optimizer=optimizer):
            found = jaxgd.sweep(*call, over=over, optimizer=optimizer, **how)
            return found.results.params

        def in_turn(call=call, over=over, how=how, optimizer=optimizer):
            shape = [len(values) for values in over.values()]
            reached = []
            for place in np.ndindex(*shape):
                pairs = zip(over.items(), place, strict=True)
                setting = {key: float(values[i]) for (key, values), i in pairs}
                rate = setting.pop("learning_rate")
                result = jaxgd.minimize(
                    *call,
                    learning_rate=rate,
                    optimizer=optimizer,
                    hyperparams=setting or None,
                    **how,
                )
                reached.append(result.params)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reached)
            return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stacked)

        rows += compare(
            name,
            f"{len(x)} x 20",
            options,
            lanes,
            {"calls in turn": lambda run=in_turn: run},
            units=64,
            unit="run",
        )
    return rows + short_fits(options)


def short_fits(options: Options) -> list[dict]:
    """100 fits that end after some 25 steps of the 10,000 that they may take."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    truth = rng.normal(size=(100, 3))
    y = jnp.asarray(truth @ x.T + 0.1 * rng.normal(size=(100, 40)), jnp.float32)
    start, stop = jnp.zeros(3), jaxgd.gradient_norm(1e-4)

    def loss(p, y):
        return jnp.mean((x @ p - y) ** 2) / 2

    def fit(y):
        return jaxgd.minimize(
            loss, start, None, args=(y,), learning_rate=0.5, stop=stop
        ).params

    mapped = jax.jit(jax.vmap(fit))
    in_turn = jax.jit(lambda y: jax.lax.map(fit, y))

    def swept():
        over = {"args": (y,)}
        found = jaxgd.sweep(loss, start, None, over=over, learning_rate=0.5, stop=stop)
        return found.results.params

    def jaxopt():
        solver = needs("jaxopt").GradientDescent(
            loss, stepsize=0.5, tol=1e-4, maxiter=10_000
        )
        run = jax.jit(jax.vmap(lambda y: solver.run(start, y).params))
        return lambda: run(y)

    def optimistix():
        library = needs("optimistix")
        solver = library.BFGS(rtol=1e-4, atol=1e-4)
        run = jax.jit(
            jax.vmap(lambda y: library.minimise(loss, solver, start, y).value)
        )
        return lambda: run(y)

    return compare(
        "100 short fits",
        "40 x 3",
        options,
        lambda: mapped(y),
        {
            "sweep": lambda: swept,
            "lax.map": lambda: lambda: in_turn(y),
            "jaxopt, vmap": jaxopt,
            "optimistix BFGS, vmap": optimistix,
        },
        units=100,
        unit="fit",
        agree=1e-2,
    )
