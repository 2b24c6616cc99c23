"""Stop rules: pure functions of what a check saw and what the rule remembers.

This room owns the criteria of convergence. Whether a rule that holds means success is
judged next door (``_stop/judge``).
"""

import functools
import inspect
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxgd import _tree
from jaxgd._checks import LAST_STEP, real, whole
from jaxgd._rules import adapter
from jaxgd._stop.judge import resolution
from jaxgd._stop.status import Check, Criterion, Status

AUTO = "auto"  # the name of the rule of stop="auto"
# Of the whole fall of an objective that vanishes, what stop="auto" leaves, by the
# finest precision of a parameter.
_LEFT = {"float64": 1e-16, "float32": 1e-10}
_LEFT_HALF = 1e-4
# Below so many times that, the gradient is small; else rounding alone ends the run.
_SMALL = 1e4
# An objective that is still to fall by more than this share of itself vanishes.
_VANISHES = 1e-2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopRule:
    """A stop rule of your own: a pair of pure functions, and what it means.

    At the first check ``memory = init(check)``; then at every check, the first
    included, ``memory, holds = update(memory, check)``. The run ends where it holds.

    Attributes:
      init: ``Check -> memory``, any pytree of arrays.
      update: ``(memory, Check) -> (memory, bool scalar)``. Numbers held by a
        ``jax.tree_util.Partial`` are data: new ones cost no compilation.
      status: the ``Status`` of a run that the rule ends, or a function
        ``memory -> code`` that says which.
      describe: optional, ``(memory, Check) -> tuple of Criterion`` for the report.
      name: optional, what the rule is called in a saved run; by default the module and
        qualified name of ``update`` (of its class, for a callable object). A run that
        goes on keeps the memory of its rule where the name, the shapes and dtypes of
        the memory and the numbers in each ``Partial`` are those of before; otherwise
        the rule starts with fresh memory. Code is not compared, so a run survives
        another version of Python, and two lambdas of one qualified name (of one
        function, or of one module) with memories of one form are the same rule, as is
        one whose code was edited in between: give them names that differ, or hold in a
        ``Partial`` the number that does. A run that was ended under that name stays
        ended where this rule holds at the last check as well.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> rule = jaxgd.StopRule(  # the largest entry of the gradient
      ...     init=lambda check: (),
      ...     update=lambda memory, check: (memory, check.grad_max <= 1e-3),
      ...     status=jaxgd.Status.GRADIENT_SMALL,
      ... )
      >>> result = jaxgd.minimize(
      ...     lambda x: jnp.sum(x**2), jnp.ones(2), learning_rate=0.3, stop=rule
      ... )
      >>> bool(result.converged)
      True
    """

    init: Any
    update: Any
    status: Any = field(metadata={"static": True})
    describe: Any = None
    name: Any = field(default=None, metadata={"static": True})

    def __post_init__(self):
        if not (self.name is None or isinstance(self.name, str)):
            raise TypeError(
                "stop: name of a StopRule must be a str or None, got "
                f"{adapter.describe(self.name)}: pass for example 'no better in 3 "
                "checks', or leave it out."
            )


def gradient_norm(atol=None, rtol=None) -> StopRule:
    r"""Stop when the gradient is small.

    .. math:: \|\nabla J(\theta)\|_2 \le \text{atol}
              + \text{rtol}\,\|\nabla J(\theta_0)\|_2

    With ``batch_size``, the gradient is the full one and :math:`\theta_0` is the
    iterate of the first check.

    Args:
      atol: absolute tolerance, in units of the gradient; 0 if only rtol is given.
      rtol: tolerance relative to the first gradient; 0 if only atol is given.

    Raises:
      TypeError, ValueError: if a tolerance is no number, negative or NaN, or none is
        given.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.gradient_norm(atol=1e-6, rtol=1e-4)

    References:
      Nocedal and Wright, Numerical Optimization (2006), section 3.2.
    """
    atol, rtol = _tolerances("gradient_norm", atol=atol, rtol=rtol)
    return StopRule(
        init=_first_grad_norm,
        update=Partial(_gradient_small, atol, rtol),
        status=Status.GRADIENT_SMALL,
        describe=Partial(_describe_gradient, atol, rtol),
        name="gradient_norm",
    )


