"""What was not finite: looked for on the host, once a run has ended badly.

This room owns the finding. A compiled program tells that a number was not finite, and
where; which row of the data, which leaf of the gradient or which learning rate it was
costs a look that only such a run takes. Inside ``jit`` there is no host to take it.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._checks import short
from jaxgd._devices.layout import undisturbed, untyped
from jaxgd._loop.parts import make_parts, stop_rule
from jaxgd._loop.plan import Numbers, Spec, block_of_pass, objective_of, rate_of
from jaxgd._problem.objective import Batch
from jaxgd._result.diagnosis import blown_up
from jaxgd._result.result import Cause, Result
from jaxgd._rows.order import rows_of_steps
from jaxgd._rows.stream import Stream
from jaxgd._rules.adapter import counts_by_itself, evaluation_params
from jaxgd._stop.status import Status

# Seconds for a look through the data, entries of them at a time, and rows of a batch
# that are evaluated one by one.
_SECONDS, _ENTRIES, _ROWS = 2.0, 2**22, 4096
BAD = (Status.DIVERGED, Status.NON_FINITE)


def explained(spec: Spec, numbers: Numbers, result: Result) -> Result:
    """``result`` of a single run with its cause, where one is found."""
    if any(map(_tree.is_traced, (result.status, result.skipped, result.value))):
        return result
    if np.shape(result.status):
        return result
    bad = int(result.status) in BAD
    if not (bad or (int(result.skipped) and not np.isfinite(result.value))):
        return result
    leaves = jax.tree.leaves((numbers, result))
    if any(map(_tree.is_traced, leaves)):  # by a derivative alone
        return result
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves):
        return result  # other processes have the rest, and may not look
    spec = spec._replace(lanes=False, axes=())
    return replace(result, cause=_cause(spec, numbers, result))


def _cause(spec: Spec, numbers: Numbers, result: Result) -> Cause | None:
    status, state = Status(int(result.status)), result.state
    if status is Status.NON_FINITE:
        place = _bad_entry("params", state.params)
        if place is not None:
            return Cause("params", f"{place[0]} is {place[1]}")
    if status in BAD:
        found = _bad_rate(spec, numbers, state)
        if found is not None:
            return found
        if status is Status.DIVERGED and blown_up(result):
            return None
    evaluated = spec.batch_size is None or spec.final_evaluation
    fine = np.isfinite(result.value) and np.isfinite(result.grad_norm)
    if numbers.data is not None and not (evaluated and fine):
        found = _bad_row(numbers.data)
        if found is not None:
            return found
    scanned = spec.exactly is not None and status is Status.DIVERGED
    if status not in BAD or scanned or isinstance(numbers.data, Stream):
        return None
    if spec.layout is not None:
        return None
    moves = status is Status.DIVERGED
    found = _seen_again(spec, moves, numbers, result)
    if found is not None or spec.batch_size is None or not evaluated or fine:
        return found
    block = block_of_pass(spec, numbers.data)  # a pass over all rows saw it, no batch
    spec = spec._replace(batch_size=None, strata=1, microbatch_size=block)
    return _seen_again(spec, False, numbers, result)


def _bad_rate(spec: Spec, numbers: Numbers, state) -> Cause | None:
    """A learning rate that a schedule gives and that is not finite."""
    rate: Any = rate_of(spec, numbers)
    if not callable(rate) or counts_by_itself(state.opt_state):
        return None
    step = int(state.step)
    steps = np.arange(0 if spec.exactly is not None else step, step + 1)[: 10**6]
    rates = np.asarray(jnp.vectorize(rate)(jnp.asarray(steps, jnp.int32)))
    bad = np.flatnonzero(~np.isfinite(rates))
    if not bad.size:
        return None
    words = f"the learning rate of step {steps[bad[0]]} is {_named(rates[bad[0]])}"
    return Cause("schedule", words)


def _bad_entry(name: str, tree) -> tuple[str, str] | None:
    """The first entry of a pytree that is not finite: (its place, what it is)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        flat = np.asarray(leaf).reshape(-1)
        bad = np.flatnonzero(~np.isfinite(flat))
        if bad.size:
            index = [int(i) for i in np.unravel_index(bad[0], np.shape(leaf))]
            place = f"{name}{jax.tree_util.keystr(path)}"
            return place + (str(index) if index else ""), _named(flat[bad[0]])
    return None


