"""Bits of 38 calls and of their cuts, to prove that a redesign changed none.

    python -m tests.golden [--write]

compares with ``tests/files/golden.json``, or writes what it finds there. Bits depend on
the version of JAX and on the processor that XLA compiles for, so each such pair has a
table of its own; where there is none, write it before the change, on the old code.
An entry has the hash of parameters, history and counters, and the number of programs
compiled by the call and by the same call again with other numbers.
"""

import hashlib
import json
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

FILE = Path(__file__).parent / "files" / "golden.json"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3))
Y = X @ [1.0, -2.0, 0.5] + 0.1 * RNG.normal(size=48)
ROWS = {"batch": {}, "sgd": {"batch_size": 1}, "mini": {"batch_size": 8}}


def squares(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


RULES = {
    "rate": {"learning_rate": 0.05},
    "schedule": {"learning_rate": optax.cosine_decay_schedule(0.1, 60)},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.05},
    "momentum": {"optimizer": optax.sgd(0.02, momentum=0.9)},
    "none": {},
    "lbfgs": {"optimizer": optax.lbfgs()},
    "barzilai_borwein": {"optimizer": jaxgd.barzilai_borwein()},
}
STOPS = {
    "auto": "auto",
    "none": None,
    "gradient": jaxgd.gradient_norm(rtol=1e-2),
    "value": jaxgd.value_change(rtol=1e-3),
}


def calls():
    """{name: (dtype, keyword arguments)}"""
    found = {}
    for rows, of_rows in ROWS.items():
        for rule, of_rule in RULES.items():
            if rows != "batch" and rule in ("lbfgs", "barzilai_borwein"):
                continue
            for stop in STOPS:
                if stop not in ("auto", "none") and rule not in ("rate", "adam"):
                    continue
                if stop == "none" and rule not in ("rate", "schedule"):
                    continue
                how = {"stop": STOPS[stop], "max_steps": 90} | of_rows | of_rule
                found[f"{rows}, {rule}, {stop}"] = "float32", how
    for name in ("batch, none, auto", "mini, adam, auto"):
        found[f"{name}, float64"] = "float64", found[name][1]
    found["mini, rate, aux"] = (
        "float32",
        {"has_aux": True, "learning_rate": 0.1, "batch_size": 8, "max_steps": 60},
    )
    return found


def with_aux(params, batch):
    return squares(params, batch), jnp.max(params["w"])


def run(dtype, how, **other):
    params = {"w": np.zeros(3, dtype), "b": np.zeros((), dtype)}
    fun = with_aux if how.get("has_aux") else squares
    return jaxgd.minimize(
        fun, params, (X.astype(dtype), Y.astype(dtype)), **how, **other
    )


def digest(result):
    """Of parameters, history and counters."""
    told = (
        result.params,
        result.history,
        result.steps,
        result.status,
        result.evaluations,
        result.value,
        result.grad_norm,
    )
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(told):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def entry(dtype, how, count):
    """The table's line for a call: whole, cut in two, driven from Python."""
    with jax.enable_x64(dtype == "float64"):
        before = count()
        whole = run(dtype, how)
        programs = count() - before
        run(dtype, how | {"max_steps": how["max_steps"] - 1}, key=0)
        compiled_again = count() - before - programs
        half = run(dtype, how | {"max_steps": 31})
        rest = {"max_steps": how["max_steps"] - 31}
        cut = run(dtype, how | rest, state=half.state)
        params = {"w": np.zeros(3, dtype), "b": np.zeros((), dtype)}
        fun = with_aux if how.get("has_aux") else squares
        data = X.astype(dtype), Y.astype(dtype)
        *_, last = jaxgd.iterate(fun, params, data, every=17, **how)
        found = {"whole": whole, "cut": cut, "iterated": last}
        digests = {name: digest(one) for name, one in found.items()}
        return digests | {"programs": programs, "programs_again": compiled_again}


def place():
    """What bits depend on: versions, and the instructions of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    kind = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return f"{jax.default_backend()} {kind}, jax {jax.__version__}"


def table():
    """{call: its line}"""
    seen = 0

    def listen(event, duration, **_):
        nonlocal seen
        seen += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = {}
    for name, (dtype, how) in calls().items():
        jax.clear_caches()
        found[name] = entry(dtype, how, lambda: seen)
        print(name, found[name], flush=True)
    return found


def main():
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    found, here = table(), place()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(known | {here: found}, indent=1) + "\n")
        return
    if here not in known:
        sys.exit(f"no table for {here}: write one on the old code, with --write")
    other = [name for name, line in found.items() if known[here].get(name) != line]
    lost = known[here].keys() - found.keys()
    print(f"{len(found) - len(other)} of {len(found)} as they were on {here}")
    if other or lost:
        sys.exit("\n".join(["not as before:", *other, *lost]))


if __name__ == "__main__":
    main()