def value_change(rtol=None, atol=None, patience=1) -> StopRule:
    r"""Stop when the objective no longer changes.

    .. math:: |J(\theta) - J(\theta')| \le \text{atol} + \text{rtol}\,|J(\theta)|

    at ``patience`` checks in a row, :math:`\theta'` being the iterate of the check
    before. If the gradient is still large there, the status is STALLED: where it is
    more than half of the largest at any check (so it is for a tiny rate, and also for a
    start so good that the gradient hardly falls any more), and where it has never
    become a fifth smaller from one check to the next while the objective falls at each,
    with a hundred times its last change to come. Of mini-batches the first counts only
    where the objective falls at each check; neither does where no further decrease is
    possible in the dtype. Where the update rule is coming to rest at a fixed point of
    its own, the status is AT_REST.

    Args:
      rtol: tolerance relative to the objective; 0 if only atol is given.
      atol: absolute tolerance, in units of the objective; 0 if only rtol is given.
      patience: how many checks in a row, at least 1.

    Raises:
      TypeError, ValueError: as ``gradient_norm``, and for a patience below 1.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.value_change(rtol=1e-6, patience=3)
    """
    rtol, atol = _tolerances("value_change", rtol=rtol, atol=atol)
    patience = _patience("value_change", patience)
    return StopRule(
        init=_first_value,
        update=Partial(_value_settled, rtol, atol, patience),
        status=Status.VALUE_SETTLED,
        describe=Partial(_describe_value, rtol, atol, patience),
        name="value_change",
    )


def params_change(rtol=None, atol=None, patience=1) -> StopRule:
    r"""Stop when the parameters no longer change.

    .. math:: \|\theta - \theta'\|_2 \le \text{atol} + \text{rtol}\,\|\theta\|_2

    at ``patience`` checks in a row, :math:`\theta'` being the iterate of the check
    before. If the gradient is still large there, the status is STALLED or AT_REST, as
    that of ``value_change``.

    Args:
      rtol: tolerance relative to the parameters; 0 if only atol is given.
      atol: absolute tolerance, in units of the parameters; 0 if only rtol is given.
      patience: how many checks in a row, at least 1.

    Raises:
      TypeError, ValueError: as ``value_change``.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.params_change(rtol=1e-6)
    """
    rtol, atol = _tolerances("params_change", rtol=rtol, atol=atol)
    patience = _patience("params_change", patience)
    return StopRule(
        init=_none_in_a_row,
        update=Partial(_params_settled, rtol, atol, patience),
        status=Status.PARAMS_SETTLED,
        describe=Partial(_describe_params, rtol, atol, patience),
        name="params_change",
    )


def target_value(value) -> StopRule:
    r"""Stop when the objective reaches a target, :math:`J(\theta) \le \text{value}`.

    Args:
      value: the target, in units of the objective.

    Raises:
      TypeError, ValueError: if the target is no number or NaN.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.target_value(0.05)
    """
    value = _number("target_value", "value", value, low=-math.inf)
    return StopRule(
        init=_nothing,
        update=Partial(_target_reached, value),
        status=Status.TARGET_REACHED,
        describe=Partial(_describe_target, value),
        name="target_value",
    )


def any_of(*rules: StopRule) -> StopRule:
    """Stop when any of the rules holds; the status is that of the first that does.

    Raises:
      TypeError, ValueError: if something is no stop rule, or there is none.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.any_of(jaxgd.gradient_norm(1e-6), jaxgd.target_value(0.1))
    """
    return _combined("any_of", _any_holds, rules)


def all_of(*rules: StopRule) -> StopRule:
    """Stop when all of the rules hold at one check; the status is that of the first.

    Raises:
      TypeError, ValueError: if something is no stop rule, or there is none.

    Example:
      >>> import jaxgd
      >>> rule = jaxgd.all_of(jaxgd.gradient_norm(1e-3), jaxgd.value_change(1e-6))
    """
    return _combined("all_of", _all_hold, rules)


def auto_rule(params) -> StopRule:
    """The rule of ``stop="auto"``: nothing is left to be gained in these dtypes.

    With E the decrease that is still to be expected (``Check.expected_decrease``), the
    run ends where E is below the rounding of the objective, or, where the objective
    itself vanishes, below a share of its whole fall.
    """
    eps = resolution(params)
    return StopRule(
        init=_first_and_lowest,
        update=Partial(_nothing_to_gain, eps, _share(params)),
        status=_code_last,
        describe=Partial(_describe_expected, eps, _share(params)),
        name=AUTO,
    )


def memory_of(rule: StopRule, params):
    """The memory of a rule that has seen nothing yet: zeros."""
    return jax.tree.map(
        lambda m: jnp.zeros(m.shape, m.dtype), _memory_form(rule, params)
    )


