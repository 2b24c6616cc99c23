"""Claim: a shuffled order of the rows costs less than any stored permutation.

``jaxgd.shuffled_rows`` computes any place of any epoch by itself, without a sort or a
stored permutation; here it computes a whole epoch, as ``jax.random.permutation`` and
NumPy's ``Generator.permutation`` do.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxgd
from benchmarks._measure import Options, compare


def run(options: Options) -> list[dict]:
    n = options.rows(1_000_000)
    index = jnp.arange(n, dtype=jnp.int32)
    permute = jax.jit(lambda key: jax.random.permutation(key, n))
    key = jax.random.key(0)
    generator, places = np.random.default_rng(0), np.arange(n, dtype=np.int32)
    return compare(
        "shuffled_rows",
        f"{n:,}",
        options,
        lambda: jaxgd.shuffled_rows(key, n, 0, index),
        {
            "jax.random.permutation": lambda: lambda: permute(key),
            "NumPy": lambda: lambda: generator.permutation(places),
        },
        units=n,
        unit="row",
        agree=None,
    )
