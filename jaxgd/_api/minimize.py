"""The front door: validate, wire, run.

This room owns the life of a call: arguments are checked and split, a state is made or
taken up, and one compiled program goes on from it.
"""

from collections.abc import Callable
from typing import Any, Literal

from jaxgd._call.arguments import checked, tried
from jaxgd._call.call import Call
from jaxgd._files.resume import begin
from jaxgd._loop.cause import explained
from jaxgd._loop.host import drive
from jaxgd._loop.outcome import finished
from jaxgd._loop.step import State
from jaxgd._result.result import Result
from jaxgd._stop.rules import StopRule


def minimize(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    args: tuple | list = (),
    batch_size: int | None = None,
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    max_steps: Any = None,
    epochs: Any = None,
    stop: StopRule | Literal["auto"] | None = "auto",
    key: Any = None,
    state: State | None = None,
    has_aux: bool = False,
    with_key: bool = False,
    microbatch_size: int | None = None,
    strata: int | None = None,
    final_evaluation: bool = True,
    history_rows: int = 1000,
) -> Result:
    r"""Minimizes an objective by gradient descent, as one compiled program.

    .. math:: \theta_{t+1} = \theta_t - \alpha\, \nabla J(\theta_t; \text{batch}_t)

    or any optax rule in place of :math:`-\alpha \nabla J`. The gradient comes from
    ``jax.value_and_grad``. The batch is all rows (batch gradient descent), one row
    (stochastic gradient descent) or ``batch_size`` rows (mini-batch), taken from an
    endless stream of shuffled epochs.

    Args:
      fun: the objective, a JAX function returning a real floating scalar:
        ``fun(params, *args)`` without data, ``fun(params, batch, *args)`` with data,
        where ``batch`` has the structure of ``data`` with a leading axis of rows and
        the value is a mean over those rows (see Warns). It may be a callable pytree;
        its arrays are data then. A new closure is a new program.
      params: the start, a pytree of floating or complex arrays; never modified.
      data: a pytree of arrays that share a leading axis of ``n`` rows, on one device or
        all split over devices along it (``shard_rows``, or a sharding of your own); or
        a ``Stream`` of rows from outside (with ``batch_size``, not with ``stop=None``).
      args: a tuple of extra traced arguments of ``fun``.
      batch_size: rows per step, ``1 <= batch_size <= n``; None for all. A multiple of
        the number of shards of ``data``.
      learning_rate: a number or an optax schedule (``step -> rate``). Alone, it means
        plain descent. With neither a rate nor an optimizer, none is needed:
        ``scaled_lbfgs`` is the rule of batch descent, ``parabolic_rms`` that with
        ``batch_size``.
      optimizer: an optax rule (``optax.adam(1e-3)``), or a factory (``optax.adam``)
        that is called as ``optimizer(learning_rate, **hyperparams)`` inside the
        compiled program, so that new numbers cost no compilation. One that assumes
        real numbers (L-BFGS, line searches) sees a complex leaf as a real one, its real
        and imaginary parts along a new first axis. One that has an answer to a batch
        that is not finite (``optax.apply_if_finite``) is asked; else the run ends.
      hyperparams: further arguments of a factory. Floats and floating arrays are data;
        bool, int, str, None and functions are structure.
      max_steps: the limit in steps; default 1000 without ``batch_size``. 0 evaluates
        the start.
      epochs: the limit in passes over the data, may be fractional; default 10 with
        ``batch_size``.
      stop: ``"auto"`` (batch descent ends where nothing is left to be gained in these
        dtypes, no early stop otherwise; docs/judging.md), a stop rule, or None: exactly
        ``max_steps`` steps in a static scan, which reverse mode can differentiate.
      key: a JAX PRNG key or an int seed, default 0; it alone decides the row order.
      state: a ``Result.state`` to go on from; ``params`` then gives only structure. The
        run goes on at its place in its rows, with another ``batch_size`` too. Other
        rows begin a new epoch: another number of them, or other values, as far as 64
        of them tell (not those of a function, and not inside ``jit``).
      has_aux: ``fun`` returns ``(value, aux)``.
      with_key: ``fun`` takes ``key=``, a function of ``(key, step)``, the same for all
        blocks of a step; full passes use one fixed key.
      microbatch_size: compute each gradient over blocks of this many rows: in less
        memory, or within the cache of a CPU.
      strata: take ``batch_size / strata`` rows of each of this many equal blocks of
        rows per step; a multiple of the number of shards of ``data``, which is the
        default. Inside ``jit``, where an automatic mesh hides them, say it.
      final_evaluation: False skips the full pass at the end of a mini-batch run.
      history_rows: upper bound on the rows of history.

    Returns:
      A ``Result``. Reaching the limit, diverging or stalling are outcomes
      (``result.status``), not exceptions.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument has a wrong value or shape.
      StreamError: a ``Stream`` failed; its ``state`` is what the run had reached.

    Warns:
      UserWarning: ``fun`` is no mean over rows. With ``batch_size`` or
        ``microbatch_size`` it is tried on 64 of the rows; without them only pairs of
        rows, as of shapes ``(n, 1)`` and ``(n,)``, are looked for. The warning names
        the kind, and what ``value`` and ``grad_norm`` are then: those of all rows at
        once, or means over blocks of rows. Not tried: an objective ``with_key`` or with
        effects, one that takes only one number of rows, and traced arguments.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> x = jnp.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
      >>> y = jnp.array([2.0, 5.0, 9.0])
      >>> def loss(theta, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ theta - y) ** 2) / 2
      >>> result = jaxgd.minimize(
      ...     loss, jnp.zeros(2), (x, y), learning_rate=0.1, max_steps=5000
      ... )
      >>> bool(result.converged)
      True

    References:
      Cauchy, Methode generale pour la resolution des systemes d'equations simultanees
      (1847). Robbins and Monro, A stochastic approximation method (1951). Bottou,
      Curtis and Nocedal, Optimization methods for large-scale machine learning, SIAM
      Review 60 (2018).
    """
    call = Call(**locals())
    spec, numbers, limit = checked(call)
    state = begin(spec, numbers, call.state)
    # At the iterate that a run has reached: ``params`` are structure alone then.
    spec = tried(spec, numbers._replace(params=state.params))
    result = finished(spec, drive(spec, numbers, state, limit))
    return explained(spec, numbers, result)
