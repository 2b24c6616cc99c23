"""Claim: a bar costs under 5 % where a snapshot comes every 10 ms.

``jaxgd.iterate``, cut about every 10 ms, against itself with ``progress=True`` (the bar
is drawn into memory), and against one call of ``minimize`` for the same steps: what a
snapshot costs is about half a millisecond and a step, the look at the iterate it
returns. The last rows show that price by itself: a tiny problem cut after every step.
"""

import contextlib
import io

import numpy as np

import jaxgd
from benchmarks import peers
from benchmarks._measure import Options, compare
from jaxgd import problems


def run(options: Options) -> list[dict]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.rows(20_000), 784)).astype(np.float32)
    y = rng.integers(0, 10, len(x))
    problem = problems.mlp(x, y, sizes=(784, 128, 10))
    rows = measured("MLP 784-128-10", "20,000 / 128", problem, 128, options, 2000)
    tiny = problems.ridge(*problems.linear_data(64, 4))
    return rows + measured("one snapshot", "64 x 4 / 8", tiny, 8, options, 200, 1)


def measured(name, size, problem, batch_size, options, steps, every=None) -> list[dict]:
    data = peers.on_device(problem.data)
    how = {"batch_size": batch_size, "learning_rate": 0.01}
    how |= {"max_steps": options.steps(steps), "final_evaluation": False}
    call = problem.fun, problem.init, data
    if every is None:
        step_s = jaxgd.benchmark(*call, repeats=3, **{
            k: how[k] for k in ("batch_size", "learning_rate")
        }).step_s  # fmt: skip
        every = max(round(0.01 / step_s), 1)

    def loop(progress):
        with contextlib.redirect_stderr(io.StringIO()):
            *_, last = jaxgd.iterate(*call, every=every, progress=progress, **how)
        return last.params

    cuts = -(-how["max_steps"] // every)
    return compare(
        f"{name}, {cuts} snapshots",
        size,
        options,
        lambda: loop(False),
        {
            "the same with a bar": lambda: lambda: loop(True),
            "one call": lambda: lambda: jaxgd.minimize(*call, **how).params,
        },
        units=cuts,
        unit="snapshot",
        agree=0.0,
    )
