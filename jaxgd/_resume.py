"""How a run is taken up: its state put into the form that a call expects.

This room owns whether a state is of the same problem, leaf by leaf, and what of its
memory another stop rule may not read.
"""

from dataclasses import replace

import jax
import numpy as np

from jaxgd._program import start
from jaxgd._spec import Numbers, Spec
from jaxgd._step import State


def begin(spec: Spec, numbers: Numbers, state=None) -> State:
    """The state that a call starts from: one before step 0, or ``state`` taken up."""
    if state is None:
        return start(spec, numbers)
    _require_same_problem(start.eval_shape(spec, numbers), state)
    return _resumed(start(spec, numbers), state)


def _require_same_problem(fresh: State, state) -> None:
    """A ValueError names the first leaf of ``state`` that differs from ``fresh``."""
    for name in ("params", "opt_state"):
        _require_alike(f"state.{name}", getattr(state, name), getattr(fresh, name))
    old, new = state.run, fresh.run
    for name in ("history", "checks"):
        rows = np.shape(getattr(old, name).step)[-1]
        expected = np.shape(getattr(new, name).step)[-1]
        if rows != expected:
            raise ValueError(
                f"state.run.{name} has room for {rows} rows, this call for {expected}: "
                "pass the history_rows of the first run, and batch_size only if it had "
                "one."
            )


def _resumed(fresh: State, state) -> State:
    """``state`` in the form of ``fresh``: another rule finds fresh memory."""
    old, new = state.run, fresh.run
    same_rule = _alike((old.watch, old.rule), (new.watch, new.rule))
    run = replace(
        old,
        watch=old.watch if same_rule else new.watch,
        rule=old.rule if same_rule else new.rule,
        status=old.status if same_rule else new.status,
        seen=old.seen if same_rule else new.seen,
        arrived=old.arrived if _alike(old.arrived, new.arrived) else new.arrived,
        anchor=old.anchor if _alike(old.anchor, new.anchor) else new.anchor,
    )
    return replace(state, run=run)


def _alike(a, b) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(
        np.shape(x) == np.shape(y) and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _require_alike(name, tree, expected) -> None:
    fix = (
        "go on with the params, optimizer and fun of the run that made the state (a "
        "schedule keeps a counter of steps, a number none)"
    )
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        raise ValueError(
            f"{name} is of another problem: expected {jax.tree.structure(expected)}, "
            f"got {jax.tree.structure(tree)}; {fix}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, leaf), like in pairs:
        if np.shape(leaf) != np.shape(like) or leaf.dtype != like.dtype:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is of another problem: expected "
                f"{like.dtype}{list(np.shape(like))}, got {leaf.dtype}"
                f"{list(np.shape(leaf))}; {fix}."
            )
