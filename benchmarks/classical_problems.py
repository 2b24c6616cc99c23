r"""A hundred classical problems, ``classical()``: functions, data, starts and minima.

This room owns what the literature says and nothing else.
An objective takes the data it needs, then ``params`` of shape (n,), and works in the
dtype of ``params``. ``TABLE`` at the end has a row a problem, in the order of the
references:

  [MGH] Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM
  TOMS 7 (1981). [S] Schittkowski, More test examples for nonlinear programming codes,
  Springer (1987). [JY] Jamil and Yang, A literature survey of benchmark functions,
  arXiv:1308.4008 (2013). [C] CUTEst: Gould, Orban and Toint, Computational
  Optimization and Applications 60 (2015), the start and the solution of its SIF file.
  [L] Luksan and Vlcek, Sparse and partially separable test problems, report V-767,
  Prague (1999). [R] Raydan, SIAM Journal on Optimization 7 (1997). [NIST] Statistical
  Reference Datasets, nonlinear regression, the second start.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxgd.problems import Problem


def _squares(*residuals):
    return sum(jnp.sum(r * r) for r in residuals)


def _count(m, params):
    return jnp.arange(1, m + 1, dtype=params.dtype)


def _neighbors(params):
    """x[i - 1] and x[i + 1], 0 beyond the ends."""
    return jnp.pad(params[:-1], (1, 0)), jnp.pad(params[1:], (0, 1))


# Moré, Garbow and Hillstrom.


def _rosenbrock(params):  # MGH 1, extended: 21
    x, y = params[0::2], params[1::2]
    return _squares(10.0 * (y - x**2), 1.0 - x)


def _freudenstein_roth(params):  # MGH 2
    x, y = params
    return _squares(
        -13.0 + x + ((5.0 - y) * y - 2.0) * y, -29.0 + x + ((y + 1.0) * y - 14.0) * y
    )


def _powell_badly_scaled(params):  # MGH 3
    x, y = params
    return _squares(1e4 * x * y - 1.0, jnp.exp(-x) + jnp.exp(-y) - 1.0001)


def _brown_badly_scaled(params):  # MGH 4
    x, y = params
    return _squares(x - 1e6, y - 2e-6, x * y - 2.0)


def _beale(params):  # MGH 5
    x, y = params
    return _squares(
        1.5 - x * (1.0 - y), 2.25 - x * (1.0 - y**2), 2.625 - x * (1.0 - y**3)
    )


def _jennrich_sampson(params):  # MGH 6, m = 10
    x, y = params
    i = _count(10, params)
    return _squares(2.0 + 2.0 * i - jnp.exp(i * x) - jnp.exp(i * y))


def _helical_valley(params):  # MGH 7
    x, y, z = params
    # Turned by a quarter, arctan2 has its cut where MGH has it: at x = 0, y < 0, not
    # through the start.
    turns = 0.25 - jnp.arctan2(x, y) / (2.0 * jnp.pi)
    return _squares(10.0 * (z - 10.0 * turns), 10.0 * (jnp.hypot(x, y) - 1.0), z)


def _bard(y, params):  # MGH 8
    a, b, c = params
    u = _count(15, params)
    v = 16.0 - u
    return _squares(y - a - u / (v * b + jnp.minimum(u, v) * c))


def _gaussian(y, params):  # MGH 9
    a, b, c = params
    t = (8.0 - _count(15, params)) / 2.0
    return _squares(a * jnp.exp(-b * (t - c) ** 2 / 2.0) - y)


def _meyer(y, params):  # MGH 10
    a, b, c = params
    t = 45.0 + 5.0 * _count(16, params)
    return _squares(a * jnp.exp(b / (t + c)) - y)


def _gulf(params):  # MGH 11, m = 99, with the misprint of its formula mended
    a, b, c = params
    t = _count(99, params) / 100.0
    y = 25.0 + (-50.0 * jnp.log(t)) ** (2.0 / 3.0)
    return _squares(jnp.exp(-(jnp.abs(y - b) ** c) / a) - t)


def _box(params):  # MGH 12, m = 10
    a, b, c = params
    t = _count(10, params) / 10.0
    return _squares(
        jnp.exp(-t * a) - jnp.exp(-t * b) - c * (jnp.exp(-t) - jnp.exp(-10.0 * t))
    )


def _powell_singular(params):  # MGH 13, extended: 22
    a, b, c, d = params.reshape(-1, 4).T
    return _squares(
        a + 10.0 * b, 5.0**0.5 * (c - d), (b - 2.0 * c) ** 2, 10.0**0.5 * (a - d) ** 2
    )


def _wood(params):  # MGH 14
    a, b, c, d = params
    return (
        _squares(10.0 * (b - a**2), 1.0 - a)
        + _squares(90.0**0.5 * (d - c**2), 1.0 - c)
        + _squares(10.0**0.5 * (b + d - 2.0), 10.0**-0.5 * (b - d))
    )


def _kowalik_osborne(u, y, params):  # MGH 15
    a, b, c, d = params
    return _squares(y - a * (u**2 + u * b) / (u**2 + u * c + d))


def _brown_dennis(params):  # MGH 16, m = 20
    a, b, c, d = params
    t = _count(20, params) / 5.0
    return _squares(
        (a + t * b - jnp.exp(t)) ** 2 + (c + d * jnp.sin(t) - jnp.cos(t)) ** 2
    )


def _osborne_1(y, params):  # MGH 17
    a, b, c, d, e = params
    t = 10.0 * (_count(33, params) - 1.0)
    return _squares(y - a - b * jnp.exp(-t * d) - c * jnp.exp(-t * e))


def _biggs(params):  # MGH 18, m = 13
    a, b, c, d, e, f = params
    t = _count(13, params) / 10.0
    y = jnp.exp(-t) - 5.0 * jnp.exp(-10.0 * t) + 3.0 * jnp.exp(-4.0 * t)
    fit = c * jnp.exp(-t * a) - d * jnp.exp(-t * b) + f * jnp.exp(-t * e)
    return _squares(fit - y)


def _osborne_2(y, params):  # MGH 19
    t = (_count(65, params) - 1.0) / 10.0
    fit = params[0] * jnp.exp(-t * params[4])
    for height, width, at in ((1, 5, 8), (2, 6, 9), (3, 7, 10)):
        fit += params[height] * jnp.exp(-params[width] * (t - params[at]) ** 2)
    return _squares(y - fit)


def _watson(params):  # MGH 20
    t = _count(29, params)[:, None] / 29.0
    j = _count(params.size, params)
    value = t ** (j - 1.0)[None] @ params
    slope = t ** (j[1:] - 2.0)[None] @ (params[1:] * j[:-1])
    x, y = params[:2]
    return _squares(slope - value**2 - 1.0, x, y - x**2 - 1.0)


def _penalty_1(params):  # MGH 23
    return _squares(1e-5**0.5 * (params - 1.0), jnp.sum(params**2) - 0.25)


def _penalty_2(params):  # MGH 24
    n = params.size
    i = _count(n, params)
    grown, level = jnp.exp(params / 10.0), jnp.exp(i / 10.0)
    pairs = grown[1:] + grown[:-1] - level[1:] - level[:-1]
    alone = grown[1:] - jnp.exp(-0.1)
    return _squares(
        params[0] - 0.2,
        1e-5**0.5 * pairs,
        1e-5**0.5 * alone,
        jnp.sum((n + 1.0 - i) * params**2) - 1.0,
    )


def _variably_dimensioned(params):  # MGH 25
    s = jnp.sum(_count(params.size, params) * (params - 1.0))
    return _squares(params - 1.0, s, s**2)


def _trigonometric(params):  # MGH 26
    loss = 1.0 - jnp.cos(params)
    i = _count(params.size, params)
    return _squares(jnp.sum(loss) + i * loss - jnp.sin(params))


def _brown_almost_linear(params):  # MGH 27
    r = params + jnp.sum(params) - (params.size + 1.0)
    return _squares(r[:-1], jnp.prod(params) - 1.0)


def _discrete_boundary(params):  # MGH 28
    h = 1.0 / (params.size + 1.0)
    cubes = (params + h * _count(params.size, params) + 1.0) ** 3
    return _squares(2.0 * params - sum(_neighbors(params)) + 0.5 * h**2 * cubes)


def _discrete_integral(params):  # MGH 29
    h = 1.0 / (params.size + 1.0)
    t = h * _count(params.size, params)
    cubes = (params + t + 1.0) ** 3
    before, rest = jnp.cumsum(t * cubes), (1.0 - t) * cubes
    after = jnp.sum(rest) - jnp.cumsum(rest)
    return _squares(params + 0.5 * h * ((1.0 - t) * before + t * after))


def _broyden_tridiagonal(params):  # MGH 30
    before, after = _neighbors(params)
    return _squares((3.0 - 2.0 * params) * params - before - 2.0 * after + 1.0)


def _broyden_banded(params):  # MGH 31
    n = params.size
    terms = params * (1.0 + params)
    band = jnp.pad(terms, (5, 1))
    others = sum(band[k : k + n] for k in (0, 1, 2, 3, 4, 6))
    return _squares(params * (2.0 + 5.0 * params**2) + 1.0 - others)


def _linear_full_rank(params):  # MGH 32, m = 2 n
    mean = 2.0 / (2.0 * params.size) * jnp.sum(params)
    return _squares(params - mean - 1.0) + params.size * (mean + 1.0) ** 2


def _linear_rank_1(params):  # MGH 33, m = 2 n
    s = jnp.sum(_count(params.size, params) * params)
    return _squares(_count(2 * params.size, params) * s - 1.0)


def _linear_rank_1_zeros(params):  # MGH 34, m = 2 n
    s = jnp.sum(_count(params.size, params)[1:-1] * params[1:-1])
    return _squares(_count(2 * params.size - 2, params) * s - 1.0) + 2.0


def _chebyquad(params):  # MGH 35, m = n
    z = 2.0 * params - 1.0
    last, this, total = 1.0, z, 0.0
    for i in range(1, params.size + 1):
        integral = 0.0 if i % 2 else -1.0 / (i**2 - 1)
        total += (jnp.mean(this) - integral) ** 2
        last, this = this, 2.0 * z * this - last
    return total


# Schittkowski, and surveys.


def _booth(params):  # JY
    x, y = params
    return _squares(x + 2.0 * y - 7.0, 2.0 * x + y - 5.0)


def _matyas(params):  # JY
    x, y = params
    return 0.26 * (x**2 + y**2) - 0.48 * x * y


def _himmelblau(params):  # JY
    x, y = params
    return _squares(x**2 + y - 11.0, x + y**2 - 7.0)


def _cube(params):  # S 211
    x, y = params
    return _squares(10.0 * (y - x**3), 1.0 - x)


def _schittkowski_212(params):
    x, y = params
    s = 4.0 * (x + y)
    return _squares(s, s + (x - y) * ((x - 2.0) ** 2 + y**2 - 1.0))


def _schittkowski_213(params):
    x, y = params
    return (10.0 * (x - y) ** 2 + (x - 1.0) ** 2) ** 4


def _schittkowski_246(params):
    x, y, z = params
    return _squares(10.0 * (z - ((x + y) / 2.0) ** 2), 1.0 - x, 1.0 - y)


def _hilbert(params):  # S 274 - 276
    i = _count(params.size, params)
    return params @ (params[None] / (i[:, None] + i[None] - 1.0)).sum(axis=1)


def _chained_rosenbrock(params):  # S 294 - 299
    x, y = params[:-1], params[1:]
    return _squares(10.0 * (y - x**2), 1.0 - x)


def _tridiagonal_quadratic(params):  # S 300 - 302
    x, y = params[:-1], params[1:]
    first = params[0]
    return first**2 - 2.0 * first + 2.0 * jnp.sum(y**2) - 2.0 * jnp.sum(x * y)


def _zakharov(params):  # S 303 - 305
    s = jnp.sum(_count(params.size, params) * params) / 2.0
    return _squares(params, s, s**2)


def _schittkowski_308(params):
    x, y = params
    return _squares(x**2 + y**2 + x * y, jnp.sin(x), jnp.cos(y))


# CUTEst, Luksan, Raydan.


def _arwhead(params):
    x, last = params[:-1], params[-1]
    return jnp.sum((x**2 + last**2) ** 2 - 4.0 * x + 3.0)


def _bdqrtic(params):
    n = params.size - 4
    a, b, c, d = (params[k : k + n] for k in range(4))
    inner = a**2 + 2.0 * b**2 + 3.0 * c**2 + 4.0 * d**2 + 5.0 * params[-1] ** 2
    return _squares(3.0 - 4.0 * a, inner)


def _broyden_tridiagonal_73(params):  # powers 7 / 3
    r = (3.0 - 2.0 * params) * params - sum(_neighbors(params)) + 1.0
    return jnp.sum(jnp.abs(r) ** (7.0 / 3.0))


def _chained_powell_singular(params):
    a, b, c, d = params[:-3:2], params[1:-2:2], params[2:-1:2], params[3::2]
    return _squares(
        a + 10.0 * b, 5.0**0.5 * (c - d), (b - 2.0 * c) ** 2, 10.0**0.5 * (a - d) ** 2
    )


def _cliff(params):
    x, y = params
    return ((x - 3.0) / 100.0) ** 2 - (x - y) + jnp.exp(20.0 * (x - y))


def _cosine(params):
    return jnp.sum(jnp.cos(params[:-1] ** 2 - 0.5 * params[1:]))


def _cragglvy(params):
    a, b, c, d = params[:-3:2], params[1:-2:2], params[2:-1:2], params[3::2]
    return _squares(
        (jnp.exp(a) - b) ** 2,
        10.0 * (b - c) ** 3,
        (jnp.tan(c - d) + c - d) ** 2,
        a**4,
        d - 1.0,
    )


def _denschna(params):
    x, y = params
    return _squares(x**2, x + y, jnp.exp(y) - 1.0)


def _denschnc(params):
    x, y = params
    return _squares(x**2 + y**2 - 2.0, jnp.exp(x - 1.0) + y**3 - 2.0)


def _denschnd(params):
    x, y, z = params
    return _squares(
        x**2 + y**3 - z**4, 2.0 * x * y * z, 2.0 * x * y - 3.0 * y * z + x * z
    )


def _denschnf(params):
    x, y = params
    return _squares(
        2.0 * (x + y) ** 2 + (x - y) ** 2 - 8.0, 5.0 * x**2 + (y - 3.0) ** 2 - 9.0
    )


def _dixmaan(weights, powers, params):
    n, m = params.size, params.size // 3
    i = _count(n, params) / n
    a, b, c, d = (w * i**k for w, k in zip(weights, powers, strict=True))
    x, y = params[:-1], params[1:]
    return (
        1.0
        + jnp.sum(a * params**2)
        + jnp.sum(b[:-1] * (x * (y + y**2)) ** 2)
        + jnp.sum(c[: 2 * m] * (params[: 2 * m] * params[m:] ** 2) ** 2)
        + jnp.sum(d[:m] * params[:m] * params[2 * m :])
    )


def _dqdrtic(params):
    return _squares(params[:-2], 10.0 * params[1:-1], 10.0 * params[2:])


def _edensch(params):
    x, y = params[:-1], params[1:]
    return 16.0 + _squares((x - 2.0) ** 2, x * y - 2.0 * y, y + 1.0)


def _engval1(params):
    x, y = params[:-1], params[1:]
    return _squares(x**2 + y**2) + jnp.sum(3.0 - 4.0 * x)


def _engval2(params):
    x, y, z = params
    return _squares(
        x**2 + y**2 + z**2 - 1.0,
        x**2 + y**2 + (z - 2.0) ** 2 - 1.0,
        x + y + z - 1.0,
        x + y - z + 1.0,
        3.0 * y**2 + x**3 + (5.0 * z - x + 1.0) ** 2 - 36.0,
    )


def _errinros(alpha, params):
    x, y = params[:-1], params[1:]
    return _squares(x - 16.0 * (alpha[1:] * y) ** 2, y - 1.0)


def _fletchcr(params):
    x, y = params[:-1], params[1:]
    return _squares(10.0 * (y - x + 1.0 - x**2))


def _freuroth(params):
    x, y = params[:-1], params[1:]
    return _squares(
        -13.0 + x + ((5.0 - y) * y - 2.0) * y, -29.0 + x + ((y + 1.0) * y - 14.0) * y
    )


def _genrose(params):
    x, y = params[:-1], params[1:]
    return 1.0 + _squares(10.0 * (y - x**2), y - 1.0)


def _hairy(params):
    x, y = params
    fur = (jnp.sin(7.0 * x) * jnp.cos(7.0 * y)) ** 2
    cups = jnp.sqrt(0.01 + (x - y) ** 2) + jnp.sqrt(0.01 + x**2)
    return 30.0 * fur + 100.0 * cups


def _liarwhd(params):
    return _squares(2.0 * (params**2 - params[0]), params - 1.0)


def _nondia(params):
    return _squares(params[0] - 1.0, 10.0 * (params[0] - params[:-1] ** 2))


def _nondquar(params):
    sums = params[:-2] + params[1:-1] + params[-1]
    return _squares(params[0] - params[1], params[-2] - params[-1], sums**2)


def _power(params):
    return _squares(_count(params.size, params) * params)


def _quartc(params):
    return _squares((params - _count(params.size, params)) ** 2)


def _raydan_1(params):
    weights = _count(params.size, params) / 10.0
    return jnp.sum(weights * (jnp.exp(params) - params))


def _schmvett(params):
    x, y, z = params[:-2], params[1:-1], params[2:]
    return -jnp.sum(
        1.0 / (1.0 + (x - y) ** 2)
        + jnp.sin((jnp.pi * y + z) / 2.0)
        + jnp.exp(-(((x + z) / y - 2.0) ** 2))
    )


def _sinquad(params):
    first, x, last = params[0], params[1:-1], params[-1]
    return _squares(
        (first - 1.0) ** 2,
        jnp.sin(x - last) - first**2 + x**2,
        last**2 - first**2,
    )


def _tquartic(params):
    return _squares(params[0] - 1.0, params[0] ** 2 - params[1:] ** 2)


def _tridia(params):
    i = _count(params.size, params)[1:]
    return _squares(params[0] - 1.0) + jnp.sum(
        i * (2.0 * params[1:] - params[:-1]) ** 2
    )


# NIST: data x and y, both (rows,).


def _misra(x, y, params):  # Misra1a, BoxBOD
    a, b = params
    return _squares(y - a * (1.0 - jnp.exp(-b * x)))


def _chwirut(x, y, params):
    a, b, c = params
    return _squares(y - jnp.exp(-a * x) / (b + c * x))


def _lanczos(x, y, params):
    a, b, c, d, e, f = params
    fit = a * jnp.exp(-b * x) + c * jnp.exp(-d * x) + e * jnp.exp(-f * x)
    return _squares(y - fit)


def _danwood(x, y, params):
    a, b = params
    return _squares(y - a * x**b)


def _roszman(x, y, params):
    a, b, c, d = params
    return _squares(y - a + b * x + jnp.arctan(c / (x - d)) / jnp.pi)


def _kirby(x, y, params):
    a, b, c, d, e = params
    return _squares(y - (a + b * x + c * x**2) / (1.0 + d * x + e * x**2))


def _thurber(x, y, params):
    a, b, c, d, e, f, g = params
    top, bottom = a + x * (b + x * (c + x * d)), 1.0 + x * (e + x * (f + x * g))
    return _squares(y - top / bottom)


def _rat42(x, y, params):
    a, b, c = params
    return _squares(y - a / (1.0 + jnp.exp(b - c * x)))


def _rat43(x, y, params):
    a, b, c, d = params
    return _squares(y - a / (1.0 + jnp.exp(b - c * x)) ** (1.0 / d))


def _eckerle(x, y, params):
    a, b, c = params
    return _squares(y - a / b * jnp.exp(-0.5 * ((x - c) / b) ** 2))


# Data as published.


def _numbers(text):
    return np.array(text.split(), np.float64)


_BARD = _numbers(
    "0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.1 4.39"
)
_GAUSSIAN = _numbers(
    "0.0009 0.0044 0.0175 0.054 0.1295 0.242 0.3521 0.3989 "
    "0.3521 0.242 0.1295 0.054 0.0175 0.0044 0.0009"
)
_MEYER = _numbers(
    "34780 28610 23650 19630 16370 13720 11540 9744 "
    "8261 7030 6005 5147 4427 3820 3307 2872"
)
_KOWALIK_U = _numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
_KOWALIK_Y = _numbers(
    "0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246"
)
_OSBORNE_1 = _numbers("""
0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658
0.628 0.603 0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431
0.424 0.420 0.414 0.411 0.406
""")
_OSBORNE_2 = _numbers("""
1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655
0.616 0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558
0.533 0.495 0.500 0.423 0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562
0.607 0.653 0.672 0.708 0.633 0.668 0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710
0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 0.054
""")
_ERRINROS = _numbers("""
1.25 1.4 2.4 1.4 1.75 1.2 2.25 1.2 1 1.1 1.5 1.6 1.25 1.25 1.2 1.2 1.4 0.5 0.5 1.25
1.8 0.75 1.25 1.4 1.6 2 1 1.6 1.25 2.75 1.25 1.25 1.25 3 1.5 2 1.25 1.4 1.8 1.5 2.2
1.4 1.5 1.25 2 1.5 1.25 1.4 0.6 1.5
""")
_MISRA1A_X = _numbers("""
77.6 114.9 141.1 190.8 239.9 289 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760
""")
_MISRA1A_Y = _numbers("""
10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.4 75.47 81.78
""")
_CHWIRUT2_X = _numbers("""
0.5 1 1.75 3.75 5.75 0.875 2.25 3.25 5.25 0.75 1.75 2.75 4.75 0.625 1.25 2.25 4.25 0.5
3 0.75 3 1.5 6 3 6 1.5 3 0.5 2 4 0.75 2 5 0.75 2.25 3.75 5.75 3 0.75 2.5 4 0.75 2.5 4
0.75 2.5 4 0.5 6 3 0.5 2.75 0.5 1.75
""")
_CHWIRUT2_Y = _numbers("""
92.9 57.1 31.05 11.5875 8.025 63.6 21.4 14.25 8.475 63.8 26.8 16.4625 7.125 67.3 41
21.15 8.175 81.5 13.12 59.9 14.62 32.9 5.44 12.56 5.44 32 13.95 75.8 20 10.42 59.5
21.67 8.55 62 20.2 7.76 3.75 11.81 54.7 23.7 11.55 61.3 17.7 8.74 59.2 16.3 8.62 81
4.87 14.62 81.7 17.17 81.3 28.9
""")
_LANCZOS3_X = _numbers("""
0 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9
0.95 1 1.05 1.1 1.15
""")
_LANCZOS3_Y = _numbers("""
2.5134 2.0443 1.6684 1.3664 1.1232 0.9269 0.7679 0.6389 0.5338 0.4479 0.3776 0.3197
0.272 0.2325 0.1997 0.1723 0.1493 0.1301 0.1138 0.1 0.0883 0.0783 0.0698 0.0624
""")
_DANWOOD_X = _numbers("""
1.309 1.471 1.49 1.565 1.611 1.68
""")
_DANWOOD_Y = _numbers("""
2.138 3.421 3.597 4.34 4.882 5.66
""")
_ROSZMAN1_X = _numbers("""
-4868.68 -4868.09 -4867.41 -3375.19 -3373.14 -3372.03 -2473.74 -2472.35 -2469.45
-1894.65 -1893.4 -1497.24 -1495.85 -1493.41 -1208.68 -1206.18 -1206.04 -997.92 -996.61
-996.31 -834.94 -834.66 -710.03 -530.16 -464.17
""")
_ROSZMAN1_Y = _numbers("""
0.252429 0.252141 0.251809 0.297989 0.296257 0.295319 0.339603 0.337731 0.33382
0.38951 0.386998 0.438864 0.434887 0.427893 0.471568 0.461699 0.461144 0.513532
0.506641 0.505062 0.535648 0.533726 0.568064 0.612886 0.624169
""")
_KIRBY2_X = _numbers("""
9.65 10.74 11.81 12.88 14.06 15.28 16.63 18.19 19.88 21.84 24 26.25 28.86 31.85 35.79
40.18 44.74 49.53 53.94 58.29 62.63 67.03 71.25 75.22 79.33 83.56 87.75 91.93 96.1
100.28 104.46 108.66 112.71 116.88 121.33 125.79 125.79 128.74 130.27 133.33 134.79
137.93 139.33 142.46 143.9 146.91 148.51 151.41 153.17 155.97 157.76 160.56 162.3
165.21 166.9 169.92 170.32 171.54 173.79 174.57 176.25 177.34 179.19 181.02 182.08
183.88 185.75 186.8 188.63 190.45 191.48 193.35 195.22 196.23 198.05 199.97 201.06
202.83 204.69 205.86 207.58 209.5 210.65 212.33 215.43 217.16 220.21 221.98 225.06
226.79 229.92 231.69 234.77 236.6 239.63 241.5 244.48 246.4 249.35 251.32 254.22
256.24 259.11 261.18 264.02 266.13 268.94 271.09 273.87 276.08 278.83 281.08 283.81
286.11 288.81 291.08 293.75 295.99 298.64 300.84 302.02 303.48 305.65 308.27 310.41
313.01 315.12 317.71 319.79 322.36 324.42 326.98 329.01 331.56 333.56 336.1 338.08
340.6 342.57 345.08 347.02 349.52 351.44 353.93 355.83 358.32 360.2 362.67 364.53 367
371.3
""")
_KIRBY2_Y = _numbers("""
0.0082 0.0112 0.0149 0.0198 0.0248 0.0324 0.042 0.0549 0.0719 0.0963 0.1291 0.171
0.2314 0.3227 0.4809 0.7084 1.022 1.458 1.952 2.541 3.223 3.999 4.852 5.732 6.727
7.835 9.025 10.267 11.578 12.944 14.377 15.856 17.331 18.885 20.575 22.32 22.303 23.46
24.06 25.272 25.853 27.11 27.658 28.924 29.511 30.71 31.35 32.52 33.23 34.33 35.06
36.17 36.84 38.01 38.67 39.87 40.03 40.5 41.37 41.67 42.31 42.73 43.46 44.14 44.55
45.22 45.92 46.3 47 47.68 48.06 48.74 49.41 49.76 50.43 51.11 51.5 52.12 52.76 53.18
53.78 54.46 54.83 55.4 56.43 57.03 58 58.61 59.58 60.11 61.1 61.65 62.59 63.12 64.03
64.62 65.49 66.03 66.89 67.42 68.23 68.77 69.59 70.11 70.86 71.43 72.16 72.7 73.4
73.93 74.6 75.16 75.82 76.34 76.98 77.48 78.08 78.6 79.17 79.62 79.88 80.19 80.66
81.22 81.66 82.16 82.59 83.14 83.5 84 84.4 84.89 85.26 85.74 86.07 86.54 86.89 87.32
87.65 88.1 88.43 88.83 89.12 89.54 89.85 90.25 90.55 90.93 91.2 91.55 92.2
""")
_BOXBOD_X = _numbers("""
1 2 3 5 7 10
""")
_BOXBOD_Y = _numbers("""
109 149 149 191 213 224
""")
_THURBER_X = _numbers("""
-3.067 -2.981 -2.921 -2.912 -2.84 -2.797 -2.702 -2.699 -2.633 -2.481 -2.363 -2.322
-1.501 -1.46 -1.274 -1.212 -1.1 -1.046 -0.915 -0.714 -0.566 -0.545 -0.4 -0.309 -0.109
-0.103 0.01 0.119 0.377 0.79 0.963 1.006 1.115 1.572 1.841 2.047 2.2
""")
_THURBER_Y = _numbers("""
80.574 84.248 87.264 87.195 89.076 89.608 89.868 90.101 92.405 95.854 100.696 101.06
401.672 390.724 567.534 635.316 733.054 759.087 894.206 990.785 1090.109 1080.914
1122.643 1178.351 1260.531 1273.514 1288.339 1327.543 1353.863 1414.509 1425.208
1421.384 1442.962 1464.35 1468.705 1447.894 1457.628
""")
_RAT42_X = _numbers("""
9 14 21 28 42 57 63 70 79
""")
_RAT42_Y = _numbers("""
8.93 10.8 18.59 22.33 39.35 56.11 61.73 64.62 67.08
""")
_RAT43_X = _numbers("""
1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
""")
_RAT43_Y = _numbers("""
16.08 33.83 65.8 97.2 191.55 326.2 386.87 520.53 590.03 651.92 724.93 699.56 689.96
637.56 717.41
""")
_ECKERLE4_X = _numbers("""
400 405 410 415 420 425 430 435 436.5 438 439.5 441 442.5 444 445.5 447 448.5 450
451.5 453 454.5 456 457.5 459 460.5 462 463.5 465 470 475 480 485 490 495 500
""")
_ECKERLE4_Y = _numbers("""
0.0001575 0.0001699 0.000235 0.0003102 0.0004917 0.000871 0.0017418 0.00464 0.0065895
0.0097302 0.0149002 0.023731 0.0401683 0.0712559 0.1264458 0.2073413 0.2902366
0.3445623 0.3698049 0.3668534 0.3106727 0.2078154 0.1164354 0.0616764 0.03372
0.0194023 0.0117831 0.0074357 0.0022732 0.00088 0.0004579 0.0002345 0.0001586
0.0001143 7.1e-05
""")


def _dixmaan_of(weights, powers):
    return Partial(_dixmaan, np.array(weights, float), np.array(powers, float))


def _steps(n, divisor):
    return np.arange(1, n + 1) / divisor


# The global minimum of Freudenstein and Roth is 0 at (5, 4), beyond a ridge.
_BESIDE = (53 - 4 * 22**0.5) / 3, (2 - 22**0.5) / 3

TABLE = (  # name, reference, fun, init, solution, value
    ("rosenbrock_2", "MGH 1", _rosenbrock, (-1.2, 1), np.ones(2), 0.0),
    (
        "freudenstein_roth",
        "MGH 2",
        _freudenstein_roth,
        (0.5, -2),
        _BESIDE,
        48.98425367924,
    ),
    ("powell_badly_scaled", "MGH 3", _powell_badly_scaled, (0, 1), None, 0.0),
    ("brown_badly_scaled", "MGH 4", _brown_badly_scaled, (1, 1), (1e6, 2e-6), 0.0),
    ("beale", "MGH 5", _beale, (1, 1), (3, 0.5), 0.0),
    ("jennrich_sampson", "MGH 6", _jennrich_sampson, (0.3, 0.4), None, 124.3621823556),
    ("helical_valley", "MGH 7", _helical_valley, (-1, 0, 0), (1, 0, 0), 0.0),
    ("bard", "MGH 8", Partial(_bard, _BARD), np.ones(3), None, 8.214877306579e-3),
    (
        "gaussian",
        "MGH 9",
        Partial(_gaussian, _GAUSSIAN),
        (0.4, 1, 0),
        None,
        1.127932769619e-8,
    ),
    ("meyer", "MGH 10", Partial(_meyer, _MEYER), (0.02, 4000, 250), None, 87.945855171),
    ("gulf", "MGH 11", _gulf, (5, 2.5, 0.15), (50, 25, 1.5), 0.0),
    ("box", "MGH 12", _box, (0, 10, 20), None, 0.0),
    ("powell_singular", "MGH 13", _powell_singular, (3, -1, 0, 1), np.zeros(4), 0.0),
    ("wood", "MGH 14", _wood, (-3, -1, -3, -1), np.ones(4), 0.0),
    (
        "kowalik_osborne",
        "MGH 15",
        Partial(_kowalik_osborne, _KOWALIK_U, _KOWALIK_Y),
        (0.25, 0.39, 0.415, 0.39),
        None,
        3.0750560384925e-4,
    ),
    ("brown_dennis", "MGH 16", _brown_dennis, (25, 5, -5, -1), None, 85822.20162635627),
    (
        "osborne_1",
        "MGH 17",
        Partial(_osborne_1, _OSBORNE_1),
        (0.5, 1.5, -1, 0.01, 0.02),
        None,
        5.464894697483e-5,
    ),
    ("biggs_exp6", "MGH 18", _biggs, (1, 2, 1, 1, 1, 1), None, 5.655649925500e-3),
    (
        "osborne_2",
        "MGH 19",
        Partial(_osborne_2, _OSBORNE_2),
        (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5),
        None,
        4.013773629355e-2,
    ),
    ("watson_6", "MGH 20", _watson, np.zeros(6), None, 2.287670053552e-3),
    ("watson_9", "MGH 20", _watson, np.zeros(9), None, 1.399760138092e-6),
    ("rosenbrock_10", "MGH 21", _rosenbrock, (-1.2, 1) * 5, np.ones(10), 0.0),
    ("rosenbrock_1000", "MGH 21", _rosenbrock, (-1.2, 1) * 500, np.ones(1000), 0.0),
    (
        "powell_singular_1000",
        "MGH 22",
        _powell_singular,
        (3, -1, 0, 1) * 250,
        np.zeros(1000),
        0.0,
    ),
    ("penalty_1_4", "MGH 23", _penalty_1, _steps(4, 1), None, 2.249977500900e-5),
    ("penalty_1_10", "MGH 23", _penalty_1, _steps(10, 1), None, 7.087651467090e-5),
    ("penalty_2_4", "MGH 24", _penalty_2, np.full(4, 0.5), None, 9.376293007355e-6),
    ("penalty_2_10", "MGH 24", _penalty_2, np.full(10, 0.5), None, 2.936605374567e-4),
    (
        "variably_dimensioned_10",
        "MGH 25",
        _variably_dimensioned,
        1 - _steps(10, 10),
        np.ones(10),
        0.0,
    ),
    (
        "variably_dimensioned_100",
        "MGH 25",
        _variably_dimensioned,
        1 - _steps(100, 100),
        np.ones(100),
        0.0,
    ),
    (
        "trigonometric",
        "MGH 26",
        _trigonometric,
        np.full(10, 0.1),
        None,
        2.7950561218792e-5,
    ),
    ("trigonometric_100", "MGH 26", _trigonometric, np.full(100, 0.01), None, None),
    (
        "brown_almost_linear",
        "MGH 27",
        _brown_almost_linear,
        np.full(10, 0.5),
        None,
        0.0,
    ),
    (
        "discrete_boundary",
        "MGH 28",
        _discrete_boundary,
        _steps(10, 11) * (_steps(10, 11) - 1),
        None,
        0.0,
    ),
    (
        "discrete_integral",
        "MGH 29",
        _discrete_integral,
        _steps(10, 11) * (_steps(10, 11) - 1),
        None,
        0.0,
    ),
    ("broyden_tridiagonal", "MGH 30", _broyden_tridiagonal, -np.ones(10), None, 0.0),
    (
        "broyden_tridiagonal_1000",
        "MGH 30",
        _broyden_tridiagonal,
        -np.ones(1000),
        None,
        0.0,
    ),
    ("broyden_banded", "MGH 31", _broyden_banded, -np.ones(10), None, 0.0),
    ("broyden_banded_1000", "MGH 31", _broyden_banded, -np.ones(1000), None, 0.0),
    ("linear_full_rank", "MGH 32", _linear_full_rank, np.ones(10), -np.ones(10), 10.0),
    ("linear_rank_1", "MGH 33", _linear_rank_1, np.ones(10), None, 190 / 41),
    (
        "linear_rank_1_zeros",
        "MGH 34",
        _linear_rank_1_zeros,
        np.ones(10),
        None,
        227 / 37,
    ),
    ("chebyquad_8", "MGH 35", _chebyquad, _steps(8, 9), None, 3.516873725678e-3),
    ("chebyquad_10", "MGH 35", _chebyquad, _steps(10, 11), None, 6.503954800882e-3),
    ("booth", "JY", _booth, (-9, -9), (1, 3), 0.0),
    ("matyas", "JY", _matyas, (-3, 3), (0, 0), 0.0),
    ("himmelblau", "JY", _himmelblau, (5, -5), None, 0.0),
    ("cube", "S 211", _cube, (-1.2, 1), (1, 1), 0.0),
    ("schittkowski_212", "S 212", _schittkowski_212, (2, 0), (0, 0), 0.0),
    ("schittkowski_213", "S 213", _schittkowski_213, (-1.2, 1), (1, 1), 0.0),
    ("schittkowski_246", "S 246", _schittkowski_246, (-1.2, 2, 0), (1, 1, 1), 0.0),
    ("hilbert_6", "S 276", _hilbert, -4 / _steps(6, 1), np.zeros(6), 0.0),
    (
        "chained_rosenbrock_100",
        "S 299",
        _chained_rosenbrock,
        (-1.2, 1) * 50,
        np.ones(100),
        0.0,
    ),
    (
        "tridiagonal_quadratic_100",
        "S 302",
        _tridiagonal_quadratic,
        np.zeros(100),
        101 - _steps(100, 1),
        -100.0,
    ),
    ("zakharov_100", "S 305", _zakharov, np.full(100, 0.1), np.zeros(100), 0.0),
    ("schittkowski_308", "S 308", _schittkowski_308, (3, 0.1), None, 0.7731990564929),
    ("arwhead_1000", "C", _arwhead, np.ones(1000), None, 0.0),
    ("bdqrtic_100", "C", _bdqrtic, np.ones(100), None, 378.7691918087),
    (
        "broyden_tridiagonal_73_1000",
        "L",
        _broyden_tridiagonal_73,
        -np.ones(1000),
        None,
        0.0,
    ),
    (
        "chained_powell_singular_1000",
        "L",
        _chained_powell_singular,
        (3, -1, 0, 1) * 250,
        np.zeros(1000),
        0.0,
    ),
    ("cliff", "C", _cliff, (0, -1), None, 0.1997866136777),
    ("cosine_1000", "C", _cosine, np.ones(1000), None, -999.0),
    ("cragglvy_100", "C", _cragglvy, [1] + [2] * 99, None, 32.26991145858),
    ("denschna", "C", _denschna, (1, 1), (0, 0), 0.0),
    ("denschnc", "C", _denschnc, (2, 3), (1, 1), 0.0),
    ("denschnd", "C", _denschnd, (10, 10, 10), None, 0.0),
    ("denschnf", "C", _denschnf, (2, 0), (1, 1), 0.0),
    (
        "dixmaana_300",
        "C",
        _dixmaan_of((1, 0, 0.125, 0.125), (0, 0, 0, 0)),
        np.full(300, 2),
        np.zeros(300),
        1.0,
    ),
    (
        "dixmaand_300",
        "C",
        _dixmaan_of((1, 0.26, 0.26, 0.26), (0, 0, 0, 0)),
        np.full(300, 2),
        np.zeros(300),
        1.0,
    ),
    (
        "dixmaane_300",
        "C",
        _dixmaan_of((1, 0, 0.125, 0.125), (1, 0, 0, 1)),
        np.full(300, 2),
        np.zeros(300),
        1.0,
    ),
    (
        "dixmaanl_300",
        "C",
        _dixmaan_of((1, 0.26, 0.26, 0.26), (2, 0, 0, 2)),
        np.full(300, 2),
        np.zeros(300),
        1.0,
    ),
    ("dqdrtic_1000", "C", _dqdrtic, np.full(1000, 3), np.zeros(1000), 0.0),
    ("edensch_36", "C", _edensch, np.full(36, 8), None, 219.2845920208),
    ("engval1_1000", "C", _engval1, np.full(1000, 2), None, 1108.194718785),
    ("engval2", "C", _engval2, (1, 2, 0), (0, 0, 1), 0.0),
    (
        "errinros_50",
        "C",
        Partial(_errinros, _ERRINROS),
        -np.ones(50),
        None,
        39.90415392013,
    ),
    ("fletchcr_100", "C", _fletchcr, np.zeros(100), None, 0.0),
    ("freuroth_1000", "C", _freuroth, [0.5, -2] + [0] * 998, None, 121469.7101095),
    ("genrose_100", "C", _genrose, _steps(100, 101), np.ones(100), 1.0),
    ("hairy", "C", _hairy, (-5, -7), (0, 0), 20.0),
    ("liarwhd_1000", "C", _liarwhd, np.full(1000, 4), np.ones(1000), 0.0),
    ("nondia_1000", "C", _nondia, -np.ones(1000), None, 0.0),
    ("nondquar_100", "C", _nondquar, (1, -1) * 50, None, 0.0),
    ("power_100", "C", _power, np.ones(100), np.zeros(100), 0.0),
    ("quartc_100", "C", _quartc, np.full(100, 2), _steps(100, 1), 0.0),
    ("raydan_1_1000", "R", _raydan_1, np.ones(1000), np.zeros(1000), 50050.0),
    (
        "schmvett_100",
        "C",
        _schmvett,
        np.full(100, 0.5),
        np.full(100, np.pi / (np.pi + 1)),
        -294.0,
    ),
    ("sinquad_50", "C", _sinquad, np.full(50, 0.1), None, 0.0),
    ("tquartic_1000", "C", _tquartic, np.full(1000, 0.1), None, 0.0),
    ("tridia_1000", "C", _tridia, np.ones(1000), 0.5 ** np.arange(1000.0), 0.0),
    (
        "misra1a",
        "NIST",
        Partial(_misra, _MISRA1A_X, _MISRA1A_Y),
        (250, 0.0005),
        (2.3894212918e2, 5.5015643181e-4),
        1.2455138894e-1,
    ),
    (
        "chwirut2",
        "NIST",
        Partial(_chwirut, _CHWIRUT2_X, _CHWIRUT2_Y),
        (0.15, 0.008, 0.01),
        (1.6657666537e-1, 5.1653291286e-3, 1.2150007096e-2),
        5.1304802941e2,
    ),
    (
        "lanczos3",
        "NIST",
        Partial(_lanczos, _LANCZOS3_X, _LANCZOS3_Y),
        (0.5, 0.7, 3.6, 4.2, 4, 6.3),
        (
            8.6816414977e-2,
            9.5498101505e-1,
            8.4400777463e-1,
            2.9515951832,
            1.5825685901,
            4.9863565084,
        ),
        1.6117193594e-8,
    ),
    (
        "danwood",
        "NIST",
        Partial(_danwood, _DANWOOD_X, _DANWOOD_Y),
        (0.7, 4),
        (7.6886226176e-1, 3.8604055871),
        4.3173084083e-3,
    ),
    (
        "roszman1",
        "NIST",
        Partial(_roszman, _ROSZMAN1_X, _ROSZMAN1_Y),
        (0.2, -5e-6, 1200, -150),
        (2.0196866396e-1, -6.1953516256e-6, 1.2044556708e3, -1.8134269537e2),
        4.9484847331e-4,
    ),
    (
        "kirby2",
        "NIST",
        Partial(_kirby, _KIRBY2_X, _KIRBY2_Y),
        (1.5, -0.15, 0.0025, -0.0015, 2e-5),
        (
            1.6745063063,
            -1.3927397867e-1,
            2.5961181191e-3,
            -1.7241811870e-3,
            2.1664802578e-5,
        ),
        3.9050739624,
    ),
    (
        "boxbod",
        "NIST",
        Partial(_misra, _BOXBOD_X, _BOXBOD_Y),
        (100, 0.75),
        (2.1380940889e2, 5.4723748542e-1),
        1.1680088766e3,
    ),
    (
        "thurber",
        "NIST",
        Partial(_thurber, _THURBER_X, _THURBER_Y),
        (1300, 1500, 500, 75, 1, 0.4, 0.05),
        (
            1.2881396800e3,
            1.4910792535e3,
            5.8323836877e2,
            7.5416644291e1,
            9.6629502864e-1,
            3.9797285797e-1,
            4.9727297349e-2,
        ),
        5.6427082397e3,
    ),
    (
        "rat42",
        "NIST",
        Partial(_rat42, _RAT42_X, _RAT42_Y),
        (75, 2.5, 0.07),
        (7.2462237576e1, 2.6180768402, 6.7359200066e-2),
        8.0565229338,
    ),
    (
        "rat43",
        "NIST",
        Partial(_rat43, _RAT43_X, _RAT43_Y),
        (700, 5, 0.75, 1.3),
        (6.9964151270e2, 5.2771253025, 7.5962938329e-1, 1.2792483859),
        8.7864049080e3,
    ),
    (
        "eckerle4",
        "NIST",
        Partial(_eckerle, _ECKERLE4_X, _ECKERLE4_Y),
        (1.5, 5, 450),
        (1.5543827178, 4.0888321754, 4.5154121844e2),
        1.4635887487e-3,
    ),
)


def classical(*, dtype: Any = np.float32) -> tuple[Problem, ...]:
    """A hundred classical test functions with their standard starts and minima.

    All of MGH, some at more than one size, and the well-known functions of the surveys
    and collections named at the head of this file, with 2 to 1000 parameters, one
    array of shape (n,). They were not chosen by who solves them: among them are
    functions that defeat first-order methods (``meyer``, ``brown_badly_scaled``,
    ``powell_badly_scaled``), flat ones (``schittkowski_213``) and regressions of NIST
    whose parameters differ in scale by a factor of 1e8.

    Where a function has several minima, value and solution are those that descent from
    the start runs into, and value is None where that depends on the method
    (``trigonometric_100``). ``brown_badly_scaled`` (minimizer (1e6, 2e-6)) and
    ``powell_singular`` (singular Hessian at the minimizer) are hard in float32.
    """
    return tuple(
        Problem(
            name,
            jax.tree.map(lambda data: data.astype(dtype), fun)
            if isinstance(fun, Partial)
            else fun,
            np.array(init, dtype),
            None,
            None if solution is None else np.array(solution, dtype),
            value,
        )
        for name, _, fun, init, solution, value in TABLE
    )
