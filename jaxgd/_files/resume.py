"""How a run is taken up: its state put into the form that a call expects.

This room owns whether a state is of the same problem, node by node and leaf by leaf,
and what of its memory another stop rule may not read. A state out of a file has a
``Node`` wherever a class stood that the file cannot make again; it takes the form of
the fresh state where the two look alike. And it has None in each field that the version
that saved it did not know; there it takes the value of the fresh state, and no other
part of its memory is lost.
"""

import inspect
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._checks import short
from jaxgd._devices.layout import free, in_place, undisturbed
from jaxgd._loop.memory import Run
from jaxgd._loop.plan import Numbers, Spec
from jaxgd._loop.program import in_places, start
from jaxgd._loop.step import State
from jaxgd._result.history import Record
from jaxgd._stop.judge import Fall, Watch
from jaxgd._stop.status import Check

# The library's own containers, of which a file tells the fields by name.
OWN: dict[str, Any] = {c.__name__: c for c in (State, Run, Record, Check, Watch, Fall)}

# Parts of a ``Run`` that are taken up together or not at all; of all others each is.
_TOGETHER = (
    ("history", "checks", "evaluations", "checked"),
    ("watch", "rule", "status", "seen"),
)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Node:
    """What ``load`` gives back of a container of another library, or of your own.

    Leaves and their order are those of the container. ``minimize(..., state=...)``
    puts them back into it; by hand ``jax.tree.unflatten`` does, with the structure of
    a state made afresh.

    Attributes:
      kind: the name of the container's class.
      names: the names of its parts, as ``jax.tree_util.keystr`` shows them.
      children: its parts.
    """

    kind: str
    names: tuple
    children: tuple

    def tree_flatten_with_keys(self):
        """As ``jax.tree_util.register_pytree_with_keys_class`` asks for."""
        pairs = tuple(zip(self.names, self.children, strict=True))
        return pairs, (self.kind, self.names)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """As ``jax.tree_util.register_pytree_with_keys_class`` asks for."""
        return cls(aux[0], aux[1], tuple(children))


class Level(NamedTuple):
    """The uppermost node of a pytree."""

    kind: str  # the name of its class
    names: tuple  # of its parts, as keystr shows them
    children: tuple


def level_of(tree) -> Level | None:
    """The uppermost node of ``tree``; None for a leaf."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda part: part is not tree
    )
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    kind = tree.kind if isinstance(tree, Node) else type(tree).__qualname__
    names = tuple(jax.tree_util.keystr(path) for path, _ in pairs)
    return Level(kind, names, tuple(child for _, child in pairs))


def begin(spec: Spec, numbers: Numbers, state=None) -> State:
    """The state that a call starts from: one before step 0, or ``state`` taken up."""
    with undisturbed(spec.places):
        return _begun(spec, numbers, state)


def _begun(spec: Spec, numbers: Numbers, state) -> State:
    if state is None:
        return _started(spec, numbers)
    like = start.eval_shape(spec, numbers)
    if _same_form(state, like):  # as where a run of this process goes on
        return _formed(state, _started(spec, numbers))
    _require_same_problem(like, _with_all_fields(state, like))
    fresh = _started(spec, numbers)
    return _resumed(fresh, _with_all_fields(state, fresh))


def _with_all_fields(state: State, fresh: State) -> State:
    """``state`` with the fields of its run that it lacks, out of ``fresh``."""
    run = _filled(state.run, fresh.run)
    if state.run.anchor is None and fresh.run.anchor is not None:
        # No check has been from which a change could be measured.
        run = replace(run, watch=fresh.run.watch, seen=fresh.run.seen)
    # A rule without a name (of layout 1) is taken for that of this call: numbers and
    # form of the memory must still be the same.
    old, new = run.rule, fresh.run.rule
    if isinstance(old, tuple) and len(old) == len(new) == 2 and old[0] is None:
        run = replace(run, rule=(new[0], old[1]))
    return replace(state, run=run)


def _filled(old, new):
    """``old`` with what it lacks out of ``new``, in each container of the library."""
    if old is None:
        return new
    if type(old) is not type(new) or type(old) not in OWN.values():
        return old
    names = fields_of(type(old))
    return type(old)(*(_filled(getattr(old, n), getattr(new, n)) for n in names))


def fields_of(kind) -> tuple:
    """The names of the fields of one of the library's own containers."""
    return tuple(inspect.signature(kind).parameters)


def _started(spec: Spec, numbers: Numbers) -> State:
    return in_places(spec, start(spec, numbers), numbers.params)


