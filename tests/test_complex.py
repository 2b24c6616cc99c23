"""Rules on complex parameters: as on their real parts, or turned as they are turned.

A rule is right on complex numbers if it takes the steps that it takes of real and
imaginary parts, or if it knows nothing of the axes: parameters turned by phases then
take the turned steps. Rules that are neither see the parts (``_rules/real_view``).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax import contrib
from test_optax_rules import ALIASES, DEPRECATED, find
from test_optax_wrappers import WRAPPED

import jaxgd
from jaxgd._rules import adapter

pytestmark = pytest.mark.thin(4)

RNG = np.random.default_rng(0)
M, K = 20, 5


def normal(*shape):
    return (RNG.normal(size=shape) + 1j * RNG.normal(size=shape)).astype(np.complex64)


A, B = normal(M, K), normal(M)
PHASES = np.exp(1j * np.array([0.3, 1.1, 2.0, -1.0, -2.5])).astype(np.complex64)
START = np.full(K, 0.1 + 0.2j, np.complex64)
BEST = np.linalg.lstsq(A.astype(np.complex128), B.astype(np.complex128), rcond=None)[0]


def loss(z, data):
    a, b = data
    r = a @ z - b
    return jnp.mean(r.real**2 + r.imag**2) / 2


def loss_of_parts(parts, data):
    return loss(lax.complex(parts[0], parts[1]), data)


def parts(z):
    return np.stack([z.real, z.imag])


def joined(x):
    x = np.asarray(x)
    return x[0] + 1j * x[1]


def few_steps(rule, fun, start, data, steps):
    """Parameters after some steps of ``make_step``."""
    step = jaxgd.make_step(lambda z, _, data: fun(z, data), rule, args=(data,))
    state = jaxgd.init_state(start, rule)
    state, _ = jax.jit(lambda s: lax.scan(step, s, jnp.zeros(steps)))(state)
    return np.asarray(state.params)


def of_alias(name):
    rate, hyperparams = ALIASES[name]
    return find(name)(*([] if rate is None else [rate]), **hyperparams)


# The parts draw noise of their own, and Sophia directions.
DRAWS = {"optax.noisy_sgd"}
OTHERS = {
    "barzilai_borwein": jaxgd.barzilai_borwein(),
    "parabolic_rms": jaxgd.parabolic_rms(),
    "clip": optax.chain(optax.clip(0.1), optax.sgd(0.05)),
    "clip_by_norm": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05)),
} | {
    name: WRAPPED[name][0]
    for name in (
        "backtracking",
        "zoom",
        "lbfgs_backtracking",
        "lbfgs_rate",
        "lbfgs_if_finite",
        "mechanize",
        "reduce_on_plateau",
        "schedule_free",
        "multi_steps_polyak",
    )
}
# Those that the view is there for: wrong without it, or refused by optax.
BY_PARTS = {
    "optax.adadelta",
    "optax.lbfgs",
    "optax.rprop",
    "optax.sm3",
    "contrib.adopt",
    "contrib.cocob",
    "contrib.dadapt_adamw",
    "contrib.galore",
    "contrib.madgrad",
    "contrib.momo",
    "contrib.momo_adam",
    "contrib.prodigy",
    "contrib.simplified_ademamix",
    "contrib.sophia",
    "backtracking",
    "clip",
    "lbfgs_backtracking",
    "lbfgs_if_finite",
    "mechanize",
    "zoom",
}


@pytest.mark.thin(10)
@DEPRECATED
@pytest.mark.parametrize("name", sorted({*ALIASES, *OTHERS} - DRAWS))
def test_steps_are_those_of_the_parts_or_turn_with_the_parameters(name):
    rule = OTHERS[name] if name in OTHERS else of_alias(name)
    run = partial(few_steps, rule, steps=4)
    found = run(loss, START, (A, B))
    moved = np.abs(found - START).max()
    assert moved > 0
    pairs = joined(run(loss_of_parts, parts(START), (A, B)))
    if name in BY_PARTS:
        assert np.abs(found - pairs).max() <= 1e-4 * moved
        return
    turned = run(loss, START * PHASES, (A / PHASES, B)) / PHASES
    off = min(np.abs(found - other).max() for other in (pairs, turned))
    assert off <= 1e-3 * moved


def test_rules_that_are_right_keep_their_complex_memory():
    for rule in (
        optax.adam(0.1),
        jaxgd.barzilai_borwein(),
        optax.lbfgs(linesearch=None),
    ):
        state = jaxgd.init_state(START, rule)
        same = rule.init(jnp.asarray(START))
        shapes = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
        assert shapes(state.opt_state) == shapes(jax.tree.map(jnp.asarray, same))


MINIMIZE = {"optimizer": optax.lbfgs(), "max_steps": 100}
RULES = {
    "lbfgs": optax.lbfgs(),
    "lbfgs_backtracking": optax.lbfgs(
        linesearch=optax.scale_by_backtracking_linesearch(20)
    ),
    "zoom": WRAPPED["zoom"][0],
    "barzilai_borwein": jaxgd.barzilai_borwein(),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "wide"), [*((name, False) for name in RULES), ("lbfgs", True)]
)
def test_minimize_takes_the_evaluations_of_the_parts(name, wide):
    with jax.enable_x64(wide):
        kinds = (np.complex128, np.float64) if wide else (np.complex64, np.float32)
        data = A.astype(kinds[0]), B.astype(kinds[0])
        run = partial(
            jaxgd.minimize,
            data=data,
            optimizer=RULES[name],
            max_steps=300,
            # Within the rounding of float32 a search is led by chance.
            stop=jaxgd.gradient_norm(1e-6, 1e-5 if wide else 1e-4),
        )
        found = run(loss, START.astype(kinds[0]))
        pairs = run(loss_of_parts, parts(START).astype(kinds[1]))
    assert found.converged
    assert pairs.converged
    assert found.params.dtype == kinds[0]
    np.testing.assert_allclose(found.params, BEST, atol=1e-4 if wide else 1e-3)
    assert abs(int(found.steps) - int(pairs.steps)) <= 3
    assert abs(int(found.evaluations) - int(pairs.evaluations)) <= 6
    assert found.evaluations < 60
    if name == "lbfgs":
        assert found.steps < 12


def mixed(params, data):
    return loss(params["z"] * params["s"], data) + (params["s"] - 2) ** 2


def mixed_of_parts(params, data):
    z = lax.complex(params["z"][0], params["z"][1])
    return mixed({"z": z, "s": params["s"]}, data)


@pytest.mark.full
def test_real_leaves_stay_beside_complex_ones():
    run = partial(jaxgd.minimize, data=(A, B), **MINIMIZE)
    found = run(mixed, {"z": START, "s": np.float32(1)})
    pairs = run(mixed_of_parts, {"z": parts(START), "s": np.float32(1)})
    assert found.converged
    np.testing.assert_allclose(found.params["s"], 2, atol=1e-3)
    np.testing.assert_allclose(found.params["z"] * found.params["s"], BEST, atol=1e-3)
    assert abs(int(found.evaluations) - int(pairs.evaluations)) <= 6


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", ["lbfgs", "lbfgs_backtracking"])
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    run = partial(
        jaxgd.minimize, loss, START, (A, B), optimizer=RULES[name], max_steps=100
    )
    whole = run()
    cut = run(max_steps=3)
    assert cut.steps == 3 < whole.steps
    left = int(whole.steps) - 3
    same_bits(run(state=cut.state, max_steps=left).state, whole.state)
    jaxgd.save(tmp_path / "run.npz", cut.state)
    loaded = jaxgd.load(tmp_path / "run.npz")
    same_bits(run(state=loaded, max_steps=left).state, whole.state)


def test_a_run_goes_on_with_other_data():
    """Value and gradient that the search left are those of the data before."""
    run = partial(jaxgd.minimize, loss, START, **MINIMIZE)
    cut = run((A, B), max_steps=3)
    other = run((A, 2 * B), state=cut.state)
    assert other.converged
    np.testing.assert_allclose(other.params, 2 * BEST, atol=1e-3)


STARTS = np.stack([START, -3 * START, START * 1j])


@pytest.mark.full
def test_lanes():
    """Up to a gradient well above rounding, where a search is led by chance."""
    data = A, B
    how = MINIMIZE | {"stop": jaxgd.gradient_norm(1e-3)}
    alone = [jaxgd.minimize(loss, start, data, **how) for start in STARTS]
    swept = jaxgd.sweep(loss, START, data, over={"params": STARTS}, **how)
    mapped = jax.vmap(lambda z: jaxgd.minimize(loss, z, data, **how))(STARTS)
    for i, one in enumerate(alone):
        for lanes in (swept.results, mapped):
            np.testing.assert_allclose(lanes.params[i], BEST, atol=1e-3)
            assert abs(int(lanes.evaluations[i]) - int(one.evaluations)) <= 8


def test_a_step_by_hand_refuses_a_state_that_saw_complex_numbers():
    rule = optax.lbfgs()
    state = jaxgd.State(jnp.asarray(START), rule.init(jnp.asarray(START)), jnp.int32(0))
    step = jaxgd.make_step(lambda z, _: loss(z, (A, B)), rule)
    with pytest.raises(TypeError, match=r"state must hold .*jaxgd.init_state"):
        step(state, 0.0)


def test_rules_within_rules():
    """Averages and perturbed parameters are judged in the form of the parameters."""
    inner = contrib.prodigy(1.0, estim_lr0=0.01)
    rule = contrib.schedule_free(inner, 1.0, b1=0.8)
    run = partial(jaxgd.minimize, data=(A, B), optimizer=rule, max_steps=30, stop=None)
    found, pairs = run(loss, START), run(loss_of_parts, parts(START))
    assert found.params.dtype == np.complex64
    np.testing.assert_allclose(found.params, joined(pairs.params), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.value, pairs.value, rtol=1e-4)


def test_the_gradient_that_a_search_left_has_the_form_of_the_parameters():
    found = jaxgd.minimize(loss, START, (A, B), **MINIMIZE | {"max_steps": 3})
    _, grad = adapter.known_point(found.state.opt_state, found.params)
    expected = jax.grad(loss)(found.params, (A, B)).conj()
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-4)
    assert grad.dtype == np.complex64
