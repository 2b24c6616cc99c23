"""Update rules: what optax's states tell of them, and how factories are called.

This room owns the reading of optax: which object is a rule, how a factory is called
with numbers that are data, which rate a state reports, how many points its line search
tried, and at which parameters it is to be judged. It plugs into the step as an ordinary
``optax.GradientTransformationExtraArgs``.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxgd import _tree
from jaxgd._checks import describe
from jaxgd._rules.barzilai_borwein import BarzilaiBorweinState
from jaxgd._rules.parabolic_rms import ParabolicRMSState
from jaxgd._rules.real_view import (
    back,
    back_of_leaf,
    in_form_of,
    is_view,
    real_view,
    view_of_leaf,
    wants_real_view,
)
from jaxgd._rules.scaled_lbfgs import ScaledLBFGSState

# Searches whose state tells value and gradient of the point they arrive at. Of optax's
# backtracking it is the last trial's, accepted or not.
_SEARCHES = (
    BarzilaiBorweinState,
    ScaledLBFGSState,
    optax.ScaleByZoomLinesearchState,
)

# Where a state keeps parameters of its own: SAM, parabolic_rms, schedule-free.
_OWN_PARAMS = ("cache", "average", "z")

_OWN_PACE = (
    optax.MultiStepsState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    contrib.SAMState,
)


class Kind(NamedTuple):
    """What the loop and its judgment have to know of an update rule.

    Attributes:
      plain: its steps are the rate times the gradient.
      searches: they come from a line search.
      averages: the rule is judged at evaluation parameters of its own.
      reported: it tells the decrease that it expects.
      rests: it may have fixed points where the gradient is not 0.
    """

    plain: bool = False
    searches: bool = False
    averages: bool = False
    reported: bool = False
    rests: bool = False


OTHER = Kind()


def is_rule(optimizer) -> bool:
    """Whether an object has the two functions of an optax rule."""
    return callable(getattr(optimizer, "init", None)) and callable(
        getattr(optimizer, "update", None)
    )


def require_rule(optimizer) -> optax.GradientTransformationExtraArgs:
    """The rule, accepting ``value``, ``grad`` and ``value_fn``; else a TypeError."""
    if not is_rule(optimizer):
        raise TypeError(
            "optimizer must be an optax rule such as optax.adam(1e-3), got "
            f"{describe(optimizer)}: call the factory with its learning rate first."
        )
    return _fed(optimizer)


def _fed(rule) -> optax.GradientTransformationExtraArgs:
    """The rule, called with those of the extra arguments that its update takes.

    Besides ``value``, ``grad`` and ``value_fn`` these are ``obj_fn`` (contrib.sophia)
    and ``grad_fn`` (contrib.sam), but only for a rule known to ask for them: the line
    searches of optax refuse names they do not know. A rule that assumes real numbers
    sees complex parameters by their parts (see ``_rules/real_view``).
    """
    takes_any, named = _extras_taken(rule)

    def init(params):
        seen = wants_real_view(rule.init, update, params)
        return rule.init(real_view(params) if seen else params)

    def update_seen(updates, state, params=None, **extras):
        if not wants_real_view(rule.init, update, params):
            return update(updates, state, params, **extras)
        _require_view(state, rule.init, params)
        value_fn = extras["value_fn"]
        extras["grad"] = real_view(extras["grad"])
        extras["value_fn"] = lambda view: value_fn(back(view, params))
        seen = real_view(updates), state, real_view(params)
        view, state = update(*seen, **extras)
        return back(view, params), state

    def update(updates, state, params=None, **extras):
        value_fn = extras["value_fn"]

        def grad_fn(params, *_):
            return optax.tree.conj(jax.grad(value_fn)(params))

        extras |= {"obj_fn": value_fn, "grad_fn": grad_fn}
        wanted = {*named, *(("value", "grad", "value_fn") if takes_any else ())}
        if takes_any and find_state(state, contrib.HutchinsonState) is not None:
            wanted.add("obj_fn")
        extras = {name: x for name, x in extras.items() if name in wanted}
        return rule.update(updates, state, params, **extras)

    return optax.GradientTransformationExtraArgs(init, update_seen)


def update_alone(optimizer, grad, opt_state, params, value):
    """What a rule makes of a gradient and a value that belong to no objective."""

    def value_fn(at):
        leaves = jax.tree.leaves(at)
        return value + sum(jnp.sum(x).real.astype(value.dtype) for x in leaves)

    extras = {"value": value, "grad": grad, "value_fn": value_fn}
    return optimizer.update(grad, opt_state, params, **extras)


def _require_view(state, init, params) -> None:
    """A TypeError where a rule saw complex parameters as they are when it began."""

    def form(state):
        leaves = [(jnp.shape(x), jnp.iscomplexobj(x)) for x in jax.tree.leaves(state)]
        return jax.tree.structure(state), leaves

    seen = jax.eval_shape(lambda: init(real_view(params)))
    if form(state) != form(seen):
        raise TypeError(
            "state must hold real and imaginary parts of complex parameters for this "
            "optimizer, which assumes real numbers, got another form: begin with "
            "jaxgd.init_state(params, optimizer)."
        )


def _extras_taken(rule) -> tuple[bool, tuple]:
    """Whether a rule takes any extra argument, and the names that it does take."""
    extra_args = isinstance(rule, optax.GradientTransformationExtraArgs)
    if isinstance(rule, optax.GradientTransformation) and not extra_args:
        return False, ()
    try:
        parameters = inspect.signature(rule.update).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return extra_args, ()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any, tuple(parameters)[3:]


def check_factory(factory, has_rate: bool, names) -> None:
    """Errors of ``optimizer=factory`` that its signature already tells."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin without a signature: let the call tell
        return
    called = describe(factory)
    kinds = inspect.Parameter
    open_ended = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    positional = [
        name
        for name, p in parameters.items()
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    variadic = any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values())
    if has_rate and not positional and not variadic:
        raise ValueError(
            f"learning_rate must not be given with {called}, a factory that takes no "
            "argument: leave learning_rate out, or let the factory take it first."
        )
    first = positional[0] if positional else None
    wants_rate = first is not None and parameters[first].default is kinds.empty
    if not has_rate and wants_rate and first not in names:
        raise ValueError(
            f"learning_rate is missing: the factory {called} has no default for "
            f"{first!r}; pass learning_rate=..., for example 1e-3."
        )
    known = [name for name in parameters if not (has_rate and name == first)]
    for name in names:
        if name not in known and not open_ended:
            raise ValueError(
                f"hyperparams has {name!r}, which the factory {called} does not take; "
                f"it takes {', '.join(known) or 'none'}."
            )
    fixed = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    for name in known:
        parameter = parameters[name]
        needed = parameter.default is kinds.empty and parameter.kind not in fixed
        if needed and name not in names:
            raise ValueError(
                f"hyperparams must hold {name!r}, which the factory {called} needs, "
                f"got {list(names)}: pass hyperparams={{{name!r}: ...}}."
            )


