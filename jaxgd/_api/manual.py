"""The loop by hand: a state, and the step that scans use."""

import jax
import jax.numpy as jnp

from jaxgd import _tree
from jaxgd._call.arrays import extra, numbers_of
from jaxgd._checks import flag, function, whole
from jaxgd._devices.layout import untyped
from jaxgd._loop.step import Info, State, descent_step
from jaxgd._problem.objective import Batch, make_objective
from jaxgd._rules.adapter import require_rule


def init_state(params, optimizer) -> State:
    """The state before step 0.

    Args:
      params: a pytree of floating or complex arrays.
      optimizer: an optax rule (``optax.adam(1e-3)``).

    Returns:
      ``State(params, optimizer.init(params), step=0)``, where an optimizer that assumes
      real numbers sees a complex leaf as a real one, its real and imaginary parts along
      a new first axis.

    Raises:
      TypeError: if ``optimizer`` is no optax rule.

    Example:
      >>> import jax.numpy as jnp, optax, jaxgd
      >>> jaxgd.init_state(jnp.zeros(3), optax.sgd(0.1)).step.item()
      0
    """
    optimizer = require_rule(optimizer)
    params = jax.tree.map(jnp.asarray, numbers_of(params))
    return State(params, optimizer.init(params), jnp.int32(0))


def make_step(fun, optimizer, *, args=(), has_aux=False, microbatch_size=None):
    r"""The step of descent as a ``lax.scan`` body, ``(state, batch) -> (state, info)``.

    With :math:`g_t = \nabla J(\theta_t; \text{batch}_t)` and an optax rule, the step is
    :math:`\theta_{t+1} = \theta_t + \mathrm{rule}(g_t)`; for ``optax.sgd(alpha)`` that
    is :math:`\theta_t - \alpha g_t`. ``minimize`` scans this very step.

    Args:
      fun: the objective, ``fun(params, batch, *args)``, or ``fun(params, *args)`` where
        the scan runs over no batches (``xs=None``).
      optimizer: an optax rule. The value, the gradient and ``value_fn`` of the same
        batch are passed to it, so line searches and Polyak steps work.
      args: extra arguments of ``fun``.
      has_aux: ``fun`` returns ``(value, aux)``; then ``info.aux`` is set.
      microbatch_size: compute each gradient over blocks of this many rows, which is
        right for a mean over rows alone: here the objective is not tried.

    Returns:
      A pure function of ``(State, batch)``; it returns ``(State, Info)`` with
      ``value``, ``grad_norm`` and ``update_norm`` in at least float32.

    Raises:
      TypeError: if ``optimizer`` is no optax rule; from the step, if the state of one
        that assumes real numbers holds complex ones (use ``init_state``).

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxgd
      >>> batches = jnp.arange(6.0).reshape(3, 2)
      >>> optimizer = optax.sgd(0.5)
      >>> step = jaxgd.make_step(lambda x, batch: jnp.mean((x - batch) ** 2), optimizer)
      >>> state, infos = jax.lax.scan(step, jaxgd.init_state(0.0, optimizer), batches)
      >>> float(state.params)
      4.5
    """
    function("fun", fun)
    flag("has_aux", has_aux)
    extra(args, jnp.float32)
    if microbatch_size is not None:
        microbatch_size = whole("microbatch_size", microbatch_size, low=1)
    optimizer = require_rule(optimizer)

    def step(state: State, batch) -> tuple[State, Info]:
        # Numbers in args get the precision of the parameters, as in minimize.
        own = extra(args, _tree.real_dtype(state.params))

        def out(kept, on_all):
            return kept(state), on_all

        return untyped(once, state, batch, own, out=out)

    def once(state: State, batch, own) -> tuple[State, Info]:
        objective = make_objective(
            lambda args: (fun, args), (own,), has_aux=has_aux, block=microbatch_size
        )
        inner = descent_step(objective, optimizer, frozenset({"update_norm", "aux"}))
        return inner(state, Batch(batch))

    return step
