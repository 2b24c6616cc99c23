"""A few of the rows of a call: what they are tried on, and what tells them apart."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._devices.layout import untyped

# Rows of each of the two sets that an objective is tried on.
ROWS = 32


def sample_of(data, n: int) -> Any:
    """64 rows spread over ``data``, as NumPy arrays; None where NumPy has none."""
    leaves, treedef = jax.tree.flatten(data)
    keys = any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves)
    if keys or any(map(_tree.is_traced, leaves)):
        return None
    places = sample_places(n)
    far = [not _is_near(leaf) for leaf in leaves]
    fetched = iter(())
    if any(far):
        wanted = [leaf for leaf, is_far in zip(leaves, far, strict=True) if is_far]
        fetched = iter(_rows_at(wanted, places))
    taken = [
        next(fetched) if is_far else np.asarray(leaf)[places]
        for leaf, is_far in zip(leaves, far, strict=True)
    ]
    return treedef.unflatten([as_on_device(np.asarray(rows)) for rows in taken])


def sample_places(n: int) -> np.ndarray:
    """Where the rows of a sample are."""
    return np.linspace(0, n - 1, 2 * ROWS).astype(np.int64)


def as_on_device(rows) -> np.ndarray:
    """``rows`` in the dtype they have on a device."""
    with np.errstate(all="ignore"):
        return rows.astype(_tree.dtype_on_device(rows.dtype))


def _is_near(leaf) -> bool:
    """Whether NumPy sees an array without a copy of all of it."""
    if not isinstance(leaf, jax.Array):
        return True
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@jax.jit
def _rows_at(leaves, places):
    return untyped(lambda leaves, at: [x[at] for x in leaves], leaves, places)


def mark_of(sample) -> np.uint32:
    """A number that tells rows from others by a sample, 0 where there is none.

    The same wherever the rows come from, and with 64 bits or without.
    """
    if sample is None:
        return np.uint32(0)
    mark = 0
    for leaf in jax.tree.leaves(sample):
        kind = {"c": np.complex64, "i": np.int32, "u": np.int32, "b": np.int32}
        with np.errstate(all="ignore"):
            plain = leaf.astype(kind.get(leaf.dtype.kind, np.float32))
        mark = zlib.crc32(np.ascontiguousarray(plain).tobytes(), mark)
    return np.uint32(mark or 1)
