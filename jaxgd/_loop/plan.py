"""The structure and the numbers of a call.

This room owns what a compiled program is keyed by (``Spec``) and what it is fed with
(``Numbers``), and makes of both what a run is built from: the objective, the rule, the
rate, and how many rows are evaluated at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgd import _tree
from jaxgd._problem.objective import even_block, make_objective
from jaxgd._rows.resident import pass_block
from jaxgd._rows.stream import Stream
from jaxgd._rows.windows import Plan, plan_of
from jaxgd._rules.adapter import (
    call_factory,
    require_rule,
)
from jaxgd._stop.rules import StopRule
from jaxgd._tree import Split


class Spec(NamedTuple):
    """Everything that is structure: the key of the compiled program."""

    fun: Split
    optimizer: Any  # Split, or None for plain descent
    factory: bool
    learning_rate: Split
    hyperparams: Split
    stop: Split | None
    batch_size: Any  # int, or None for all rows
    strata: int
    n: Any  # rows of the data, or None
    layout: Any  # Layout of rows split over devices, or None
    places: Any  # Places of the results, or None
    pieces: int  # of the rows, and of those of a batch, that a block takes its part of
    microbatch_size: int | None
    has_aux: bool
    with_key: bool
    final_evaluation: bool
    history_rows: int
    exactly: int | None  # steps of a static scan
    lanes: bool  # under vmap
    axes: tuple = ()  # of vmap, where lanes share one loop
    work: int = 0  # bytes of intermediate results in one gradient
    pass_rows: int | None = None  # of a block of a full pass, where fun is no mean


class Numbers(NamedTuple):
    """Everything that is data: a pytree of arrays."""

    fun: Any
    params: Any
    data: Any
    args: Any
    optimizer: Any
    learning_rate: Any
    hyperparams: Any
    stop: Any
    key: Any
    mark: Any  # tells the rows from others, see ``Place``


def objective_of(spec: Spec, numbers: Numbers, block=None):
    """The objective of a call, its gradient in blocks of ``block`` rows."""
    return make_objective(
        lambda fun, args: (spec.fun.join(fun), args),
        (numbers.fun, numbers.args),
        has_aux=spec.has_aux,
        block=block,
        pieces=spec.pieces,
        places=spec.places if spec.places is not None and spec.places.split else None,
    )


def rate_of(spec: Spec, numbers: Numbers) -> Any:
    """The rate as the rule gets it: an array, a schedule of that dtype, or None."""
    rate = spec.learning_rate.join(numbers.learning_rate)
    if rate is None or hasattr(rate, "dtype"):
        return rate
    dtype = _tree.real_dtype(numbers.params)
    return lambda step: jnp.asarray(rate(step)).astype(dtype)


def optimizer_of(spec: Spec, numbers: Numbers) -> optax.GradientTransformationExtraArgs:
    """The rule of a call."""
    rate = rate_of(spec, numbers)
    if spec.optimizer is None:
        return optax.with_extra_args_support(optax.sgd(rate))
    optimizer = spec.optimizer.join(numbers.optimizer)
    if not spec.factory:
        return require_rule(optimizer)
    return call_factory(optimizer, rate, spec.hyperparams.join(numbers.hyperparams))


def block_of_pass(spec: Spec, data) -> int:
    """Rows in a block of a full pass of a mini-batch run."""
    if spec.pass_rows is not None:
        return spec.pass_rows
    rows = min(spec.microbatch_size or spec.batch_size, spec.batch_size)
    work = spec.work * rows // spec.batch_size
    block = pass_block(rows, work, spec.n, data)
    if spec.layout is not None:  # each device has its part of it, and of the memory
        block = min(spec.n, block * spec.layout.shards)
    return even_block(spec.n // spec.pieces, -(-block // spec.pieces)) * spec.pieces


def windows_of(spec: Spec, stream: Stream) -> Plan:
    """What the windows of a stream hold, or a ValueError."""
    block = block_of_pass(spec, stream.form.abstract())
    return plan_of(stream, spec.batch_size, block, spec.work)


def block_alone(spec: Spec, factor: int = 1) -> int:
    """Rows to evaluate at once outside of a run, of ``factor`` times its bytes each."""
    known = spec.pass_rows or spec.microbatch_size
    if known:
        return known
    work = factor * spec.work // (spec.batch_size or spec.n)
    return even_block(spec.n, pass_block(1, work, spec.n))


def _part(spec: Spec) -> int:
    """Rows of a block where all rows at once do not fit, or mean something else."""
    return spec.microbatch_size or spec.batch_size or block_alone(spec)


def parts_of(rule: StopRule) -> list:
    """The rules that any_of or all_of made one rule of."""
    leaves = jax.tree.leaves(rule.init, is_leaf=lambda x: isinstance(x, StopRule))
    return [leaf for leaf in leaves if isinstance(leaf, StopRule)]
