"""scaled_lbfgs: quasi-Newton steps on a learned scale.

What it shares with ``barzilai_borwein`` is in ``test_spectral.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from benchmarks.classical_problems import classical
from jaxgd import Status, problems

pytestmark = pytest.mark.thin(4)


def inverse_hessian(pairs):
    """The matrix of L-BFGS from its pairs, oldest first, on the learned diagonal."""
    s, y = (np.array(x) for x in zip(*pairs, strict=True))
    newest = y[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        diagonal = np.sqrt((s**2).sum(axis=0) / (y**2).sum(axis=0))
    # A parameter that no pair tells of has the scale of the newest pair.
    told = (diagonal > 0) & (diagonal < np.inf)
    diagonal = np.where(told, diagonal, 1 / (newest @ newest))
    h = np.diag(diagonal) / (newest @ (diagonal * newest))
    for s, y in pairs:
        left = np.eye(len(s)) - np.outer(s, y)
        h = left @ h @ left.T + np.outer(s, s)
    return h


def reference(value_and_grad, x, steps, memory=10):
    """The same method in NumPy and float64, written from its formulas."""
    f, g = value_and_grad(x)
    pairs, recent, t, far = [], [], 1.0, 0.0
    path, evaluations = [x], 1
    for _ in range(steps):
        recent = [f, *recent][:10]
        if pairs:
            direction = -inverse_hessian(pairs) @ g
        else:
            far = far or 0.01 * (np.linalg.norm(x) or 1)
            direction = -far * g / np.linalg.norm(g)
        slope = g @ direction
        while True:
            trial = x + t * direction
            ft, gt = value_and_grad(trial)
            evaluations += 1
            fine = np.isfinite(ft) and np.isfinite(gt).all()
            if fine and ft <= max(recent) + 1e-4 * t * slope:
                break
            cut = -t * slope / (2 * (ft - f - t * slope)) if fine else 0.1
            t *= min(max(cut, 0.1), 0.5)
        s, y = trial - x, gt - g
        if s @ y > 0:
            pairs = [*pairs, (s / np.sqrt(s @ y), y / np.sqrt(s @ y))][-memory:]
            t = 1.0
        elif pairs:
            t *= 4
        else:
            t, far = 1.0, 4 * np.linalg.norm(s)
        x, f, g = trial, ft, gt
        path.append(x)
    return path, evaluations


def saddle(x):
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 + 0.1 * x[0] * x[1]


CASES = {
    "rosenbrock_2": 10,
    "beale": 10,
    "helical_valley": 3,
    "wood": 10,
    "kowalik_osborne": 1,
    "saddle": 10,
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_method_of_its_formulas(name, x64):
    if name == "saddle":
        fun, start = saddle, np.array([0.0, 1e-4])
    else:
        table = {p.name: p for p in classical(dtype=np.float64)}
        fun, start = table[name].fun, table[name].init
    own = jax.jit(jax.value_and_grad(fun))

    def value_and_grad(x):
        value, grad = own(x)
        return float(value), np.asarray(grad)

    memory, steps = CASES[name], 15
    path, evaluations = reference(value_and_grad, start, steps, memory)
    result = jaxgd.minimize(
        fun,
        start,
        optimizer=jaxgd.scaled_lbfgs(memory),
        max_steps=steps,
        stop=None,
    )
    assert result.evaluations == evaluations
    np.testing.assert_allclose(result.params, path[-1], rtol=1e-6, atol=1e-12)
    values = [value_and_grad(x)[0] for x in path[:-1]]
    np.testing.assert_allclose(result.history.value, values, rtol=1e-6, atol=1e-12)


# Parameters in any units.

SPREAD = np.geomspace(1e-3, 1e3, 30)
SPREAD = np.random.default_rng(0).permutation(SPREAD)


def _quadratic(x, units, matrix, target):
    apart = x / units - target
    return 0.5 * apart @ matrix @ apart


def test_a_quadratic_in_units_from_a_thousandth_to_a_thousand(x64):
    problem = problems.quadratic(30, 10.0, dtype=np.float64)
    target = jnp.asarray(problem.solution)
    matrix = jax.hessian(problem.fun)(target)
    runs = [
        jaxgd.minimize(_quadratic, np.zeros(30), args=(jnp.asarray(u), matrix, target))
        for u in (np.ones(30), SPREAD)
    ]
    for run, units in zip(runs, (1, SPREAD), strict=True):
        assert run.converged
        np.testing.assert_allclose(run.params / units, target, atol=1e-5)
    assert runs[1].evaluations <= 2 * runs[0].evaluations


def _columns():
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(200, 6))
    raw = plain * np.array([1e-2, 1.0, 30.0, 1e3, 5e4, 0.1])
    return rng, plain, raw


def _line(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def test_a_line_through_raw_columns(x64):
    rng, plain, raw = _columns()
    y = plain @ np.arange(1.0, 7.0) + rng.normal(size=200)
    known = np.linalg.lstsq(raw, y, rcond=None)[0]
    lowest = float(_line(known, (raw, y)))
    runs = [jaxgd.minimize(_line, np.zeros(6), (x, y)) for x in (plain, raw)]
    for run in runs:
        assert run.converged
        assert run.value == pytest.approx(lowest, rel=1e-9)
    np.testing.assert_allclose(runs[1].params, known, rtol=1e-3)
    assert runs[1].evaluations <= 2 * runs[0].evaluations + 10


def _classes(w, batch):
    x, y = batch
    z = x @ w
    return jnp.mean(jnp.logaddexp(0, z) - y * z)


def test_classes_by_raw_columns(x64):
    optimize = pytest.importorskip("scipy.optimize")
    rng, plain, raw = _columns()
    y = 1.0 * (plain @ np.array([1.0, -2, 0.5, 1, -1, 0.3]) + rng.normal(size=200) > 0)
    grad = jax.jit(jax.value_and_grad(_classes))
    known = optimize.minimize(
        lambda w: tuple(np.asarray(x) for x in grad(w, (plain, y))),
        np.zeros(6),
        jac=True,
        tol=1e-10,
    )
    runs = [jaxgd.minimize(_classes, np.zeros(6), (x, y)) for x in (plain, raw)]
    for run in runs:
        assert run.converged
        assert run.value == pytest.approx(known.fun, rel=1e-9)
    assert runs[1].evaluations <= 2 * runs[0].evaluations + 10


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "name",
    [
        "meyer",
        "misra1a",
        "kirby2",
        "osborne_1",
        "powell_badly_scaled",
        "brown_badly_scaled",
    ],
)
def test_badly_scaled_problems_are_solved(name, x64):
    problem = {p.name: p for p in classical(dtype=np.float64)}[name]
    result = jaxgd.minimize(problem.fun, problem.init, max_steps=3000)
    assert result.converged, result.report()
    fall = result.history.value[0] - problem.value
    assert result.value - problem.value <= 1e-6 * fall


# What its state says.


def walk(fun, start, steps, rule=None):
    """The points, and the states that led from each to the next."""
    rule = jaxgd.scaled_lbfgs() if rule is None else rule

    def body(carry, _):
        x, state = carry
        value, grad = jax.value_and_grad(fun)(x)
        updates, state = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=fun
        )
        return (optax.apply_updates(x, updates), state), (x, state)

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))
    start = jnp.asarray(start)
    (last, _), (path, states) = run((start, rule.init(start)))
    return np.concatenate([path, last[None]]), states


def test_without_curvature_a_step_is_four_times_the_last(x64):
    """From 0, where the norm of the parameters says nothing."""
    path, states = walk(lambda x: -0.5 * jnp.sum((x + 1e-3) ** 2), [0.0, 0.0], 7)
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(lengths, 0.01 * 4.0 ** np.arange(7), rtol=1e-9)
    assert (states.pairs == 0).all()
    assert (states.decrement == np.inf).all()


@pytest.mark.optimized
@pytest.mark.full
def test_pairs_of_negative_curvature_are_refused(x64):
    """Into a saddle, then off it, then into a bowl."""

    def fun(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

    path, states = walk(fun, [1.0, 1e-3], 30)
    grads = np.asarray(jax.vmap(jax.grad(fun))(jnp.asarray(path)))
    bends = (np.diff(path, axis=0) * np.diff(grads, axis=0)).sum(axis=1)
    known = np.diff(states.pairs, prepend=0)
    early = slice(0, 9)  # before the memory is full
    np.testing.assert_array_equal(known[early], bends[early] > 0)
    bent = np.flatnonzero((bends[:-1] < -1e-9) & (states.pairs[:-1] > 0))
    assert len(bent) > 0
    assert (np.asarray(states.decrement)[bent + 1] == np.inf).all()
    assert (np.asarray(states.trust)[bent] == 0).all()
    np.testing.assert_allclose(np.asarray(jax.grad(fun)(path[-1])), 0, atol=1e-6)


def _bowl(x):
    return jnp.sum(jnp.array([1.0, 9.0]) * (x - 1) ** 2)


def _with_a_pair(rule, x):
    """A state that holds pairs, and the point, value and gradient there."""
    state = rule.init(x)
    for _ in range(2):
        value, grad = jax.value_and_grad(_bowl)(x)
        updates, state = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=_bowl
        )
        x = optax.apply_updates(x, updates)
    return state, x, *jax.value_and_grad(_bowl)(x)


@pytest.mark.full
def test_a_search_that_fails_forgets_the_pairs():
    rule = jaxgd.scaled_lbfgs()
    state, x, value, grad = _with_a_pair(rule, jnp.zeros(2))
    assert state.pairs == 2

    def update(state, fun):
        return rule.update(grad, state, x, value=value, grad=grad, value_fn=fun)

    nowhere = lambda p: jnp.nan * jnp.sum(p)
    updates, state = update(state, nowhere)
    np.testing.assert_array_equal(updates, 0)
    assert (state.pairs, state.num_linesearch_steps) == (0, 30)
    # Along the gradient then, by 1 % of the norm.
    updates, after = update(state, _bowl)
    downhill = -0.01 * np.linalg.norm(x) * grad / np.linalg.norm(grad)
    np.testing.assert_allclose(updates, downhill, rtol=1e-5)
    assert after.pairs == 1
    # Nothing along the gradient either: all further updates are 0.
    _, state = update(state, nowhere)
    updates, state = update(state, _bowl)
    np.testing.assert_array_equal(updates, 0)
    assert state.num_linesearch_steps == 0


def test_a_gradient_of_zero_moves_nothing():
    rule, x = jaxgd.scaled_lbfgs(), jnp.ones(2)
    value, grad = jax.value_and_grad(_bowl)(x)
    for state in (rule.init(x), _with_a_pair(rule, jnp.zeros(2))[0]):
        updates, after = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=_bowl
        )
        np.testing.assert_array_equal(updates, 0)
        assert after.evaluations == state.evaluations
        assert all(np.isfinite(x).all() for x in (after.steps, after.changes))


@pytest.mark.full  # its digits want XLA's optimizations
def test_conjugate_pairs_are_newtons_method(x64):
    """n of them hold the whole inverse Hessian, and the decrement is Newton's."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    curvatures = np.array([1e-3, 1.0, 20.0, 1e4])
    matrix = jnp.asarray(basis * curvatures @ basis.T)
    fun = lambda x: 0.5 * x @ matrix @ x + 3.0
    rule, x = jaxgd.scaled_lbfgs(5), jnp.asarray(rng.normal(size=4))
    roots = np.sqrt(curvatures)[:, None]
    state = rule.init(x)
    state = state._replace(
        steps=state.steps.at[:4].set(basis.T / roots),
        changes=state.changes.at[:4].set(basis.T * roots),
        pairs=jnp.int32(4),
        next=jnp.int32(4),
    )
    value, grad = jax.value_and_grad(fun)(x)
    updates, state = rule.update(grad, state, x, value=value, grad=grad, value_fn=fun)
    # The condition is 1e7, and rounding 1e-16 times that.
    np.testing.assert_allclose(x + updates, 0, atol=1e-9)
    assert state.decrement == pytest.approx(float(value) - 3.0, rel=1e-10)
    assert state.trust == pytest.approx(1.0)
    assert state.num_linesearch_steps == 1