def _memory_form(rule: StopRule, params):
    """The memory of a rule, shapes and dtypes in place of arrays."""
    return jax.eval_shape(rule.init, Check.like(_tree.real_dtype(params)))


def fields_used(rule: StopRule, params) -> frozenset:
    """The fields of ``Check`` that the rule looks at: the others cost nothing."""
    check = Check.like(_tree.real_dtype(params))
    memory = memory_of(rule, params)
    used = set()
    functions = [(rule.init, ()), (rule.update, (memory,))]
    if rule.describe is not None:
        functions.append((rule.describe, (memory,)))
    for function, args in functions:
        jaxpr = jax.make_jaxpr(function)(*args, check).jaxpr
        read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
        read |= {id(v) for v in jaxpr.outvars}
        inputs = jaxpr.invars[-len(check) :]
        used |= {
            name for name, v in zip(Check._fields, inputs, strict=True) if id(v) in read
        }
    return frozenset(used)


def describe(rule: StopRule, memory, check: Check, holds) -> tuple:
    """Each criterion of the rule with what it saw, its threshold and its verdict."""
    if rule.describe is not None:
        return tuple(rule.describe(memory, check))
    nan = jnp.full_like(check.value, jnp.nan)
    return (Criterion("your stop rule", nan, nan, holds),)


def fingerprint(rule: StopRule, params) -> int:
    """A number for the name of a rule and the form of its memory.

    It is the same in every process and for every version of Python and JAX, which
    neither bytecode nor the text of a tree structure would be. Two rules are the same
    where this and their numbers agree.
    """
    form = jax.tree_util.tree_leaves_with_path(_memory_form(rule, params))
    lines = [f"{_place(path)} {x.dtype.name} {[*x.shape]}" for path, x in form]
    text = "\n".join([name_of(rule), *lines])
    return zlib.crc32(text.encode(errors="backslashreplace"))


def _place(path) -> str:
    """A path as indices, keys and names; JAX may come to spell its own otherwise."""
    steps = []
    for entry in path:
        told = [getattr(entry, name, None) for name in ("idx", "key", "name")]
        steps.append(next((str(x) for x in told if x is not None), str(entry)))
    return "/".join(steps)


def name_of(rule: StopRule) -> str:
    """The name of a rule, or that of the function that it calls at every check."""
    if rule.name is not None:
        return rule.name
    function = rule.update
    while True:  # what wraps a function says nothing of it
        if isinstance(function, functools.partial):  # a Partial too
            function = function.func
        elif hasattr(function, "__wrapped__"):  # by jax.jit, for example
            function = inspect.unwrap(function)
        else:
            break
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


# The rules themselves, as module-level functions: they are part of a compiled program's
# key, their numbers are not.


def _nothing(check):
    return ()


def _first_grad_norm(check):
    return check.grad_norm


def _gradient_small(atol, rtol, first, check):
    return first, check.grad_norm <= atol + rtol * first


def _describe_gradient(atol, rtol, first, check):
    threshold = atol + rtol * first
    holds = check.grad_norm <= threshold
    return (Criterion("gradient norm", check.grad_norm, threshold, holds),)


def _first_and_lowest(check):
    inf = jnp.full_like(check.value, jnp.inf)
    return check.value, check.value, inf, jnp.int32(Status.GRADIENT_SMALL)


def _thresholds(eps, share, first, lowest, value):
    """Of the rounding of the objective, and of the share of its fall."""
    return eps * jnp.abs(value), share * (first - lowest)


def _nothing_to_gain(eps, share, memory, check):
    first, lowest, _, _ = memory
    left, value = check.expected_decrease, check.value
    lowest = jnp.fmin(lowest, value)
    rounding, part = _thresholds(eps, share, first, lowest, value)
    vanishes = left > _VANISHES * jnp.abs(value)
    holds = (left <= rounding) | (vanishes & (left <= part))
    small = left <= _SMALL * part
    code = jnp.where(small, Status.GRADIENT_SMALL, Status.PRECISION_REACHED)
    return (first, lowest, left, code.astype(jnp.int32)), holds


def _code_last(memory):
    return memory[-1]


def _describe_expected(eps, share, memory, check):
    first, lowest, left, _ = memory
    rounding, part = _thresholds(eps, share, first, lowest, check.value)
    vanishes = left > _VANISHES * jnp.abs(check.value)
    threshold = jnp.where(vanishes, part, rounding)
    return (Criterion("expected decrease", left, threshold, left <= threshold),)


def _none_in_a_row(check):
    return jnp.int32(0)


