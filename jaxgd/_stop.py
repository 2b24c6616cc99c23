"""Stop rules: pure functions of what a check saw and what the rule remembers.

This room owns the criteria of convergence and the judgment whether a rule that holds
means success. It plugs into the loop as ``judge``, a function of one check; nothing
here knows gradients, data or chunks.
"""

import functools
import inspect
import operator
import types
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxgd import _rules, _tree
from jaxgd._loop import Check
from jaxgd._result import Criterion, Status

# A run that stood still for so many steps will not move again; fewer could be a warm-up
# from rate 0 or the wait of accumulated gradients.
STILL_STEPS = 100

# Tolerances of stop="auto" by the precision of the parameters: (atol, rtol).
_AUTO = {"float64": (1e-10, 1e-8), "float32": (1e-6, 1e-5)}
_AUTO_HALF = (1e-3, 1e-2)


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
    )


def value_change(rtol=None, atol=None, patience=1) -> StopRule:
    r"""Stop when the objective no longer changes.

    .. math:: |J(\theta) - J(\theta')| \le \text{atol} + \text{rtol}\,|J(\theta)|

    at ``patience`` checks in a row, :math:`\theta'` being the iterate of the check
    before. If the gradient is still large there, more than half of the largest at any
    check, the status is STALLED: so it is for a tiny rate, and also for a start so good
    that the gradient hardly falls any more.

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
    )


def params_change(rtol=None, atol=None, patience=1) -> StopRule:
    r"""Stop when the parameters no longer change.

    .. math:: \|\theta - \theta'\|_2 \le \text{atol} + \text{rtol}\,\|\theta\|_2

    at ``patience`` checks in a row, :math:`\theta'` being the iterate of the check
    before. If the gradient is still large there, the status is STALLED.

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
    value = _number("target_value", "value", value, nonnegative=False)
    return StopRule(
        init=_nothing,
        update=Partial(_target_reached, value),
        status=Status.TARGET_REACHED,
        describe=Partial(_describe_target, value),
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
    """``gradient_norm`` with tolerances that the dtypes of ``params`` can resolve."""
    atol, rtol = _auto_tolerances(params)
    return gradient_norm(atol=atol, rtol=rtol)


class Watch(NamedTuple):
    """What a run remembers of its checks: the rule's memory, and the loop's own."""

    memory: Any
    started: Any  # bool: the memory holds a check
    value: Any  # the objective at the check before
    lowest: Any  # the lowest objective at any check
    largest: Any  # the largest gradient norm at any check
    still: Any  # int32: steps in a row that stood still


def fresh_watch(rule: StopRule, params) -> Watch:
    """The memory of a run whose rule has seen nothing yet."""
    dtype = _tree.real_dtype(params)
    memory = jax.eval_shape(rule.init, Check.like(dtype))
    zero = jnp.zeros((), dtype)
    memory = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), memory)
    return Watch(memory, jnp.bool_(False), zero, zero + jnp.inf, zero, jnp.int32(0))


def make_judge(rule: StopRule, params):
    """``judge(watch, check, moved) -> (watch, code)`` with a ``Status`` code.

    ``moved``: whether the last step changed any parameter, or None where checks are
    further apart. A step stands still that changes no bit, or that lowers the objective
    no further and is as small as rounding (a cycle between neighboring numbers).
    A "settled" rule that holds while the gradient is still large is no success: either
    the steps are too small (the gradient has not even halved), or the objective and
    parameters are at the resolution of their dtype (then a gradient of ten times the
    root of that resolution is large; J - J* goes with its square).
    """
    dtype = _tree.real_dtype(params)
    floor, _ = _auto_tolerances(params)
    eps = float(np.finfo(dtype).eps)

    def judge(watch: Watch, check: Check, moved=None):
        memory = _tree.select(
            watch.started, watch.memory, _like(rule.init(check), watch.memory)
        )
        memory, holds = rule.update(memory, check)
        memory = _like(memory, watch.memory)
        code = jnp.int32(rule.status(memory) if callable(rule.status) else rule.status)
        largest = jnp.fmax(watch.largest, check.grad_norm)
        still = watch.still
        unresolved = watch.started & (
            jnp.abs(check.value - watch.value) <= 2 * eps * jnp.abs(check.value)
        )
        if moved is not None:
            tiny = check.update_norm <= 4 * eps * check.params_norm
            rounding = tiny & (check.update_norm > 0)
            stands = ~moved | (rounding & (check.value >= watch.lowest))
            still = jnp.where(stands & watch.started, watch.still + 1, 0)
            unresolved = unresolved | (still > 0)
        share = jnp.where(unresolved, 10 * eps**0.5, 0.5)
        large = (check.grad_norm > share * largest) & (check.grad_norm > floor)
        settled = (code == Status.VALUE_SETTLED) | (code == Status.PARAMS_SETTLED)
        code = jnp.where(settled & large, Status.STALLED, code)
        otherwise = jnp.where(still >= STILL_STEPS, Status.STALLED, Status.RUNNING)
        lowest = jnp.fmin(watch.lowest, check.value)
        watch = Watch(memory, jnp.bool_(True), check.value, lowest, largest, still)
        return watch, jnp.where(holds, code, otherwise).astype(jnp.int32)

    return judge


