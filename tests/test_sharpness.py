"""The largest curvature against dense eigenvalues, whatever the spectrum."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import jaxgd
from benchmarks.classical_problems import classical
from jaxgd import problems

pytestmark = pytest.mark.thin(4)

RNG = np.random.default_rng(0)


def diagonal(x, curvatures):
    return jnp.sum(curvatures * x**2) / 2


def dense(fun, params, *rest):
    """The largest eigenvalue of jax.hessian, of float64 numbers, by NumPy."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        rest = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, rest
        )
        flat, join = ravel_pytree(wide)
        hessian = jax.hessian(lambda v: fun(join(v), *rest))(flat)
        return np.linalg.eigvalsh(np.asarray(hessian)).max()


N = 1000  # of nearly all, which then share a program
SPECTRA = {
    "one": [3.0],
    "one, negative": [-3.0],
    "two": [-3.0, 2.0],
    "condition 1e6": np.geomspace(1e-6, 1, N),
    "condition 1e6, large": 1e8 * np.geomspace(1e-6, 1, N),
    "dense to the edge": np.linspace(0, 1, N),
    "one beyond a dense edge": [*np.linspace(0, 1, N - 1), 1.03],
    "one among equals": [*np.ones(N - 1), 1.2],
    "clusters": np.repeat([1.0, 0.98, 0.5, -0.3], N // 4),
    "almost equal": 1 + 1e-3 * np.linspace(0, 1, N),
    "squares": np.arange(N) ** 2.0,
    "indefinite": [*np.linspace(-10, 0.5, N - 1), 1.0],
    "indefinite, 100 times down": [*np.linspace(-100, 0.5, N - 1), 1.0],
    "all negative": -np.geomspace(0.02, 1, N),
    "beyond squares in float32": 1e25 * np.linspace(0, 1, N),
    "below squares in float32": 1e-25 * np.linspace(0, 1, N),
    "zero": np.zeros(N),
    "zero and negative": -np.tile([0.0, 1.0], N // 2),
    "many equals": [*np.ones(49_999), 1.2],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_to_one_percent(name, dtype):
    curvatures = np.asarray(SPECTRA[name], dtype)
    with jax.enable_x64(dtype == np.float64):
        for key in range(3):
            found = jaxgd.sharpness(
                diagonal, np.zeros_like(curvatures), args=(curvatures,), key=key
            )
            assert found.dtype == dtype
            assert found.shape == ()
            most = curvatures.max()
            off = 1e-5 * np.abs(curvatures).max() if most == 0 else 0.01 * abs(most)
            np.testing.assert_allclose(found, most, rtol=0, atol=off)


CASES = {
    "quadratic": problems.quadratic(60, 1e6),
    "logistic": problems.logistic(),
    "mlp": problems.mlp(*problems.blobs(100, 4, 3), sizes=(4, 8, 3)),
    **{p.name: p for p in classical()[2:8:2]},
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", CASES)
def test_objectives_to_one_percent(name):
    case = CASES[name]
    near = lambda x: np.asarray(x + 0.1 * RNG.normal(size=np.shape(x)), np.float32)
    params = jax.tree.map(near, case.init)
    rest = () if case.data is None else (case.data,)
    expected = dense(case.fun, params, *rest)
    found = jaxgd.sharpness(case.fun, params, *rest)
    np.testing.assert_allclose(found, expected, rtol=0.01)


X = RNG.normal(size=(1003, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.float32)
START = {"w": jnp.full(6, 0.3), "b": jnp.zeros(())}


def logistic(params, batch):
    x, y = batch
    z = x @ params["w"] + params["b"]
    return jnp.mean(jnp.logaddexp(z, 0) - y * z)


WHOLE = dense(logistic, START, (X, Y))


@pytest.mark.parametrize("size", [None, 1, 100, 1002, 5000])
def test_blocks_are_weighted_by_rows(size):
    found = jaxgd.sharpness(logistic, START, (X, Y), microbatch_size=size)
    np.testing.assert_allclose(found, WHOLE, rtol=1e-3)


def test_memory_is_bounded_and_blocks_change_nothing():
    wide, n = 512, 40_000
    shapes = jnp.zeros((8, wide)), jnp.zeros(wide)

    def deep(params, x):
        first, last = params
        return jnp.mean(jnp.tanh(x @ first) @ last) ** 2

    def temporaries(size):
        run = jax.jit(
            lambda p, x: jaxgd.sharpness(deep, p, x, microbatch_size=size, rtol=0.1)
        )
        memory = run.lower(shapes, jnp.zeros((n, 8))).compile().memory_analysis()
        return memory.temp_size_in_bytes

    at_once = temporaries(n)
    assert at_once > 3 * 4 * wide * n  # three layers of all rows
    assert temporaries(None) < at_once / 4


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 0.01), (np.float64, 0.01), (jnp.bfloat16, 0.03)]
)
def test_dtypes(dtype, rtol):
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), START)
        found = jaxgd.sharpness(logistic, params, (X, Y))
        assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
        np.testing.assert_allclose(found, WHOLE, rtol=rtol)


