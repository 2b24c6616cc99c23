"""Whether an objective is a mean over rows: a trial on a few of the rows of the call.

This room owns the question behind every block of rows. A full pass and a step in
microbatches average what blocks of rows give, which is right for a mean over rows and
for nothing else. So where rows are split into blocks, the objective is tried on two
sets of 32 rows and on both together, at the start and near it. What is no mean is said
in a warning that names the kind, and is then evaluated on all rows at once where that
fits and means something (see ``_call/fit``). Nothing that was found is kept: the next
call is tried on rows of its own.
"""

import inspect
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._checks import short
from jaxgd._devices.layout import undisturbed, untyped
from jaxgd._problem.objective import make_objective
from jaxgd._rows.sample import ROWS
from jaxgd._tree import Split

# Entries of a gradient that are looked at, or twice as many.
_ENTRIES = 256


class Verdict(NamedTuple):
    """What kind of objective is no mean over rows, in words."""

    kind: str  # "sum", "weights", "pairs", "counts" or "coupled"
    words: str


def kind_of(
    fun: Split, numbers, sample, *, has_aux, eps, pairs, places
) -> Verdict | None:
    """What the objective is if it is no mean over rows; None where it seems to be one.

    ``fun``: the structure of the objective; ``numbers``: those of the call; ``eps``:
    the rounding of its coarsest numbers; ``pairs``: whether something in it has a
    number for each pair of rows.
    """
    # Rounding is far below that: sums of rows in another order, of deep networks and
    # recurrences, differ by some eps. Loops that end at a tolerance differ by more.
    bound = max(eps**0.6, 1e-6)
    given = numbers.fun, numbers.params, numbers.args
    how = partial(untyped, partial(_compiled, fun, has_aux))
    try:
        with undisturbed(places), np.errstate(all="ignore"):
            # First the least that tells: two sets at the start, two others near it.
            if not _kind(_few(how, given, sample), bound)[0]:
                return None
            seen = _all(how, given, sample)
            kind, words = _kind(seen, bound)
            if pairs and kind in ("weights", "coupled"):
                values = untyped(partial(_shuffled, fun, has_aux), *given, sample)
                loose = _loose_leaf(values, bound, sample)
                if loose is not None:
                    kind, words = "pairs", _of_pairs(loose)
    except Exception:  # an objective that takes no other number of rows
        return None
    return Verdict(kind, words) if kind else None


