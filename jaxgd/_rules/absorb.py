"""Whether an update rule has an answer to numbers that are not finite.

This room owns that question for rules such as ``optax.apply_if_finite``: a step whose
batch has a value or gradient that is not finite does not end the run where the rule
makes a finite update and a finite state of it. A rule has an answer where, from its
first state, it makes that of a gradient of NaN. What it then does is seen step by step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from jaxgd import _tree
from jaxgd._rules.adapter import keeps_point, update_alone

# Operations whose result may be finite where an operand is NaN, or tell that it is.
_CHOICES = {"is_finite", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to"}
_CHOICES |= {"sort", "top_k", "argmax", "argmin"}


def make_absorbs(optimizer, params) -> tuple[Any, Callable] | None:
    """(whether the rule has an answer, whether it absorbed a step); None: surely not.

    The first is a traced bool, the second a function of (fine, updates, new state, old
    state), where ``fine`` says that nothing was to be absorbed. A rule whose program
    makes no choice by the gradient pays nothing.
    """
    state = jax.eval_shape(optimizer.init, params)
    if keeps_point(state):  # what it has seen
        return None

    update, leaves = partial(update_alone, optimizer), jax.tree.leaves
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    value = jax.ShapeDtypeStruct((), _tree.real_dtype(params))
    jaxpr = jax.make_jaxpr(update)(like, state, like, value).jaxpr
    grads, states = len(leaves(like)), len(leaves(state))
    used = _used(jaxpr)
    chooses = any(v not in used for v in jaxpr.invars[:grads])
    if not (chooses or _may_choose(jaxpr, jaxpr.invars[:grads])):
        return None
    # What a rule writes down and never reads (that of skip_large_updates) harms nobody.
    read = [v in used for v in jaxpr.invars[grads : grads + states]]

    def is_sound(updates, new, old):
        pairs = zip(read, leaves(new), leaves(old), strict=True)
        return _tree.all_finite(updates) & ~_any(
            jnp.any(jnp.isfinite(b) & ~jnp.isfinite(a))
            for is_read, a, b in pairs
            if is_read and jnp.issubdtype(a.dtype, jnp.inexact)
        )

    first = optimizer.init(params)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    made, state = update(nan, first, params, jnp.asarray(jnp.nan, value.dtype))
    has_answer = lax.stop_gradient(is_sound(made, state, first))

    def absorbed(fine, updates, new, old):
        seen = lax.stop_gradient((updates, new, old))

        def guarded(fine, *seen):  # a GPU would ask the host which branch to take
            return lax.cond(fine, lambda *_: jnp.bool_(True), is_sound, *seen)

        def always(fine, *seen):
            return fine | is_sound(*seen)

        quiet = fine | ~has_answer
        sound = lax.platform_dependent(quiet, *seen, cpu=guarded, default=always)
        return has_answer & sound

    return has_answer, absorbed


def _any(flags):
    flags = list(flags)
    return jnp.any(jnp.stack(flags)) if flags else jnp.bool_(False)


def _used(jaxpr: Jaxpr) -> set:
    """The variables that some operation of a program reads, down to the last."""
    used = set()
    for eqn in jaxpr.eqns:
        operands, subs = eqn.invars, list(jaxprs_in_params(eqn.params))
        if eqn.primitive.name == "cond":  # its first chooses among branches of the rest
            used |= _variables(operands[:1])
            operands = operands[1:]
        if not subs or any(len(sub.invars) != len(operands) for sub in subs):
            used |= _variables(operands)
            continue
        for sub in subs:
            inner = _used(sub) | _variables(sub.outvars)
            pairs = zip(operands, sub.invars, strict=True)
            used |= _variables(v for v, own in pairs if own in inner)
    return used


def _variables(atoms) -> set:
    return {v for v in atoms if not isinstance(v, Literal)}


def _may_choose(jaxpr: Jaxpr, seeds) -> bool:
    """Whether some choice within a program depends on the variables ``seeds``."""
    touched = set(seeds)
    for eqn in jaxpr.eqns:
        hit = [bool(_variables([v]) & touched) for v in eqn.invars]
        if not any(hit):
            continue
        touched.update(eqn.outvars)
        if eqn.primitive.name in _CHOICES:
            return True
        if eqn.primitive.name == "cond" and hit[0]:
            return True
        for sub in jaxprs_in_params(eqn.params):
            own = sub.invars
            if len(own) == len(hit):  # else whatever goes in may be the gradient
                own = [v for v, h in zip(own, hit, strict=True) if h]
            if _may_choose(sub, own):
                return True
    return False