def _require_same_problem(fresh: State, state) -> None:
    """A ValueError names the first part of ``state`` that differs from ``fresh``."""
    for name in ("params", "opt_state", "step"):
        _require_alike(f"state.{name}", getattr(state, name), getattr(fresh, name))
    old, new = state.run, fresh.run
    for name in ("history", "checks"):
        rows = np.shape(getattr(getattr(old, name), "step", 0))[-1:]
        expected = np.shape(getattr(new, name).step)[-1:]
        if rows and rows != expected:
            raise ValueError(
                f"state.run.{name} has room for {rows[0]} rows, this call for "
                f"{expected[0]}: pass the history_rows of the first run, and "
                "batch_size only if it had one."
            )
    for name in ("history", "checks", "evaluations", "status", "checked"):
        _require_alike(f"state.run.{name}", getattr(old, name), getattr(new, name))


def _resumed(fresh: State, state) -> State:
    """``state`` in the form of ``fresh``: another rule finds fresh memory."""
    old, new = state.run, fresh.run

    def taken(*names):
        parts = [getattr(old, name) for name in names]
        likes = [getattr(new, name) for name in names]
        same = _difference(parts, likes) is None
        return dict(zip(names, _formed(parts, likes) if same else likes, strict=True))

    grouped = {"key", *(name for names in _TOGETHER for name in names)}
    alone = [(f.name,) for f in fields(Run) if f.name not in grouped]
    parts: dict[str, Any] = {"key": _placed(old.key, new.key)}
    for names in (*_TOGETHER, *alone):
        parts |= taken(*names)
    run = replace(new, **parts)
    params, opt_state, step = _formed(
        (state.params, state.opt_state, state.step),
        (fresh.params, fresh.opt_state, fresh.step),
    )
    return State(params, opt_state, step, run)


def _formed(tree, like):
    """The leaves of ``tree`` in the structure of ``like``, and where those are."""
    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, map(_placed, jax.tree.leaves(tree), leaves))


def _placed(leaf, like):
    """``leaf`` on the devices of ``like``: a run may go on on others."""
    if _tree.is_traced(leaf) or _tree.is_traced(like):
        return leaf
    bound = getattr(leaf, "committed", False)
    if bound and in_place(leaf, like.sharding):
        return leaf
    # What is bound to no device may go to any, but not by the same compiled program.
    if not like.committed:
        return free(leaf) if bound else leaf
    spread = bound and not leaf.is_fully_addressable
    if like.is_fully_addressable or spread:
        return jax.device_put(leaf, like.sharding)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        words = _everywhere(jax.random.key_data(leaf), like.sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return _everywhere(leaf, like.sharding)


def _everywhere(leaf, sharding) -> jax.Array:
    """What this process has whole, on devices of which some are those of others."""
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda place: whole[place]
    )


def _require_alike(name, tree, like) -> None:
    found = _difference(tree, like)
    if found is not None:
        path, came, expected = found
        raise ValueError(
            f"{name}{path} is of another problem: expected {expected}, got {came}; go "
            "on with the params, optimizer and fun of the run that made the state (a "
            "schedule keeps a counter of steps, a number none)."
        )


def _difference(tree, like, path="") -> tuple[str, str, str] | None:
    """Path, what is there and what was expected, of the first part that differs."""
    old, new = level_of(tree), level_of(like)
    if old is None and new is None:
        same = _form(tree) == _form(like)
        return None if same else (path, _told(tree), _told(like))
    if old is None or new is None or old.kind != new.kind:
        return path, _told(tree), _told(like)
    if old.names == new.names:
        for name, child, expected in zip(*old[1:], new.children, strict=True):
            found = _difference(child, expected, path + name)
            if found is not None:
                return found
        return None
    for name, child in zip(*new[1:], strict=True):
        if name not in old.names:
            return path + name, "nothing", _told(child)
    for name, child in zip(*old[1:], strict=True):
        if name not in new.names:
            return path + name, _told(child), "nothing"
    return path, _told(tree), _told(like)  # the same names in another order


def _same_form(tree, like) -> bool:
    """Whether classes, shapes and dtypes are the same: quickly told."""
    leaves, treedef = jax.tree.flatten(tree)
    likes, expected = jax.tree.flatten(like)
    return treedef == expected and list(map(_form, leaves)) == list(map(_form, likes))


def _form(leaf) -> tuple:
    return np.shape(leaf), getattr(leaf, "dtype", type(leaf))


def _told(tree) -> str:
    """A part as an error shows it: dtype and shape, or class and names of parts."""
    level = level_of(tree)
    if level is None:
        shape, dtype = _form(tree)
        return f"{dtype}{list(shape)}"
    return f"{level.kind}({short(', '.join(level.names), 80)})"