def call_factory(
    factory, rate, hyperparams: dict
) -> optax.GradientTransformationExtraArgs:
    """``factory(rate, **hyperparams)``, or without the rate where it is None."""
    rule = factory(**hyperparams) if rate is None else factory(rate, **hyperparams)
    if not is_rule(rule):
        raise TypeError(
            f"optimizer must be an optax rule or a function that returns one, "
            f"{describe(factory)} returned {describe(rule)}: return what an optax "
            "factory returns."
        )
    return _fed(rule)


def default_rate(factory) -> Any:
    """The rate a factory uses when none is given, or None where it does not say."""
    try:
        parameter = inspect.signature(factory).parameters.get("learning_rate")
    except (TypeError, ValueError):
        return None
    default = None if parameter is None else parameter.default
    return default if isinstance(default, int | float) else None


def rate_used(opt_state, dtype) -> jax.Array:
    """The learning rate of the last update where the state reports one, else NaN."""
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    rates = [jnp.asarray(rate, dtype) for _, rate in found if _is_scalar(rate)]
    if not rates:
        return jnp.asarray(jnp.nan, dtype)
    # Rules for parts of the parameters may each have a rate: then there is no one rate.
    same = jnp.all(jnp.stack(rates) == rates[0])
    return jnp.where(same, rates[0], jnp.nan)


def reports_rate(opt_state) -> bool:
    """Whether the state of a rule tells the learning rate it used."""
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    return any(_is_scalar(rate) for _, rate in found)


def _is_scalar(rate) -> bool:  # and not the state of a schedule
    return isinstance(rate, int | float) or getattr(rate, "shape", None) == ()


def decrease_expected(opt_state, dtype) -> jax.Array:
    """The decrease that the last rule of a chain expects of a whole step of its own."""
    last: Any = _last_state(opt_state)
    return jnp.asarray(last.decrement, dtype)


def expects_decrease(opt_state) -> bool:
    """Whether the last rule of a chain tells the decrease that it expects."""
    return isinstance(_last_state(opt_state), ScaledLBFGSState)


def trial_points(opt_state) -> jax.Array:
    """Evaluations of the last line search, as far as its state reports them."""
    found = optax.tree.get_all_with_path(opt_state, "num_linesearch_steps")
    return sum((jnp.asarray(n).astype(jnp.int32) for _, n in found), jnp.int32(0))


def known_point(opt_state, params) -> Any:
    """(value, gradient) at the new parameters, where a line search left them; or None.

    ``params``: what they have the form of.

    Only of a search that has the last word: what came after it would have moved on.
    """
    if not keeps_point(opt_state):
        return None
    last: Any = _last_state(opt_state)
    return last.value, back(last.grad, params)


