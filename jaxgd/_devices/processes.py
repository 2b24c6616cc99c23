"""What several processes must agree on before they run one program.

This room owns the words that processes exchange on the host: whether they pass the same
arguments, and whether what one of them did has worked. Everything here is a collective:
all processes call it, in the same order, or wait for each other.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgd import _tree
from jaxgd._devices.layout import Layout


def spans(layout: Layout | None) -> bool:
    """Whether the rows lie on devices of all of several processes."""
    if layout is None or not isinstance(layout.mesh, Mesh) or jax.process_count() == 1:
        return False
    processes = {device.process_index for device in layout.mesh.devices.flat}
    return len(processes) == jax.process_count()


def told_by_all(numbers) -> np.ndarray:
    """``numbers`` of every process, stacked by process; all of them must call."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(numbers))


def require_same_on_processes(layout: Layout | None, named: dict) -> None:
    """A ValueError, on all processes, names an argument that is not the same on all.

    Each would go its own way with it, and call the result that of all.
    """
    if not spans(layout):
        return
    seen = told_by_all(np.asarray([_print_of(tree) for tree in named.values()]))
    for name, prints in zip(named, seen.T, strict=True):
        other = int(np.argmax(prints != prints[0]))
        if other:
            raise ValueError(
                f"{name} must be the same on every process, got one on process {other} "
                "that differs from that on process 0: make it there as here, for "
                "example of the same seed or file."
            )


def _print_of(tree) -> np.int32:
    """A number that tells trees of arrays apart; of other processes nothing is read."""
    told = 0
    # Paths, not the structure: what is static in it may be known by its address.
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        told = zlib.crc32(jax.tree_util.keystr(path).encode(), told)
        if _tree.is_traced(leaf):
            continue
        if jnp.issubdtype(getattr(leaf, "dtype", np.dtype(int)), jax.dtypes.extended):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            kept = np.ascontiguousarray(leaf)
            told = zlib.crc32(f"{kept.dtype}{kept.shape}".encode(), told)
            told = zlib.crc32(kept.tobytes(), told)
    return np.uint32(told).astype(np.int32)
