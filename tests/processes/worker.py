"""One of several processes: ``python worker.py TASK FOLDER PORT COUNT INDEX``.

Each task returns a dict of arrays, which goes to ``FOLDER/INDEX.npz``. With a COUNT of
1 nothing is initialized: the same task on one device, for comparison.
"""

import os
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd
from jaxgd import problems

STRATA, N = 8, 640
MLP = problems.mlp(*problems.blobs(N, 12, 3), sizes=(12, 16, 3))
LINEAR = problems.least_squares(*problems.linear_data(N, 5))
RULES = {
    "sgd": {"learning_rate": 0.05},
    "momentum": {
        "optimizer": optax.sgd,
        "learning_rate": 0.01,
        "hyperparams": {"momentum": 0.9},
    },
    "adam": {"optimizer": optax.adam, "learning_rate": 0.01},
}


def own(data):
    """The rows of this process, in their places."""
    if jax.process_count() == 1:
        return data
    count = N // jax.process_count()
    part = slice(jax.process_index() * count, (jax.process_index() + 1) * count)
    return jaxgd.shard_rows(jax.tree.map(lambda x: np.asarray(x)[part], data))


def run(problem, rule="sgd", data=None, **how):
    how = {"batch_size": 32, "strata": STRATA, "max_steps": 200} | RULES[rule] | how
    data = own(problem.data) if data is None else data
    return jaxgd.minimize(problem.fun, problem.init, data, **how)


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def numbers(result):
    history, checks = result.history, result.checks
    return {
        "params": flat(result.params),
        "value": result.value,
        "grad_norm": result.grad_norm,
        "status": result.status,
        "steps": result.steps,
        "evaluations": result.evaluations,
        "history": np.stack([history.value, history.grad_norm, history.update_norm]),
        "at": history.step,
        "checks": np.stack([checks.value, checks.grad_norm]),
        "checked_at": checks.step,
        "report": np.asarray(result.report()),
    }


def rows(folder):
    """Every step leaves the counts of its rows in bits of its own."""
    taken = jnp.arange(N, dtype=jnp.int32)

    def pick(params, ids):
        return jnp.mean(params[ids])

    result = jaxgd.minimize(
        pick,
        np.zeros(N, np.float32),
        own(taken),
        batch_size=32,
        strata=STRATA,
        learning_rate=lambda step: -32 * 2.0**-step,
        max_steps=12,
    )
    return {"bits": np.asarray(result.params) * 2**11}


def agreement(folder):
    found = {}
    for name, problem in (("linear", LINEAR), ("mlp", MLP)):
        for rule in RULES:
            found |= {
                f"{name} {rule} {key}": value
                for key, value in numbers(run(problem, rule)).items()
            }
    return found


def long(folder):
    return numbers(run(MLP, "adam", max_steps=2000, history_rows=10))


def batch_descent(folder):
    stop = jaxgd.gradient_norm(rtol=1e-3)  # "auto" ends in the rounding of the sums
    result = run(LINEAR, batch_size=None, strata=None, stop=stop, max_steps=300)
    return numbers(result)


def stopped(folder):
    return numbers(run(LINEAR, stop=jaxgd.value_change(rtol=1e-3), max_steps=2000))


def resumed(folder):
    """Cut, saved and loaded on the way, and driven in pieces: the bits of one run."""
    data = own(MLP.data)
    how = {"rule": "adam", "data": data}
    whole = run(MLP, **how, max_steps=60)
    half = run(MLP, **how, max_steps=25)
    jaxgd.save(Path(folder) / "half.jaxgd", half.state)
    state = jaxgd.load(Path(folder) / "half.jaxgd")
    loaded = run(MLP, **how, max_steps=35, state=state)
    straight = run(MLP, **how, max_steps=35, state=half.state)
    *_, last = jaxgd.iterate(
        MLP.fun,
        MLP.init,
        data,
        every=20,
        progress=True,
        max_steps=60,
        batch_size=32,
        strata=STRATA,
        **RULES["adam"],
    )
    return {
        "whole": flat(whole.params),
        "loaded": flat(loaded.params),
        "straight": flat(straight.params),
        "pieces": flat(last.params),
        "steps": loaded.steps,
    }