def warn(verdict: Verdict, consequence: str) -> None:
    """The warning, at the line of the user that called jaxgd."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        "jaxgd."
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"fun is no mean over rows: {verdict.words}. {consequence}",
        UserWarning,
        stacklevel=level,
    )


class _Seen(NamedTuple):
    """Of two sets of rows and of both together: (2 points, comparisons, k) each.

    The first of the k numbers is the value, the others are entries of the gradient.
    """

    firsts: np.ndarray
    seconds: np.ndarray
    pairs: np.ndarray
    noise: Any = 0.0  # (k,): what rounding of the parameters makes of them


# The points: the start, a point near it, and both moved by rounding.
_START, _NEAR, _START_MOVED, _NEAR_MOVED, _NEAR_MOVED_BACK = range(5)
_MOVES = (0, 0, 4, 4, -4)  # eps of each number


def _few(how, given, sample) -> _Seen:
    first, second, last = _three_sets(sample)
    parts, pairs = how(
        *given,
        np.array([_START, _START, _NEAR, _NEAR]),
        _stacked(first, second, first, last),
        np.array([_START, _NEAR]),
        _stacked(_joined(first, second), _joined(first, last)),
    )
    parts, pairs = _rows(parts), _rows(pairs)
    return _Seen(parts[::2, None], parts[1::2, None], pairs[:, None])


def _all(how, given, sample) -> _Seen:
    """All three sets at both points, each with the first, which is one of them."""
    sets = _three_sets(sample)
    points = np.repeat([_START, _NEAR], 3)
    moved = np.array([_START_MOVED, _NEAR_MOVED, _NEAR_MOVED_BACK])
    parts, pairs = how(
        *given,
        np.concatenate([points, moved]),
        _stacked(*sets, *sets, *3 * [sets[0]]),
        points,
        _stacked(*2 * [_joined(sets[0], other) for other in sets]),
    )
    parts, pairs = _rows(parts), _rows(pairs)
    own = np.stack([parts[0], parts[3], parts[3]])
    seconds = parts[:6].reshape(2, 3, -1)
    firsts = np.broadcast_to(seconds[:, :1], seconds.shape)
    noise = abs(parts[6:] - own).max(0)
    return _Seen(firsts, seconds, pairs.reshape(2, 3, -1), noise)


def _three_sets(sample) -> tuple:
    """Three sets of 32 rows.

    Rows of one kind show little of a function that is nearly linear in their mean, such
    as its root: a single row again and again is another kind.
    """
    return (
        jax.tree.map(lambda x: x[:ROWS], sample),
        jax.tree.map(lambda x: x[ROWS:], sample),
        jax.tree.map(lambda x: np.repeat(x[-1:], ROWS, axis=0), sample),
    )


def _stacked(*sets):
    return jax.tree.map(lambda *x: np.stack(x), *sets)


def _joined(*sets):
    return jax.tree.map(lambda *x: np.concatenate(x), *sets)


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(fun, has_aux, fun_numbers, params, args, *points_and_sets):
    objective = _objective(fun, has_aux, fun_numbers, args)
    near = jax.tree.map(_near, params)

    def of(given):
        point, rows = given
        is_near = (point != _START) & (point != _START_MOVED)
        moves = jnp.asarray(_MOVES)[point]
        at = jax.tree.map(
            lambda x: x * (1 + moves * jnp.finfo(x.dtype).eps).astype(x.real.dtype),
            _tree.select(is_near, near, params),
        )
        (value, _), grad = objective.value_and_grad(at, rows, None)
        return value, [_entries(leaf) for leaf in jax.tree.leaves(grad)]

    # Coarse products may differ between kernels for 32 rows and for 64.
    with jax.default_matmul_precision("highest"):
        pairs = zip(points_and_sets[::2], points_and_sets[1::2], strict=True)
        return [lax.map(of, pair) for pair in pairs]


def _objective(fun, has_aux, fun_numbers, args):
    def bind(held, args):
        return fun.join(held), args

    return make_objective(bind, (fun_numbers, args), has_aux=has_aux)


def _near(x):
    """A point near ``x``: up to a tenth of each number away, and a tenth more."""
    places = jnp.arange(1, x.size + 1, dtype=jnp.float32).reshape(x.shape) * 0.618034
    noise = 2 * (places - jnp.floor(places)) - 1
    return (x + noise * (0.1 + 0.1 * jnp.abs(x))).astype(x.dtype)


def _entries(leaf):
    """Some entries of an array, spread over it."""
    flat = leaf.reshape(-1)
    return flat[:: max(1, flat.size // _ENTRIES)]


def _rows(found) -> np.ndarray:
    """What was measured, as real numbers: (evaluations, k)."""
    value, entries = jax.tree.map(np.asarray, found)
    columns = [value[:, None]]
    for x in entries:
        columns += [x.real, x.imag] if np.iscomplexobj(x) else [x]
    return np.concatenate([x.astype(np.float64) for x in columns], axis=1)


def _kind(seen: _Seen, bound: float) -> tuple[str, str]:
    """The kind of the objective and its words; ("", "") of a mean."""
    firsts, seconds, pairs, noise = seen
    whole = np.isfinite(pairs).all(-1)  # (points, pairs)
    known = np.isfinite(firsts).all(-1) & np.isfinite(seconds).all(-1) & whole
    # A mean over rows is not finite where one of a part is not.
    if (whole & ~known).any():
        return "weights", (
            "the value of 64 rows is finite where that of half of them is not: a "
            "weighted or masked mean, whose weights must add up over all rows"
        )
    if not known.any():
        return "", ""
    # Of the value, and of the gradient as a whole: an entry may be rounding alone.
    both = np.concatenate([firsts, seconds, pairs], axis=1)
    both = np.where(np.isfinite(both).all(-1, keepdims=True), both, 0)
    size = np.full(pairs.shape[-1], np.linalg.norm(both[..., 1:], axis=-1).max())
    size[0] = abs(both[..., 0]).max()

    def holds(off):
        return bool((abs(off) <= bound * size + 30 * noise)[known].all())

    mean = (firsts + seconds) / 2
    if holds(pairs - mean):
        return "", ""
    if holds(pairs - 2 * mean):
        return "sum", (
            "the value of 64 rows is twice the mean of its halves: a sum; divide by "
            "the number of rows"
        )
    live = np.expand_dims(known, -1)
    left = np.where(live, pairs - 2 * mean, 0)
    common = left.sum(1, keepdims=True) / np.maximum(live.sum(1, keepdims=True), 1)
    if holds(left - common):
        return "sum", (
            "the value of 64 rows is that of its halves together, but for a term that "
            "sees no rows: a sum; divide it by the number of rows"
        )
    scale = np.where(size > 0, size, 1)
    off = np.where(known, (abs(pairs - mean) / scale).max(-1), -1)
    far = np.unravel_index(np.argmax(off), off.shape)
    told = [f"{x[far][0]:.4g}" for x in (pairs, mean)]
    told = f"the value of 64 rows is {told[0]}, the mean of its halves {told[1]}"
    if abs(pairs - mean)[far][0] <= bound * size[0]:
        told = "the gradient of 64 rows is not the mean of those of its halves"
    # The first pair is one set twice over.
    if not holds((pairs - mean) * np.array([1, 0, 0])[:, None]):
        return "counts", (f"{told}: it depends on how many rows there are")
    apart = (firsts - seconds) / scale
    length = np.maximum((apart**2).sum(-1), np.finfo(pairs.dtype).tiny)
    weight = ((pairs - seconds) / scale * apart).sum(-1) / length
    share = np.clip(weight, 0, 1)[..., None]
    if holds(pairs - share * firsts - (1 - share) * seconds):
        a = share[far][0]
        return "weights", (
            f"the value of 64 rows is a mean of its halves with weights {a:.3g} and "
            f"{1 - a:.3g}: a weighted or masked mean, whose weights must add up over "
            "all rows; divide them by their mean over the data instead"
        )
    return "coupled", (
        f"{told}: rows are compared with each other, or their mean is within another "
        "function"
    )


@partial(jax.jit, static_argnums=(0, 1))
def _shuffled(fun, has_aux, fun_numbers, params, args, sample):
    """The value near the start: of the sample, and with each leaf in two other forms.

    The forms: its rows in another order, and its first row again and again.
    """
    objective = _objective(fun, has_aux, fun_numbers, args)
    leaves, treedef = jax.tree.flatten(sample)
    sets = [sample]
    for i, leaf in enumerate(leaves):
        for other in (
            jnp.roll(leaf, 13, axis=0),
            jnp.broadcast_to(leaf[:1], leaf.shape),
        ):
            sets.append(treedef.unflatten([*leaves[:i], other, *leaves[i + 1 :]]))
    near = jax.tree.map(_near, params)
    sets = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    return lax.map(lambda rows: objective.value(near, rows, None), sets)


def _loose_leaf(values, bound: float, sample) -> str | None:
    """The path of a leaf whose rows count, but not to which other rows they belong."""
    value, *forms = np.asarray(values, np.float64)
    forms = np.reshape(forms, (-1, 2))
    kept, lost = (abs(forms - value) <= bound * abs(value)).T
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(sample)]
    loose = np.flatnonzero(kept & ~lost)
    return f"data{jax.tree_util.keystr(paths[loose[-1]])}" if loose.size else None


def _of_pairs(name: str) -> str:
    return (
        "the value depends on pairs of rows, for it stays the same when the rows of "
        f"{short(name, 40)} are shuffled against the others; shapes such as (n, 1) and "
        "(n,) broadcast to (n, n): give both one shape"
    )