def test_its_decrement_tells_how_far_a_quadratic_still_falls(x64):
    fun = problems.quadratic(4, 100.0, dtype=np.float64).fun
    path, states = walk(fun, np.zeros(4), 14)
    excess = np.array([fun(x) for x in path[:-1]])
    known = np.asarray(states.pairs) >= 4
    known &= (np.asarray(states.decrement) < np.inf) & (excess > 1e-20)
    assert known.sum() >= 5
    ratio = np.asarray(states.decrement)[known] / excess[known]
    assert ((ratio > 0.2) & (ratio < 20)).all(), ratio
    assert 0.8 < np.median(ratio) < 1.25


def test_a_wall_of_nan_is_not_crossed(x64):
    def fun(x):
        return jnp.sum(-jnp.sqrt(1 - x**2) + jnp.array([0.99, 5.0]) * x)

    path, states = walk(fun, [0.9, 0.0], 25)
    assert (np.abs(path) < 1).all()
    assert (np.asarray(states.num_linesearch_steps) > 1).any()
    slopes = np.array([0.99, 5.0])
    wanted = -slopes / np.sqrt(1 + slopes**2)
    np.testing.assert_allclose(path[-1], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (0, ValueError, "memory_size must be at least 1, got 0"),
        (-3, ValueError, "memory_size must be at least 1, got -3"),
        (2.5, TypeError, "memory_size must be a whole number, got 2.5"),
        (True, TypeError, "memory_size must be a whole number, got True"),
        ("10", TypeError, "memory_size must be a whole number"),
    ],
)
def test_bad_memory(size, error, words):
    with pytest.raises(error, match=words):
        jaxgd.scaled_lbfgs(size)


