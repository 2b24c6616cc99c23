"""Claim: one call of jaxgd costs no more than the loop one would write by hand.

Measures, in one process and interleaved: ``jaxgd.minimize`` against a bare hand-written
``lax.scan`` of the same steps on the same rows (aim: at least 0.91 of its speed, rows
included), and against the usual Python loop around a jitted optax step; the time of a
repeated call on a tiny problem (aim: under 5 ms); temporaries of the compiled program
on n and 8 n rows (aim: equal, no permuted copy); and the row order against
``jax.random.permutation`` (aim: 30 times faster).

    python -m benchmarks.lean [--repeats 9]

Ratios are medians of interleaved pairs, above 1 where jaxgd is faster.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxgd
from jaxgd import problems


def timed(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(runs: dict, repeats: int) -> dict:
    """Seconds of each run, (repeats,), compilation apart, taken in turn."""
    for run in runs.values():
        jax.block_until_ready(run())
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: np.array(seconds) for name, seconds in times.items()}


def cases():
    """name, problem, batch size, optax rule, its factory and rate, steps."""
    small = problems.blobs(10_000, 20, 2)
    digits = problems.blobs(4096, 64, 10)
    images = problems.blobs(4096, 784, 10)
    sgd: Any = (optax.sgd(0.1), {"learning_rate": 0.1})
    adam: Any = (optax.adam(1e-3), {"optimizer": optax.adam, "learning_rate": 1e-3})
    wide = problems.mlp(*images, sizes=(784, 128, 10))
    yield "logistic 20, batch 32", problems.logistic(*small), 32, *sgd, 10_000
    yield "logistic 20, batch 32, Adam", problems.logistic(*small), 32, *adam, 10_000
    narrow = problems.mlp(*digits, sizes=(64, 32, 10))
    yield "MLP 64-32-10, batch 32", narrow, 32, *sgd, 3000
    yield "MLP 784-128-10, batch 128", wide, 128, *sgd, 400
    yield "MLP 784-128-10, batch 128, Adam", wide, 128, *adam, 400


def bare_scan(problem, batch_size, rule, steps):
    """The loop one would write by hand, for speed: nothing but steps."""
    n = len(problem.data[0])

    @jax.jit
    def run(params, data, key):
        def step(carry, t):
            params, opt_state = carry
            rows = jaxgd.batch_rows(key, n, batch_size, t)
            batch = jax.tree.map(lambda x: x[rows], data)
            value, grad = jax.value_and_grad(problem.fun)(params, batch)
            updates, opt_state = rule.update(grad, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return lax.scan(step, (params, rule.init(params)), jnp.arange(steps))

    data = jax.tree.map(jnp.asarray, problem.data)
    return lambda: run(problem.init, data, jax.random.key(0))


def optax_loop(problem, batch_size, rule, steps):
    """The loop of the optax documentation: a jitted step called from Python."""
    data = jax.tree.map(jnp.asarray, problem.data)
    rows = np.random.default_rng(0).integers(0, len(data[0]), (steps, batch_size))

    @jax.jit
    def step(params, opt_state, rows):
        batch = jax.tree.map(lambda x: x[rows], data)
        value, grad = jax.value_and_grad(problem.fun)(params, batch)
        updates, opt_state = rule.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def run():
        params, opt_state = problem.init, rule.init(problem.init)
        for t in range(steps):
            params, opt_state, _ = step(params, opt_state, rows[t])
        return params

    return run


def speed(repeats: int) -> None:
    head = ("case", "jaxgd us", "scan us", "optax us", "/ scan", "/ optax", "spread")
    print(("{:34}" + "{:>10}" * 6).format(*head))
    for name, problem, batch_size, rule, arguments, steps in cases():
        data = jax.tree.map(jnp.asarray, problem.data)
        fewer = max(1, steps // 10)

        def run(
            problem=problem, data=data, batch_size=batch_size, kw=arguments, n=steps
        ):
            return jaxgd.minimize(
                problem.fun,
                problem.init,
                data,
                batch_size=batch_size,
                max_steps=n,
                final_evaluation=False,
                **kw,
            ).params

        times = interleaved(
            {
                "jaxgd": run,
                "scan": bare_scan(problem, batch_size, rule, steps),
                "optax": optax_loop(problem, batch_size, rule, fewer),
            },
            repeats,
        )
        per_step = {k: t / (fewer if k == "optax" else steps) for k, t in times.items()}
        ratios = {k: per_step[k] / per_step["jaxgd"] for k in ("scan", "optax")}
        low, high = np.quantile(ratios["scan"], [0.25, 0.75])
        print(
            f"{name:34}"
            + "".join(f"{np.median(t) * 1e6:10.2f}" for t in per_step.values())
            + "".join(f"{np.median(r):10.2f}" for r in ratios.values())
            + f"{low:8.2f}-{high:.2f}"
        )


def repeated_call(repeats: int) -> None:
    problem = problems.rosenbrock()

    def run():
        return jaxgd.minimize(
            problem.fun, problem.init, learning_rate=1e-3, max_steps=10
        )

    times = interleaved({"call": run}, 20 * repeats)["call"]
    print(
        f"\nrepeated call, tiny problem: {np.median(times) * 1e3:.2f} ms (aim: under 5)"
    )


def temporaries() -> None:
    """Bytes of temporaries of the compiled mini-batch program, by rows."""
    found = {}
    for n in (10_000, 80_000):
        x, y = problems.blobs(n, 64, 10)
        problem = problems.mlp(x, y, sizes=(64, 32, 10))

        def fit(params, data, problem=problem):
            return jaxgd.minimize(
                problem.fun, params, data, batch_size=32, learning_rate=0.1
            ).params

        compiled = jax.jit(fit).lower(problem.init, (x, y)).compile()
        analysis: Any = compiled.memory_analysis()
        found[n] = analysis.temp_size_in_bytes, x.nbytes + y.nbytes
    for n, (temporary, data) in found.items():
        mb, of = temporary / 1e6, data / 1e6
        print(f"temporaries, {n} rows: {mb:.2f} MB beside {of:.2f} MB of data")


def row_order(repeats: int) -> None:
    n = 1_000_000
    index = jnp.arange(n)
    permute = jax.jit(lambda key: jax.random.permutation(key, n))
    times = interleaved(
        {
            "jaxgd": lambda: jaxgd.shuffled_rows(jax.random.key(0), n, 0, index),
            "jax": lambda: permute(jax.random.key(0)),
            "NumPy": lambda: np.random.default_rng(0).permutation(n),
        },
        repeats,
    )
    medians = {name: np.median(t) / n * 1e9 for name, t in times.items()}
    print(
        f"\nshuffled_rows, 1M rows: {medians['jaxgd']:.1f} ns a row, "
        f"{medians['jax'] / medians['jaxgd']:.0f} times faster than "
        f"jax.random.permutation ({medians['jax']:.0f}), "
        f"{medians['NumPy'] / medians['jaxgd']:.1f} than NumPy ({medians['NumPy']:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    speed(repeats)
    repeated_call(repeats)
    temporaries()
    row_order(repeats)


if __name__ == "__main__":
    main()
