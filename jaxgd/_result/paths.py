"""Paths of runs in two dimensions, over the contours of their objective."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgd import _tree
from jaxgd._result.plot import GRAD, listed, new_axes


def plot_paths(fun, paths, *, args=(), ax=None):
    r"""Draws descents over the contours of an objective of two parameters.

    Args:
      fun: the objective, ``fun(params, *args)``.
      paths: a list of descents, or a dict of them by name. Each has its iterates in
        order: parameters, whose leaves hold two numbers together, or results, such as
        the snapshots of ``iterate``.
      args: extra arguments of ``fun``.
      ax: Matplotlib axes to draw into; new ones if None.

    Returns:
      The axes. A ring is where a descent begins, a diamond where it ends. Contours are
      at equal distances in the logarithm of the objective above its lowest value in
      the picture.

    Raises:
      ValueError: the parameters are not two real numbers.
      ImportError: without Matplotlib, the extra ``jaxgd[plot]``.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> def valley(x):
      ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> start = jnp.array([-1.2, 1.0])
      >>> path = [start, *jaxgd.iterate(valley, start, every=1)]
      >>> ax = jaxgd.plot_paths(valley, {"Barzilai-Borwein": path})
    """
    fix = "pass for example [[start, *snapshots]]"
    if not isinstance(paths, dict | list | tuple) or len(paths) == 0:
        came = (
            "none" if isinstance(paths, dict | list | tuple) else type(paths).__name__
        )
        raise ValueError(
            f"paths must be a list or dict of one descent at least, got {came}: {fix}."
        )
    if any(not isinstance(path, list | tuple | np.ndarray) for path in listed(paths)):
        raise ValueError(
            "paths must hold descents, each a list of iterates, got iterates: wrap "
            f"them, {fix}."
        )
    names = list(paths) if isinstance(paths, dict) else [None] * len(paths)
    found = [_points(path) for path in listed(paths)]
    _, unravel, dtype = found[0]
    found = [(points, *rest) for points, *rest in found if len(points)]
    if not found:
        raise ValueError(f"paths must hold a finite iterate at least, got none: {fix}.")
    ax = new_axes() if ax is None else ax
    every = np.concatenate([points for points, *_ in found])
    _contours(ax, lambda p: fun(unravel(p), *args), every, dtype)
    for label, (points, *_) in zip(names, found, strict=True):
        marker = "o-" if len(points) <= 100 else "-"
        style = {"lw": 1.2, "ms": 2.5, "label": label, "zorder": 3}
        (line,) = ax.plot(*points.T, marker, **style)
        color = line.get_color()
        ax.plot(*points[0], "o", color="white", mec=color, ms=7, zorder=4)
        ax.plot(*points[-1], "D", color=color, mec="white", ms=7, zorder=4)
    if isinstance(paths, dict):
        ax.legend(fontsize="small", framealpha=0.9)
    return ax


def _points(path):
    """A descent as an array (iterates, 2), the way back to params, and their dtype."""
    from jax.flatten_util import ravel_pytree

    iterates = [getattr(one, "params", one) for one in path]
    if not iterates:
        raise ValueError("paths must hold an iterate at least each, got none.")
    if any(_tree.is_traced(x) for x in jax.tree.leaves(iterates)):
        raise TypeError(
            "plot_paths draws, which nothing does inside jit: call it outside."
        )
    first, unravel = ravel_pytree(iterates[0])
    if first.size != 2 or jnp.iscomplexobj(first):
        raise ValueError(
            "plot_paths draws descents of two real parameters, got "
            f"{first.size} of dtype {first.dtype}: plot the result instead."
        )
    points = np.array([np.asarray(ravel_pytree(one)[0]) for one in iterates], float)
    return points[np.isfinite(points).all(axis=1)], unravel, first.dtype


def _contours(ax, fun, points, dtype):
    low, high = points.min(axis=0), points.max(axis=0)
    size = np.maximum(high - low, 0.1 * np.max(high - low) or 1.0)
    low, high = low - 0.25 * size, high + 0.25 * size
    x, y = (np.linspace(a, b, 161) for a, b in zip(low, high, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    values = jax.vmap(jax.vmap(fun))(jnp.asarray(grid, dtype))
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    if finite.size and finite.max() > finite.min():
        above = np.log10(values - finite.min() + 1e-4 * (finite.max() - finite.min()))
        style = {"levels": 18, "colors": GRAD, "alpha": 0.6}
        ax.contour(x, y, above, linewidths=0.7, linestyles="solid", **style)
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    ax.set_xlabel("first parameter")
    ax.set_ylabel("second parameter")
