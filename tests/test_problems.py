"""Every problem is what it says: its start, its minimum, its gradient, one program."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.tree_util import Partial
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge

from benchmarks.classical_problems import TABLE, classical
from jaxgd import problems

pytestmark = pytest.mark.thin(12)

f64 = {"dtype": np.float64}
rng = np.random.default_rng(0)
X = rng.normal(size=(50, 4))
TARGETS = X @ rng.normal(size=4) + rng.normal(size=50)
LABELS = rng.integers(0, 3, size=50)

WITH_DATA = {
    "least_squares": problems.least_squares,
    "ridge": problems.ridge,
    "logistic": problems.logistic,
    "multinomial": problems.multinomial,
    "mlp_tanh": problems.mlp,
    "mlp_relu": partial(problems.mlp, activation="relu"),
}


def squares(*numbers):
    return sum(x * x for x in numbers)


# Values at the starts: MGH as tabulated in the literature, or by hand from the formula
# (None for the regressions of NIST, whose certified sums of squares are at their
# solutions); and published minima, to the digits that are published.
e, sin, cos, sqrt = np.exp(1.0), np.sin, np.cos, np.sqrt
PUBLISHED = {
    "rosenbrock_2": (24.2, 0.0),
    "freudenstein_roth": (400.5, 48.9842),
    "powell_badly_scaled": (1.0 + (1 / e - 0.0001) ** 2, 0.0),
    "brown_badly_scaled": (999998000003.0, 0.0),
    "beale": (14.203125, 0.0),
    "jennrich_sampson": (
        squares(*(2 + 2 * i - e ** (0.3 * i) - e ** (0.4 * i) for i in range(1, 11))),
        124.362,
    ),
    "helical_valley": (2500.0, 0.0),
    "bard": (41.6816959, 8.21487e-3),
    "gaussian": (3.88810699e-6, 1.12793e-8),
    "meyer": (1.69360781e9, 87.9458),
    "gulf": (12.1107058, 0.0),
    "box": (1031.15381, 0.0),
    "powell_singular": (215.0, 0.0),
    "wood": (19192.0, 0.0),
    "kowalik_osborne": (5.31317227e-3, 3.07505e-4),
    "brown_dennis": (7926693.336997, 85822.2),
    "osborne_1": (0.879026294, 5.46489e-5),
    "biggs_exp6": (0.779070076, 5.65565e-3),
    "osborne_2": (2.09341951, 4.01377e-2),
    "watson_6": (30.0, 2.28767e-3),
    "watson_9": (30.0, 1.39976e-6),
    "rosenbrock_10": (121.0, 0.0),
    "rosenbrock_1000": (500 * 24.2, 0.0),
    "powell_singular_1000": (250 * 215.0, 0.0),
    "penalty_1_4": (1e-5 * 14 + 29.75**2, 2.24997e-5),
    "penalty_1_10": (1e-5 * 285 + 384.75**2, 7.08765e-5),
    "penalty_2_4": (2.34000881, 9.37629e-6),
    "penalty_2_10": (162.652777, 2.93660e-4),
    "variably_dimensioned_10": (3.85 + 38.5**2 + 38.5**4, 0.0),
    "variably_dimensioned_100": (33.835 + 3383.5**2 + 3383.5**4, 0.0),
    "trigonometric": (7.07575946e-3, 2.79506e-5),
    "trigonometric_100": (
        squares(*((100 + i) * (1 - cos(0.01)) - sin(0.01) for i in range(1, 101))),
        None,
    ),
    "brown_almost_linear": (9 * 5.5**2 + (1 - 2.0**-10) ** 2, 0.0),
    # On t (t - 1) the second difference is 2 h^2.
    "discrete_boundary": (
        squares(*(0.5 * (1 + (t / 11) ** 2) ** 3 - 2 for t in range(1, 11))) / 11**4,
        0.0,
    ),
    "discrete_integral": (0.0634168416, 0.0),
    "broyden_tridiagonal": (21.0, 0.0),
    "broyden_tridiagonal_1000": (998.0 + 4.0 + 9.0, 0.0),
    "broyden_banded": (360.0, 0.0),
    "broyden_banded_1000": (36000.0, 0.0),
    "linear_full_rank": (50.0, 10.0),
    "linear_rank_1": (squares(*(55.0 * i - 1 for i in range(1, 21))), 4.634146),
    "linear_rank_1_zeros": (
        squares(*(44.0 * i - 1 for i in range(1, 19))) + 2,
        6.135135,
    ),
    "chebyquad_8": (3.86176982859e-2, 3.51687e-3),
    "chebyquad_10": (3.37632655e-2, 6.50395e-3),
    "booth": (2180.0, 0.0),
    "matyas": (9.0, 0.0),
    "himmelblau": (610.0, 0.0),
    "cube": (749.0384, 0.0),
    "schittkowski_212": (100.0, 0.0),
    "schittkowski_213": (53.24**4, 0.0),
    "schittkowski_246": (8.4, 0.0),
    "hilbert_6": (
        sum(16 / (i * j * (i + j - 1)) for i in range(1, 7) for j in range(1, 7)),
        0.0,
    ),
    "chained_rosenbrock_100": (50 * 24.2 + 49 * 484, 0.0),
    "tridiagonal_quadratic_100": (0.0, -100.0),
    "zakharov_100": (1 + 252.5**2 + 252.5**4, 0.0),
    "schittkowski_308": (9.31**2 + sin(3.0) ** 2 + cos(0.1) ** 2, 0.773199),
    "arwhead_1000": (999 * 3.0, 0.0),
    "bdqrtic_100": (96 * 226.0, 378.769),
    "broyden_tridiagonal_73_1000": (
        998 * 2 ** (7 / 3) + 2 * 3 ** (7 / 3),
        0.0,
    ),
    "chained_powell_singular_1000": (250 * 215.0 + 249 * 815.0, 0.0),
    "cliff": (0.0009 - 1 + e**20, 0.199786613),
    "cosine_1000": (999 * cos(0.5), -999.0),
    "cragglvy_100": ((e - 2) ** 4 + 2 + 48 * ((e**2 - 2) ** 4 + 257), 32.270),
    "denschna": (5 + (e - 1) ** 2, 0.0),
    "denschnc": (121 + (e + 25) ** 2, 0.0),
    "denschnd": (8900.0**2 + 2000.0**2, 0.0),
    "denschnf": (416.0, 0.0),
    "dixmaana_300": (1 + 1200 + 1600 + 50, 1.0),
    "dixmaand_300": (1 + 1200 + 0.26 * (299 * 144 + 200 * 64 + 100 * 4), 1.0),
    "dixmaane_300": (1 + 2 * 301 + 1600 + 5050 / 600, 1.0),
    "dixmaanl_300": (
        1
        + 4 * sum((i / 300) ** 2 for i in range(1, 301))
        + 0.26 * (299 * 144 + 200 * 64)
        + 1.04 * sum((i / 300) ** 2 for i in range(1, 101)),
        1.0,
    ),
    "dqdrtic_1000": (998 * 9 * 201.0, 0.0),
    "edensch_36": (16 + 35 * (6**4 + 48**2 + 81), 219.28),
    "engval1_1000": (999 * 59.0, 1108.2),
    "engval2": (629.0, 0.0),
    "errinros_50": (110181.776, 39.904154),
    "fletchcr_100": (9900.0, 0.0),
    "freuroth_1000": (400.5 + 1186 + 997 * 1010, 1.2147e5),
    "genrose_100": (
        1
        + sum(100 * (i + 1 - i * i / 101) ** 2 / 101**2 for i in range(1, 100))
        + sum((i / 101 - 1) ** 2 for i in range(2, 101)),
        1.0,
    ),
    "hairy": (
        30 * (sin(35) * cos(49)) ** 2 + 100 * (sqrt(4.01) + sqrt(25.01)),
        20.0,
    ),
    "liarwhd_1000": (1000 * 585.0, 0.0),
    "nondia_1000": (4 + 999 * 400.0, 0.0),
    "nondquar_100": (4 + 4 + 98, 0.0),
    "power_100": (338350.0, 0.0),
    "quartc_100": (sum((2.0 - i) ** 4 for i in range(1, 101)), 0.0),
    "raydan_1_1000": (50050 * (e - 1), 50050.0),
    "schmvett_100": (-98 * (2 + sin((np.pi + 1) / 4)), -294.0),
    "sinquad_50": (0.9**4, 0.0),
    "tquartic_1000": (0.81, 0.0),
    "tridia_1000": (500499.0, 0.0),
    "misra1a": (None, 1.2455138894e-1),
    "chwirut2": (None, 5.1304802941e2),
    "lanczos3": (None, 1.6117193594e-8),
    "danwood": (None, 4.3173084083e-3),
    "roszman1": (None, 4.9484847331e-4),
    "kirby2": (None, 3.9050739624),
    "boxbod": (None, 1.1680088766e3),
    "thurber": (None, 5.6427082397e3),
    "rat42": (None, 8.0565229338),
    "rat43": (None, 8.7864049080e3),
    "eckerle4": (None, 1.4635887487e-3),
}
NIST = [name for name, (start, _) in PUBLISHED.items() if start is None]
NAMES = ("quadratic", *PUBLISHED, *WITH_DATA)

# BFGS for functions of few parameters, L-BFGS-B for many, but for these.
METHODS = {
    "broyden_tridiagonal_1000": "CG",
    "fletchcr_100": "L-BFGS-B",  # BFGS finds another, at 49.6
    "meyer": "trust-exact",
}


@cache
def by_name(dtype):
    return {p.name: p for p in classical(dtype=dtype)}


def make(name, dtype=np.float64):
    if name == "quadratic":
        return problems.quadratic(dtype=dtype)
    if name in WITH_DATA:
        return WITH_DATA[name](dtype=dtype)
    return by_name(dtype)[name]


hessian_of = jax.jit(lambda fun, params: jax.hessian(fun)(params))
value_and_grad_of = jax.jit(
    lambda fun, params, *rows: jax.value_and_grad(fun)(params, *rows)
)


def operands(problem, params):
    """What ``fun`` is called with, itself included: equal problems, one compilation."""
    fun = problem.fun
    # A Partial of a Partial hides the numbers of the inner one from jit.
    fun = fun if isinstance(fun, Partial) else Partial(fun)
    return (fun, params) if problem.data is None else (fun, params, problem.data)


def value(problem, params):
    return float(value_and_grad(problem, params)[0])


def value_and_grad(problem, params):
    return jax.device_get(value_and_grad_of(*operands(problem, params)))


def join(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def split(vector, like):
    leaves, treedef = jax.tree.flatten(like)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [
        part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, shaped)


def minimum(problem, method="BFGS"):
    def on_host(vector):
        at, grad = value_and_grad(problem, split(vector, problem.init))
        return float(at), join(grad)

    options = {"gtol": 1e-8, "maxiter": 10_000}
    if method == "L-BFGS-B":
        options |= {"ftol": 0.0, "maxfun": 20_000}
    extra = {}
    if method == "trust-exact":
        extra["hess"] = lambda x: np.asarray(hessian_of(*operands(problem, x)))
    return scipy.optimize.minimize(
        on_host, join(problem.init), jac=True, method=method, options=options, **extra
    )


def test_the_table_of_published_values_is_complete():
    assert list(PUBLISHED) == [p.name for p in classical()]
    assert len(PUBLISHED) >= 60
    numbers = {int(ref[4:]) for _, ref, *_ in TABLE if ref[:3] == "MGH"}
    assert numbers == set(range(1, 36))
    sizes = [p.init.size for p in classical()]
    assert (min(sizes), max(sizes)) == (2, 1000)


def test_starts_are_finite_in_float32():
    ends = jax.jit(
        lambda: [
            jax.value_and_grad(p.fun)(p.init) for p in by_name(np.float32).values()
        ]
    )()
    for name, (at, grad) in zip(PUBLISHED, ends, strict=True):
        assert at.dtype == grad.dtype == np.float32
        assert np.isfinite(join((at, grad))).all(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_dtypes_are_as_asked(name, dtype):
    problem = make(name, dtype)
    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("strict"):
        rows = () if problem.data is None else (problem.data,)
        value, grad = jax.eval_shape(
            jax.value_and_grad(problem.fun), problem.init, *rows
        )
    assert problem.name == name
    assert value.shape == ()
    for tree in (problem.init, problem.solution, value, grad):
        assert {x.dtype for x in jax.tree.leaves(tree)} <= {np.dtype(dtype)}
    if problem.solution is not None:
        shapes = [jax.tree.map(np.shape, t) for t in (problem.init, problem.solution)]
        assert shapes[0] == shapes[1]
    for x in jax.tree.leaves((problem.init, problem.data, problem.solution)):
        assert isinstance(x, np.ndarray)


@pytest.mark.parametrize("name", NAMES)
def test_maker_called_twice_gives_the_same_program(name):
    once = make(name, np.float32)
    by_name.cache_clear()
    again = make(name, np.float32)
    same = jax.tree.map(np.array_equal, once[2:5], again[2:5])
    assert jax.tree.all(same)
    assert jax.tree.structure(once.fun) == jax.tree.structure(again.fun)
    if not isinstance(once.fun, Partial):
        assert once.fun is again.fun


@pytest.mark.parametrize("name", ["quadratic", "ridge", "logistic", "multinomial"])
def test_numbers_of_a_problem_cost_no_compilation(name, count_compilations):
    change = {"seed": 1} if name == "quadratic" else {"penalty": 3.0}
    maker = getattr(problems, name)
    params = jax.tree.map(np.ones_like, maker().init)
    before = value(maker(), params)
    with count_compilations() as count:
        after = value(maker(**change), params)
    assert count() == 0
    assert before != after


@pytest.mark.usefixtures("x64")
class TestMinima:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_start_and_minimum_match_the_literature(self, name):
        problem, (start, least) = make(name), PUBLISHED[name]
        if start is not None:
            np.testing.assert_allclose(value(problem, problem.init), start, rtol=1e-8)
        if least is None:
            assert problem.value is None
        else:
            digits = {"cragglvy_100": 1e-5, "edensch_36": 3e-5, "freuroth_1000": 5e-5}
            rtol = digits.get(name, 5e-6)
            np.testing.assert_allclose(problem.value, least, rtol=rtol)

    @pytest.mark.parametrize(
        "name",
        [n for n in NAMES if make(n).solution is not None and n not in NIST],
    )
    def test_solution_is_stationary_with_its_value(self, name):
        problem = make(name)
        least, grad = value_and_grad(problem, problem.solution)
        np.testing.assert_allclose(least, problem.value, rtol=1e-12, atol=1e-25)
        np.testing.assert_allclose(join(grad), 0.0, atol=1e-9)

    @pytest.mark.parametrize("name", NIST)
    def test_certified_parameters_have_the_certified_sum_of_squares(self, name):
        problem = make(name)
        least, grad = value_and_grad(problem, problem.solution)
        np.testing.assert_allclose(least, problem.value, rtol=1e-9)
        # Parameters of 11 digits, in their own units.
        _, first = value_and_grad(problem, problem.init)
        slopes = [abs(problem.solution * g).max() for g in (grad, first)]
        assert slopes[0] <= 1e-6 * slopes[1]

    @pytest.mark.parametrize("name", [n for n in NAMES if make(n).value is not None])
    def test_quasi_newton_finds_the_minimum(self, name):
        problem = make(name)
        few = join(problem.init).size <= 100
        method = METHODS.get(name, "BFGS" if few else "L-BFGS-B")
        found = minimum(problem, method)
        np.testing.assert_allclose(found.fun, problem.value, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", NAMES)
    def test_gradient_matches_finite_differences(self, name):
        problem, local = make(name), np.random.default_rng(0)
        start = join(problem.init)
        # Off the start, where all residuals and penalties count, but at its scale.
        scale = np.where(start == 0, 1.0, abs(start))
        point = start + 0.1 * scale * local.normal(size=start.shape)
        direction = 1e-5 * scale * local.normal(size=start.shape)
        ahead, behind = (
            value(problem, split(point + sign * direction, problem.init))
            for sign in (1, -1)
        )
        _, grad = value_and_grad(problem, split(point, problem.init))
        size = abs(join(grad) * direction).sum()
        slope = join(grad) @ direction
        np.testing.assert_allclose(
            (ahead - behind) / 2, slope, atol=1e-5 * size, rtol=0
        )

    @pytest.mark.parametrize(("n", "condition"), [(1, 10.0), (6, 1e4), (30, 1.0)])
    def test_quadratic_has_the_stated_spectrum(self, n, condition):
        problem = problems.quadratic(n, condition, seed=3, **f64)
        hessian = jax.jit(jax.hessian(problem.fun))(problem.init)
        eigenvalues = np.linalg.eigvalsh(np.asarray(hessian))[::-1]
        expected = np.geomspace(1.0, 1.0 / condition, n)
        np.testing.assert_allclose(eigenvalues, expected, rtol=1e-8)

    def test_himmelblau_has_four_minima(self):
        published = ((3, 2), (-2.805118, 3.131312), (-3.77931, -3.283186))
        for point in (*published, (3.584428, -1.848126)):
            least = value(make("himmelblau"), np.array(point, float))
            np.testing.assert_allclose(least, 0.0, atol=1e-10)

    def test_freudenstein_roth_is_lowest_beyond_the_ridge(self):
        problem = make("freudenstein_roth")
        assert value(problem, np.array([5.0, 4.0])) == 0.0
        assert problem.value > 0.0

    def test_helical_valley_is_smooth_at_its_start(self):
        problem = make("helical_valley")
        above, below = (value(problem, np.array([-1.0, y, 0.0])) for y in (1e-9, -1e-9))
        np.testing.assert_allclose(above, below, rtol=1e-6)

    @pytest.mark.parametrize("penalty", [0.0, 0.01, 10.0])
    def test_ridge_is_that_of_sklearn(self, penalty):
        x, y = load_diabetes(return_X_y=True)
        problem = problems.ridge(x, y, penalty, **f64)
        # sklearn minimizes sum of squares + alpha |w|^2, n times ours times 2
        peer = Ridge(alpha=len(y) * penalty, tol=1e-12).fit(x, y)
        np.testing.assert_allclose(problem.solution["weights"], peer.coef_, rtol=1e-8)
        np.testing.assert_allclose(
            problem.solution["intercept"], peer.intercept_, rtol=1e-10
        )
        least = value(problem, problem.solution)
        np.testing.assert_allclose(least, problem.value, rtol=1e-12)

    def test_least_squares_is_ridge_without_penalty(self):
        plain, ridge = problems.least_squares(**f64), problems.ridge(penalty=0.0, **f64)
        assert plain.value == ridge.value
        assert plain.value < problems.ridge(**f64).value

    def test_dependent_columns_have_the_smallest_solution(self):
        x = np.column_stack([X[:, 0], X[:, 0]])
        problem = problems.least_squares(x, X[:, 0], **f64)
        np.testing.assert_allclose(problem.solution["weights"], 0.5, rtol=1e-12)

    def test_logistic_is_that_of_sklearn(self):
        problem = problems.logistic(X, LABELS > 0, 0.05, **f64)
        peer = LogisticRegression(C=1 / (50 * 0.05), tol=1e-10).fit(X, LABELS > 0)
        found = split(minimum(problem).x, problem.init)
        np.testing.assert_allclose(found["weights"], peer.coef_[0], atol=1e-6)
        np.testing.assert_allclose(found["intercept"], peer.intercept_[0], atol=1e-6)

    def test_multinomial_is_that_of_sklearn(self):
        problem = problems.multinomial(X, LABELS, penalty=0.05, **f64)
        peer = LogisticRegression(C=1 / (50 * 0.05), tol=1e-10).fit(X, LABELS)
        found = split(minimum(problem).x, problem.init)
        np.testing.assert_allclose(found["weights"], peer.coef_.T, atol=1e-6)

    @pytest.mark.parametrize(
        "name", ["logistic", "multinomial", "mlp_tanh", "mlp_relu"]
    )
    def test_untrained_classifier_guesses(self, name):
        problem = make(name)
        params = jax.tree.map(np.zeros_like, problem.init)
        classes = 2 if name == "logistic" else 3
        np.testing.assert_allclose(value(problem, params), np.log(classes), rtol=1e-12)


@pytest.mark.parametrize("name", WITH_DATA)
def test_value_is_a_mean_over_rows(name):
    problem = make(name, np.float32)
    n = len(problem.data[0])
    params = jax.tree.map(lambda x: x + np.float32(0.1), problem.init)
    parts = [jax.tree.map(lambda a, k=k: a[k::2], problem.data) for k in (0, 1)]
    halves = [value(problem._replace(data=part), params) for part in parts]
    assert n % 2 == 0
    np.testing.assert_allclose(np.mean(halves), value(problem, params), rtol=1e-5)


@pytest.mark.parametrize("name", ["logistic", "multinomial"])
def test_large_margins_stay_finite(name):
    problem = getattr(problems, name)(1e4 * X, LABELS > 0)
    params = jax.tree.map(np.ones_like, problem.init)
    assert np.isfinite(join(value_and_grad(problem, params))).all()


@pytest.mark.parametrize(
    ("activation", "variance"), [("tanh", 2 / 500), ("relu", 2 / 200)]
)
def test_mlp_starts_with_the_variance_of_its_activation(activation, variance):
    init = problems.mlp(sizes=(200, 300, 7), activation=activation).init
    shapes = [(layer["weights"].shape, layer["bias"].shape) for layer in init]
    assert shapes == [((200, 300), (300,)), ((300, 7), (7,))]
    np.testing.assert_allclose(init[0]["weights"].var(), variance, rtol=0.03)
    other = problems.mlp(sizes=(200, 300, 7), activation=activation, seed=1).init
    assert not np.array_equal(init[0]["weights"], other[0]["weights"])


def test_mlp_applies_its_activation():
    tanh, relu = problems.mlp(), problems.mlp(activation="relu")
    layer = {"weights": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    batch = np.array([[-2.0, 1.0]], np.float32), np.array([1], np.int32)
    for problem, hidden in ((tanh, np.tanh([-2.0, 1.0])), (relu, np.array([0.0, 1.0]))):
        expected = np.log(np.exp(hidden).sum()) - hidden[1]
        found = value(problem._replace(data=batch), (layer, layer))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_synthetic_data_is_seeded_and_shaped():
    for make_data, labels in (
        (problems.linear_data, np.float32),
        (problems.blobs, np.int32),
    ):
        (x, y), (again, _), (other, _) = (make_data(60, 4, seed=s) for s in (0, 0, 1))
        assert (x.shape, y.shape) == ((60, 4), (60,))
        assert (x.dtype, y.dtype) == (np.float32, labels)
        assert np.array_equal(x, again)
        assert not np.array_equal(x, other)
    assert np.bincount(problems.blobs(61, classes=4)[1]).tolist() == [16, 15, 15, 15]
    exact = problems.least_squares(*problems.linear_data(60, 4, noise=0.0))
    assert exact.value < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: problems.rosenbrock(3), "n must be even and positive, got 3"),
        (lambda: problems.ridge(X), "x and y must come together"),
        (lambda: problems.ridge(y=TARGETS), "x and y must come together"),
        (lambda: problems.ridge(X, TARGETS[:, None]), r"got \(50, 4\) and \(50, 1\)"),
        (
            lambda: problems.logistic(X, LABELS - 1),
            "from 0 to 1, got labels such as -1",
        ),
        (lambda: problems.multinomial(X, LABELS, 2), "from 0 to 1, .* such as 2"),
        (lambda: problems.multinomial(X, TARGETS, 3), "y must hold whole numbers"),
        (lambda: problems.mlp(X, LABELS, (5, 3)), r"sizes must be \(4, ..., classes\)"),
        (lambda: problems.mlp(X, LABELS, (4, 2)), "from 0 to 1, .* such as 2"),
        (lambda: problems.mlp(activation="gelu"), "activation must be"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_and_classes_follow_the_data():
    assert problems.multinomial(X, LABELS).init["weights"].shape == (4, 3)
    assert problems.multinomial(X, LABELS, 5).init["weights"].shape == (4, 5)
    assert problems.multinomial(classes=4).init["weights"].shape == (2, 4)
    shapes = [layer["weights"].shape for layer in problems.mlp(X, LABELS).init]
    assert shapes == [(4, 32), (32, 3)]
