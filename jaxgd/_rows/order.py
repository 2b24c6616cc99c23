"""Which rows a step takes: a keyed permutation of row indices as pure arithmetic.

This room owns the order of the rows, and where a run is in them (``Place``). It plugs
in as ``rows_of_steps``, which the source of a run calls once per chunk: a function of
the key, the step number and the place that steps are counted from, with no stored
permutation and no sort, so that resuming, straddling batches, batches of another size,
streaming and sharding are all arithmetic on a position.
"""

import math
import operator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgd import _tree
from jaxgd._checks import LAST_STEP, whole

# Below this many rows every order must be equally likely, which few Feistel rounds
# are not (chi-square per degree of freedom over all orders of n = 5: 1.4 after 12
# rounds), so the Fisher-Yates shuffle is evaluated point by point instead.
_FISHER_YATES = 24
_ROUNDS = 8
_CONFIG: Any = jax.config
_MAX_STEP = 2**31 - 1


def shuffled_rows(key, n: int, epoch, index) -> jax.Array:
    r"""The rows at places ``index`` of the shuffled epochs ``epoch``.

    For each ``epoch`` the map ``index -> row`` is a permutation of ``0 ... n - 1``,
    chosen by ``key``. Each value is computed on its own, in a fixed number of integer
    operations, so no permutation is stored and none is sorted.

    The permutation is a Feistel network on a ragged grid. With
    :math:`a = \lceil\sqrt n\rceil` columns, row ``i`` of the data is the cell
    ``(i // a, i % a)``; only the last grid row may be short. One round turns every
    grid row cyclically by a hash of its number, the next every column, each modulo
    its own length, so each round is a bijection on exactly ``n`` cells. For
    ``n <= 24`` the Fisher-Yates shuffle is applied to the index instead, which makes
    all ``n!`` orders equally likely.

    Args:
      key: a JAX PRNG key (or an int seed).
      n: number of rows, ``1 <= n < 2**31``, a Python int.
      epoch: integer array, the number of the pass over the data.
      index: integer array, ``0 <= index < n``; broadcast against ``epoch``.

    Returns:
      int32 array shaped like ``index`` broadcast against ``epoch``.

    Raises:
      TypeError, ValueError: if ``n`` is not an int in range, or an array is no integer.

    Example:
      >>> import jax.numpy as jnp, jaxgd
      >>> rows = jaxgd.shuffled_rows(0, 5, epoch=0, index=jnp.arange(5))
      >>> sorted(rows.tolist())
      [0, 1, 2, 3, 4]

    References:
      Luby and Rackoff, How to construct pseudorandom permutations, SIAM J. Comput.
      17 (1988). Fisher and Yates, Statistical Tables (1938); Durstenfeld, CACM 7
      (1964).
    """
    n = whole("n", n, high=LAST_STEP)
    epoch, index = _integers("epoch", epoch), _integers("index", index)
    try:
        np.broadcast_shapes(np.shape(epoch), np.shape(index))
    except ValueError:
        raise ValueError(
            f"epoch and index must broadcast, got shapes {np.shape(epoch)} and "
            f"{np.shape(index)}: pass for example epoch[:, None]."
        ) from None
    if isinstance(index, np.ndarray) and index.size:
        for place in (index.min(), index.max()):
            if not 0 <= place < n:
                raise ValueError(
                    f"index must be 0 <= index < n = {n}, got {place}: pass places "
                    "in range."
                )
    return _shuffled_rows(as_key(key), n, epoch, index)


