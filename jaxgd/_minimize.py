"""The front door: validate, wire, run.

This room owns the life of a call: arguments are checked and split, a state is made or
taken up, and one compiled program goes on from it.
"""

import difflib
from collections.abc import Callable
from typing import Any, Literal

from jaxgd._check import check_all
from jaxgd._fed import drive
from jaxgd._program import finished
from jaxgd._result import Result
from jaxgd._resume import begin
from jaxgd._step import State
from jaxgd._stop import StopRule


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
        the value is a mean over those rows. It may be a callable pytree; its arrays
        are data then. A new closure is a new program.
      params: the start, a pytree of floating or complex arrays; never modified.
      data: a pytree of arrays that share a leading axis of ``n`` rows, on one device or
        all split over devices along it (``shard_rows``, or a sharding of your own); or
        a ``Stream`` of rows from outside (with ``batch_size``, not with ``stop=None``).
      args: a tuple of extra traced arguments of ``fun``.
      batch_size: rows per step, ``1 <= batch_size <= n``; None for all. A multiple of
        the number of shards of ``data``.
      learning_rate: a number or an optax schedule (``step -> rate``). Alone, it means
        plain descent. With neither a rate nor an optimizer, rates are found on the
        way: by ``barzilai_borwein`` for batch descent, by ``parabolic_rms`` with
        ``batch_size``.
      optimizer: an optax rule (``optax.adam(1e-3)``), or a factory (``optax.adam``)
        that is called as ``optimizer(learning_rate, **hyperparams)`` inside the
        compiled program, so that new numbers cost no compilation.
      hyperparams: further arguments of a factory. Floats and floating arrays are data;
        bool, int, str, None and functions are structure.
      max_steps: the limit in steps; default 1000 without ``batch_size``. 0 evaluates
        the start.
      epochs: the limit in passes over the data, may be fractional; default 10 with
        ``batch_size``.
      stop: ``"auto"`` (a small gradient for batch descent, no early stop otherwise), a
        stop rule, or None: exactly ``max_steps`` steps in a static scan, which reverse
        mode can differentiate.
      key: a JAX PRNG key or an int seed, default 0; it alone decides the row order.
      state: a ``Result.state`` to go on from; ``params`` then gives only structure.
      has_aux: ``fun`` returns ``(value, aux)``.
      with_key: ``fun`` takes ``key=``, a function of ``(key, step)``, the same for all
        blocks of a step; full passes use one fixed key.
      microbatch_size: compute each gradient over blocks of this many rows.
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
    spec, numbers, limit = check_all(
        fun,
        params,
        data,
        args=args,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        hyperparams=hyperparams,
        max_steps=max_steps,
        epochs=epochs,
        stop=stop,
        key=key,
        state=state,
        has_aux=has_aux,
        with_key=with_key,
        microbatch_size=microbatch_size,
        strata=strata,
        final_evaluation=final_evaluation,
        history_rows=history_rows,
    )
    return finished(spec, drive(spec, numbers, begin(spec, numbers, state), limit))


# Of every argument that may be left out.
DEFAULTS: dict[str, Any] = dict(minimize.__kwdefaults__ or {})


def check_names(what: str, given, own: dict[str, str] | None = None) -> None:
    """A TypeError names an argument that ``minimize`` has not, or ``what`` cannot take.

    ``own``: names that ``what`` refuses, each with what to do instead.
    """
    own = own or {}
    allowed = set(DEFAULTS) - set(own)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            fix = (
                f"did you mean {near[0]!r}"
                if near
                else f"choose among {sorted(allowed)}"
            )
            raise TypeError(f"{what} takes no argument {name!r}: {own.get(name, fix)}.")
