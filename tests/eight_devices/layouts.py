"""Where rows may lie, problems to solve there, and what "the same result" means."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgd

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def spread(count):
    return lambda data: jaxgd.shard_rows(data, devices=jax.devices()[:count])


@lru_cache
def mesh_of(shape, kind):
    names = ("a", "b")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def on_mesh(shape, kind, axes):
    place = NamedSharding(mesh_of(shape, kind), P(axes))
    return lambda data: jax.device_put(data, place)


LAYOUTS = {
    "one device": lambda data: data,
    "2 devices": spread(2),
    "4 devices": spread(4),
    "8 devices": spread(8),
    "auto mesh": on_mesh((8,), AUTO, "a"),
    "explicit mesh": on_mesh((8,), EXPLICIT, "a"),
    "one axis of two": on_mesh((4, 2), AUTO, "a"),
    "both axes": on_mesh((4, 2), AUTO, ("a", "b")),
    "both axes, explicit": on_mesh((2, 4), EXPLICIT, ("b", "a")),
}

FEW = ["8 devices", "explicit mesh", "both axes"]


def minimize(layout, fun, params, data, **how):
    """The run of this layout, of eight strata where it takes batches."""
    if how.get("batch_size") is not None:
        how.setdefault("strata", 8)
    return jaxgd.minimize(fun, params, LAYOUTS[layout](data), **how)


def close(a, b, tolerance=1e-5):
    """Trees of one structure, each leaf within ``tolerance`` of its largest number."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            np.testing.assert_array_equal(x, y)
            continue
        wide = np.complex128 if x.dtype.kind == "c" else np.float64
        x, y = x.astype(wide), y.astype(wide)
        finite = np.abs(y[np.isfinite(y)])
        scale = max(1.0, finite.max()) if finite.size else 1.0
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale)


def same_result(result, other, tolerance=1e-5):
    """Whether two runs tell the same of themselves, up to rounding."""
    for name in ("status", "steps", "evaluations", "aux", "params", "value"):
        close(getattr(result, name), getattr(other, name), tolerance)
    close(result.grad_norm, other.grad_norm, 10 * tolerance)
    for name in ("history", "checks"):
        mine, its = getattr(result, name), getattr(other, name)
        np.testing.assert_array_equal(mine.step, its.step)
        close(mine, its, 10 * tolerance)
    assert str(result).splitlines()[0] == str(other).splitlines()[0]