def batch_rows(key, n: int, batch_size: int, step, strata: int = 1) -> jax.Array:
    """The rows that ``minimize`` takes at step ``step``.

    That is so in a run with these rows and this ``batch_size`` from its start on; one
    that went on with others counts from where it did.

    The rows of the data are ``strata`` equal consecutive blocks. Step ``t`` takes,
    stratum by stratum in order, places ``t * c ... t * c + c - 1`` with
    ``c = batch_size / strata`` of the endless stream of shuffled epochs of that
    stratum, ``shuffled_rows(fold_in(key, s), n / strata, ...) + s * n / strata``.
    Every row comes exactly once per epoch; a batch may straddle two epochs.

    Args:
      key: a JAX PRNG key (or an int seed).
      n: number of rows, a Python int.
      batch_size: rows per step, ``1 <= batch_size <= n``.
      step: the step number, an integer scalar (or an array, for many steps).
      strata: number of strata; must divide ``n`` and ``batch_size``.

    Returns:
      int32 array of shape ``step.shape + (batch_size,)``.

    Raises:
      TypeError, ValueError: if a number is no int, out of range, or not divisible.

    Example:
      >>> import jaxgd
      >>> rows = jaxgd.batch_rows(key=0, n=10, batch_size=4, step=3)
      >>> rows.shape
      (4,)
    """
    n, batch_size = (
        whole("n", n, high=LAST_STEP),
        whole("batch_size", batch_size, high=LAST_STEP),
    )
    strata = whole("strata", strata, high=LAST_STEP)
    if batch_size > n:
        raise ValueError(
            f"batch_size must be at most n = {n}, got {batch_size}: pass a smaller one."
        )
    for name, number in (("n", n), ("batch_size", batch_size)):
        if number % strata:
            raise ValueError(
                f"strata must divide {name} = {number}, got strata={strata}: "
                f"pass a divisor of {math.gcd(n, batch_size)}."
            )
    step = _integers("step", step)
    return _batch_rows(as_key(key), n, batch_size, step, strata)


class Place(NamedTuple):
    """Where a run is in its rows at some step, and which rows these are: uint32.

    What comes next is counted from here, so a run may go on with other rows, or in
    batches of another size. It carries this in one array: every array in and out of a
    call costs time.
    """

    step: Any
    epoch: Any  # of the stream of epochs
    place: Any  # in that epoch, in rows of one stratum
    seen_high: Any  # rows taken so far: seen_high * 2**32 + seen_low
    seen_low: Any
    n: Any
    batch_size: Any  # of the steps that led here
    strata: Any
    mark: Any  # tells these rows from others; 0 where they cannot be seen


def first_place(n, batch_size, strata, mark) -> jax.Array:
    """The packed ``Place`` of a run before step 0."""
    fixed = jnp.array([0, 0, 0, 0, 0, n, batch_size or n, strata], jnp.uint32)
    return jnp.append(fixed, jnp.uint32(mark))


def place_taken_up(packed, step, n, batch_size, strata, mark) -> jax.Array:
    """``packed`` of a run that goes on at ``step`` with the rows of this call.

    Batches of another size go on where those before ended. Other rows, or rows in
    other strata, begin an epoch of their own.
    """
    old, new = Place(*packed), Place(*first_place(n, batch_size, strata, mark))
    known = (old.mark != 0) & (new.mark != 0)
    other = (old.n != new.n) | (old.strata != new.strata)
    other = other | (known & (old.mark != new.mark))
    begins = other & (old.place > 0)
    here = other | (old.batch_size != new.batch_size)
    taken = old._replace(
        step=jnp.where(here, step.astype(jnp.uint32), old.step),
        epoch=old.epoch + begins.astype(jnp.uint32),
        place=jnp.where(other, jnp.uint32(0), old.place),
        n=new.n,
        batch_size=new.batch_size,
        strata=new.strata,
        mark=jnp.where(new.mark != 0, new.mark, old.mark),
    )
    return jnp.stack(taken)


