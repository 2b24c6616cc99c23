"""Rows on the way to their devices.

This room owns ``shard_rows`` and what can be wrong with the rows of several devices or
processes. Everything after it is the same as for arrays that the user has sharded.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgd import _tree
from jaxgd._call.arrays import refuse_stream, rows_of
from jaxgd._checks import short
from jaxgd._devices.processes import told_by_all

_AXIS = "rows"
_SOME = "for example jax.devices()[:4]"


def shard_rows(data, devices=None):
    """The rows of ``data`` spread over devices, in equal consecutive pieces.

    ``minimize`` on such data computes on all of these devices: each reads its own rows
    alone, and one all-reduce a step brings their gradients together. Arrays that you
    have sharded on the leading axis yourself, over one or more axes of a
    ``jax.sharding.Mesh``, serve as well.

    After ``jax.distributed.initialize()`` each process passes its own rows, equally
    many; row 0 of the whole is the first row of process 0. All processes must call.

    Args:
      data: a pytree of arrays that share a leading axis of rows: all rows in a single
        process, those of this process where there are several.
      devices: the devices to use, in the order of the pieces; all devices of all
        processes by default. Their number must divide the number of rows.

    Returns:
      The same pytree of ``jax.Array``, sharded over a mesh with one axis, "rows".
      NumPy arrays are copied: writing to them later changes nothing.

    Raises:
      TypeError: if ``data`` holds something that is no array of numbers, or is traced.
      ValueError: if the arrays differ in length, the devices do not divide their rows,
        or the processes pass different numbers or kinds of rows.

    Example:
      >>> import jax, numpy as np, jaxgd
      >>> x = np.arange(6.0).reshape(6, 1)
      >>> rows = jaxgd.shard_rows(x, devices=jax.devices()[:1])
      >>> rows.shape, len(rows.addressable_shards)
      ((6, 1), 1)
    """
    refuse_stream("shard_rows", data)
    data, n = rows_of(data)
    if n is None:
        raise TypeError("data must be a pytree of arrays, got None: pass rows.")
    if any(map(_tree.is_traced, jax.tree.leaves(data))):
        raise TypeError(
            "data must be arrays, got traced values: call shard_rows outside jit, vmap "
            "and grad."
        )
    devices = _devices(devices)
    own = [d for d in devices if d.process_index == jax.process_index()]
    _processes_agree(data, n, devices)
    if not own:
        raise ValueError(
            "devices must include some of each process that calls shard_rows, got none "
            f"of process {jax.process_index()}: pass jax.devices()."
        )
    if n % len(own):
        where = "" if own == devices else " of this process"
        fits = n - n % len(own)
        fix = f"cut it to {fits} rows, or pass" if fits else "pass more rows, or pass"
        raise ValueError(
            f"data must have a number of rows that the {len(own)} devices{where} "
            f"divide, got {n}: {fix} fewer devices."
        )
    mesh = Mesh(np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P(_AXIS))
    if own == devices:
        # NumPy memory could be taken over without a copy, and written to later; on a
        # CPU it is so with may_alias=False as well.
        return jax.device_put(jax.tree.map(_copied, data), place)
    every = n * (len(devices) // len(own))

    def whole(x):
        local = np.array(x, jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.make_array_from_process_local_data(
            place, local, (every, *x.shape[1:])
        )

    return jax.tree.map(whole, data)


def _copied(x):
    return np.array(x) if isinstance(x, np.ndarray) else x


def _devices(devices) -> list:
    if devices is None:
        devices = sorted(jax.devices(), key=lambda d: d.process_index)
    if isinstance(devices, np.ndarray):  # as those of a mesh
        devices = devices.ravel().tolist()
    if not isinstance(devices, list | tuple):
        fix = "list(mesh.devices.flat)" if isinstance(devices, Mesh) else _SOME
        raise TypeError(
            f"devices must be a list of jax devices, got {devices!r}: pass {fix}."
        )
    devices = list(devices)
    for device in devices:
        if not isinstance(device, jax.Device):
            raise TypeError(
                f"devices must be a list of jax devices, got {device!r} among them: "
                f"pass {_SOME}."
            )
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(
            f"devices must be one or more, each once, got {devices}: pass for example "
            "jax.devices()."
        )
    order = [d.process_index for d in devices]
    counts = {order.count(process) for process in order}
    if order != sorted(order) or len(counts) > 1:
        raise ValueError(
            "devices must be those of process 0, then of process 1 and so on, equally "
            f"many of each, got them of processes {order}: leave devices out, or pass "
            "the same number of each process."
        )
    return devices


def _processes_agree(data, n: int, devices) -> None:
    """A ValueError, the same on all processes, unless they pass rows of one kind."""
    processes = {d.process_index for d in devices}
    if len(processes) == 1 or len(processes) < jax.process_count():
        return
    told = ", ".join(
        f"data{jax.tree_util.keystr(path)} {x.dtype}{['rows', *x.shape[1:]]}"
        for path, x in jax.tree_util.tree_leaves_with_path(data)
    )
    told = told.replace("'", "").encode()
    print_ = np.frombuffer(told.ljust(512)[:512], np.uint8).astype(np.int32)
    seen = told_by_all(np.concatenate([[np.int32(n)], print_]))
    counts = seen[:, 0].tolist()
    if len(set(counts)) > 1:
        each = ", ".join(f"{c} on process {i}" for i, c in enumerate(counts))
        raise ValueError(
            "data must have equally many rows on every process, got "
            f"{short(each)}: cut them to {min(counts)}."
        )
    other = next((i for i, row in enumerate(seen) if (row != seen[0]).any()), None)
    if other is not None:
        kind = bytes(seen[other, 1:].astype(np.uint8)).decode(errors="replace").strip()
        first = bytes(seen[0, 1:].astype(np.uint8)).decode(errors="replace").strip()
        raise ValueError(
            "data must be of one structure, shape and dtype on every process, got "
            f"{short(first)} on process 0 and {short(kind)} on process "
            f"{other}: pass the same arrays of different rows."
        )
