"""The largest curvature of an objective at a point: ``sharpness``.

This room owns the Lanczos iteration. It plugs into the objective by Hessian-vector
products alone, the derivative of its gradient along a direction, so that data is looked
at in blocks of rows and no Hessian is ever stored.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._call.arguments import checked, tried
from jaxgd._call.arrays import refuse_stream
from jaxgd._call.call import Call
from jaxgd._checks import real, whole
from jaxgd._devices.layout import untyped
from jaxgd._loop.plan import Numbers, Spec, block_alone, objective_of
from jaxgd._rows.resident import pass_key

# Vectors of the basis, if so many fit into so many bytes, and at least a few.
_BASIS, _BASIS_BYTES, _SMALLEST_BASIS = 48, 2**28, 8
# A residual bounds the way to some eigenvalue, and is small by chance while the start
# hardly sees the largest: edges of dense spectra hid one 3 % above without this.
_SAFETY, _FEWEST_PRODUCTS = 0.25, 10
# A product needs about so many times the intermediate results of a gradient.
_WORK_OF_PRODUCT = 3
_START_KEY = 0xFFFFFFFD


def sharpness(
    fun: Callable[..., Any],
    params: Any,
    data: Any = None,
    *,
    args: tuple | list = (),
    rtol: Any = 0.01,
    max_products: int = 500,
    key: Any = None,
    has_aux: bool = False,
    with_key: bool = False,
    microbatch_size: int | None = None,
) -> jax.Array:
    r"""The largest eigenvalue of the Hessian of an objective, by Lanczos.

    .. math:: \lambda = \max_{\|v\| = 1} v^T \nabla^2 J(\theta)\, v

    Plain descent on a quadratic is stable below the rate :math:`2 / \lambda`. The
    eigenvalue is the most positive one, not the largest in size: of an objective that
    curves down everywhere it is negative. A complex parameter counts as two real ones,
    its real and its imaginary part, as it does for the gradient that descent follows.

    The Krylov space of a random vector is built by Hessian-vector products (forward
    over reverse), with full reorthogonalization and thick restarts, until the residual
    of the Ritz pair promises that an eigenvalue is within ``rtol``. A product costs
    about three gradients of all rows.

    Args:
      fun: the objective, as for ``minimize``; with data its value is a mean over rows.
      params: where to look, a pytree of floating or complex arrays.
      data: a pytree of arrays that share a leading axis of ``n`` rows; all are used, in
        blocks that bound the memory (see Warns).
      args: a tuple of extra traced arguments of ``fun``.
      rtol: the relative error allowed.
      max_products: the most Hessian-vector products; what is found by then is returned,
        a lower bound of the eigenvalue.
      key: a JAX PRNG key or an int seed, default 0: of the random start, and of full
        passes of an objective ``with_key``.
      has_aux: ``fun`` returns ``(value, aux)``.
      with_key: ``fun`` takes ``key=``.
      microbatch_size: rows of a block, instead of as many as fit.

    Returns:
      A scalar, float32, or float64 if a parameter is that wide; NaN where the Hessian
      is not finite.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument has a wrong value or shape.

    Warns:
      UserWarning: ``fun`` is no mean over rows. Then all rows are taken at once where
        they fit, else in blocks.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> curvatures = jnp.array([-9.0, 1.0, 4.0])
      >>> def bowl(theta):
      ...     return jnp.sum(curvatures * theta**2) / 2
      >>> round(float(jaxgd.sharpness(bowl, jnp.ones(3))), 2)
      4.0

    References:
      Lanczos, An iteration method for the solution of the eigenvalue problem, J. Res.
      Nat. Bur. Standards 45 (1950). Pearlmutter, Fast exact multiplication by the
      Hessian, Neural Computation 6 (1994). Wu and Simon, Thick-restart Lanczos method
      for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22 (2000).
      Cohen et al., Gradient descent on neural networks typically occurs at the edge of
      stability, ICLR (2021).
    """
    real("rtol", rtol, "pass for example 0.01")
    max_products = whole("max_products", max_products, low=1, high=2**31 - 1)
    refuse_stream("sharpness", data)
    call = Call(
        fun,
        params,
        data,
        args,
        key=key,
        has_aux=has_aux,
        with_key=with_key,
        microbatch_size=microbatch_size,
        learning_rate=0.0,  # what follows is of no descent
        max_steps=0,
        stop=None,
        history_rows=0,
    )
    spec, numbers, _ = checked(call)
    spec = tried(spec, numbers, splits=True, lanes=_WORK_OF_PRODUCT)
    dtype = _tree.real_dtype(numbers.params)
    traced = _tree.is_traced(rtol)
    rtol = rtol.astype(dtype) if traced else np.asarray(rtol, dtype)
    return largest_curvature(spec, numbers, rtol, np.int32(max_products))


@partial(jax.jit, static_argnums=0)
def largest_curvature(spec: Spec, numbers: Numbers, rtol, max_products) -> jax.Array:
    """``sharpness`` of arguments that were checked."""
    return untyped(partial(_largest, spec), numbers, rtol, max_products)


def _largest(spec: Spec, numbers: Numbers, rtol, max_products) -> jax.Array:
    hessian_times, start = _hessian(spec, numbers)
    krylov = _fresh(start)
    enough = min(start.size, _FEWEST_PRODUCTS)

    def more(k: _Krylov):
        small = k.residual <= _SAFETY * rtol * jnp.abs(k.value)
        done = k.exhausted | (small & (k.products >= enough)) | jnp.isnan(k.value)
        return (k.products == 0) | (~done & (k.products < max_products))

    return lax.while_loop(more, partial(_extended, hessian_times), krylov).value


def _hessian(spec: Spec, numbers: Numbers):
    """(vector -> Hessian times it, a random vector), over all reals of the params."""
    params, dtype = numbers.params, _tree.real_dtype(numbers.params)
    block = None if spec.n is None else block_alone(spec, _WORK_OF_PRODUCT)
    objective = objective_of(spec, numbers, block)
    key = pass_key(numbers.key) if spec.with_key else None
    leaves, treedef = jax.tree.flatten(params)

    def flat(tree):
        parts = [part for leaf in jax.tree.leaves(tree) for part in _reals(leaf)]
        return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])

    def tree_of(vector):
        found, at = [], 0
        for leaf in leaves:
            parts = []
            for part in _reals(leaf):
                parts.append(vector[at : at + part.size].reshape(leaf.shape))
                at += part.size
            found.append(lax.complex(*parts) if len(parts) > 1 else parts[0])
        found = [x.astype(leaf.dtype) for x, leaf in zip(found, leaves, strict=True)]
        return jax.tree.unflatten(treedef, found)

    def grad(params):
        return objective.value_and_grad(params, numbers.data, key)[1]

    def hessian_times(vector):
        return flat(jax.jvp(grad, (params,), (tree_of(vector),))[1])

    size = sum(part.size for leaf in leaves for part in _reals(leaf))
    random = jax.random.fold_in(numbers.key, _START_KEY)
    return hessian_times, jax.random.normal(random, (size,), dtype)


def _reals(leaf) -> tuple:
    return (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)


class _Krylov(NamedTuple):
    """An orthonormal basis, the Hessian within it, and its largest Ritz pair."""

    basis: Any  # (most, n); rows not used are zero; the last used is yet to multiply
    within: Any  # (most, most)
    used: Any  # int32: rows of the basis that were multiplied
    products: Any  # int32
    value: Any
    residual: Any
    exhausted: Any  # bool: no direction is left that a product leads to


def _fresh(start) -> _Krylov:
    n, dtype = start.size, start.dtype
    fits = _BASIS_BYTES // (n * dtype.itemsize)
    most = min(n, max(min(_BASIS, fits), _SMALLEST_BASIS))
    basis = jnp.zeros((most, n), dtype).at[0].set(start / _tree.norm(start, dtype))
    nan = jnp.full((), jnp.nan, dtype)
    zero = jnp.int32(0)
    within = jnp.zeros((most, most), dtype)
    return _Krylov(basis, within, zero, zero, nan, nan, jnp.bool_(False))


def _extended(hessian_times, k: _Krylov) -> _Krylov:
    """One product more: a column of ``within``, and the next vector of the basis."""
    most, n = k.basis.shape
    dtype, keep = k.basis.dtype, most // 2
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    rest = hessian_times(k.basis[k.used])
    column = jnp.zeros((most,), dtype)
    for _ in range(2):  # once leaves what rounding put in, twice is enough
        part = dot(k.basis, rest)
        rest, column = rest - dot(part, k.basis), column + part
    # Whatever couples a kept Ritz vector to this one is in the column, too, so a
    # restart needs no formula of its own.
    within = k.within.at[k.used].set(column).at[:, k.used].set(column)
    used, beta = k.used + 1, _tree.safe_norm(rest, dtype)

    rows = jnp.arange(most)
    bound = jnp.max(jnp.sum(jnp.abs(within), axis=1))
    # Rows not used get an eigenvalue below all others.
    padded = within - jnp.diag(jnp.where(rows < used, 0, 2 * bound))
    values, vectors = jnp.linalg.eigh(padded)
    residual = beta * jnp.abs(vectors[used - 1, -1])
    noise = (
        4
        * jnp.finfo(dtype).eps
        * jnp.max(jnp.abs(jnp.where(rows < most - used, 0, values)))
    )
    exhausted = (residual <= noise) | (used == n)

    after = rest / jnp.where(beta > 0, beta, 1)

    def restarted():
        best = jnp.where(rows[:, None] < keep, dot(vectors[:, ::-1].T, k.basis), 0)
        kept = jnp.diag(jnp.where(rows < keep, values[::-1], 0))
        return best.at[keep].set(after), kept, jnp.int32(keep)

    def longer():
        return k.basis.at[used].set(after, mode="drop"), within, used

    if most == n:
        basis, within, used = longer()
    else:
        basis, within, used = lax.cond(used == most, restarted, longer)
    return _Krylov(basis, within, used, k.products + 1, values[-1], residual, exhausted)
