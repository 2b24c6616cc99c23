"""What every room asks of an argument, and how an error names what came.

Each refusal names the argument, what was expected, what came, and the fix.
"""

import math
import operator
from typing import Any

import jax
import numpy as np

from jaxgd import _tree
from jaxgd._tree import dtype_of, is_real

LAST_STEP = 2**31 - 1
_CONFIG: Any = jax.config


def describe(thing: Any) -> str:
    """How an error names an object: functions by name, the rest by type and value."""
    name = getattr(thing, "__qualname__", None)
    if name is not None:
        return f"{getattr(thing, '__module__', '')}.{name}".lstrip(".")
    text = " ".join(repr(thing).split())
    text = text if len(text) < 60 else text[:57] + "..."
    return f"{text} of type {type(thing).__name__}"


def short(text: str, most: int = 150) -> str:
    """A text cut to a length that an error can show."""
    return text if len(text) <= most else text[: most - 3] + "..."


def wrong_kind(name: str, what: str, leaf: Any, fix: str) -> TypeError:
    """The error of a leaf that is not ``what``."""
    array = isinstance(leaf, np.ndarray | jax.Array)
    came = f"dtype {leaf.dtype}" if array else describe(leaf)
    return TypeError(f"{name} must be {what}, got {came}: {fix}.")


def flag(name: str, value: Any) -> None:
    """Refuses what is no bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be True or False, got {describe(value)}: pass a bool."
        )


def function(name: str, value: Any) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function, got {describe(value)}: pass the function "
            "itself."
        )


def real(
    name: str, value: Any, fix: str, *, low: float = 0.0, finite: bool = True
) -> None:
    """Refuses what is no real scalar >= ``low``, as far as a traced one tells."""
    if isinstance(value, bool) or not is_real(dtype_of(value)):
        raise wrong_kind(name, "a real number", value, fix)
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}: {fix}; to try "
            "several, vmap over them."
        )
    if _tree.is_traced(value):
        return
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not (number >= low and (math.isfinite(number) or not finite)):
        wanted = "finite" if finite else "a number"
        if low > -math.inf:
            wanted += f" and >= {low:g}" if finite else f" >= {low:g}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}: {fix}.")


def whole(
    name: str,
    value: Any,
    *,
    low: int = 1,
    high: int | None = None,
    high_is: str = "the largest int32",
) -> int:
    """A whole number between ``low`` and ``high``, or an error."""
    if _tree.is_traced(value):
        raise TypeError(
            f"{name} must be a Python int, got a traced value: it decides the shape of "
            "the program; mark it static."
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be a whole number, got {describe(value)}: pass an int."
        )
    if number < low:
        raise ValueError(
            f"{name} must be at least {low}, got {number}: pass {low} or more."
        )
    if high is not None and number > high:
        raise ValueError(
            f"{name} must be at most {high} ({high_is}), got {number}: pass a smaller "
            "one."
        )
    return number


def fit_32_bits(name: str, tree: Any) -> None:
    """A ValueError where arrays hold whole numbers that JAX would cut to 32 bits."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        fits_32_bits(name + jax.tree_util.keystr(path), leaf)


def fits_32_bits(name: str, leaf: Any) -> None:
    """A ValueError where one array does."""
    whole_numbers = isinstance(leaf, np.ndarray | np.generic) and (
        leaf.dtype.kind in "iu" and leaf.dtype.itemsize == 8 and leaf.size
    )
    if not whole_numbers or _CONFIG.jax_enable_x64:
        return
    narrow = np.iinfo(np.int32 if leaf.dtype.kind == "i" else np.uint32)
    for find in (np.argmin, np.argmax):
        place = np.unravel_index(find(leaf), leaf.shape)
        number = int(np.asarray(leaf)[place])
        if not narrow.min <= number <= narrow.max:
            where = f" at {[int(i) for i in place]}" if place else ""
            raise ValueError(
                f"{name} must fit in {narrow.dtype}, got {number}{where}: JAX keeps 32 "
                "bits of a whole number; turn on 64 with jax.enable_x64(True), or "
                "renumber."
            )
