"""Parameters, data and extra arguments as arrays, or an error.

This room owns what an array of each kind has to be; nothing is compiled here.
"""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._checks import LAST_STEP, describe, fits_32_bits, short, wrong_kind
from jaxgd._problem.objective import count_rows
from jaxgd._rows.source import Form
from jaxgd._rows.stream import Stream
from jaxgd._tree import dtype_of

_UNTRACED = (
    "data must be arrays inside jit, vmap and grad, got a Stream: the host feeds it, "
    "so call minimize outside of them."
)


def refuse_stream(what: str, data: Any) -> None:
    """A TypeError where ``what`` takes resident data only."""
    if isinstance(data, Stream):
        raise TypeError(
            f"data must be arrays in {what}, got a Stream: pass some of the rows as "
            "arrays."
        )


def require_untraced(values: Any) -> None:
    """A TypeError where a run that the host feeds is traced."""
    traced = any(_tree.is_traced(x) for x in jax.tree.leaves(values))
    if traced or _tree.is_traced(jnp.zeros(())):
        raise TypeError(_UNTRACED)


def numbers_of(params: Any) -> Any:
    """``params`` as arrays of floating or complex numbers."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in paths:
        name, dtype = "params" + jax.tree_util.keystr(path), dtype_of(leaf)
        if dtype is None:
            fix = "pass arrays of numbers, such as jnp.asarray makes"
            raise wrong_kind(name, "a floating or complex array", leaf, fix)
        if not jnp.issubdtype(dtype, jnp.inexact):
            fix = "convert it with jnp.asarray(x, jnp.float32), or pass it in args"
            raise wrong_kind(name, "a floating or complex array", leaf, fix)
    if sum(math.prod(np.shape(leaf)) for _, leaf in paths) == 0:
        raise ValueError(
            f"params must hold at least one number, got {describe(params)}: pass a "
            "pytree of floating arrays."
        )
    # NumPy memory may be taken over by a device array without a copy.
    return jax.tree.map(
        lambda x: (
            _tree.as_number(x, None)
            if isinstance(x, jax.Array)
            else np.array(x, jax.dtypes.canonicalize_dtype(dtype_of(x)))
        ),
        params,
    )


def rows_of(data: Any) -> tuple[Any, int | None]:
    """``data`` as arrays that share a leading axis, and its length; or an error."""
    if data is None:
        return None, None
    if isinstance(data, Form):
        raise TypeError(_UNTRACED)
    if isinstance(data, Stream):
        return data, data.n
    fix = "convert lists and tables with np.asarray, pass single numbers in args"
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data must be a pytree of arrays, got a {type(data).__name__}: collect "
            "its rows in arrays first."
        )
    _not_sparse(data)
    paths = jax.tree_util.tree_leaves_with_path(data)
    if not paths:
        raise ValueError(
            f"data must hold at least one array, got {data!r}: pass arrays, or leave "
            "data out."
        )
    rows = {}
    for path, leaf in paths:
        name = "data" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise wrong_kind(name, "an array with a leading axis of rows", leaf, fix)
        if dtype_of(leaf) is None:
            encode = "encode it as numbers, in an array such as np.asarray makes"
            raise wrong_kind(name, "an array of numbers", leaf, encode)
        if leaf.ndim == 0:
            raise ValueError(
                f"{name} must have a leading axis of rows, got a scalar: pass it in "
                "args."
            )
        fits_32_bits(name, leaf)
        rows[name] = leaf.shape[0]
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(
            "data must have equally many rows in every array, got different lengths "
            f"({short(lengths)}): cut them to one length."
        )
    n = count_rows(data)
    if not 1 <= n <= LAST_STEP:
        fix = "pass fewer rows" if n else "pass rows, or leave data out"
        raise ValueError(f"data must have 1 to 2**31 - 1 rows, got {n}: {fix}.")
    return jax.tree.map(lambda x: _tree.as_number(x, None), data), n


def _not_sparse(data) -> None:
    """A TypeError where data are sparse: their parts have no axis of rows."""
    paths = jax.tree_util.tree_leaves_with_path(data, is_leaf=_is_sparse)
    for path, leaf in paths:
        if _is_sparse(leaf):
            kind, shape = type(leaf).__name__, tuple(leaf.shape)
            raise TypeError(
                f"data{jax.tree_util.keystr(path)} must be a dense array, got a sparse "
                f"{kind} of shape {shape}: make it dense with todense(), feed dense "
                "rows by a jaxgd.Stream, or pass it in args, as a BCOO of "
                "jax.experimental.sparse, and take its rows in fun."
            )


def _is_sparse(x) -> bool:
    """Whether JAX or SciPy made it sparse; neither is imported for that."""
    of_jax = getattr(sys.modules.get("jax.experimental.sparse"), "JAXSparse", ())
    told = getattr(sys.modules.get("scipy.sparse"), "issparse", None)
    return isinstance(x, of_jax) or (told is not None and told(x))


def extra(args: Any, dtype: Any) -> tuple:
    """``args`` as a tuple of pytrees of arrays."""
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple, got {describe(args)}: pass args=(x,) for one "
            "argument."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        name = "args" + jax.tree_util.keystr(path)
        if dtype_of(leaf) is None:
            fix = "pass numbers; bind the rest to fun, for example by functools.partial"
            raise wrong_kind(name, "an array of numbers", leaf, fix)
        if isinstance(leaf, int | np.integer) and not -(2**31) <= leaf < 2**31:
            raise ValueError(
                f"{name} must fit in int32, got {leaf}: pass an array of the dtype you "
                "want."
            )
        fits_32_bits(name, leaf)
    return jax.tree.map(lambda x: _tree.as_number(x, dtype), tuple(args))
