"""Claim: without a rate, parabolic_rms ends below 1.1 times the best rate of SGD.

Rules without a rate, as they come, against constant rates of SGD and Adam, each the
best of 20 for its task and batch size by the median over five seeds. 20 epochs,
float32; judged by the objective of all rows at the parameters a rule is evaluated at,
over that of SGD, and by the excess over the best objective known. The order of the rows
follows the seed, the network's start as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import jaxgd
from benchmarks import tasks
from benchmarks._measure import Options, where
from jaxgd._rules import adapter

SEEDS = 5
EPOCHS = 20
BATCH_SIZES = (1, 32, 256)
COARSE = {"SGD": np.geomspace(1e-12, 1e2, 29), "Adam": np.geomspace(1e-6, 1e2, 17)}
TUNED = {"SGD": optax.sgd, "Adam": optax.adam}


class Averaged(NamedTuple):
    """State of a rule whose iterates are averaged with a polynomial decay."""

    inner: Any
    average: Any
    count: Any


def averaged(rule, decay=8.0):
    """The average of Shamir and Zhang (2013), which DoG's authors recommend."""

    def init(params):
        return Averaged(rule.init(params), params, jnp.zeros(()))

    def update(updates, state, params=None, **extra) -> Any:
        updates, inner = optax.with_extra_args_support(rule).update(
            updates, state.inner, params, **extra
        )
        share = (decay + 1) / (state.count + 1 + decay)
        average = jax.tree.map(
            lambda a, p, u: a + share * (p + u - a), state.average, params, updates
        )
        return updates, Averaged(inner, average, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def line_search():
    """Stochastic Armijo search (Vaswani et al., 2019): the rate may double a step."""
    search = optax.scale_by_backtracking_linesearch(20, slope_rtol=0.1)
    return optax.chain(optax.sgd(1.0), search)


RULES = {
    "parabolic_rms": jaxgd.parabolic_rms,
    "Prodigy": contrib.prodigy,
    "D-Adaptation": contrib.dadapt_adamw,
    "DoG": contrib.dog,
    "DoG, averaged": lambda: averaged(contrib.dog()),
    "DoWG": contrib.dowg,
    "DoWG, averaged": lambda: averaged(contrib.dowg()),
    "Mechanic, SGD": lambda: contrib.mechanize(optax.sgd(1.0)),
    "Mechanic, Adam": lambda: contrib.mechanize(optax.adam(1e-3)),
    "schedule-free SGD": contrib.schedule_free_sgd,
    "schedule-free Adam": contrib.schedule_free_adamw,
    "schedule-free Prodigy": lambda: contrib.schedule_free(
        contrib.prodigy(betas=(0.0, 0.999)), 1.0
    ),
    "MoMo": contrib.momo,
    "MoMo-Adam": contrib.momo_adam,
    "COCOB": contrib.cocob,
    "Polyak (SPS_max)": optax.polyak_sgd,
    "line search (SLS)": line_search,
    "Adam, 1e-3": lambda: optax.adam(1e-3),
    "schedule-free Adam, 1e-3": lambda: contrib.schedule_free_adamw(1e-3),
}


def run(options: Options) -> list[dict]:
    names = ("breast_cancer", "diabetes_raw") if options.quick else tasks.NAMES
    sizes = (32,) if options.quick else BATCH_SIZES
    rules = ("parabolic_rms", "Prodigy", "DoG") if options.quick else RULES
    rows = []
    for name in names:
        for batch_size in sizes:
            found = at(name, batch_size, rules, options)
            rows += found
            _show(name, batch_size, found)
    if not options.quick:
        print(f"\n{summary(rows)}\n\n{cells(rows)}")
    return rows


def at(name, batch_size, rules, options: Options) -> list[dict]:
    """Rows of the report for one task and batch size."""
    problem = tasks.task(name)
    setting = Setting(problem, batch_size, options)
    ends = {kind: setting.tuned(kind) for kind in TUNED}
    ends |= {rule: (None, setting.finals(RULES[rule]())) for rule in rules}
    best, start = problem.value or 0.0, setting.start
    sgd, adam = (np.median(ends[kind][1]) for kind in TUNED)
    rows = []
    for rule, (rate, finals) in ends.items():
        lost = ~(np.isfinite(finals) & (finals <= start))
        finals = np.where(np.isfinite(finals), finals, np.inf)
        row = {
            "name": name,
            "batch_size": batch_size,
            "rule": rule,
            "rate": rate,
            "finals": finals.tolist(),
            "start": start,
            "best_known": best,
            "over_sgd": float(finals.max() / sgd),
            "excess_over_sgd": float((np.median(finals) - best) / (sgd - best)),
            "excess_over_adam": float((np.median(finals) - best) / (adam - best)),
            "diverged": int(lost.sum()),
        }
        rows.append(row | where())
    return rows


class Setting:
    """A task at a batch size: programs with one lane per seed, or seed and rate."""

    def __init__(self, problem, batch_size, options: Options):
        self.problem, self.batch_size = problem, batch_size
        self.data = jax.tree.map(jnp.asarray, problem.data)
        self.n = len(self.data[0])
        epochs = 5 if options.quick else EPOCHS
        self.steps = -(-epochs * self.n // batch_size)
        seeds = range(2 if options.quick else SEEDS)
        starts = [tasks.start(problem, seed) for seed in seeds]
        self.starts = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        self.keys = jax.vmap(jax.random.key)(jnp.arange(len(seeds)))
        values = jax.vmap(problem.fun, (0, None))(self.starts, self.data)
        self.start = float(values.max())

    def finals(self, rule) -> np.ndarray:
        """The objective reached, (seeds,)."""
        lane = jax.vmap(lambda params, key: self._final(rule, params, key))
        return np.asarray(jax.jit(lane)(self.starts, self.keys), np.float64)

    def tuned(self, kind):
        """The best of 20 constant rates and the objectives it reached, (seeds,)."""

        def finals(params, key, rate):
            return self._final(TUNED[kind](rate), params, key)

        seeds = jax.vmap(jax.vmap(finals, (None, None, 0)), (0, 0, None))
        seeds = jax.jit(seeds)
        rates = COARSE[kind]
        first = jax.tree.map(lambda x: x[:1], self.starts)
        reached = _reached(seeds(first, self.keys[:1], rates))
        middle = rates[np.argmin(reached[0])]
        rates = np.geomspace(middle / 30, middle * 30, 20)
        reached = _reached(seeds(self.starts, self.keys, rates))
        best = np.argmin(np.median(reached, axis=0))
        return float(rates[best]), reached[:, best]

    def _final(self, rule, params, key):
        step = jaxgd.make_step(self.problem.fun, rule)

        def body(state, number):
            rows = jaxgd.batch_rows(key, self.n, self.batch_size, number)
            return step(state, jax.tree.map(lambda x: x[rows], self.data))[0], None

        state = jaxgd.init_state(params, rule)
        numbers = jnp.arange(self.steps, dtype=jnp.int32)
        state = jax.lax.scan(body, state, numbers)[0]
        own = adapter.find_state(state.opt_state, Averaged)
        judged = adapter.evaluation_params(state.opt_state, state.params)
        judged = judged if own is None else own.average
        return self.problem.fun(judged, self.data)


def _reached(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.inf)


def summary(rows) -> str:
    """Markdown: rules by their worst, over all tasks, batch sizes and seeds."""
    lines = [
        "| rule | worst | of 21 within 1.1 | median | geometric mean of excess: to "
        "SGD | to Adam | runs diverged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    by = {}
    for row in rows:
        by.setdefault(row["rule"], []).append(row)

    def mean(found, field):
        return np.exp(np.mean([np.log(max(row[field], 1e-9)) for row in found]))

    for rule, found in sorted(by.items(), key=lambda pair: _worst(pair[1])):
        over = np.array([row["over_sgd"] for row in found])
        label = f"{rule}, best of 20 rates" if rule in TUNED else rule
        lines.append(
            f"| {label} "
            f"| {_number(over.max())} | {np.sum(over <= 1.1)} "
            f"| {_number(np.median(over))} "
            f"| {_number(mean(found, 'excess_over_sgd'))} "
            f"| {_number(mean(found, 'excess_over_adam'))} "
            f"| {sum(row['diverged'] for row in found)} |"
        )
    return "\n".join(lines)


def cells(rows) -> str:
    """Markdown: rule by task, the worst seed at batch sizes 1 / 32 / 256."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [f"| rule | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    by = {(row["rule"], row["name"], row["batch_size"]): row for row in rows}
    rules = sorted(
        dict.fromkeys(row["rule"] for row in rows),
        key=lambda rule: _worst([row for row in rows if row["rule"] == rule]),
    )
    for rule in rules:
        parts = [
            " / ".join(
                _number(by[rule, name, size]["over_sgd"])
                for size in BATCH_SIZES
                if (rule, name, size) in by
            )
            for name in names
        ]
        lines.append(f"| {rule} | {' | '.join(parts)} |")
    return "\n".join(lines)


def _worst(rows):
    return max(row["over_sgd"] for row in rows)


def _number(x) -> str:
    if not np.isfinite(x):
        return "inf"
    return f"{x:.2f}" if x < 10 else f"{x:.0f}" if x < 1e4 else f"{x:.0e}"


def _show(name, batch_size, rows) -> None:
    for row in rows:
        line = f"  {name + f' / {batch_size}':24} {row['rule']:24}"
        line += f" {np.median(row['finals']):11.5g}  over SGD {row['over_sgd']:8.3g}"
        line += f"  excess {row['excess_over_sgd']:8.3g}"
        print(line + (f"  diverged {row['diverged']}" if row["diverged"] else ""))
