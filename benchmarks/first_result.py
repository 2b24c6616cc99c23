"""Claim: the first result of a fresh process comes as soon as a hand-written loop's.

Two scripts, each in a process of its own, in turn: one imports jaxgd and minimizes, the
other imports jax and optax and compiles a bare ``lax.scan`` of such steps on the same
data, with rows drawn uniformly, which is the least one would write. Everything counts:
the interpreter, the imports, tracing, compiling and 1000 steps. The persistent
compilation cache is off.
"""

import os
import subprocess
import sys

from benchmarks._measure import Options, compare

_PROBLEM = """
import numpy as np
rng = np.random.default_rng(0)
x = rng.normal(size=(10_000, 20)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.float32)
import jax, jax.numpy as jnp
def loss(w, batch):
    x, y = batch
    z = x @ w
    return jnp.mean(jnp.logaddexp(z, 0.0) - y * z)
w = np.zeros(20, np.float32)
"""

_JAXGD = (
    _PROBLEM
    + """
import jaxgd
how = {how}
result = jaxgd.minimize(loss, w, (x, y), learning_rate=0.1, max_steps=1000, **how)
"""
)

_BARE = (
    _PROBLEM
    + """
import optax
rule = optax.sgd(0.1)
size = {size}
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
jax.block_until_ready(run(w, (x, y), jax.random.key(0)))
"""
)


def in_a_process(script: str, device: str) -> None:
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "JAX_PLATFORMS": {"gpu": "cuda"}.get(device, device),
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def run(options: Options) -> list[dict]:
    rows = []
    for name, size in (("first result, mini-batch", 32), ("first result, batch", None)):
        how = {"batch_size": size}
        ours, bare = _JAXGD.format(how=how), _BARE.format(size=size)
        rows += compare(
            name,
            f"10,000 x 20 / {size or 'all'}",
            options,
            lambda ours=ours: in_a_process(ours, options.device),
            {
                "bare script": lambda bare=bare: (
                    lambda: in_a_process(bare, options.device)
                )
            },
            units=1,
            unit="process",
            agree=None,
        )
    return rows