# Numbers of any kind.


def _valley(x, factor):
    return factor * (jnp.sum((x - 1) ** 2) + 10 * (x[0] - x[1] ** 2) ** 2)


def test_a_factor_before_the_objective_changes_nothing():
    """In single precision, where the squares of its gradients leave the range.

    About 1e-30 and 1e30, but powers of two: so the factor adds no rounding.
    """
    start = jnp.array([-1.0, 2.0, 0.5])
    runs = [
        jaxgd.minimize(_valley, start, args=(factor,), max_steps=8, stop=None)
        for factor in (1.0, 2.0**-100, 2.0**100)
    ]
    for factor, run in zip((2.0**-100, 2.0**100), runs[1:], strict=True):
        np.testing.assert_allclose(run.params, runs[0].params, rtol=1e-5)
        values = run.history.value / np.float32(factor)
        np.testing.assert_allclose(values, runs[0].history.value, rtol=1e-5)
        assert run.evaluations == runs[0].evaluations
    assert runs[0].value < 0.1 * runs[0].history.value[0]


@pytest.mark.full
def test_complex_parameters_are_pairs_of_real_ones(x64):
    """Not bit by bit: the scale is one for both parts of a complex parameter."""
    target = jnp.array([1 - 2j, 0.5 + 1j])

    def fun(z):
        z = z["z"] - target
        return jnp.sum(jnp.abs(z) ** 2) + 3 * jnp.abs(z[0] + 2j * z[1]) ** 2

    def real(x):
        return fun({"z": x["re"] + 1j * x["im"]})

    zero = jnp.zeros(2)
    runs = (
        jaxgd.minimize(fun, {"z": jnp.zeros(2, complex)}),
        jaxgd.minimize(real, {"re": zero, "im": zero}),
    )
    assert runs[0].converged
    assert runs[1].converged
    np.testing.assert_allclose(runs[0].params["z"], target, rtol=1e-6)
    assert runs[0].evaluations <= runs[1].evaluations + 5
    first = [run.history.value[:2] for run in runs]  # no pair yet
    np.testing.assert_allclose(first[0], first[1], rtol=1e-12)