def _bad_row(data) -> Cause | None:
    """The first row of the first leaf of the data that is not finite."""
    if isinstance(data, Stream):
        data = data.arrays()
    until = time.monotonic() + _SECONDS
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        rows = max(1, _ENTRIES // max(1, int(np.prod(leaf.shape[1:]))))
        for first in range(0, leaf.shape[0], rows):
            if time.monotonic() > until:
                return None
            some = np.asarray(leaf[first : first + rows])
            some = some.reshape(some.shape[0], -1)
            bad = np.flatnonzero(~np.isfinite(some).all(1))
            if bad.size:
                row, name = int(bad[0]), f"data{jax.tree_util.keystr(path)}"
                entry = some[row][~np.isfinite(some[row])][0]
                words = f"row {first + row} of {name} is not finite"
                return Cause("data", f"{words} ({_named(entry)})")
    return None


def _seen_again(spec: Spec, moves: bool, numbers: Numbers, result) -> Cause | None:
    """What is not finite of the objective where the run ended, or a step after that."""
    step = int(result.steps)
    with undisturbed(spec.places):
        look = partial(_look, spec, moves)
        params, value, kinds, jump = untyped(look, numbers, result.state)
        value, kinds, (jump, length) = map(np.asarray, (value, kinds, jump))
        if not np.isfinite(jump):
            name, what = _bad_entry("params", params) or ("params", "infinite")
            made = f"the update rule made {name} {what}"
            return Cause("update", f"{made} of a finite gradient at step {step}")
        if np.isfinite(value) and not kinds.any():
            return None
        overflow = np.isposinf(value) or not (np.isnan(value) or kinds[:, 0].any())
        if jump > (1 if overflow else 1e3) * (1 + length):
            far = f"step {step} moved params by {jump:.2g}, to where it overflows"
            return Cause("rate", far)
        row = _bad_place(spec, numbers, result.state, params, step + moves)
    when = f"at step {step + moves}" if step + moves else "at the start"
    if np.isfinite(value):
        bad = int(np.argmax(kinds.any(1)))
        path = jax.tree_util.tree_leaves_with_path(params)[bad][0]
        what = "NaN" if kinds[bad, 0] else "infinite"
        name = f"params{jax.tree_util.keystr(path)}"
        words = f"{when} the value is finite, the gradient of {name} is {what}{row}"
        return Cause("gradient", words)
    at = f"params = {_shown(params)}"
    words = f"the objective is not finite ({_named(value)}) {when}, where {at}{row}"
    return Cause("objective", words)


@partial(jax.jit, static_argnums=(0, 1))
def _look(spec: Spec, moves: bool, numbers: Numbers, state):
    """What the run saw in the end: (params, value, NaN and infinity by leaf, norms).

    ``moves``: after the step that leaves ``state``. The norms are those of this step
    and of the parameters that it left.
    """
    core, batch = replace(state, run=None), Batch(numbers.data)
    if spec.batch_size is not None or spec.with_key or moves:
        parts, _ = make_parts(spec, numbers, state, stop_rule(spec, numbers))
        inputs = parts.inputs(state.step, jnp.bool_(not moves))
        if moves:
            core, _ = parts.step(core, jax.tree.map(lambda x: x[0], inputs))
        batch = parts.batch(jax.tree.map(lambda x: x[int(moves)], inputs))
    params = evaluation_params(core.opt_state, core.params)
    objective = objective_of(spec, numbers, spec.microbatch_size)
    (value, _), grad = objective.value_and_grad(params, *batch)
    kinds = [
        jnp.stack([jnp.any(jnp.isnan(g)), jnp.any(jnp.isinf(g))])
        for g in jax.tree.leaves(grad)
    ]
    change = _tree.subtract(core.params, state.params)
    dtype = _tree.real_dtype(params)
    norms = [_tree.norm(tree, dtype) for tree in (change, state.params)]
    return params, value, jnp.stack(kinds), jnp.stack(norms)


def _bad_place(spec: Spec, numbers: Numbers, state, params, step) -> str:
    """The first row seen whose own value or gradient is not finite, in words.

    Where those of all rows are not, it is no row that makes the difference.
    """
    if spec.n is None or spec.with_key or (spec.batch_size or spec.n) > _ROWS:
        return ""
    every = np.arange(spec.n, dtype=np.int32)
    rows = every
    if spec.batch_size is not None:
        sizes = spec.n, spec.batch_size, spec.strata
        since = state.run.rows
        rows = rows_of_steps(state.run.key, *sizes, jnp.int32(step), 1, since)[0]
        rows = np.asarray(rows)
    looked_at = every if spec.n <= _ROWS else rows
    try:
        bad = np.asarray(_bad_rows(spec, numbers, params, looked_at))
    except Exception:  # an objective that takes no single row
        return ""
    if bad.all() and bad.size > 1:
        return ""
    bad = rows[np.isin(rows, looked_at[bad])]
    return f" (row {bad[0]} of the data)" if bad.size else ""


@partial(jax.jit, static_argnums=0)
def _bad_rows(spec: Spec, numbers: Numbers, params, rows):
    """Whether value or gradient of each of these rows alone is not finite."""
    objective = objective_of(spec, numbers)

    def of(row):
        one = jax.tree.map(lambda x: x[row][None], numbers.data)
        (value, _), grad = objective.value_and_grad(params, one, None)
        return ~(jnp.isfinite(value) & _tree.all_finite(grad))

    return lax.map(of, rows)


def _named(x) -> str:
    """What a number that is not finite is called."""
    x = np.asarray(x)
    if np.isnan(x):
        return "NaN"
    return "infinite" if np.iscomplexobj(x) or x > 0 else "minus infinity"


def _shown(params) -> str:
    """Parameters as a sentence can show them."""

    def one(leaf):
        leaf = np.asarray(leaf)
        leaf = leaf.astype(np.complex64 if np.iscomplexobj(leaf) else np.float32)
        return np.array2string(leaf, precision=5, threshold=6, edgeitems=2)

    form = jax.tree.map(one, params)
    text = form if isinstance(form, str) else str(form).replace("'[", "[")
    return short(" ".join(text.replace("]'", "]").split()), 80)
