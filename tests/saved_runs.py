"""Runs whose states lie in ``tests/files``, as other versions of jaxgd wrote them.

``python tests/saved_runs.py tests/files`` writes for each run ``NAME-VERSION.jaxgd``,
the state in the middle, and ``VERSION.json``: where the uncut run ends. What is there
of an older version stays as that version wrote it (0.1.0: Python 3.11, JAX 0.10.2).
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgd

FILES = Path(__file__).parent / "files"

# Data by arithmetic, not by a generator that may change.
_I = np.arange(40.0)
X = np.stack([np.sin(3 * _I), np.cos(5 * _I), np.sin(7 * _I + 1)], 1).astype("f")
Y = (X @ np.array([1, -2, 3]) + np.sin(11 * _I) / 4).astype("f")


def residual(p, batch):
    x, y = batch
    return x @ p["linear"]["w"] + p["linear"]["b"][0] - y


def squares(p, batch):
    return jnp.mean(residual(p, batch) ** 2)


START = {"linear": {"w": np.zeros(3, "f"), "b": [np.float32(0.5)]}}


def call(max_steps, state=None, **setting):
    return jaxgd.minimize(
        squares,
        START,
        (X, Y),
        max_steps=max_steps,
        history_rows=6,
        state=state,
        **setting,
    )


def batch(max_steps, state=None):
    """A plain rate; cut where the rule has seen some small changes in a row."""
    rule = jaxgd.any_of(
        jaxgd.value_change(rtol=0.0115, patience=8), jaxgd.gradient_norm(atol=1e-7)
    )
    return call(max_steps, state, learning_rate=0.1, stop=rule)


def spectral(max_steps, state=None):
    """The default of version 0.1.0, whose state has a known value and gradient."""
    stop, rule = jaxgd.value_change(rtol=1e-3, patience=6), jaxgd.barzilai_borwein()
    return call(max_steps, state, stop=stop, optimizer=rule)


def mini_batch(max_steps, state=None):
    """Adam, whose checks are one an epoch and look at the change of parameters."""
    rule = jaxgd.any_of(
        jaxgd.params_change(rtol=0.01, patience=6), jaxgd.target_value(0.0)
    )
    return call(
        max_steps,
        state,
        optimizer=optax.adam,
        learning_rate=0.05,
        batch_size=7,
        key=5 if state is None else None,
        stop=rule,
    )


# Where a run is cut, and how it is called.
RUNS = {
    "batch": (42, batch),
    "spectral": (9, spectral),
    "mini_batch": (118, mini_batch),
}


# Rules of one's own, with the memory of ``value_change`` in other clothes.


def small_in_a_row(patience, memory, check):
    small = jnp.abs(check.value - memory["before"]) <= 0.0115 * check.value
    count = jnp.where(small, memory["count"] + 1, 0)
    return {"before": check.value, "count": count}, count >= patience


class Small:
    def __call__(self, memory, check):
        return small_in_a_row(8, memory, check)


def of_own(update, **more):
    """The run of ``batch`` with such a rule."""
    rule = jaxgd.StopRule(
        init=lambda check: {"before": check.value, "count": jnp.int32(0)},
        update=update,
        status=jaxgd.Status.TARGET_REACHED,
        **more,
    )
    return lambda max_steps, state=None: call(
        max_steps, state, learning_rate=0.1, stop=rule
    )


OWN_RUNS = {
    "lambda": (42, of_own(lambda memory, check: small_in_a_row(8, memory, check))),
    "partial": (42, of_own(partial(small_in_a_row, 8))),
    "numbers": (42, of_own(jax.tree_util.Partial(small_in_a_row, 8.0))),
    "compiled": (42, of_own(jax.jit(partial(small_in_a_row, 8)))),
    "object": (42, of_own(Small())),
    "method": (42, of_own(Small().__call__)),
}


def cut_and_go_on(folder, ending, other) -> dict:
    """Cuts each run here, and goes on where a process of another version cut it.

    Files end with the version that cut the run; ``other`` is None where there are none
    yet. Returns the steps at which uncut runs end, and those that went on.
    """
    steps: dict = {"uncut": {}, "resumed": {}}
    for name, (cut, run) in (RUNS | OWN_RUNS).items():
        jaxgd.save(Path(folder) / f"{name}.{ending}", run(cut).state)
        steps["uncut"][name] = int(run(1000).steps)
        if other is not None:
            state = jaxgd.load(Path(folder) / f"{name}.{other}")
            steps["resumed"][name] = int(run(1000, state).steps)
    return steps


def uncut(result) -> dict:
    """Where a run ends, in plain numbers."""
    params = {
        jax.tree_util.keystr(path): np.asarray(leaf).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(result.params)
    }
    return {
        "steps": int(result.steps),
        "status": int(result.status),
        "evaluations": int(result.evaluations),
        "value": float(result.value),
        "params": params,
    }


def write(folder) -> None:
    """The files of this version of jaxgd."""
    ends = {}
    for name, (cut, call) in RUNS.items():
        file = f"{name}-{jaxgd.__version__}.jaxgd"
        jaxgd.save(Path(folder) / file, call(cut).state)
        ends[name] = uncut(call(1000))
    text = json.dumps(ends, indent=1) + "\n"
    (Path(folder) / f"{jaxgd.__version__}.json").write_text(text)


if __name__ == "__main__":
    write(sys.argv[1])