def fields_used(rule: StopRule, params) -> frozenset:
    """The fields of ``Check`` that the rule looks at: the others cost nothing."""
    check = Check.like(_tree.real_dtype(params))
    memory = fresh_watch(rule, params).memory
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


def fingerprint(rule: StopRule) -> int:
    """A number for the functions of a rule, the same in every process.

    Two rules are the same where this and their numbers agree.
    """
    return zlib.crc32(repr(_identity(rule)).encode())


def _identity(part, fixed=False, within=()):
    """What a function is made of; ``fixed``: its arrays are part of it, not data."""
    if id(part) in within:  # a function that calls itself
        return "itself"

    def of(inner, fixed=fixed):
        return _identity(inner, fixed, (*within, id(part)))

    if isinstance(part, StopRule):
        return of((part.init, part.update, part.status))
    if isinstance(part, functools.partial):
        held = fixed or not isinstance(part, Partial)
        return of(part.func), of(part.args, held), of(part.keywords, held)
    if isinstance(part, tuple | list):
        return tuple(map(of, part))
    if isinstance(part, dict):
        return tuple((str(name), of(part[name])) for name in sorted(part, key=str))
    if isinstance(part, types.CodeType):
        return part.co_code, part.co_names, of(part.co_consts)
    if isinstance(part, types.MethodType):
        return of(part.__func__), of(part.__self__, True)
    if isinstance(part, types.FunctionType):
        cells = inspect.getclosurevars(part).nonlocals
        defaults = (part.__defaults__, part.__kwdefaults__)
        name = part.__module__, part.__qualname__
        return name, of(part.__code__), of(cells, True), of(defaults, True)
    if hasattr(part, "__wrapped__"):  # by jax.jit, for example
        return of(part.__wrapped__)
    if hasattr(part, "dtype"):
        if not fixed or _tree.is_traced(part):
            return "number"
        return str(part.dtype), np.shape(part), np.asarray(part).tobytes()
    if part is None or isinstance(part, int | float | complex | str | bytes):
        return repr(part)
    name = type(part).__qualname__
    if isinstance(part, type | types.ModuleType):
        return name, part.__name__
    return name, of(getattr(part, "__dict__", {}), True)


# The rules themselves, as module-level functions: their identity is part of a compiled
# program's key, their numbers are not.


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
                f"{name} takes stop rules, got {_rules.describe(rule)} as argument "
                f"{i}: pass for example jaxgd.{name}(jaxgd.gradient_norm(atol=1e-6))."
            )
    return StopRule(
        init=Partial(_init_each, rules),
        update=Partial(update, rules),
        status=_code_remembered,
        describe=Partial(_describe_each, rules),
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


def _auto_tolerances(params) -> tuple[float, float]:
    reals = {np.dtype(leaf.real.dtype).name for leaf in jax.tree.leaves(params)}
    pairs = [_AUTO.get(name, _AUTO_HALF) for name in reals]
    return max(pairs)


def _tolerances(rule, **given) -> list:
    if all(value is None for value in given.values()):
        names = " nor ".join(given)
        raise ValueError(
            f"{rule} needs a tolerance, got neither {names}: pass for example "
            f"jaxgd.{rule}({next(iter(given))}=1e-6)."
        )
    return [
        0.0 if value is None else _number(rule, name, value, nonnegative=True)
        for name, value in given.items()
    ]


def _number(rule, name, value, nonnegative):
    if _tree.is_traced(value):
        return value
    array = np.asarray(value) if hasattr(value, "dtype") else value
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real and getattr(value, "dtype", np.dtype(bool)).kind not in "fiuV":
        raise TypeError(
            f"{rule}: {name} must be a real number, got {value!r}: pass for example "
            "1e-6."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{rule}: {name} must be a scalar, got shape {np.shape(value)}: pass for "
            "example 1e-6, or vmap."
        )
    if np.isnan(array) or (nonnegative and array < 0):
        low = " >= 0" if nonnegative else ""
        raise ValueError(
            f"{rule}: {name} must be a number{low}, got {value!r}: pass for example "
            "1e-6."
        )
    return value if isinstance(value, jax.Array) else float(array)


def _patience(rule, patience):
    if _tree.is_traced(patience):
        return patience
    try:
        number = operator.index(patience)
    except TypeError:
        number = None
    if number is None or isinstance(patience, bool):
        raise TypeError(
            f"{rule}: patience must be a whole number of checks, got {patience!r}: "
            "pass for example 1."
        )
    if not 1 <= number < 2**31:
        raise ValueError(
            f"{rule}: patience must be at least 1 and below 2**31, got {number}: pass "
            "1."
        )
    return np.asarray(number, np.int32)
