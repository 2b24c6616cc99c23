"""Claim: descent that needs no learning rate solves the classical problems.

Every solver, with its default settings, on every problem of
``classical_problems.py`` in float64, from the standard start. Solved means that
max|gradient| <= 1e-5 within 5000 evaluations, seen by the solver itself; NaN is never
solved. An evaluation is one of the value, the gradient or both at a point, every trial
point of a line search included: as reported by jaxgd, SciPy and optimistix (one a
step), and counted by a callback inside the objective for jaxopt, to which the look at
the gradient at its iterates is given for nothing. SciPy's and optimistix's own tests of
convergence are replaced by this one.

The picture is a performance profile (Dolan and Moré, Mathematical Programming 91,
2002): the share of problems that a solver solves within a multiple of the evaluations
of the best solver of that problem.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import jaxgd
from benchmarks._measure import Missing, Options, needs, where
from benchmarks.classical_problems import classical

LIMIT, TOLERANCE = 5000, 1e-5


class Outcome(NamedTuple):
    """Where a solver ended, as it saw it itself."""

    evaluations: int
    grad_max: float
    value: float


def run(options: Options) -> list[dict]:
    """A row a problem and solver; ``--quick`` takes every eighth problem."""
    rows, about, every = [], where(), 8 if options.quick else 1
    with jax.enable_x64(True):
        solvers = {}
        for name, maker in SOLVERS.items():
            try:
                solvers[name] = maker()
            except Missing as missing:
                print(f"  {name} skipped, {missing}")
        print(f"  {'evaluations, - where not solved':30} {', '.join(solvers)}")
        for problem in classical(dtype=np.float64)[::every]:
            own = [row_of(problem, name, solvers[name](problem)) for name in solvers]
            rows += [row | about for row in own]
            taken = [row["evaluations"] if row["solved"] else "-" for row in own]
            print(f"  {problem.name:30}", *(f"{n:>6}" for n in taken), flush=True)
            jax.clear_caches()  # or hundreds of programs fill the memory
    show(rows)
    return rows


def row_of(problem, solver: str, end: Outcome) -> dict:
    """A row of the report; numbers that are not finite are None."""
    finite = bool(np.isfinite([end.grad_max, end.value]).all())
    reached = end.value if finite else None
    known = problem.value if finite else None
    return {
        "name": problem.name,
        "size": f"{problem.init.size} parameters",
        "solver": solver,
        "solved": end.grad_max <= TOLERANCE and end.evaluations <= LIMIT and finite,
        "finite": finite,
        "evaluations": end.evaluations,
        "grad_max": end.grad_max if finite else None,
        "value": reached,
        "excess": None if known is None else end.value - known,
    }


# Solvers: each a maker of a function from a problem to an Outcome.


def of_jaxgd(rule: Callable | None = None) -> Callable:
    """``minimize`` with a rule of optax; None: with nothing but the problem."""
    if rule is None and not hasattr(jaxgd, "barzilai_borwein"):
        raise Missing("jaxgd.barzilai_borwein is not there")
    stop = jaxgd.StopRule(
        init=lambda check: (),
        update=lambda memory, check: (memory, check.grad_max <= TOLERANCE),
        status=jaxgd.Status.GRADIENT_SMALL,
        describe=lambda memory, check: (
            jaxgd.Criterion(
                "largest entry of the gradient",
                check.grad_max,
                TOLERANCE,
                check.grad_max <= TOLERANCE,
            ),
        ),
    )
    optimizer = None if rule is None else rule()

    def solve(problem) -> Outcome:
        result = jaxgd.minimize(
            problem.fun,
            problem.init,
            optimizer=optimizer,
            stop=stop,
            max_steps=LIMIT,
            history_rows=0,
        )
        (seen,) = result.criteria
        return Outcome(
            int(result.evaluations), float(seen.measured), float(result.value)
        )

    return solve


def of_jaxopt() -> Callable:
    """Accelerated gradient descent with its line search, up to half the limit: an
    iteration takes at least two evaluations."""
    jaxopt = needs("jaxopt")
    count = 0

    def tick():
        nonlocal count
        count += 1

    @jax.jit
    def descend(fun, params):
        def counted(params):
            jax.debug.callback(tick)
            return fun(params)

        def seen(params):
            value, grad = jax.value_and_grad(fun)(params)
            return value, jnp.max(jnp.abs(grad))

        def goes_on(carry):
            _, state, (value, grad_max) = carry
            more = (grad_max > TOLERANCE) & jnp.isfinite(value)
            return more & (state.iter_num < LIMIT // 2)

        def body(carry):
            params, state = solver.update(*carry[:2])
            return params, state, seen(params)

        solver = jaxopt.GradientDescent(counted)
        start = params, solver.init_state(params), seen(params)
        return jax.lax.while_loop(goes_on, body, start)[2]

    def solve(problem) -> Outcome:
        nonlocal count
        count = 0
        value, grad_max = descend(callable_tree(problem.fun), problem.init)
        jax.effects_barrier()
        return Outcome(count, float(grad_max), float(value))

    return solve


def of_optimistix(name: str) -> Callable:
    """BFGS or NonlinearCG, which evaluate once a step."""
    optimistix = needs("optimistix")

    class Solver(getattr(optimistix, name)):
        def terminate(self, fn, y, args, options, state, tags):
            grad_max = jnp.max(jnp.abs(state.f_info.grad))
            return ~state.first_step & (grad_max <= TOLERANCE), state.result

        def postprocess(self, fn, y, aux, args, options, state, tags, result):
            info = state.f_info
            return y, aux, {"value": info.f, "grad_max": jnp.max(jnp.abs(info.grad))}

    solver = Solver(rtol=0.0, atol=0.0)

    def solve(problem) -> Outcome:
        found = optimistix.minimise(
            objective_of_args,
            solver,
            problem.init,
            args=callable_tree(problem.fun),
            max_steps=LIMIT,
            throw=False,
        )
        stats = {name: float(found.stats[name]) for name in found.stats}
        return Outcome(int(stats["num_steps"]), stats["grad_max"], stats["value"])

    return solve


def objective_of_args(params, fun):
    return fun(params)


class Spent(Exception):
    """The evaluations are used up."""


def of_scipy(method: str, **settings) -> Callable:
    """A method of SciPy, on value and gradient from one compiled function."""
    optimize = needs("scipy.optimize")
    value_and_grad = jax.jit(lambda fun, params: jax.value_and_grad(fun)(params))

    def solve(problem) -> Outcome:
        fun, count, last = callable_tree(problem.fun), 0, (np.nan, np.nan)

        def on_host(params):
            nonlocal count, last
            if count == LIMIT:
                raise Spent
            count += 1
            value, grad = jax.device_get(value_and_grad(fun, params))
            last = np.abs(grad).max(), value
            return value, grad

        settings_of_all = {"gtol": TOLERANCE, "maxiter": LIMIT}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a line search that overflows
            try:
                end = optimize.minimize(
                    on_host,
                    problem.init,
                    jac=True,
                    method=method,
                    options=settings_of_all | settings,
                )
            except Spent:
                return Outcome(LIMIT + 1, float(last[0]), float(last[1]))
        return Outcome(count, float(np.abs(end.jac).max()), float(end.fun))

    return solve


def callable_tree(fun) -> Partial:
    """The objective as a pytree, which a compiled function takes as an argument."""
    return fun if isinstance(fun, Partial) else Partial(fun)


SOLVERS = {
    "jaxgd, default": of_jaxgd,
    "jaxgd, optax.lbfgs": partial(of_jaxgd, optax.lbfgs),
    "jaxgd, barzilai_borwein": partial(of_jaxgd, jaxgd.barzilai_borwein),
    "jaxopt GradientDescent": of_jaxopt,
    "optimistix NonlinearCG": partial(of_optimistix, "NonlinearCG"),
    "optimistix BFGS": partial(of_optimistix, "BFGS"),
    "SciPy CG": partial(of_scipy, "CG"),
    "SciPy L-BFGS-B": partial(of_scipy, "L-BFGS-B", ftol=0.0, maxfun=LIMIT),
}


# The table and the profile.


def ratios(rows: list[dict]) -> dict[str, np.ndarray]:
    """Evaluations by those of the best, (problems,), infinite where not solved."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    taken = np.full((len(solvers), len(names)), np.inf)
    for row in rows:
        if row["solved"]:
            place = solvers.index(row["solver"]), names.index(row["name"])
            taken[place] = row["evaluations"]
    best = taken.min(axis=0)
    over = np.divide(
        taken, best, out=np.full_like(taken, np.inf), where=np.isfinite(best)
    )
    return dict(zip(solvers, over, strict=True))


def show(rows: list[dict]) -> None:
    """The table: a line a solver, and what it does not solve."""
    print(f"  {'':24} solved  share  not finite  ratio to the best  above the minimum")
    for solver, ratio in ratios(rows).items():
        own = [row for row in rows if row["solver"] == solver]
        solved = np.isfinite(ratio)
        lost = sum(not row["finite"] for row in own)
        typical = f"{np.median(ratio[solved]):.2f}" if solved.any() else ""
        print(
            f"  {solver:24} {solved.sum():6} {100 * solved.mean():5.1f}% {lost:11}"
            f"  {typical:>17}  {sum(map(ends_above, own)):17}"
        )
    for solver in ratios(rows):
        own = [row for row in rows if row["solver"] == solver]
        left = ", ".join(row["name"] for row in own if not row["solved"])
        print(f"  {solver}, not solved: {left or 'none'}")


def ends_above(row: dict) -> bool:
    """Whether a problem is solved at a point above its published minimum: another
    minimum, or a plateau."""
    if not row["solved"] or row["excess"] is None:
        return False
    return row["excess"] > 1e-3 * (1 + abs(row["value"] - row["excess"]))
