"""Claim: a run that says it has converged has.

Batch descent with ``stop="auto"`` on the classical problems and on raw regressions
(columns of very different spread, nothing standardized), in float64 and float32, each
also with its parameters in units from 1e-3 to 1e3 and with its objective times 1e-9 and
1e9. Rules with a given rate are tried on random raw lines, whose curvature tells which
rates there are. From the end of each run jaxgd's rule and SciPy's L-BFGS-B go on in
float64 in the units of the problem; what they still gain is the fall that was left. A
run is solved where that is at most 1e-6 (float32: 1e-4) of the whole fall; it says so
where it calls itself converged; it is false where it says so and is not solved.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd
from benchmarks._measure import Options, needs, where
from benchmarks.classical_problems import classical

LIMIT, LINES = 5000, 12
SOLVED = {"float64": 1e-6, "float32": 1e-4}
VARIANTS = {  # name: whether parameters have other units, factor of the objective
    "as it is": (False, 1.0),
    "parameters 1e-3 ... 1e3": (True, 1.0),
    "objective 1e-9": (False, 1e-9),
    "objective 1e9": (False, 1e9),
}
RULES = {"no rate": None, "optax.lbfgs": optax.lbfgs}
GIVEN = {  # name: rule, its rate by the reciprocal of the curvature, or its rate
    "descent, 0.6": (None, 0.6, True),
    "descent, 1.8": (None, 1.8, True),
    "momentum": (partial(optax.sgd, momentum=0.9), 0.3, True),
    "Adam, 0.1": (optax.adam, 0.1, False),
    "Adam, 1": (optax.adam, 1.0, False),
}


class Case(NamedTuple):
    name: str
    fun: Callable  # (params, data) -> value
    init: np.ndarray
    data: Any


def run(options: Options) -> list[dict]:
    """A row a rule, dtype and variant; ``--quick`` takes every eighth problem."""
    rows, every = [], 8 if options.quick else 1
    print(f"  {'':45} solved  said  false  stalled or at the limit")
    with jax.enable_x64(True):
        for rule, maker in RULES.items():
            for dtype in SOLVED:
                ends = [
                    row
                    for case in cases()[::every]
                    for row in of_case(case, dtype, None if maker is None else maker())
                ]
                rows += [{"rule": rule, "dtype": dtype} | row for row in ends]
                for variant in VARIANTS:
                    show(rule, dtype, variant, ends)
        for dtype in SOLVED:
            ends = [
                row for seed in range(LINES)[::every] for row in of_line(seed, dtype)
            ]
            rows += [{"rule": "given rate", "dtype": dtype} | row for row in ends]
            for name in GIVEN:
                show("given rate", dtype, name, ends)
    return [row | where() for row in rows]


def show(rule: str, dtype: str, variant: str, rows: list[dict]) -> None:
    """A line, and who is false."""
    own = [row for row in rows if row["variant"] == variant]
    solved = sum(row["solved"] for row in own)
    said = sum(row["solved"] and row["converged"] for row in own)
    false = [row for row in own if row["converged"] and not row["solved"]]
    left = [row["name"] for row in own if not row["converged"]]
    name, left = f"{rule}, {dtype}, {variant}", ", ".join(left)
    print(
        f"  {name:45} {solved:3}/{len(own)} {said:5}  {len(false):5}  {left}",
        flush=True,
    )
    for row in false:
        print(f"    {row['name']}: {row['status']}, left {row['left']:.0e}")


def of_case(case: Case, dtype: str, optimizer) -> list[dict]:
    """A row a variant; all of them are one compiled program."""
    data = jax.tree.map(lambda x: np.asarray(x, dtype), case.data)
    value_and_grad = jax.jit(jax.value_and_grad(case.fun))

    def fun(params, unit, factor, data):
        return case.fun(params * unit, data) * factor

    rows = []
    for variant, (scaled, factor) in VARIANTS.items():
        size = case.init.size
        unit = np.geomspace(1e-3, 1e3, size) if scaled else np.ones(size)
        start = (case.init / unit).astype(dtype)
        result = jaxgd.minimize(
            fun,
            start,
            args=(unit.astype(dtype), np.asarray(factor, dtype), data),
            optimizer=optimizer,
            max_steps=LIMIT,
            history_rows=0,
        )
        units = [np.asarray(x, float) * unit for x in (start, result.params)]
        first, end = (float(value_and_grad(x, case.data)[0]) for x in units)
        lowest = min(end, gone_on(value_and_grad, units[1], case))
        left = (end - lowest) / (first - lowest) if first > lowest else 0.0
        rows.append(row_of(case.name, variant, result, left, dtype))
    jax.clear_caches()  # or hundreds of programs fill the memory
    return rows


def of_line(seed: int, dtype: str) -> list[dict]:
    """A row a rule with a given rate, on a random raw line."""
    rng = np.random.default_rng(seed)
    width, n = 10 ** rng.uniform(1, 6), int(10 ** rng.uniform(1.5, 4))
    x = np.linspace(0, width, n)
    y = rng.uniform(-10, 10) + rng.normal() * 10 / width * x
    y = y + rng.normal(size=n) * rng.uniform(0.1, 1)
    lowest, first = np.var(y - np.polyval(np.polyfit(x, y, 1), x)), np.mean(y**2)
    data = x[:, None].astype(dtype), y.astype(dtype)
    rows = []
    for name, (rule, rate, relative) in GIVEN.items():
        result = jaxgd.minimize(
            squares,
            np.zeros(2, dtype),
            data,
            optimizer=rule,
            learning_rate=rate / (2 * np.mean(x**2)) if relative else rate,
            max_steps=LIMIT,
            history_rows=0,
        )
        slope, intercept = np.asarray(result.params, float)
        left = np.mean((slope * x + intercept - y) ** 2) - lowest
        left = float(left / (first - lowest))
        rows.append(row_of(f"line to {width:.0f}", name, result, left, dtype))
    return rows


def row_of(name: str, variant: str, result, left: float, dtype: str) -> dict:
    return {
        "name": name,
        "variant": variant,
        "status": result.to_dict()["status"],
        "converged": bool(result.converged),
        "solved": bool(left <= SOLVED[dtype]),
        "left": left,
        "evaluations": int(result.evaluations),
    }


def gone_on(value_and_grad, params, case: Case) -> float:
    """The lowest value that descents in float64 still find from there."""
    optimize = needs("scipy.optimize")

    def on_host(params):
        value, grad = jax.device_get(value_and_grad(params, case.data))
        return float(value), np.asarray(grad, float)

    settings = {"gtol": 0.0, "ftol": 0.0, "maxiter": LIMIT, "maxfun": LIMIT}
    with np.errstate(all="ignore"):
        other = optimize.minimize(
            on_host, params, jac=True, method="L-BFGS-B", options=settings
        )
    own = jaxgd.minimize(
        lambda p, data: case.fun(p, data), params, args=(case.data,), max_steps=LIMIT
    )
    return float(np.nanmin([other.fun, float(own.value)]))


def cases() -> list[Case]:
    """The classical problems, and raw regressions."""
    smooth = [
        Case(p.name, lambda x, _, fun=p.fun: fun(x), np.asarray(p.init), ())
        for p in classical(dtype=np.float64)
    ]
    return smooth + regressions()


def regressions() -> list[Case]:
    """Unstandardized columns, from zero."""
    rng = np.random.default_rng(0)
    line = np.linspace(0, 1e5, 101)[:, None]
    spread, middle = np.array([1e-2, 1, 30, 1e3, 5e4]), np.array([1, 0, 50, 2e3, 1e5])
    five = rng.normal(size=(2000, 5)) * spread + middle
    twenty = rng.normal(size=(2000, 20)) * np.geomspace(1e-2, 1e2, 20)
    found = [
        Case("line to 1e5", squares, np.zeros(2), (line, line[:, 0] + 1e5)),
        Case("steep and flat", steep_and_flat, np.array([1.0, 0.0]), ()),
    ]
    for x in (five, twenty):
        centered = (x - x.mean(0)) / x.std(0)
        told = centered @ rng.normal(size=x.shape[1]) / x.shape[1] ** 0.5
        answers = {
            squares: told + 0.5 * rng.normal(size=2000),
            logistic: (rng.uniform(size=2000) < 1 / (1 + np.exp(-2 * told))) * 1.0,
            poisson: rng.poisson(np.exp(0.5 * told)) * 1.0,
        }
        found += [
            Case(f"{fun.__name__} {x.shape[1]}", fun, np.zeros(x.shape[1] + 1), (x, y))
            for fun, y in answers.items()
        ]
    return found


def steep_and_flat(params, _):
    a, b = params
    return (1e4 * a**2 + 1e-2 * (b - 1) ** 2) / 2


def _linear(params, x):
    return x @ params[:-1] + params[-1]


def squares(params, data):
    x, y = data
    return jnp.mean((_linear(params, x) - y) ** 2)


def logistic(params, data):
    x, y = data
    score = _linear(params, x)
    return jnp.mean(jnp.logaddexp(0, score) - y * score)


def poisson(params, data):
    x, y = data
    score = _linear(params, x)
    return jnp.mean(jnp.exp(score) - y * score)