def spread_parameters(folder):
    """Parameters of which each process has a part, saved and taken up again."""
    data = own(MLP.data)
    params = MLP.init
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(data)[0].sharding.mesh

        def spread(x):
            axis = "rows" if x.shape[0] % mesh.size == 0 else None
            place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
            return jax.make_array_from_callback(
                x.shape, place, lambda part: np.asarray(x)[part]
            )

        params = jax.tree.map(spread, params)
    how = {"batch_size": 32, "strata": STRATA, "max_steps": 30, **RULES["adam"]}
    first = jaxgd.minimize(MLP.fun, params, data, **how)
    placed = [x.sharding.is_fully_replicated for x in jax.tree.leaves(first.params)]
    jaxgd.save(Path(folder) / "spread.jaxgd", first.state)
    state = jaxgd.load(Path(folder) / "spread.jaxgd")
    second = jaxgd.minimize(MLP.fun, params, data, **how, state=state)
    jaxgd.save(Path(folder) / "end.jaxgd", second.state)
    end = jaxgd.load(Path(folder) / "end.jaxgd")
    return {"params": flat(end.params), "whole": placed, "value": second.value}


def refused(folder):
    """What processes that do not pass the same are told."""
    i, devices = jax.process_index(), jax.local_device_count()
    data = own(MLP.data)
    start = jax.tree.map(lambda x: x + i, MLP.init)
    how = {"batch_size": 32, "max_steps": 3, "learning_rate": 0.1}

    def descend(params=MLP.init, **other):
        jaxgd.minimize(MLP.fun, params, data, **how | other)

    tries = {
        "rows": lambda: jaxgd.shard_rows(np.zeros((devices * (i + 1), 2))),
        "kind": lambda: jaxgd.shard_rows(np.zeros((devices, 2 + i))),
        "divide": lambda: jaxgd.shard_rows(np.zeros((2 * devices + 1, 2))),
        "devices": lambda: jaxgd.shard_rows(
            np.zeros((devices, 2)), jax.devices()[::-1]
        ),
        "params": lambda: descend(start),
        "key": lambda: descend(key=i),
        "learning_rate": lambda: descend(learning_rate=0.1 + i),
        "max_steps": lambda: descend(max_steps=3 + i),
        "folder": lambda: jaxgd.save(
            Path(folder) / "nowhere" / "x", run(LINEAR, max_steps=1).state
        ),
    }
    told = {}
    for name, call in tries.items():
        try:
            call()
            told[name] = "no error"
        except (ValueError, OSError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    told["after"] = float(run(LINEAR, max_steps=10).value)  # all go on together
    alone = jaxgd.shard_rows(np.zeros((devices * (i + 1), 2)), jax.local_devices())
    told["alone"] = len(alone)
    return told


def orphaned(folder):
    """The last process dies in the midst of a run; the others are to hear of it."""
    data = own(LINEAR.data)
    run(LINEAR, data=data, max_steps=10)
    if jax.process_index() == jax.process_count() - 1:
        threading.Timer(1.0, os._exit, (9,)).start()
    start = time.monotonic()
    try:
        run(LINEAR, data=data, learning_rate=1e-9, max_steps=100_000_000)
    except Exception as error:
        print(
            f"heard of it after {time.monotonic() - start:.1f} s: {error}", flush=True
        )
        os._exit(3)
    return {}


def main():
    task, folder, port, count, index = sys.argv[1:]
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            num_processes=int(count),
            process_id=int(index),
            heartbeat_timeout_seconds=60,
            shutdown_timeout_seconds=60,
        )
    found = globals()[task](folder)
    np.savez(Path(folder) / f"{index}.npz", **found)


if __name__ == "__main__":
    main()