def place_at(packed, step, n, batch_size, strata) -> jax.Array:
    """``packed`` moved on to ``step``."""
    since, b = Place(*packed), batch_size or n
    steps = step.astype(jnp.uint32) - since.step
    epoch, place = _epoch_and_place(since, steps, n // strata, b // strata)
    high, low = _long_product(steps, jnp.uint32(b))
    low = low + since.seen_low
    high = high + since.seen_high + (low < since.seen_low).astype(jnp.uint32)
    moved = since._replace(
        step=step.astype(jnp.uint32),
        epoch=epoch,
        place=place,
        seen_high=high,
        seen_low=low,
    )
    return jnp.stack(moved)


def next_epoch_end(packed, n, batch_size, strata, step, checked) -> jax.Array:
    """The first step at or after ``step`` that ends an epoch and is not ``checked``.

    The j-th epoch from ``since`` on ends with the step that takes its last row. Where
    steps run out before, it is the last step there can be.
    """
    since, c, m = Place(*packed), batch_size // strata, n // strata
    steps = step.astype(jnp.uint32) - since.step
    ended = _epoch_and_place(since, steps, m, c)[0] - since.epoch
    before, within = since.place // c, since.place % c

    def end_of(j):
        whole, rest = divide_product(j, m, c)
        whole = whole.astype(jnp.uint32) - before + (rest > within).astype(jnp.uint32)
        return jnp.minimum(whole, jnp.uint32(_MAX_STEP) - since.step)

    last, following = end_of(ended), end_of(ended + 1)
    due = (ended >= 1) & (last == steps) & (checked < step)
    return (since.step + jnp.where(due, last, following)).astype(jnp.int32)


def _epoch_and_place(since: Place, steps, m: int, c: int):
    """Epoch and place so many steps of c rows after ``since``."""
    epoch, place = divide_product(steps, c, m)
    place = place + since.place
    over = (place >= m).astype(jnp.uint32)
    return epoch.astype(jnp.uint32) + since.epoch + over, place - over * m


def _long_product(a, b):
    """The 64 bits of a product of uint32 numbers: (high, low)."""
    (a1, a0), (b1, b0) = ((x >> 16, x & 0xFFFF) for x in (a, b))
    middle = (a0 * b0 >> 16) + (a0 * b1 & 0xFFFF) + (a1 * b0 & 0xFFFF)
    high = a1 * b1 + (a0 * b1 >> 16) + (a1 * b0 >> 16) + (middle >> 16)
    return high, a * b


def rows_of_steps(key, n, batch_size, strata, step, count, since=None) -> jax.Array:
    """Rows of the steps ``step ... step + count - 1``: int32[count, batch_size].

    ``since``: the packed ``Place`` they are counted from; None: step 0.
    """
    rows = rows_in_strata(key, n, batch_size, strata, step, count, since)
    first = jnp.arange(strata, dtype=jnp.int32) * (n // strata)
    return (rows + first[None, :, None]).reshape(count, batch_size)


def rows_in_strata(key, n, batch_size, strata, step, count, since=None) -> jax.Array:
    """The same, each counted within its stratum: int32[count, strata, c]."""
    c, m = batch_size // strata, n // strata
    if since is None:
        epoch, place = divide_product(step, c, m)
    else:
        since = Place(*since)
        steps = step.astype(jnp.uint32) - since.step
        epoch, place = _epoch_and_place(since, steps, m, c)
    # One position for the chunk, then small offsets: 32 bits suffice, and the long
    # division above is paid once.
    places = place + jnp.arange(count * c, dtype=jnp.uint32)
    epochs = epoch.astype(jnp.uint32) + places // m

    def of_stratum(s):
        own = _permute(jax.random.fold_in(key, s), m, epochs, places % m)
        return own.reshape(count, c)

    if strata == 1:  # under vmap it would be another program
        return of_stratum(0)[:, None]
    return jax.vmap(of_stratum, out_axes=1)(jnp.arange(strata, dtype=jnp.uint32))


def divide_product(t, a: int, m: int):
    """``divmod(t * a, m)`` for an int32 array ``t`` when the product needs 64 bits.

    Horner's rule over base ``2**k`` digits of ``t``, with ``m * 2**k < 2**32``.
    Returns (quotient int32, remainder uint32).
    """
    whole, a = divmod(a, m)
    t = t.astype(jnp.uint32)
    bits = max(1, 32 - m.bit_length())
    quotient, remainder = jnp.zeros_like(t), jnp.zeros_like(t)
    for shift in reversed(range(0, 32, bits)):
        digit = (t >> shift) & (2**bits - 1)
        scaled, product = remainder << bits, digit * a
        wholes = scaled // m + product // m
        quotient = (quotient << bits) + wholes
        remainder = scaled + product - wholes * m  # of a sum that may wrap around
        over = remainder >= m
        quotient = quotient + over.astype(jnp.uint32)
        remainder = remainder - jnp.where(over, jnp.uint32(m), jnp.uint32(0))
    return (quotient + t * whole).astype(jnp.int32), remainder


def as_key(key) -> jax.Array:
    """A typed PRNG key from a key of either kind or an int seed."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    if (
        not typed
        and getattr(key, "dtype", None) == jnp.uint32
        and np.shape(key) == (2,)
    ):
        key, typed = jax.random.wrap_key_data(key), True
    if typed:
        if key.shape != ():
            raise ValueError(
                f"key must be a single key, got keys of shape {key.shape}: pass one of "
                "them, or vmap over them."
            )
        return key
    seed = _seed(key)
    if _tree.is_traced(seed):
        return jax.random.key(seed)
    where = jax.sharding.get_abstract_mesh(), _CONFIG.jax_default_device
    return _key_of_seed(seed, _CONFIG.jax_default_prng_impl, where)


@lru_cache(maxsize=64)
def _key_of_seed(seed, impl, where) -> jax.Array:
    del where  # an array belongs to the mesh or device it was made under
    with jax.ensure_compile_time_eval():  # or it would belong to the trace around it
        return jax.random.key(seed, impl=impl)


def _seed(seed) -> int:
    if _tree.is_traced(seed):
        return seed
    if getattr(seed, "dtype", None) == jnp.uint32 and np.shape(seed)[-1:] == (2,):
        raise ValueError(
            f"key must be a single key, got keys of shape {np.shape(seed)}: pass one "
            "of them, or vmap over them."
        )
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or isinstance(seed, bool | np.bool_):
        raise TypeError(
            f"key must be one JAX PRNG key or an int seed, got {seed!r}: pass for "
            "example jax.random.key(0)."
        )
    if not 0 <= number < 2**32:
        raise ValueError(
            f"key as a seed must be 0 <= seed < 2**32, got {seed!r}: pass 0."
        )
    return number


@partial(jax.jit, static_argnums=1)
def _shuffled_rows(key, n, epoch, index):
    epoch, index = jnp.broadcast_arrays(epoch, index)
    return _permute(key, n, epoch.astype(jnp.uint32), index.astype(jnp.uint32))


@partial(jax.jit, static_argnums=(1, 2, 4))
def _batch_rows(key, n, batch_size, step, strata):
    rows = jnp.vectorize(
        lambda t: rows_of_steps(key, n, batch_size, strata, t, 1)[0],
        signature="()->(b)",
    )
    return rows(step.astype(jnp.int32))


def _permute(key, n, epoch, index):
    """``shuffled_rows`` on uint32 arrays of one shape."""
    if n == 1:
        return jnp.zeros(index.shape, jnp.int32)
    # Words of the key itself, not random bits drawn from it: those depend on flags.
    first, second = jnp.uint32(0x243F6A88), jnp.uint32(0xB7E15162)
    for word in jax.random.key_data(key).ravel():
        first, second = _mix(first ^ word), _mix(second + word)
    low = _mix(epoch * jnp.uint32(0x9E3779B1) + first)
    high = _mix(low ^ second) | 1
    if n <= _FISHER_YATES:
        return _fisher_yates(n, low, high, index)
    return _feistel(n, low, high, index)


def _fisher_yates(n, low, high, index):
    # Swapping k with a place drawn from 0 ... k, for k = n - 1 ... 1, seen from the
    # one place `index` that is asked for.
    def swapped(i, index):
        k = jnp.uint32(n - 1) - i.astype(jnp.uint32)
        draw = _below(_mix(_mix(low + k * high) ^ high), k + 1)
        return jnp.where(index == k, draw, jnp.where(index == draw, k, index))

    # A loop, for a swap uses its index three times, and XLA unrolls 3**n of them.
    return lax.fori_loop(0, n - 1, swapped, index).astype(jnp.int32)


def _feistel(n, low, high, index):
    width = math.isqrt(n - 1) + 1
    height = -(-n // width)
    last = n - (height - 1) * width  # cells in the last grid row, 1 ... width

    def two_rounds(r, place):
        row, column = place // width, place % width
        # A fresh word for each round, then the hash of the coordinate that stays.
        word = low + jnp.asarray(2 * r).astype(jnp.uint32) * high
        length = jnp.where(row == height - 1, jnp.uint32(last), jnp.uint32(width))
        column = column + _below(_mix(row * jnp.uint32(0x9E3779B1) + word), length)
        column = column - jnp.where(column >= length, length, jnp.uint32(0))
        length = jnp.where(column < last, jnp.uint32(height), jnp.uint32(height - 1))
        row = row + _below(_mix(column * jnp.uint32(0x85EBCA77) + word + high), length)
        row = row - jnp.where(row >= length, length, jnp.uint32(0))
        return row * width + column

    # A loop, for XLA would compute unrolled rounds anew in each gather of the rows.
    return lax.fori_loop(0, _ROUNDS // 2, two_rounds, index).astype(jnp.int32)


def _mix(x):
    """A 32-bit bijection with low bias (Wellons' ``lowbias32``)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _below(hashed, length):
    """``hashed * length / 2**32`` without 64 bits: exact for ``length < 2**16``."""
    return ((hashed >> 16) * length + (((hashed & 0xFFFF) * length) >> 16)) >> 16


def _integers(name, value):
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be of integers, got {value!r}: pass an int array."
        )
    return array