def keeps_point(opt_state) -> bool:
    """Whether a line search left value and gradient at the new parameters."""
    last = _last_state(opt_state)
    return isinstance(last, _SEARCHES) and last.grad is not None


def with_known_point(opt_state, value, grad) -> Any:
    """``opt_state`` with another value and gradient in it."""
    if type(opt_state) is tuple:
        return (*opt_state[:-1], with_known_point(opt_state[-1], value, grad))
    return opt_state._replace(
        value=value.astype(opt_state.value.dtype),
        grad=_tree.cast_like(in_form_of(grad, opt_state.grad), opt_state.grad),
    )


def _last_state(opt_state):
    while type(opt_state) is tuple and opt_state:
        opt_state = opt_state[-1]
    return opt_state


def evaluation_params(opt_state, params) -> Any:
    """The parameters a rule is judged at: ``params``, but for rules with their own.

    Rules that average (schedule-free ones, ``parabolic_rms``) are judged at their
    average, sharpness-aware ones (contrib.sam) at the parameters they perturb. The
    state of such a rule may stand in a chain, in wrappers, or be one of several that
    each own a part of the parameters.
    """
    states = _with_own_params(opt_state)
    owned = [_owned(state, params) for state in states]
    if any(sum(column) > 1 for column in zip(*owned, strict=True)):
        raise ValueError(
            "optimizer must have one set of evaluation parameters, got "
            f"{_names(states)} for the same parameters: keep one of them, or give each "
            "a part of the parameters with optax.partition."
        )
    for state in states:
        params = _judged_params(state, params)
    return params


def has_evaluation_params(opt_state) -> bool:
    """Whether a rule is judged at parameters of its own."""
    return bool(_with_own_params(opt_state))


def _with_own_params(opt_state) -> list:
    """The outermost states of rules that are judged at parameters of their own."""

    def is_own(state):
        if isinstance(state, contrib.MechanicState):
            return has_evaluation_params(state.base_optimizer_state)
        if isinstance(state, contrib.SAMState):
            return state.cache is not None
        return isinstance(state, contrib.ScheduleFreeState | ParabolicRMSState)

    return [s for s in jax.tree.leaves(opt_state, is_leaf=is_own) if is_own(s)]


def _judged_params(state, params):
    if isinstance(state, contrib.SAMState):
        synced = state.steps_since_sync == 0
        params = _over_own(
            state, params, lambda cache, p: jnp.where(synced, p, cache).astype(p.dtype)
        )
        return evaluation_params(state.opt_state, params)
    if isinstance(state, ParabolicRMSState):
        return _over_own(state, params, lambda average, p: average.astype(p.dtype))
    if isinstance(state, contrib.MechanicState):
        inner = _names(_with_own_params(state.base_optimizer_state))
        raise ValueError(
            "optimizer must not scale the steps of a rule with evaluation parameters, "
            f"got contrib.mechanize around {inner}: its average is of other "
            "parameters; use one of the two."
        )

    def average(z, p):  # as contrib.schedule_free_eval_params
        return ((p - (1.0 - state.b1) * z) / state.b1).astype(p.dtype)

    return _over_own(state, params, average)


def _owned(state, params) -> list:
    """For each leaf of ``params``, whether a state with own parameters has it."""
    if isinstance(state, contrib.MechanicState):
        return [True] * len(jax.tree.leaves(params))
    owned = _over_own(state, params, lambda own, params: None)
    leaves = jax.tree.leaves(owned, is_leaf=lambda leaf: leaf is None)
    return [leaf is None for leaf in leaves]


def _over_own(state, params, fun):
    """``fun(own, params)`` leaf by leaf; where the rule is masked, ``params``."""
    own = next(getattr(state, n) for n in _OWN_PARAMS if hasattr(state, n))
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def one(own, params):
        if masked(own):
            return params
        seen = view_of_leaf(params) if is_view(own, params) else params
        if own.shape != getattr(seen, "shape", None):
            raise ValueError
        found = fun(own, seen)
        return found if found is None else back_of_leaf(found, params)

    try:
        return jax.tree.map(one, own, params, is_leaf=masked)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer must keep its {_names([state])} in the form of the parameters, "
            "got it within a wrapper that changes their form: its evaluation "
            "parameters are not known there; put it outside of the wrapper."
        ) from error


def _names(states) -> str:
    return " and ".join(type(state).__name__ for state in states)


def counts_by_itself(opt_state) -> bool:
    """Whether a wrapper steps its rule, and so the rule's schedule, at its own pace."""
    return any(find_state(opt_state, kind) is not None for kind in _OWN_PACE)


def find_state(opt_state, kind) -> Any:
    """The first state of class ``kind`` (or a tuple of them), or None."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next((leaf for leaf in leaves if isinstance(leaf, kind)), None)