@pytest.mark.full
def test_a_complex_parameter_is_a_pair_of_reals():
    matrix = RNG.normal(size=(9, 5)) + 1j * RNG.normal(size=(9, 5))
    skew = RNG.normal(size=5)

    def loss(z):
        # Beside |M z|^2 a term that is no function of |z|: Hermitian matrices are not
        # enough to describe it.
        return jnp.sum(jnp.abs(matrix @ z["z"]) ** 2) + jnp.sum(
            skew * jnp.real(z["z"] ** 2)
        )

    def of_pair(pair):
        return loss({"z": pair[0] + 1j * pair[1]})

    pair = RNG.normal(size=(2, 5)).astype(np.float32)
    expected = dense(of_pair, pair)
    start = {"z": jnp.asarray(pair[0] + 1j * pair[1])}
    found = float(jaxgd.sharpness(loss, start))
    np.testing.assert_allclose(found, expected, rtol=0.01)
    run = lambda rate: jaxgd.minimize(loss, start, learning_rate=rate, max_steps=400)
    assert run(2 * 0.97 / found).value < loss(start)
    assert not run(2 * 1.03 / found).value < loss(start)


def test_under_jit_and_vmap():
    scales = jnp.array([1.0, -2.0, 0.0, 5.0])
    curvatures = jnp.array(SPECTRA["indefinite"], jnp.float32)

    def of(scale):
        return jaxgd.sharpness(
            diagonal, jnp.zeros(N), args=(scale * curvatures,), rtol=scale * 0 + 0.01
        )

    found = jax.jit(jax.vmap(of))(scales)
    np.testing.assert_allclose(found, [1, 20, 0, 5], rtol=0.01, atol=1e-4)


def test_aux_and_keys():
    def noisy(params, batch, scale, *, key):
        level = 1 + jax.random.uniform(key)
        return scale * level * logistic(params, batch), {"level": level, "x": batch[0]}

    options = {"has_aux": True, "with_key": True, "args": (2.0,), "microbatch_size": 90}
    run = lambda key: jaxgd.sharpness(noisy, START, (X, Y), key=key, **options)
    result = jaxgd.minimize(
        noisy, START, (X, Y), learning_rate=0.1, max_steps=0, key=3, **options
    )
    expected = 2 * WHOLE * float(result.aux["level"])
    np.testing.assert_allclose(run(3), expected, rtol=0.01)
    assert run(3) == run(3)
    assert abs(float(run(4)) / float(run(3)) - 1) > 1e-3


def test_what_is_not_finite_is_nan():
    bowl = lambda x: jnp.sum(x**2 * jnp.sqrt(x))
    assert np.isnan(jaxgd.sharpness(bowl, jnp.array([1.0, -1.0, 1.0])))


def test_the_limit_on_products_returns_a_lower_bound():
    curvatures = np.linspace(0, 1, 5000, dtype=np.float32)
    run = lambda most: float(
        jaxgd.sharpness(
            diagonal, np.zeros(5000, "f"), args=(curvatures,), max_products=most
        )
    )
    found = [run(most) for most in (1, 5, 20, 500)]
    assert found == sorted(found)
    assert found[0] < 0.6 < found[1] < 0.98 < found[2] < found[3] < 1.0001


def test_new_numbers_cost_no_compilation(count_compilations):
    def scaled(scale, params, batch, penalty):
        return scale * logistic(params, batch) + penalty * jnp.sum(params["w"] ** 2)

    def run(scale=1.0, penalty=0.1, x=X, **how):
        fun = Partial(scaled, np.float32(scale))
        return jaxgd.sharpness(fun, START, (x, Y), args=(penalty,), **how)

    run()
    for how in (
        {"scale": 2.0},
        {"penalty": np.float64(0.3)},
        {"penalty": jnp.float32(1)},
        {"x": X + 1},
        {"rtol": 1e-4},
        {"rtol": np.float32(1e-3)},
        {"max_products": 7},
        {"key": 5},
    ):
        with count_compilations() as count:
            run(**how)
        assert count() == 0, how


REFUSED = [
    ({"fun": 3}, TypeError, "fun must be a function"),
    ({"params": {"w": 1}}, TypeError, r"params\['w'\] must be a floating"),
    ({"data": [X, Y[:3]]}, ValueError, "equally many rows"),
    ({"args": 3.0}, TypeError, "args must be a tuple"),
    ({"fun": lambda params: 0.0}, TypeError, "fun must take"),
    ({"fun": lambda params, batch: batch[1]}, ValueError, "fun must return"),
    ({"rtol": -1.0}, ValueError, "rtol must be finite and >= 0"),
    ({"rtol": "1 %"}, TypeError, "rtol must be a real number"),
    ({"max_products": 0}, ValueError, "max_products must be at least 1"),
    ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1"),
    ({"has_aux": 1}, TypeError, "has_aux must be True or False"),
    ({"key": 1.5}, TypeError, "key"),
]


@pytest.mark.parametrize(("how", "error", "said"), REFUSED)
def test_refused_before_compilation(how, error, said, count_compilations):
    given = {"fun": logistic, "params": START, "data": (X, Y)} | how
    with count_compilations() as count, pytest.raises(error, match=said):
        jaxgd.sharpness(**given)
    assert count() == 0
