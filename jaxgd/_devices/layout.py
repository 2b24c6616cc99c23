"""Where rows and parameters lie, when they are spread over devices.

This room owns what jaxgd knows of several devices: the mesh axes over which the rows
of a call are split (``Layout``), and the two things done about it. What a program
returns stays where its inputs were (``pinned``); and meshes with explicit axes are
taken for what they mean, not for what each operation has to say of them (``untyped``).
All else is XLA's partitioner, which gives the answer of one device for whatever a
function does with its rows.
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgd import _tree

# Leading axes that the memory of a rule may have before those of a parameter.
_MORE_AXES = 2


class Layout(NamedTuple):
    """How the rows of the data are split."""

    mesh: Any  # a Mesh; an AbstractMesh inside jit
    axes: tuple  # its axes over which the rows are split

    @property
    def shards(self) -> int:
        """Into how many pieces the rows are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


def layout_of(data) -> Layout | None:
    """How rows are split over devices, None where they are not; or a ValueError."""
    found: list[tuple[str, Any]] = [
        ("data" + jax.tree_util.keystr(path), _split(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    ]
    if all(split is None for _, split in found):
        return None
    (first, split), *others = sorted(found, key=lambda pair: pair[1] is None)
    for name, other in others:
        if other != split:
            its = _told(other)
            if its == _told(split):
                its += ", of another order or kind of axes"
            raise ValueError(
                "data must have its rows split over one mesh, by the same axes, in "
                f"every array: {first} has them {_told(split)}, {name} {its}; pass "
                "jaxgd.shard_rows(data), or device_put all of it with one sharding."
            )
    return Layout(*split)


def _split(leaf) -> tuple | None:
    """(mesh, axes of the rows)."""
    if isinstance(leaf, np.ndarray):
        return None
    sharding: Any = (
        jax.typeof(leaf).sharding if _tree.is_traced(leaf) else leaf.sharding
    )
    if isinstance(sharding, NamedSharding):
        first, *_ = (*sharding.spec, None)
        axes = (first,) if isinstance(first, str) else tuple(first or ())
        axes = tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1)
        return (sharding.mesh, axes) if axes else None
    pieces = sharding.devices_indices_map(leaf.shape).values()
    if len({(piece[0].start, piece[0].stop) for piece in pieces}) > 1:
        raise ValueError(
            "data must be sharded by a jax.sharding.NamedSharding, got one of type "
            f"{type(sharding).__name__}: pass jaxgd.shard_rows(data)."
        )
    return None


def _told(split) -> str:
    if split is None:
        return "whole on each device that has them"
    mesh, axes = split
    sizes = ", ".join(f"{axis!r}: {mesh.shape[axis]}" for axis in axes)
    return f"split over {{{sizes}}} of a mesh of {mesh.size} devices"


def in_place(leaf, sharding) -> bool:
    """Whether an array lies as ``sharding`` says, on the same mesh."""
    own = leaf.sharding
    same = getattr(own, "mesh", None) == getattr(sharding, "mesh", None)
    return same and own.is_equivalent_to(sharding, leaf.ndim)


def free(leaf):
    """An array that is bound to no device."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(leaf)
    words: Any = np.asarray(jax.random.key_data(leaf))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))


def require_same_devices(layout: Layout | None, named: dict) -> None:
    """A ValueError names an argument that is bound to other devices than the rows.

    ``named``: arguments by name. What is bound to no device goes to all of them.
    """
    known, where, mesh = None, "data", None
    if layout is not None and isinstance(layout.mesh, Mesh):
        known, mesh = list(layout.mesh.devices.flat), layout.mesh
    for name, tree in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            bound = isinstance(leaf, jax.Array) and not _tree.is_traced(leaf)
            if not bound or not leaf.committed:
                continue
            own = _devices_of(leaf.sharding)
            told = name + jax.tree_util.keystr(path)
            its = getattr(leaf.sharding, "mesh", None) if len(own) > 1 else None
            if known is None:
                known, where, mesh = own, told, its
            elif own != known:
                place = "there"
                if len(known) > 1:
                    place = "with NamedSharding(mesh, PartitionSpec()), the mesh of "
                    place += where
                raise ValueError(
                    f"{told} must be on the devices of {where}, {_listed(known)}, got "
                    f"{_listed(own)}: pass it as a NumPy array (jax.device_get), or "
                    f"device_put it {place}."
                )
            elif its != mesh and _typed(its, mesh):
                raise ValueError(
                    f"{told} must be on the mesh of {where}, since axes are explicit, "
                    f"got meshes {_axes(its)} and {_axes(mesh)}: pass it as a NumPy "
                    "array (jax.device_get), or make both meshes with AxisType.Auto."
                )


def _typed(*meshes) -> bool:
    return any(m is not None and AxisType.Explicit in m.axis_types for m in meshes)


def _axes(mesh) -> str:
    if mesh is None:
        return "none"
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    told = ", ".join(
        f"{name!r}: {mesh.shape[name]} {kind.name}" for name, kind in pairs
    )
    return f"{{{told}}}"


def _devices_of(sharding) -> list:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return list(sharding.mesh.devices.flat)
    return sorted(sharding.device_set, key=lambda d: d.id)


def _listed(devices) -> str:
    shown = ", ".join(str(device) for device in devices[:4])
    more = f" and {len(devices) - 4} more" if len(devices) > 4 else ""
    return f"[{shown}{more}]"


class Places(NamedTuple):
    """Where the results of a program go: parameters where they were, all else to all
    devices."""

    mesh: Any
    own: tuple  # shardings of the leaves of params
    shapes: tuple

    @property
    def split(self) -> bool:
        """Whether any parameter is split over devices."""
        return any(any(sharding.spec) for sharding in self.own)


def places_of(layout: Layout | None, params) -> Places | None:
    """The places of a call; None on one device, and where tracing hides them."""
    leaves = jax.tree.leaves(params)
    own = [getattr(x, "sharding", None) for x in leaves if not _tree.is_traced(x)]
    meshes = [s.mesh for s in own if isinstance(s, NamedSharding) and s.num_devices > 1]
    if layout is not None and isinstance(layout.mesh, Mesh):
        meshes = [layout.mesh, *meshes]
    if len(own) < len(leaves) or not meshes:
        return None
    alike = NamedSharding(meshes[0], P())
    own = [s if isinstance(s, NamedSharding) and any(s.spec) else alike for s in own]
    return Places(meshes[0], tuple(own), tuple(np.shape(x) for x in leaves))


def everywhere(places: Places | None, tree):
    """``tree``, all of it on all devices."""
    return _moved(places, tree, lambda part, put: jax.tree.map(lambda x: put(x), part))


def pinned(places: Places | None, tree, params):
    """``tree``, what has the structure of ``params`` where they are, leaf by leaf.

    The memory of optax rules has; leading axes more, as in that of L-BFGS or for real
    and imaginary parts, are not split. All else goes to all devices.
    """
    if places is None:
        return tree
    structure, shapes, shardings = jax.tree.structure(params), places.shapes, places.own

    def is_like(part):
        return jax.tree.structure(part) == structure

    def pin(tree, put):
        def like(leaf, shape, own):
            if np.shape(leaf) == shape:
                return put(leaf, own)
            more = np.ndim(leaf) - len(shape)
            if not 1 <= more <= _MORE_AXES or np.shape(leaf)[more:] != shape:
                return put(leaf)
            return put(leaf, own.update(spec=P(*[None] * more, *own.spec)))

        def place(part):
            if not is_like(part):
                return put(part)
            leaves = map(like, jax.tree.leaves(part), shapes, shardings)
            return jax.tree.unflatten(structure, leaves)

        return jax.tree.map(place, tree, is_leaf=is_like)

    return _moved(places, tree, pin)


def _moved(places: Places | None, tree, how):
    """``how(tree, put)``, with ``put(leaf, sharding)``; all devices if there is none.

    Called within a program and, since one that sees no typed array cannot know of a
    mesh with explicit axes, on what it has returned.
    """
    if places is None:
        return tree
    here = _here(places.mesh)
    typed = AxisType.Explicit in here.axis_types
    traced = any(map(_tree.is_traced, jax.tree.leaves(tree)))
    if typed == traced:  # by its types it is, or by the program that returned it
        return tree
    move = lax.with_sharding_constraint if traced else jax.device_put

    def put(leaf, sharding=None):
        if sharding is None or sharding.mesh == places.mesh:
            spec = P() if sharding is None else sharding.spec
            sharding = NamedSharding(here, spec)
        return move(leaf, sharding)

    return how(tree, put)


def untyped(fun, *args, out=None) -> Any:
    """``fun(*args)``, all axes of meshes automatic within.

    ``out(kept, on_all)``: where that goes which it returns, a prefix of it, with
    ``kept(tree)`` for what is to be where ``tree`` is. If None, all of it on all.
    """
    meshes = [
        jax.typeof(x).sharding.mesh
        for x in jax.tree.leaves(args)
        if hasattr(x, "dtype")
    ]
    around = jax.sharding.get_abstract_mesh()
    typed = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if typed is not None:
        on_all = NamedSharding(typed, P())

        def kept(tree):
            own = jax.tree.map(lambda x: jax.typeof(x).sharding, tree)
            return jax.tree.map(lambda s: on_all if s.mesh.empty else s, own)

        where = on_all if out is None else out(kept, on_all)
        axes = typed.axis_names
        return jax.sharding.auto_axes(fun, axes=axes, out_sharding=where)(*args)
    other = next((m for m in meshes if not m.empty and m != around), None)
    if other is not None and not around.empty:  # the data have a mesh of their own
        with jax.sharding.use_abstract_mesh(other):
            return fun(*args)
    return fun(*args)


def split_on(layout: Layout | None, x, axis: int):
    """``x`` with this axis split as the rows are."""
    if layout is None:
        return x
    spec = P(*[None] * axis, layout.axes)
    return lax.with_sharding_constraint(x, NamedSharding(_here(layout.mesh), spec))


def undisturbed(places: Places | None):
    """A context in which the mesh of a call is its own, whatever the user has set."""
    if places is None or jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _here(mesh):
    """``mesh`` as the trace around has it: its axes may be of another kind there."""
    around = jax.sharding.get_abstract_mesh()
    return mesh if around.empty else around
