"""barzilai_borwein, and what it shares with scaled_lbfgs: no learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from benchmarks.classical_problems import classical
from jaxgd import Status, problems

pytestmark = pytest.mark.thin(4)

RULES = {"spectral": jaxgd.barzilai_borwein, "scaled": jaxgd.scaled_lbfgs}
either = pytest.mark.parametrize("rule", RULES)


def reference(value_and_grad, x, steps, memory=10):
    """The same method in NumPy and float64, written from its formulas."""
    f, g = value_and_grad(x)
    recent, shorts, threshold, alpha = [], [], 0.7, None
    path, rates, evaluations = [x], [], 1
    for _ in range(steps):
        recent = [f, *recent][:memory]
        if alpha is None:
            alpha = 0.01 * (np.linalg.norm(x) or 1) / np.linalg.norm(g)
        while True:
            trial, (ft, gt) = x - alpha * g, value_and_grad(x - alpha * g)
            evaluations += 1
            fine = np.isfinite(ft) and np.isfinite(gt).all()
            if fine and ft <= max(recent) - 1e-4 * alpha * g @ g:
                break
            cut = alpha * g @ g / (2 * (ft - f + alpha * g @ g)) if fine else 0.1
            alpha *= min(max(cut, 0.1), 0.5)
        s, y = trial - x, gt - g
        rates.append(alpha)
        if s @ y > 0:
            long, short = s @ s / (s @ y), s @ y / (y @ y)
            shorts = [short, *shorts][:3]
            if short < threshold * long:
                alpha, threshold = min(shorts), threshold * 0.9
            else:
                alpha, threshold = long, threshold * 1.1
        else:
            alpha *= 10
        x, f, g = trial, ft, gt
        path.append(x)
    return path, rates, evaluations


@pytest.mark.optimized
@pytest.mark.thin(5)
@pytest.mark.parametrize(
    "name", ["rosenbrock", "freudenstein_roth", "beale", "helical_valley", "wood"]
)
def test_it_is_the_method_of_its_formulas(name):
    with jax.enable_x64(True):
        named = {p.name: p for p in classical(dtype=np.float64)}
        problem = named.get(name) or problems.rosenbrock(dtype=np.float64)
        own = jax.jit(jax.value_and_grad(problem.fun))

        def value_and_grad(x):
            value, grad = own(x)
            return float(value), np.asarray(grad)

        steps = 15  # rounding differs, and the method is chaotic
        path, rates, evaluations = reference(value_and_grad, problem.init, steps)
        result = jaxgd.minimize(
            problem.fun,
            problem.init,
            optimizer=jaxgd.barzilai_borwein(),
            max_steps=steps,
        )
        assert result.steps == steps
        np.testing.assert_allclose(result.history.learning_rate, rates, rtol=1e-6)
        np.testing.assert_allclose(result.params, path[-1], rtol=1e-6, atol=1e-9)
        assert result.evaluations == evaluations


# No tuning, whatever the units: the iterates scale with the problem.


def _in_units(x, c, s):
    x = x / s
    return c * jnp.sum(jnp.array([1.0, 30.0, 100.0]) * (x - 3.0) ** 2)


@pytest.mark.parametrize("of_value", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("of_params", [1e-6, 1e6])
@either
def test_no_scale_needs_to_be_known(rule, of_value, of_params):
    start = jnp.array([1.0, 2.0, -1.0])
    # So small that the bound on the parameters below follows from it.
    call = {"stop": jaxgd.gradient_norm(rtol=1e-6), "optimizer": RULES[rule]}
    plain = jaxgd.minimize(_in_units, start, args=(1.0, 1.0), **call)
    scaled = jaxgd.minimize(
        _in_units, start * of_params, args=(of_value, of_params), **call
    )
    assert scaled.converged
    assert abs(int(scaled.steps) - int(plain.steps)) <= 3
    np.testing.assert_allclose(scaled.params / of_params, plain.params, rtol=1e-3)


SOLVED = ("rosenbrock", "beale", "helical_valley", "wood", "powell_singular")


@pytest.mark.full
def test_a_share_of_the_classical_problems():
    """A handful here; all of them in ``benchmarks/classical.py``."""
    with jax.enable_x64(True):
        small = jaxgd.StopRule(
            init=lambda check: (),
            update=lambda memory, check: (memory, check.grad_max <= 1e-5),
            status=Status.GRADIENT_SMALL,
        )
        table = {p.name: p for p in classical(dtype=np.float64)}
        chosen = [table[name] for name in SOLVED if name in table]
        assert len(chosen) >= 4
        for problem in chosen:
            result = jaxgd.minimize(
                problem.fun,
                problem.init,
                optimizer=jaxgd.barzilai_borwein(),
                stop=small,
                max_steps=5000,
            )
            assert result.status == Status.GRADIENT_SMALL, problem.name
            assert result.evaluations < 5000
            assert result.value == pytest.approx(problem.value, abs=1e-6)


# What breaks others.


def _inner_nan(x):
    return jnp.sum(-jnp.sqrt(1 - x**2) + 0.99 * x)


SOLVED_WELL = (Status.GRADIENT_SMALL, Status.PRECISION_REACHED)
STUCK = (Status.STALLED,)
HOSTILE = {
    "values of 1e16": (
        lambda x: 1e16 * jnp.sum(jnp.array([1.0, 100.0]) * (x - 3) ** 2),
        [1.0, 1.0],
        SOLVED_WELL,
    ),
    "gradients of 1e10": (
        lambda x: 1e10 * jnp.sum(jnp.sqrt(1 + (x - 2) ** 2)),
        [-3.0, 8.0],
        SOLVED_WELL,
    ),
    "NaN beyond a wall": (_inner_nan, [0.0, 0.5], SOLVED_WELL),
    "infinity beyond a wall": (
        lambda x: jnp.sum(x - jnp.log(x)),
        [1e-3, 50.0],
        SOLVED_WELL,
    ),
    "overflow in a trial point": (
        lambda x: jnp.exp(x[0] ** 2) + x[1] ** 2,
        [3.0, -1.0],
        SOLVED_WELL,
    ),
    "negative curvature": (
        lambda x: jnp.sum(jnp.cos(x)),
        [1e-3, -2e-3],
        SOLVED_WELL,
    ),
    "a flat valley": (
        lambda x: jnp.sum((x - 1) ** 8),
        [3.0, -2.0],
        SOLVED_WELL,
    ),
    "a kink": (lambda x: jnp.sum(jnp.abs(x - 1)), [3.0, -2.3], STUCK),
    "an objective without a minimum": (jnp.sum, [1.0, 2.0], STUCK),
    "a start at the minimum": (
        lambda x: jnp.sum(x**2),
        [0.0, 0.0],
        SOLVED_WELL,
    ),
    "a start at a pole": (lambda x: jnp.sum(1 / x), [0.0, 0.0], (Status.NON_FINITE,)),
    "a constant far above the rest": (
        lambda x: 1e6 + jnp.sum(jnp.array([1.0, 100.0]) * x**2),
        [1.0, 1.0],
        SOLVED_WELL,
    ),
}


def _hostile(x, which):
    """All of them in one program."""
    return jax.lax.switch(which, [fun for fun, *_ in HOSTILE.values()], x)


@pytest.mark.parametrize("name", HOSTILE)
@either
def test_it_survives(rule, name):
    _, start, ends = HOSTILE[name]
    which = jnp.int32(list(HOSTILE).index(name))
    result = jaxgd.minimize(
        _hostile,
        jnp.array(start),
        args=(which,),
        optimizer=RULES[rule],
        max_steps=1000,
    )
    if (rule, name) == ("scaled", "negative curvature"):
        # A pair across a wave may have next to no curvature, and the step that follows
        # leads thousands of waves away, where single precision is too coarse for more.
        ends = (*ends, *STUCK)
        assert result.value < -1.9
    assert result.status in ends, result.report()
    if Status.NON_FINITE not in ends:
        assert np.isfinite(result.value)
        assert np.isfinite(result.history.value).all()
        assert np.isfinite(result.params).all()
    if ends == STUCK:
        assert result.steps < 1000


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("beale", "scaled"),
        ("helical_valley", "spectral"),
        ("rosenbrock_10", "spectral"),
    ],
)
def test_at_the_floor_of_single_precision_it_says_so(name, rule):
    problem = {p.name: p for p in classical()}[name]
    never = jaxgd.gradient_norm(atol=1e-30)
    result = jaxgd.minimize(
        problem.fun,
        problem.init,
        optimizer=RULES[rule],
        stop=never,
        max_steps=5000,
    )
    assert result.status in (*STUCK, *SOLVED_WELL)
    assert result.steps < 5000
    assert result.value <= 1e-8


# An ordinary optax transformation.


@pytest.mark.full
@either
def test_in_an_optax_loop(rule):
    problem = problems.rosenbrock()
    rule = RULES[rule]()
    value_and_grad = optax.value_and_grad_from_state(problem.fun)

    def body(carry, _):
        x, state = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=problem.fun
        )
        rate = getattr(state, "learning_rate", None)
        return (optax.apply_updates(x, updates), state), (value, rate)

    start = jnp.asarray(problem.init)
    (x, state), (values, rates) = jax.jit(
        lambda carry: jax.lax.scan(body, carry, length=40)
    )((start, rule.init(start)))
    result = jaxgd.minimize(
        problem.fun, problem.init, optimizer=rule, max_steps=40, stop=None
    )
    np.testing.assert_allclose(x, result.params, rtol=0.05)
    np.testing.assert_allclose(values[:10], result.history.value[:10], rtol=1e-4)
    if rates is not None:
        own = result.history.learning_rate
        np.testing.assert_allclose(rates[:10], own[:10], rtol=1e-3)
    assert state.evaluations + 1 == result.evaluations
    np.testing.assert_array_equal(state.value, problem.fun(x))


@either
def test_further_arguments_of_the_objective_go_through_update(rule):
    rule = RULES[rule]()
    fun = lambda x, target: jnp.sum((x - target) ** 2)
    x, target = jnp.zeros(2), jnp.array([1.0, 2.0])
    state = rule.init(x)

    @jax.jit
    def step(x, state, target):
        value, grad = jax.value_and_grad(fun)(x, target)
        updates, state = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=fun, target=target
        )
        return optax.apply_updates(x, updates), state

    for _ in range(8):
        x, state = step(x, state, target)
    np.testing.assert_allclose(x, target, rtol=1e-4)


@either
def test_behind_another_transformation_it_still_descends(rule):
    rule = optax.chain(optax.add_decayed_weights(0.1), RULES[rule]())
    result = jaxgd.minimize(
        lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), optimizer=rule, max_steps=50
    )
    assert np.all(np.diff(result.history.value[:5]) <= 0)
    assert result.value < 0.05


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (jnp.float32, "scaled"),
        (jnp.bfloat16, "scaled"),
        (jnp.complex64, "spectral"),
        (jnp.complex64, "scaled"),
    ],
)
def test_dtypes_and_pytrees(dtype, rule):
    target = {"a": jnp.ones(3, dtype) * 2, "b": (jnp.asarray(-1, dtype),)}
    if dtype == jnp.complex64:
        target = jax.tree.map(lambda x: x * (1 - 2j), target)
    scales = {"a": 1.0, "b": (20.0,)}

    def fun(params):
        apart = jax.tree.map(
            lambda x, t, s: s * jnp.sum(jnp.abs(x - t).astype(jnp.float32) ** 2),
            params,
            target,
            scales,
        )
        return sum(jax.tree.leaves(apart))

    start = jax.tree.map(jnp.zeros_like, target)
    result = jaxgd.minimize(fun, start, optimizer=RULES[rule])
    assert result.status in SOLVED_WELL
    rtol = 0.02 if dtype == jnp.bfloat16 else 1e-4
    for found, wanted in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(target), strict=True
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(
            np.asarray(found, complex), np.asarray(wanted, complex), rtol=rtol
        )


@pytest.mark.full
def test_lanes_are_runs_of_their_own():
    problem = problems.rosenbrock()
    starts = jnp.array([[-1.2, 1.0], [2.0, 2.0], [0.0, 0.0]])
    stop = jaxgd.gradient_norm(1e-2)
    call = {"optimizer": jaxgd.barzilai_borwein, "stop": stop}
    run = lambda s: jaxgd.minimize(problem.fun, s, **call)
    together = jax.vmap(run)(starts)
    assert together.converged.all()
    for i, start in enumerate(starts):
        alone = run(start)
        assert abs(int(together.steps[i]) - int(alone.steps)) <= 40
        np.testing.assert_allclose(together.params[i], alone.params, atol=2e-2)


@pytest.mark.full
def test_memory_one_is_monotone():
    problem = problems.rosenbrock()
    values = {}
    for memory in (1, 10):
        rule = jaxgd.barzilai_borwein(memory=memory)
        result = jaxgd.minimize(problem.fun, problem.init, optimizer=rule)
        assert result.converged
        values[memory] = np.diff(result.history.value)
    assert (values[1] <= 1e-6).all()
    assert (values[10] > 1e-3).any()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"memory": 0}, ValueError, "memory must be at least 1, got 0"),
        ({"memory": 2.5}, TypeError, "memory must be a whole number, got 2.5"),
        ({"max_linesearch_steps": 0}, ValueError, "max_linesearch_steps must be"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        jaxgd.barzilai_borwein(**arguments)


@pytest.mark.parametrize("name", ["params", "value", "grad", "value_fn"])
@either
def test_what_it_needs_is_asked_for(rule, name):
    rule, x = RULES[rule](), jnp.ones(2)
    call = {"params": x, "value": 2.0, "grad": x, "value_fn": jnp.sum} | {name: None}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        rule.update(x, rule.init(x), **call)


# The default, and what the loop makes of it.


@pytest.mark.full
def test_the_scaled_rule_is_what_batch_descent_uses():
    ridge = problems.ridge()
    given = jaxgd.minimize(
        ridge.fun, ridge.init, ridge.data, optimizer=jaxgd.scaled_lbfgs
    )
    nothing = jaxgd.minimize(ridge.fun, ridge.init, ridge.data)
    assert nothing.converged
    assert nothing.value == pytest.approx(ridge.value, rel=1e-5)
    for a, b in zip(
        jax.tree.leaves(given.params), jax.tree.leaves(nothing.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


SEARCHES = RULES | {"lbfgs": optax.lbfgs}


@pytest.mark.parametrize("rule", SEARCHES)
@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_cut_changes_no_bit(rule, cut):
    fun, start = problems.rosenbrock().fun, problems.rosenbrock().init
    rule = SEARCHES[rule]
    whole = jaxgd.minimize(fun, start, optimizer=rule)
    first = jaxgd.minimize(fun, start, optimizer=rule, max_steps=cut)
    rest = jaxgd.minimize(fun, start, optimizer=rule, state=first.state)
    np.testing.assert_array_equal(whole.params, rest.params)
    assert whole.steps == rest.steps
    assert whole.evaluations == rest.evaluations
    np.testing.assert_array_equal(whole.value, rest.value)


@pytest.mark.full
@pytest.mark.parametrize("rule", SEARCHES)
def test_the_accepted_point_is_not_evaluated_again(rule):
    calls = []

    def fun(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.array([1.0, 5.0]) * (x - 1) ** 4)

    result = jaxgd.minimize(fun, jnp.zeros(2), optimizer=SEARCHES[rule], max_steps=12)
    jax.effects_barrier()
    assert result.steps == 12
    if rule in RULES:
        assert result.evaluations == 1 + result.state.opt_state.evaluations
    # A chunk may be run again, but never with a call more than it counted.
    assert len(calls) <= 2 * result.evaluations
    assert result.evaluations <= 3 * 12


@pytest.mark.parametrize("rule", SEARCHES)
def test_a_state_is_no_excuse_for_the_value_of_another_problem(rule):
    fun = lambda x, target: jnp.sum(jnp.array([1.0, 10.0]) * (x - target) ** 2)
    call = {"optimizer": SEARCHES[rule]}
    first = jaxgd.minimize(fun, jnp.zeros(2), args=(1.0,), **call)
    assert first.converged
    moved = jaxgd.minimize(
        fun, jnp.zeros(2), args=(2.0,), state=first.state, max_steps=0, **call
    )
    np.testing.assert_allclose(moved.value, fun(first.params, 2.0), rtol=1e-5)
    assert not moved.converged
    rest = jaxgd.minimize(fun, jnp.zeros(2), args=(2.0,), state=first.state, **call)
    np.testing.assert_allclose(rest.params, 2.0, rtol=1e-3)


@pytest.mark.full
def test_a_chain_that_goes_on_behind_a_search_is_evaluated_anew():
    fun = lambda x: jnp.sum(jnp.array([1.0, 30.0]) * (x - 1) ** 2)
    halved = optax.chain(optax.lbfgs(), optax.scale(0.5))
    result = jaxgd.minimize(fun, jnp.zeros(2), optimizer=halved, max_steps=3, stop=None)
    np.testing.assert_allclose(result.value, fun(result.params), rtol=1e-6)
    x, state = jnp.zeros(2), halved.init(jnp.zeros(2))
    for i in range(3):
        value, grad = jax.value_and_grad(fun)(x)
        np.testing.assert_allclose(result.history.value[i], value, rtol=1e-5)
        updates, state = halved.update(
            grad, state, x, value=value, grad=grad, value_fn=fun
        )
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(result.params, x, rtol=1e-4)


@pytest.mark.full
def test_a_search_takes_gradients_in_blocks():
    """Memory: differentiating a sum over blocks would keep the inside of all."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4096, 8)), jnp.float32)

    def fun(w, batch):
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ w) @ w.T).sum(axis=1) ** 2)

    start = jnp.full((8, 64), 0.1)
    call = {"optimizer": jaxgd.scaled_lbfgs}

    def temporaries(block):
        run = lambda w, x: (
            jaxgd.minimize(
                fun, w, x, max_steps=3, microbatch_size=block, stop=None, **call
            ).value
        )
        compiled = jax.jit(run).lower(start, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < temporaries(None) / 4
    whole = jaxgd.minimize(fun, start, x, max_steps=5, **call)
    split = jaxgd.minimize(fun, start, x, max_steps=5, microbatch_size=64, **call)
    np.testing.assert_allclose(split.value, whole.value, rtol=1e-3)


def test_mini_batches_search_on_their_own_rows():
    ridge = problems.ridge()
    result = jaxgd.minimize(
        ridge.fun,
        ridge.init,
        ridge.data,
        batch_size=50,
        optimizer=jaxgd.barzilai_borwein,
        epochs=20,
    )
    assert result.value < ridge.value + 0.01


@pytest.mark.full
def test_a_state_is_no_excuse_behind_a_steep_start_or_few_bits():
    far = lambda x, s: 1000.0 + jnp.sum((x - s) ** 2)
    stop = jaxgd.gradient_norm(1e-3)
    first = jaxgd.minimize(far, jnp.array([1e4]), args=(0.0,), stop=stop)
    rest = jaxgd.minimize(
        far, jnp.array([1e4]), args=(0.05,), stop=stop, state=first.state
    )
    np.testing.assert_allclose(rest.params, 0.05, atol=1e-3)
    few = lambda x, s: (1 + jnp.sum((x - s) ** 2)).astype(jnp.bfloat16)
    start = jnp.array([4.0], jnp.bfloat16)
    first = jaxgd.minimize(few, start, args=(0.0,))
    rest = jaxgd.minimize(few, start, args=(0.5,), state=first.state)
    np.testing.assert_allclose(np.asarray(rest.params, float), 0.5, atol=0.02)


def test_a_backtracking_search_that_fails_is_not_taken_for_a_divergence():
    fun = lambda x: jnp.where(x < 0, jnp.nan, x - 1e-4 * jnp.log(jnp.abs(x)))
    for store in (True, False):
        search = optax.scale_by_backtracking_linesearch(3, store_grad=store)
        rule = optax.chain(optax.sgd(1.0), search)
        result = jaxgd.minimize(fun, jnp.float32(1e-2), optimizer=rule, max_steps=5)
        assert (result.status, result.steps) == (Status.MAX_STEPS, 5)
