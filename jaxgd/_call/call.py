"""The arguments of a call by name, with what they are where they are left out.

``minimize`` and the drivers that take all of its arguments make a ``Call`` of theirs,
and everything after that reads the ``Call``. The signature of ``minimize`` shows the
same defaults to the reader; a test compares the two.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Call:
    """The arguments of ``minimize``; see there."""

    fun: Any
    params: Any
    data: Any = None
    args: Any = ()
    batch_size: Any = None
    learning_rate: Any = None
    optimizer: Any = None
    hyperparams: Any = None
    max_steps: Any = None
    epochs: Any = None
    stop: Any = "auto"
    key: Any = None
    state: Any = None
    has_aux: Any = False
    with_key: Any = False
    microbatch_size: Any = None
    strata: Any = None
    final_evaluation: Any = True
    history_rows: Any = 1000


# Of every argument that goes by its name alone.
OPTIONS = tuple(field.name for field in fields(Call))[3:]


def call_of(
    driver: str,
    fun: Any,
    params: Any,
    data: Any,
    like_minimize: Mapping[str, Any],
    refused: Mapping[str, str] | None = None,
) -> Call:
    """The ``Call`` of a driver that takes the arguments of ``minimize`` by name.

    A TypeError names one that ``minimize`` has not, or that is ``refused``: names, each
    with what to do instead.
    """
    refused = refused or {}
    allowed = set(OPTIONS) - set(refused)
    for name in like_minimize:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            fix = (
                f"did you mean {near[0]!r}"
                if near
                else f"choose among {sorted(allowed)}"
            )
            fix = refused.get(name, fix)
            raise TypeError(f"{driver} takes no argument {name!r}: {fix}.")
    return Call(fun, params, data, **like_minimize)