def test_leaves_make_no_difference(x64):
    fun = {p.name: p for p in classical(dtype=np.float64)}["wood"].fun
    start = np.array([-3.0, -1.0, -3.0, -1.0])
    joined = lambda tree: fun(jnp.concatenate([tree[0].reshape(-1), tree[1]["b"]]))
    tree = (start[:2].reshape(2, 1), {"b": start[2:]})
    apart = jaxgd.minimize(joined, tree, max_steps=12, stop=None)
    whole = jaxgd.minimize(fun, start, max_steps=12, stop=None)
    found = np.concatenate([apart.params[0].reshape(-1), apart.params[1]["b"]])
    np.testing.assert_allclose(found, whole.params, rtol=1e-6)
    assert apart.evaluations == whole.evaluations


def test_pairs_of_half_precision_are_kept_in_single():
    rule = jaxgd.scaled_lbfgs(3)
    state = rule.init({"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float16)})
    assert state.steps["a"].shape == state.changes["a"].shape == (3, 2)
    kinds = {x.dtype for x in jax.tree.leaves((state.steps, state.changes))}
    assert kinds == {jnp.dtype(jnp.float32)}


def test_lanes_equal_single_runs(x64):
    fun = lambda x: _valley(x, 1.0)
    starts = jnp.array([[-1.0, 2.0, 0.5], [3.0, 0.1, 0.0], [0.0, 0.0, 0.0]])

    def run(start):
        return jaxgd.minimize(fun, start, max_steps=12, stop=None)

    together = jax.vmap(run)(starts)
    for i, start in enumerate(starts):
        alone = run(start)
        assert together.evaluations[i] == alone.evaluations
        np.testing.assert_allclose(together.params[i], alone.params, rtol=1e-7)


def test_it_stops_where_nothing_is_left(x64):
    """A bowl above 1: what is left is below the rounding of that 1."""
    result = jaxgd.minimize(lambda x: 1 + _bowl(x), np.zeros(2))
    assert result.status in (Status.GRADIENT_SMALL, Status.PRECISION_REACHED)
    assert result.value - 1 <= 4e-16


def test_the_rate_is_the_length_of_the_step():
    result = jaxgd.minimize(
        lambda p: jnp.sum((p - 1) ** 2), jnp.zeros(2), max_steps=6, stop=None
    )
    rates = result.history.learning_rate
    assert rates[0] == 1
    np.testing.assert_array_equal(rates[result.history.grad_norm == 0], 0)
    assert rates[-1] == 0
