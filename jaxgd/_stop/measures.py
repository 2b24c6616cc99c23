"""What is measured of an iterate for stop rules, beside its value and gradient norm.

One table serves the steps of batch descent and the passes over all rows. A name in it
is that of a field of ``Check``. Steps compute what a rule looks at (and the norm of the
parameters, for the judge), a full pass computes all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgd import _tree


class Seen(NamedTuple):
    """An iterate, as far as it has been looked at."""

    params: Any
    grad: Any
    dtype: Any  # of what is measured
    norm: Callable[[Any, Any], Any]  # (tree, dtype) -> its 2-norm


MEASURES: dict[str, Callable[[Seen], Any]] = {
    "grad_max": lambda seen: _tree.largest(seen.grad, seen.dtype),
    "params_norm": lambda seen: seen.norm(seen.params, seen.dtype),
}
