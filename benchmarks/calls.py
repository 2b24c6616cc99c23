"""Claim: a call costs little, the first of a fresh process and those after it.

*First calls*: scripts in processes of their own, in turn, each of them the least one
would write with its library: a small logistic regression, 1000 steps at most. Times are
those of the processor (compiling in two threads counts twice), from the import of the
library's own modules on for "process", of the call alone for "call". The persistent
compilation cache is off.

*Repeated calls*: ten steps of descent on a tiny problem, compiled before, by each
library's compiled function; and new numbers for jaxgd (data, rate, tolerance, limit,
seed), which must compile nothing: compilations are counted by JAX's own events.
"""

import os
import subprocess
import sys
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd
from benchmarks._measure import Missing, Options, compare, needs, rows_of
from jaxgd import problems

_COMPILED = "/jax/core/compile/backend_compile_duration"

# The script of a first call: imports of the library, then the call.
_SCRIPT = """
import time
import numpy as np
import jax, jax.numpy as jnp, optax
rng = np.random.default_rng(0)
x = rng.normal(size=(1000, 10)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.float32)
def loss(w, batch):
    x, y = batch
    z = x @ w
    return jnp.mean(jnp.logaddexp(z, 0.0) - y * z)
w = jnp.zeros(10)
start = time.process_time()
{imports}
ready = time.process_time()
{call}
jax.block_until_ready(end)
end = time.process_time()
print(end - start, end - ready)
"""

_SCAN = """
rule, size = {rule}, {size}
@jax.jit
def run(w, data, key):
    def step(carry, key):
        w, state = carry
        batch = data
        if size is not None:
            rows = jax.random.randint(key, (size,), 0, len(data[0]))
            batch = jax.tree.map(lambda x: x[rows], data)
        value, grad = jax.value_and_grad(loss)(w, batch)
        updates, state = rule.update(grad, state, w)
        return (optax.apply_updates(w, updates), state), value
    keys = jax.random.split(key, 1000)
    return jax.lax.scan(step, (w, rule.init(w)), keys)
end = run(w, (x, y), jax.random.key(0))"""


def _jaxgd(how: str) -> tuple[str, str]:
    call = f"end = jaxgd.minimize(loss, w, (x, y), max_steps=1000, {how}).params"
    return "import jaxgd", call


def _jaxopt(solver: str) -> tuple[str, str]:
    call = f"end = jax.jit(jaxopt.{solver}(loss, maxiter=1000).run)(w, (x, y))"
    return "import warnings; warnings.simplefilter('ignore'); import jaxopt", call


_BFGS = (
    "import optimistix as optx",
    "end = optx.minimise(loss, optx.BFGS(rtol=1e-6, atol=1e-6), w, (x, y), "
    "max_steps=1000, throw=False).value",
)
_MINI = ("", _SCAN.format(rule="optax.adam(0.1)", size=32))
_BATCH = ("", _SCAN.format(rule="optax.sgd(0.1)", size=None))
FIRST = {  # name: jaxgd's arguments, its peers
    "mini-batch, Adam": (
        "batch_size=32, optimizer=optax.adam(0.1)",
        {"bare scan": _MINI},
    ),
    "batch, given rate": (
        "learning_rate=0.1",
        {"bare scan": _BATCH, "jaxopt": _jaxopt("GradientDescent")},
    ),
    "batch, no rate": (
        "",
        {"jaxopt LBFGS": _jaxopt("LBFGS"), "optimistix BFGS": _BFGS},
    ),
    "batch, optax.lbfgs": (
        "optimizer=optax.lbfgs()",
        {"jaxopt LBFGS": _jaxopt("LBFGS"), "optimistix BFGS": _BFGS},
    ),
}


def run(options: Options) -> list[dict]:
    return first_calls(options) + repeated_calls(options) + new_numbers(options)


def first_calls(options: Options) -> list[dict]:
    rows = []
    for name, (how, peers) in FIRST.items():
        scripts = {"jaxgd": _jaxgd(how)} | peers
        taken = {peer: [] for peer in scripts}
        for _ in range(3 if options.quick else 7):
            for peer, script in scripts.items():
                try:
                    taken[peer].append(in_a_process(script, options.device))
                except Missing as missing:
                    print(f"  first call, {name}: {peer} skipped, {missing}")
        taken = {peer: np.array(times) for peer, times in taken.items() if times}
        for place, unit in enumerate(("process", "call")):
            seconds = {peer: times[:, place] for peer, times in taken.items()}
            rows += rows_of(f"first {unit}, {name}", "1,000 x 10", unit, seconds)
    return rows


def in_a_process(script: tuple[str, str], device: str) -> list[float]:
    """Processor seconds with the imports and without."""
    imports, call = script
    for library in ("jaxopt", "optimistix"):
        if f"import {library}" in imports:
            needs(library)
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "JAX_PLATFORMS": {"gpu": "cuda"}.get(device, device),
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(imports=imports, call=call)],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [float(x) for x in done.stdout.split()]


def repeated_calls(options: Options) -> list[dict]:
    """Ten steps of ``sgd(0.1)`` of three numbers."""

    def fun(x):
        return jnp.sum((x - 1) ** 2)

    start, rule = jnp.zeros(3), optax.sgd(0.1)

    def bare_scan():
        @jax.jit
        def run(x):
            def step(carry, _):
                x, state = carry
                value, grad = jax.value_and_grad(fun)(x)
                updates, state = rule.update(grad, state)
                return (optax.apply_updates(x, updates), state), value

            return jax.lax.scan(step, (x, rule.init(x)), length=10)

        return lambda: run(start)[0][0]

    def jaxopt():
        solver = needs("jaxopt").OptaxSolver(fun, rule, maxiter=10, tol=-1.0)
        run = jax.jit(solver.run)
        return lambda: run(start).params

    def optimistix():
        optx = needs("optimistix")
        solver = optx.OptaxMinimiser(rule, rtol=0.0, atol=0.0)

        @jax.jit
        def run(x):
            def of_two(x, _):
                return fun(x)

            return optx.minimise(of_two, solver, x, max_steps=10, throw=False).value

        return lambda: run(start)

    def ours(**how):
        return jaxgd.minimize(
            fun, start, optimizer=rule, max_steps=10, history_rows=0, **how
        ).params

    peers = {"bare scan": bare_scan, "jaxopt": jaxopt, "optimistix": optimistix}
    rows = []
    for name, how in (("stop='auto'", {}), ("stop=None", {"stop": None})):
        title = f"repeated call, {name}"
        rows += compare(
            title,
            "3 numbers, 10 steps",
            options,
            partial(ours, **how),
            peers,
            units=1,
            unit="call",
        )
    return rows


def new_numbers(options: Options) -> list[dict]:
    problem = problems.ridge(*problems.linear_data(64, 4))
    x, y = problem.data
    changes, compilations = count(1), []
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
        "repeated call, new numbers",
        "64 x 4 / 8",
        options,
        call,
        {},
        units=1,
        unit="call",
    )
    for _ in range(50):
        call()
    if compilations:
        raise AssertionError(f"{len(compilations)} compilations in repeated calls")
    print("  0 compilations in all repeated calls")
    return [row | {"compilations": len(compilations)} for row in rows]
