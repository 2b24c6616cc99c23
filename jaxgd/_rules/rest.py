"""Whether a rule that comes to rest would still answer to another gradient.

This room owns what tells a fixed point of a rule from a rule that has become slow.
At both the steps die down while the gradient stays. But a projection, a frozen leaf or
decoupled weight decay at their fixed point make steps of a gradient that points
elsewhere, and a rule whose rate has decayed makes none of any.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxgd import _tree
from jaxgd._rules.adapter import update_alone

# So many gradients in a row, for a rule may gather them first.
_UPDATES = 32
# Of the gradient's own size, and so much longer that no threshold hides them.
_SIZES = (1.0, -1.0, 1e3, -1e3)
# An answer moves the parameters by so much more of its gradient than the last step,
# and than the root of the rounding of the longest.
_MORE = 10.0


def answers(optimizer, params, opt_state, value, grad_norm, last, longest):
    """Whether the rule makes ordinary steps of a gradient of another direction.

    Args:
      value, grad_norm: the objective and the norm of its gradient at the parameters.
      last, longest: the last ratio of a step to its gradient, and the largest of all.
    """
    dtype = _tree.real_dtype(params)
    eps = float(jnp.finfo(dtype).eps)
    least = _MORE * jnp.maximum(last, eps**0.5 * longest)
    leaves, treedef = jax.tree.flatten(params)
    count = sum(leaf.size for leaf in leaves)

    def towards(size):
        length = size * grad_norm / count**0.5
        return treedef.unflatten([_scattered(x, length) for x in leaves])

    def probe(size):
        grad = towards(size)

        def once(carry, _):
            opt_state, most = carry
            updates, after = update_alone(optimizer, grad, opt_state, params, value)
            after = _tree.cast_like(after, opt_state)
            return (after, jnp.fmax(most, _tree.safe_norm(updates, dtype))), None

        (_, most), _ = lax.scan(
            once, (opt_state, jnp.zeros((), dtype)), length=_UPDATES
        )
        return most > least * _tree.safe_norm(grad, dtype)

    return jnp.any(lax.map(probe, jnp.asarray(_SIZES, dtype)))


def _scattered(leaf, length):
    """Entries of both signs and of sizes about ``length``, in no order."""
    place = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)
    entry = 1.4 * jnp.cos(2.4 * place + 0.5)  # in steps of the golden angle
    return (entry.astype(length.dtype) * length).astype(leaf.dtype)
