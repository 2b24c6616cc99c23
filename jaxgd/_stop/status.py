"""Words between the rooms: why a run ends, what a stop rule sees and what it says."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Status(enum.IntEnum):
    """Why a run ended. ``Status.X.message`` is a sentence."""

    RUNNING = 0
    GRADIENT_SMALL = 1
    VALUE_SETTLED = 2
    PARAMS_SETTLED = 3
    TARGET_REACHED = 4
    MAX_STEPS = 5
    STALLED = 6
    DIVERGED = 7
    NON_FINITE = 8
    AT_REST = 9
    PRECISION_REACHED = 10

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Status.RUNNING: "The run has not ended.",
    Status.GRADIENT_SMALL: "The gradient is small.",
    Status.VALUE_SETTLED: "The objective no longer changes.",
    Status.PARAMS_SETTLED: "The parameters no longer change.",
    Status.TARGET_REACHED: "The objective reached its target.",
    Status.MAX_STEPS: "The limit on steps was reached.",
    Status.STALLED: "The run stands still before the gradient is small: the steps are "
    "too small, or the numbers are at the limit of their precision.",
    Status.DIVERGED: "An iterate was not finite; the last finite one is returned.",
    Status.NON_FINITE: "The start itself is not finite.",
    Status.AT_REST: "The update rule has come to rest at a point of its own, where the "
    "gradient need not be small.",
    Status.PRECISION_REACHED: "No further decrease is possible in this precision.",
}


def succeeded(status):
    """Whether a status, or each of an array of them, means success."""
    first = (status >= Status.GRADIENT_SMALL) & (status <= Status.TARGET_REACHED)
    return first | (status == Status.AT_REST) | (status == Status.PRECISION_REACHED)


def has_no_bound(value) -> bool:
    """Whether an objective has come near the end of the range of its dtype."""
    value = np.asarray(value)
    return float(value) < -1e-2 * np.finfo(value.dtype).max


class Criterion(NamedTuple):
    """One criterion of a stop rule at the last check.

    Attributes:
      name: what was measured.
      measured: its value.
      threshold: the criterion asks for ``measured <= threshold``.
      holds: whether it did, for as many checks as it asks for.
    """

    name: Any
    measured: Any
    threshold: Any
    holds: Any


jax.tree_util.register_pytree_node(
    Criterion,
    lambda c: (tuple(c[1:]), c.name),
    lambda name, rest: Criterion(name, *rest),
)


class Check(NamedTuple):
    """What a stop rule sees of an iterate: scalars.

    Attributes:
      step: int32, updates applied so far.
      value: the objective, of all rows.
      grad_norm: the 2-norm of its gradient.
      grad_max: the largest absolute entry of its gradient.
      update_norm: the 2-norm of the change of the parameters since the check before
        (NaN at the first).
      params_norm: the 2-norm of the parameters.
      expected_decrease: how far the objective is still expected to fall, judged by the
        last five checks; inf while they cannot tell.
    """

    step: Any
    value: Any
    grad_norm: Any
    grad_max: Any
    update_norm: Any
    params_norm: Any
    expected_decrease: Any

    @staticmethod
    def like(dtype) -> "Check":
        number = jax.ShapeDtypeStruct((), dtype)
        return Check(
            jax.ShapeDtypeStruct((), jnp.int32), *[number] * (len(Check._fields) - 1)
        )
