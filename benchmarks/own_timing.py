"""Claim: ``jaxgd.benchmark`` tells the time that a stopwatch around the call tells.

The time of a step as ``jaxgd.benchmark`` finds it, against the slope between two long
calls of ``jaxgd.minimize`` from outside, which sees checks of arguments, launch and
transfer as a user does. The ratio should be 1.
"""

import numpy as np

import jaxgd
from benchmarks import peers
from benchmarks._measure import Options, interleaved, show, where
from benchmarks.mini_batch import cases


def run(options: Options) -> list[dict]:
    rows = []
    for name, size, problem, batch_size, rule, steps in cases(options):
        if rule != "SGD":
            continue
        data = peers.on_device(problem.data)
        how = {"batch_size": batch_size, "learning_rate": 0.1}
        found = jaxgd.benchmark(
            problem.fun, problem.init, data, repeats=options.repeats, **how
        )

        def call(steps, problem=problem, data=data, how=how):
            return jaxgd.minimize(
                problem.fun, problem.init, data, max_steps=steps, **how
            ).params

        runs = {n: lambda n=n: call(n) for n in (found.steps, 2 * found.steps)}
        for each in runs.values():
            each()
        short, long = interleaved(runs, options.repeats).values()
        slopes = (long - short) / found.steps
        row = {
            "name": f"jaxgd.benchmark, {name}",
            "size": f"{size} / {batch_size}",
            "peer": "stopwatch",
            "unit": "step",
            "jaxgd": found.step_s,
            "peer_time": float(np.median(slopes)),
            "ratio": float(np.median(slopes)) / found.step_s,
            "spread": [
                float(q) / found.step_s for q in np.quantile(slopes, [0.25, 0.75])
            ],
        }
        rows.append(row | where())
        show(rows[-1])
    return rows
