"""Every problem is what it says: its start, its minimum, its gradient, one program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.tree_util import Partial
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge

from jaxgd import problems

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
NAMES = ("quadratic", *(p.name for p in problems.classical()), *WITH_DATA)

# Values at the starts: MGH as tabulated in the literature, or by hand; and published
# minima, to the digits that are published.
PUBLISHED = {
    "rosenbrock_2": (24.2, 0.0),
    "rosenbrock_10": (121.0, 0.0),
    "freudenstein_roth": (400.5, 48.9842),
    "brown_badly_scaled": (999998000003.0, 0.0),
    "beale": (14.203125, 0.0),
    "helical_valley": (2500.0, 0.0),
    "powell_singular": (215.0, 0.0),
    "wood": (19192.0, 0.0),
    "brown_dennis": (7926693.336997, 85822.2),
    "trigonometric": (7.07575946e-3, 2.79506e-5),
    "broyden_tridiagonal": (21.0, 0.0),
    "booth": (2180.0, 0.0),
    "matyas": (9.0, 0.0),
    "himmelblau": (610.0, 0.0),
}


def make(name, dtype=np.float64):
    if name == "quadratic":
        return problems.quadratic(dtype=dtype)
    if name in WITH_DATA:
        return WITH_DATA[name](dtype=dtype)
    return next(p for p in problems.classical(dtype=dtype) if p.name == name)


value_of = jax.jit(lambda fun, *operands: fun(*operands))
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
    return float(value_of(*operands(problem, params)))


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

    options = {"gtol": 1e-8, "maxiter": 2000}
    if method == "L-BFGS-B":
        options["ftol"] = 0.0
    return scipy.optimize.minimize(
        on_host, join(problem.init), jac=True, method=method, options=options
    )


def test_the_table_of_published_values_is_complete():
    assert {p.name for p in problems.classical()} == PUBLISHED.keys()


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
    once, again = make(name, np.float32), make(name, np.float32)
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
        np.testing.assert_allclose(value(problem, problem.init), start, rtol=1e-8)
        np.testing.assert_allclose(problem.value, least, rtol=2e-6)

    @pytest.mark.parametrize("name", [n for n in NAMES if make(n).solution is not None])
    def test_solution_is_stationary_with_its_value(self, name):
        problem = make(name)
        least, grad = value_and_grad(problem, problem.solution)
        np.testing.assert_allclose(least, problem.value, rtol=1e-12, atol=1e-25)
        np.testing.assert_allclose(join(grad), 0.0, atol=1e-9)

    @pytest.mark.parametrize("method", ["BFGS", "L-BFGS-B"])
    @pytest.mark.parametrize("name", [n for n in NAMES if make(n).value is not None])
    def test_quasi_newton_finds_the_minimum(self, name, method):
        problem = make(name)
        found = minimum(problem, method)
        np.testing.assert_allclose(found.fun, problem.value, rtol=1e-10, atol=1e-13)
        if problem.solution is not None:
            # The Hessian of powell_singular has rank 2 at its solution.
            loose = 1e-2 if name == "powell_singular" else 1e-5
            np.testing.assert_allclose(
                found.x, join(problem.solution), rtol=1e-6, atol=loose
            )

    @pytest.mark.parametrize("name", NAMES)
    def test_gradient_matches_finite_differences(self, name):
        problem, local = make(name), np.random.default_rng(0)
        start = join(problem.init)
        # Off the start, where all residuals and penalties count.
        point = start + 0.1 * local.normal(size=start.shape)
        direction = 1e-5 * local.normal(size=start.shape)
        ahead, behind = (
            value(problem, split(point + sign * direction, problem.init))
            for sign in (1, -1)
        )
        _, grad = value_and_grad(problem, split(point, problem.init))
        size = np.linalg.norm(join(grad)) * np.linalg.norm(direction)
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
