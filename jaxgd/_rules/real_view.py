"""Complex parameters as real ones, for rules that assume real numbers.

This room owns the real view of a pytree (a complex leaf becomes a real one with a
leading axis of real and imaginary parts, real leaves stay), and which rules of optax
are given it. A rule that is right on complex numbers as it is (Adam takes ``|g|^2``)
keeps them. No state says whether it is one of the view: a real leaf in the place of a
complex parameter does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax import contrib

# What these remember of complex numbers is wrong, without an error: slopes that are no
# real inner products, squares in place of those of absolute values, maxima of numbers
# that have no order. Found by comparing each rule with itself on real pairs and on
# parameters turned by phases (tests/test_complex.py).
_REAL_ALONE = (
    optax.ScaleByAdaDeltaState,
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
    contrib.COCOBState,
    contrib.DAdaptAdamWState,
    contrib.GaLoreState,
    contrib.MechanicState,
    contrib.MomoAdamState,
    contrib.MomoState,
    contrib.ProdigyState,
    contrib.ScaleBySimplifiedAdEMAMixState,
)


def real_view(tree) -> Any:
    """``tree`` with each complex leaf as a real one, parts along a leading axis."""
    return jax.tree.map(view_of_leaf, tree)


def view_of_leaf(x) -> jax.Array:
    """A real leaf as it is, of a complex one its parts along a leading axis."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def back(view, like) -> Any:
    """What has the form of ``real_view(like)`` in that of ``like``."""
    return jax.tree.map(back_of_leaf, view, like)


def back_of_leaf(x, like) -> jax.Array:
    """``x`` as a complex leaf where ``like`` is one."""
    return lax.complex(x[0], x[1]) if is_view(x, like) else x


def is_view(x, like) -> bool:
    """Whether ``x`` stands for a complex leaf by its parts."""
    return jnp.iscomplexobj(like) and not jnp.iscomplexobj(x)


def in_form_of(tree, like) -> Any:
    """``tree`` of parameters in the form of a state's ``like``, seen or as it is."""
    return jax.tree.map(
        lambda x, y: view_of_leaf(x) if is_view(y, x) else x, tree, like
    )


def wants_real_view(init, update, params) -> bool:
    """Whether a rule is to see ``params`` by their parts.

    So it is with a rule that is wrong on complex numbers, and with one that refuses
    them but takes their parts.
    """
    if not any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        return False
    seen = jax.eval_shape(real_view, params)
    state = _tried(lambda: jax.eval_shape(init, seen))
    kinds = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _REAL_ALONE))
    if any(isinstance(kind, _REAL_ALONE) for kind in kinds):
        return True

    def works(params) -> bool:
        return _tried(lambda: jax.eval_shape(step, params)) is not None

    def step(params):
        def value_fn(params):
            parts = jax.tree.leaves(jax.tree.map(jnp.real, params))
            return sum(jnp.sum(part) for part in parts)

        given = {"value": value_fn(params), "grad": params, "value_fn": value_fn}
        return update(params, init(params), params, **given)

    return not works(params) and works(seen)


def _tried(call) -> Any:
    """What ``call`` returns, None where it fails: for what reason, the rule tells."""
    try:
        return call()
    except Exception:
        return None
