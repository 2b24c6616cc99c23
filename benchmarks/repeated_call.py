"""Claim: once compiled, new numbers compile nothing, and a call costs under 2 ms.

A tiny problem is minimized again and again with a new rate, tolerance, limit, seed or
data of the same shape. Compilations are counted by JAX's own events; any at all is an
error. The time is that of a whole call of ten steps, arguments checked and history
brought to the host.
"""

from itertools import count

import jax
import numpy as np

import jaxgd
from benchmarks._measure import Options, compare
from jaxgd import problems

_COMPILED = "/jax/core/compile/backend_compile_duration"


def run(options: Options) -> list[dict]:
    problem = problems.ridge(*problems.linear_data(64, 4))
    x, y = problem.data
    changes = count(1)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            compilations.append(duration_secs) if event == _COMPILED else None
        )
    )

    def call():
        i = next(changes)
        return jaxgd.minimize(
            problem.fun,
            problem.init,
            (x + np.float32(1e-3 * i), y),
            batch_size=8,
            learning_rate=1e-3 / i,
            stop=jaxgd.gradient_norm(atol=1e-9 / i),
            max_steps=10 + i % 3,
            key=i,
        ).params

    call()
    del compilations[:]
    rows = compare(
        "repeated call", "64 x 4 / 8", options, call, {}, units=1, unit="call"
    )
    for _ in range(50):
        call()
    if compilations:
        raise AssertionError(f"{len(compilations)} compilations in repeated calls")
    print("  0 compilations in all repeated calls")
    return [row | {"compilations": len(compilations)} for row in rows]
