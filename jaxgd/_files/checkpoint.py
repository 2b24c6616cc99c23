"""States in files: ``save`` and ``load``.

This room owns the file. It is a zip of stored (not compressed) members, as
``numpy.savez`` makes: ``0.npy``, ``1.npy``, ... hold the leaves in their order, and
``manifest.json`` says what they are:

* ``format``, ``version`` and ``jaxgd``: what the file is, the version of its layout,
  and of the library that wrote it;
* ``leaves``: of each its ``path``, ``dtype`` and ``shape``, and for typed PRNG keys
  ``key``, the name of their implementation. Dtypes that NumPy does not know (bfloat16,
  float8, int4) lie in the file as unsigned integers of that size, keys as their data;
* ``tree``: the containers. A leaf is its number, None is null, every other node an
  object with its ``kind`` and ``parts``. Kinds that are made again are dict, list,
  tuple and the library's own classes (``OWN``); of any other class there is the name,
  and ``load`` gives a ``Node``.

Versions of the library differ in the fields of its own classes, so these are read by
name: one that this version does not know is passed over with all that it holds, one
that the file lacks is None. So are members and keys of the manifest that are not those
above. ``VERSION`` grows where that does not do: where what is known means another
thing. Layout 1 (of 0.1.0) differs in what tells stop rules apart.

Nothing that stands in a file is run, imported or believed: no size is allocated that
the file itself does not have, and the header of an array is compared with the one that
the manifest calls for, not parsed.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
import zipfile
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._devices.processes import told_by_all
from jaxgd._files.archive import (
    Unreadable,
    as_object,
    content_of,
    first_line,
    members_of,
    replacing,
    require,
    typed,
)
from jaxgd._files.resume import OWN, Node, fields_of, level_of
from jaxgd._loop.memory import Run
from jaxgd._loop.step import State
from jaxgd._result.result import Result

FORMAT, VERSION = "jaxgd state", 2
_MANIFEST = "manifest.json"
_PLAIN = {"bool", "complex64", "complex128", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
# Those NumPy does not know by itself, as far as this version of JAX has them.
_FOREIGN = {
    name
    for name in vars(jnp)
    if re.fullmatch(r"bfloat16|float[48]_\w+|u?int[24]", name)
}


class _Leaf(NamedTuple):
    """A leaf as the file has it."""

    path: str
    dtype: str  # of the array; for keys, of their data
    shape: tuple
    array: Any
    key: str | None = None  # name of the implementation of typed keys


def save(path, state) -> None:
    """Writes a state to a file, which ``load`` reads in any other process.

    The file is complete or not there: it is written under another name in the same
    folder, flushed to the disk and then renamed. Whatever happens before that, a full
    disk or Ctrl-C included, leaves a file that was there as it was. A process killed
    while it saves (SIGKILL, power) can leave ``.<name>.<random>.tmp`` behind, which no
    one reads and anyone may delete.

    It holds parameters, optimizer state, keys, counters, history and the memory of the
    stop rule as they are, in a zip of NumPy arrays and one JSON text: no pickle, no
    code. ``numpy.load`` opens it too.

    A state that is spread over several processes is saved by all of them together: all
    call ``save``, the first writes, and none returns before the file is there. To
    ``load`` it in all of them, the folder must be one that they all see.

    Args:
      path: the file, a str or os.PathLike; one that is there is replaced.
      state: a ``Result.state``, of one run or of lanes, or the ``State`` of a manual
        loop.

    Raises:
      TypeError: if ``state`` is no state (a ``Result``, for example), is traced, or
        holds something that is no array of numbers.
      FileNotFoundError: if the folder does not exist.
      OSError: if the file cannot be written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxgd
      >>> fun, start = lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2)
      >>> first = jaxgd.minimize(fun, start, learning_rate=0.1, max_steps=10)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "run.jaxgd")
      ...     jaxgd.save(path, first.state)
      ...     state = jaxgd.load(path)
      >>> more = jaxgd.minimize(
      ...     fun, start, learning_rate=0.1, max_steps=10, state=state
      ... )
      >>> int(more.steps)
      20
    """
    path = os.fsdecode(path)
    _require_state(state)
    spread = any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(state)
    )
    leaves: list[_Leaf] = []
    tree = _described(state, "", leaves)
    with _one_of_all(path) if spread else contextlib.nullcontext(True) as writes:
        if writes:
            _write_file(path, tree, leaves)


def _write_file(path, tree, leaves) -> None:
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write(archive, _MANIFEST, json.dumps(_manifest(tree, leaves)).encode())
        for i, leaf in enumerate(leaves):
            _write(archive, f"{i}.npy", _header(leaf), _bytes(leaf))


@contextlib.contextmanager
def _one_of_all(path):
    """Whether this process writes for all; none goes on before the file is there."""
    first, error = jax.process_index() == 0, None
    try:
        yield first
    except BaseException as raised:
        error = raised
    written = told_by_all(np.int32(error is None)).all()
    if error is not None:
        raise error
    if not written:
        raise OSError(f"{path!r} could not be written by process 0: see its error.")


def load(path) -> State:
    """Reads a state that ``save`` wrote.

    ``minimize(..., state=load(path))`` goes on bit for bit as with the state that was
    saved, and needs no compilation that the latter would not. A state of another
    problem is refused there, with the name of the first leaf that differs.

    A file of an earlier version of jaxgd, or of Python or JAX, is read as one of this
    version. A field of the run's memory that the file does not have is None in the
    state; ``minimize`` puts there what a run has that begins, and keeps all else. What
    this version does not know is left out.

    Args:
      path: the file, a str or os.PathLike.

    Returns:
      A ``State``. Its leaves are read-only NumPy arrays of the dtypes that were saved
      (so float64 stays, whatever ``jax_enable_x64`` says) and typed PRNG keys. dicts,
      lists, tuples and None are as they were. Containers of other libraries and your
      own (the states of optax rules, modules, ordered dicts) come back as nodes with
      ``kind``, ``names`` and ``children``, with the same leaves in the same order:
      ``minimize`` puts them back into the form that it expects, and by hand
      ``jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))`` does,
      with ``like = jaxgd.init_state(params, optimizer)`` for a manual loop.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is torn, damaged, by a later version of jaxgd, or not by
        ``save`` at all; the message names the file and what is wrong.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, optax, jaxgd
      >>> state = jaxgd.init_state({"w": jnp.ones(2)}, optax.adam(0.1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxgd.save(os.path.join(folder, "start.jaxgd"), state)
      ...     loaded = jaxgd.load(os.path.join(folder, "start.jaxgd"))
      >>> loaded.params
      {'w': array([1., 1.], dtype=float32)}
      >>> loaded.opt_state[0].kind
      'ScaleByAdamState'
    """
    path = os.fsdecode(path)
    regular = stat.S_ISREG(os.stat(path).st_mode)
    try:
        require(regular, "it is no regular file")
        with open(path, "rb") as file:
            return _read(file)
    except Exception as error:
        # Not the file's fault, unless it had us look for bytes before its start.
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):
            raise
        told = isinstance(error, Unreadable)
        what = error if told else f"it is torn or damaged ({first_line(error)})"
        raise ValueError(f"{path!r} is no state that load can read: {what}.") from error


# Writing


def _require_state(state) -> None:
    if not isinstance(state, State):
        fix = (
            "pass result.state"
            if isinstance(state, Result)
            else "pass a Result.state or the State of a manual loop"
        )
        raise TypeError(
            f"state must be a State, got one of type {type(state).__name__}: {fix}."
        )
    if any(map(_tree.is_traced, jax.tree.leaves(state))):
        raise TypeError(
            "state must be on the host, got traced values: save outside jit, vmap and "
            "grad, for example in the body of a loop over minimize."
        )


def _described(tree, path, leaves):
    """The manifest's word for ``tree``; its leaves go to the end of ``leaves``."""
    if tree is None:
        return None
    level = level_of(tree)
    if level is None:
        leaves.append(_leaf(path, tree))
        return len(leaves) - 1
    parts = [
        _described(child, path + name, leaves)
        for name, child in zip(level.names, level.children, strict=True)
    ]
    if type(tree) in (list, tuple):
        return {"kind": level.kind, "parts": parts}
    if type(tree) is dict and _are_keys(sorted(tree)):
        return {"kind": "dict", "keys": sorted(tree), "parts": parts}
    kind = "own" if type(tree) in OWN.values() else "other"
    return {"kind": kind, "class": level.kind, "names": level.names, "parts": parts}


def _are_keys(keys) -> bool:
    """Whether a dict has keys that JSON keeps."""
    return {type(key) for key in keys} in (set(), {str}, {int})


def _leaf(path, leaf) -> _Leaf:
    key = None
    if jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jax.dtypes.prng_key):
        key, leaf = jax.random.key_impl(leaf), jax.random.key_data(leaf)
        if not isinstance(key, str):
            raise TypeError(
                "state must hold keys of an implementation that JAX knows by name, got "
                f"{key} as state{path}: register it with JAX."
            )
    array = _whole(leaf)
    if array.dtype.name not in _PLAIN | _FOREIGN:
        raise TypeError(
            f"state must hold arrays of numbers, got one of type {type(leaf).__name__} "
            f"and dtype {array.dtype} as state{path}: leave it out."
        )
    return _Leaf(path, array.dtype.name, array.shape, array, key)


def _whole(leaf) -> np.ndarray:
    """An array on the host, of all devices and processes that have a part of it."""
    near = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if near or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _manifest(tree, leaves) -> dict:
    from jaxgd import __version__

    def told(leaf):
        own = {"path": leaf.path, "dtype": leaf.dtype, "shape": leaf.shape}
        return own if leaf.key is None else {**own, "key": leaf.key}

    return {
        "format": FORMAT,
        "version": VERSION,
        "jaxgd": __version__,
        "leaves": [told(leaf) for leaf in leaves],
        "tree": tree,
    }


def _stored_dtype(name) -> np.dtype:
    """The dtype that lies in the file, little-endian on every machine."""
    dtype = np.dtype(getattr(jnp, name) if name in _FOREIGN else name)
    if name in _FOREIGN:
        dtype = np.dtype(f"u{dtype.itemsize}")
    return dtype.newbyteorder("<")


def _header(leaf: _Leaf) -> bytes:
    """That of a ``.npy`` file, version 1.0, padded to a multiple of 64 bytes.

    Written here because NumPy's own padding differs between its versions, and a header
    that can be foretold need not be parsed.
    """
    shape = "".join(f"{size}, " for size in leaf.shape)
    text = (
        f"{{'descr': '{_stored_dtype(leaf.dtype).str}', 'fortran_order': False, "
        f"'shape': ({shape}), }}"
    )
    length = -(-(10 + len(text) + 1) // 64) * 64
    text = text.ljust(length - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def _bytes(leaf: _Leaf):
    stored = _stored_dtype(leaf.dtype)
    flat = np.ascontiguousarray(leaf.array).reshape(-1)
    if leaf.dtype in _FOREIGN:
        flat = flat.view(stored)
    return flat.astype(stored, copy=False).view(np.uint8).data


def _write(archive, name, *parts) -> None:
    info = zipfile.ZipInfo(name)  # of a fixed date: equal states are equal files
    info.file_size = sum(len(part) for part in parts)  # decides about 64-bit sizes
    with archive.open(info, "w") as member:
        for part in parts:
            member.write(part)


# Reading


def _read(file) -> State:
    size = os.fstat(file.fileno()).st_size
    require(zipfile.is_zipfile(file), "it is no zip file, or was cut off")
    with zipfile.ZipFile(file) as archive:
        members = members_of(archive, size)
        require(_MANIFEST in members, f"it has no {_MANIFEST}, so save did not make it")
        manifest = as_object(
            json.loads(content_of(archive, members[_MANIFEST])), "the manifest"
        )
        require(manifest.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        _require_version(manifest)
        told = typed(manifest, "leaves", list)
        names = {f"{i}.npy" for i in range(len(told))}
        require(names <= set(members), "manifest and members do not agree")

        def read(i):
            leaf = as_object(told[i], f"leaf {i}")
            return _read_leaf(archive, members[f"{i}.npy"], leaf)

        rest = iter(range(len(told)))
        state = _rebuilt(manifest.get("tree"), rest, read)
    require(next(rest, None) is None, "its tree does not hold all leaves")
    require(isinstance(state, State), "it holds no State")
    return _migrated_from_1(state) if manifest["version"] == 1 else state


def _migrated_from_1(state: State) -> State:
    """A state of layout 1, which told stop rules apart by their bytecode.

    That says nothing to another version of Python, or of the library. The rule has no
    name then: ``minimize`` takes it for its own if numbers and form of the memory are.
    """
    run = state.run
    if not isinstance(run, Run) or not isinstance(run.rule, tuple) or not run.rule:
        return state  # of a manual loop, or of a run without a rule
    return replace(state, run=replace(run, rule=(None, *run.rule[1:])))


def _require_version(manifest) -> None:
    version = typed(manifest, "version", int)
    writer = str(manifest.get("jaxgd"))[:20]
    require(
        version <= VERSION,
        f"it was written by a later jaxgd ({writer}, layout {version}; this one reads "
        f"{VERSION}): upgrade jaxgd",
    )
    require(version >= 1, f"there is no layout {version}")


def _read_leaf(archive, member, told: dict):
    name, shape = typed(told, "dtype", str), typed(told, "shape", list)
    what = member.filename
    require(name in _PLAIN | _FOREIGN, f"{what} is of unknown dtype {name[:30]!r}")
    sizes = all(type(size) is int and 0 <= size < 2**63 for size in shape)
    require(sizes and len(shape) <= 32, f"{what} has no possible shape")
    leaf = _Leaf(typed(told, "path", str), name, tuple(shape), None)
    stored, header = _stored_dtype(name), _header(leaf)
    length = len(header) + math.prod(shape) * stored.itemsize
    require(member.file_size == length, f"{what} is not of the size it should be")
    content = content_of(archive, member)
    require(content.startswith(header), f"{what} is not the array of the manifest")
    array: Any = np.frombuffer(content, stored, offset=len(header)).reshape(shape)
    array = array.astype(stored.newbyteorder("="), copy=False)
    if name in _FOREIGN:
        array = array.view(getattr(jnp, name))
    if "key" not in told:
        return array
    implementation = typed(told, "key", str)
    try:
        return jax.random.wrap_key_data(array, impl=implementation)
    except (TypeError, ValueError) as error:
        raise Unreadable(
            f"{what} holds no keys of {implementation[:30]!r} ({first_line(error)})"
        ) from error


def _rebuilt(tree, places, read) -> Any:
    """The pytree of the manifest's word for it.

    ``places``: iterator over the numbers of its leaves; ``read``: number -> leaf.
    """
    if tree is None:
        return None
    if type(tree) is int:
        require(next(places, None) == tree, "its tree names leaves out of order")
        return read(tree)
    tree = as_object(tree, "a node of its tree")
    kind = typed(tree, "kind", str)
    if kind == "own":
        return _own(tree, places, read)
    parts = [_rebuilt(part, places, read) for part in typed(tree, "parts", list)]
    if kind in ("list", "tuple"):
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        keys = typed(tree, "keys", list)
        ordered = _are_keys(keys) and keys == sorted(set(keys))
        require(ordered and len(keys) == len(parts), "a dict of its tree is none")
        return dict(zip(keys, parts, strict=True))
    require(kind == "other", f"its tree has a node of unknown kind {kind[:30]!r}")
    return Node(typed(tree, "class", str), _names(tree), tuple(parts))


def _own(tree, places, read) -> Any:
    """One of the library's own containers, by the names of its fields."""
    name = typed(tree, "class", str)
    require(name in OWN, f"its tree has an unknown class {name[:30]!r}")
    known, found = fields_of(OWN[name]), {}
    for path, part in zip(_names(tree), tree["parts"], strict=True):
        field = path.removeprefix(".")
        if field in known:
            require(field not in found, f"its {name} has two fields of one name")
            found[field] = _rebuilt(part, places, read)
        else:
            _pass_over(part, places)
    return OWN[name](**{field: found.get(field) for field in known})


def _pass_over(tree, places) -> None:
    """Takes the leaves of a part that this version does not know, unread."""
    if type(tree) is int:
        require(next(places, None) == tree, "its tree names leaves out of order")
    elif tree is not None:
        for part in typed(as_object(tree, "a node of its tree"), "parts", list):
            _pass_over(part, places)


def _names(tree) -> tuple:
    """The names of the parts of a node."""
    names, parts = typed(tree, "names", list), typed(tree, "parts", list)
    named = all(type(x) is str for x in names) and len(names) == len(parts)
    require(named, "a node of its tree has not a name for each part")
    return tuple(names)