def _first_value(check):
    # NaN: the first check has none before it, and no comparison with NaN holds.
    nan = jnp.full_like(check.value, jnp.nan)
    return nan, nan, jnp.int32(0)


def _value_settled(rtol, atol, patience, memory, check):
    before, _, in_a_row = memory
    change = jnp.abs(check.value - before)
    in_a_row = jnp.where(change <= atol + rtol * jnp.abs(check.value), in_a_row + 1, 0)
    return (check.value, change, in_a_row), in_a_row >= patience


def _describe_value(rtol, atol, patience, memory, check):
    _, change, in_a_row = memory
    threshold = atol + rtol * jnp.abs(check.value)
    return (Criterion("change of objective", change, threshold, in_a_row >= patience),)


def _params_settled(rtol, atol, patience, in_a_row, check):
    threshold = atol + rtol * check.params_norm
    in_a_row = jnp.where(check.update_norm <= threshold, in_a_row + 1, 0)
    return in_a_row, in_a_row >= patience


def _describe_params(rtol, atol, patience, in_a_row, check):
    threshold = atol + rtol * check.params_norm
    holds = in_a_row >= patience
    return (Criterion("change of parameters", check.update_norm, threshold, holds),)


def _target_reached(target, memory, check):
    return memory, check.value <= target


def _describe_target(target, memory, check):
    return (Criterion("objective", check.value, target, check.value <= target),)


def _combined(name, update, rules) -> StopRule:
    if not rules:
        raise ValueError(
            f"{name} needs at least one stop rule, got none: pass rules to it."
        )
    for i, rule in enumerate(rules):
        if not isinstance(rule, StopRule):
            raise TypeError(
                f"{name} takes stop rules, got {adapter.describe(rule)} as argument "
                f"{i}: pass for example jaxgd.{name}(jaxgd.gradient_norm(atol=1e-6))."
            )
    return StopRule(
        init=Partial(_init_each, rules),
        update=Partial(update, rules),
        status=_code_remembered,
        describe=Partial(_describe_each, rules),
        name=f"{name}({', '.join(map(name_of, rules))})",
    )


def _init_each(rules, check):
    memories = tuple(rule.init(check) for rule in rules)
    return memories, jnp.int32(Status.RUNNING), jnp.zeros(len(rules), bool)


def _code_remembered(memory):
    return memory[1]


def _update_each(rules, memory, check):
    memories, verdicts, codes = [], [], []
    for rule, old in zip(rules, memory[0], strict=True):
        new, holds = rule.update(old, check)
        memories.append(_like(new, old))
        verdicts.append(jnp.asarray(holds))
        codes.append(
            jnp.int32(rule.status(new) if callable(rule.status) else rule.status)
        )
    return tuple(memories), jnp.stack(verdicts), jnp.stack(codes)


def _any_holds(rules, memory, check):
    memories, verdicts, codes = _update_each(rules, memory, check)
    return (memories, codes[jnp.argmax(verdicts)], verdicts), jnp.any(verdicts)


def _all_hold(rules, memory, check):
    memories, verdicts, codes = _update_each(rules, memory, check)
    return (memories, codes[0], verdicts), jnp.all(verdicts)


def _describe_each(rules, memory, check):
    found = ()
    for i, (rule, own) in enumerate(zip(rules, memory[0], strict=True)):
        found += describe(rule, own, check, memory[2][i])
    return found


def _like(memory, like):
    return _tree.cast_like(memory, like)


def _share(params) -> float:
    # Of the dtype, not of leaf.real: on a device that is an operation to compile.
    reals = {jnp.finfo(leaf.dtype).dtype.name for leaf in jax.tree.leaves(params)}
    return min(_LEFT.get(name, _LEFT_HALF) for name in reals)


def _tolerances(rule, **given) -> list:
    if all(value is None for value in given.values()):
        names = " nor ".join(given)
        raise ValueError(
            f"{rule} needs a tolerance, got neither {names}: pass for example "
            f"jaxgd.{rule}({next(iter(given))}=1e-6)."
        )
    return [
        0.0 if value is None else _number(rule, name, value)
        for name, value in given.items()
    ]


def _number(rule, name, value, low=0.0):
    real(f"{rule}: {name}", value, "pass for example 1e-6", low=low, finite=False)
    if _tree.is_traced(value) or isinstance(value, jax.Array):
        return value
    return float(value)


def _patience(rule, patience):
    if _tree.is_traced(patience):
        return patience
    return np.asarray(whole(f"{rule}: patience", patience, high=LAST_STEP), np.int32)
