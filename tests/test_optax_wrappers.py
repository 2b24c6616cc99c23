"""Rules of optax around other rules, parts of rules, and line searches.

Each takes the steps of an optax loop written by hand, goes on bit for bit where it was
cut, and is judged at its own evaluation parameters wherever its state stands.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optax_loop import (
    BATCH,
    KEY,
    START,
    STEPS,
    N,
    X,
    Y,
    assert_close,
    assert_same_bits,
    by_hand,
    loss,
    minimize,
    rows_of,
    start_value,
)

import jaxgd

pytestmark = pytest.mark.thin(4)

SGD, ADAM = optax.sgd(0.05, momentum=0.5), optax.adam(0.05)
DECAY = optax.linear_schedule(0.1, 0.02, STEPS)
FREE, FREE_ADAM = contrib.schedule_free_sgd(0.1), contrib.schedule_free_adamw(0.05)
ONLY_W, LABELS = {"w": True, "b": False}, {"w": "w", "b": "b"}
STAY = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
ASCENT = optax.chain(contrib.normalize(), optax.sgd(0.05))


def every_other(step):
    return step % 2 == 0


def some_rms(tree):
    return optax.tree.norm(tree) / 8


PARTS = optax.named_chain(
    ("clips", optax.chain(optax.clip(1.0), optax.clip_by_global_norm(3.0))),
    ("more_clips", optax.chain(optax.clip_by_block_rms(2), optax.zero_nans())),
    ("agc", optax.adaptive_grad_clip(10.0)),
    ("noise", optax.add_noise(1e-3, 0.5, 1)),
    ("decay", optax.add_decayed_weights(1e-3, mask=ONLY_W)),
    ("snapshot", optax.snapshot("rms", some_rms)),
    ("ema", optax.ema(0.5)),
    ("centralize", optax.centralize()),
    ("trace", optax.trace(0.5)),
    ("own", optax.stateless(lambda updates, _: jax.tree.map(jnp.negative, updates))),
    ("schedule", optax.scale_by_schedule(DECAY)),
    ("flat", optax.flatten(optax.scale(0.5))),
    ("positive", optax.keep_params_nonnegative()),
)

# name: (rule, whether a loop by hand must be compiled)
WRAPPED = {
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(DECAY), False),
    "multi_steps": (optax.MultiSteps(ADAM, 2), False),
    "multi_steps_polyak": (optax.MultiSteps(optax.polyak_sgd(), 3), True),
    "multi_steps_skip": (
        optax.MultiSteps(
            SGD, 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        True,
    ),
    "multi_steps_large": (
        optax.MultiSteps(
            SGD,
            2,
            should_skip_update_fn=partial(
                optax.skip_large_updates, max_squared_norm=20
            ),
        ),
        True,
    ),
    "apply_every": (optax.chain(SGD, optax.apply_every(2)), False),
    "apply_if_finite": (optax.apply_if_finite(ADAM, 2), True),
    "masked": (optax.chain(optax.masked(ADAM, ONLY_W), STAY), False),
    "multi_transform": (optax.partition({"w": ADAM, "b": SGD}, LABELS), False),
    "freeze": (optax.chain(ADAM, optax.freeze(ONLY_W)), False),
    "selective_transform": (
        optax.selective_transform(ADAM, freeze_mask=ONLY_W),
        False,
    ),
    "conditionally_mask": (optax.conditionally_mask(ADAM, every_other), True),
    "conditionally_transform": (
        optax.chain(SGD, optax.conditionally_transform(optax.clip(0.1), every_other)),
        True,
    ),
    "flatten": (optax.flatten(ADAM), False),
    "parts": (PARTS, True),
    "normalize": (optax.chain(contrib.normalize(), SGD), False),
    "scale_by_learning_rate": (optax.scale_by_learning_rate(0.05), False),
    "scale_by_rprop": (optax.chain(optax.scale_by_rprop(0.05), optax.scale(-1)), False),
    "scale_by_madgrad": (contrib.scale_by_madgrad(0.05), False),
    "scale_by_polyak": (
        optax.chain(optax.scale_by_polyak(0.2), optax.scale_by_learning_rate(1.0)),
        False,
    ),
    "reduce_on_plateau": (
        optax.chain(
            optax.sgd(0.3), contrib.reduce_on_plateau(0.5, patience=1, cooldown=1)
        ),
        True,
    ),
    "mechanize": (contrib.mechanize(optax.sgd(0.1), s_init=0.1), True),
    "split_real": (contrib.split_real_and_imaginary(ADAM), False),
    "backtracking": (
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20, store_grad=True)
        ),
        True,
    ),
    "zoom": (
        optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)),
        True,
    ),
    "lbfgs_backtracking": (
        optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(20)),
        True,
    ),
    "lbfgs_rate": (optax.lbfgs(0.1, linesearch=None), True),
    "lbfgs_if_finite": (optax.apply_if_finite(optax.lbfgs(), 2), True),
    "sam": (contrib.sam(SGD, ASCENT, sync_period=3), False),
    "sam_opaque": (contrib.sam(SGD, ASCENT, opaque_mode=True), False),
    "schedule_free": (contrib.schedule_free(optax.rmsprop(0.05), 0.05, b1=0.7), False),
    "free_in_chain": (optax.chain(optax.clip(5.0), FREE, optax.scale(0.9)), False),
    "free_masked": (optax.chain(optax.masked(FREE, ONLY_W), STAY), False),
    "free_in_parts": (optax.partition({"w": FREE, "b": FREE_ADAM}, LABELS), False),
    "free_in_one_part": (optax.partition({"w": SGD, "b": FREE}, LABELS), False),
    "free_in_multi_steps": (optax.MultiSteps(FREE, 3), True),
    "free_if_finite": (optax.apply_if_finite(FREE, 2), True),
    "free_injected": (
        optax.inject_hyperparams(contrib.schedule_free_sgd)(0.1, b1=0.8),
        False,
    ),
    "free_sam": (contrib.sam(FREE, ASCENT, sync_period=3), False),
}
SEARCHES = ["backtracking", "zoom", "lbfgs_backtracking", "lbfgs_if_finite"]


def given_to(name):
    """The extra arguments that a loop by hand gives to a rule; None: the usual."""
    if name == "sam_opaque":
        return lambda value_fn: {"grad_fn": lambda p, _: jax.grad(value_fn)(p)}
    return (lambda value_fn: {}) if "sam" in name else None


def average(state, params):
    return contrib.schedule_free_eval_params(state, params)


def judged(name, params, state):
    """Where a rule is to be evaluated, told for each wrapper by hand."""
    if name in ("sam", "free_sam"):
        assert state.steps_since_sync == 2
        true = state.cache
        return average(state.opt_state, true) if name == "free_sam" else true
    part = lambda state, leaf: average(state._replace(z=state.z[leaf]), params[leaf])
    if name == "free_masked":
        return params | {"w": part(state[0].inner_state, "w")}
    if name in ("free_in_parts", "free_in_one_part"):
        free = [leaf for leaf in "wb" if name == "free_in_parts" or leaf == "b"]
        inner = {leaf: state.inner_states[leaf].inner_state for leaf in free}
        return params | {leaf: part(inner[leaf], leaf) for leaf in free}
    if name == "free_in_chain":
        return average(state[1], params)
    if name == "free_in_multi_steps":
        return average(state.inner_opt_state, params)
    if name in ("free_if_finite", "free_injected"):
        return average(state.inner_state, params)
    return average(state, params) if name == "schedule_free" else params


def check(name, batch_size):
    rule, jit = WRAPPED[name]
    # What a search does next to the solution is rounding.
    steps = 4 if name in SEARCHES else STEPS
    call = partial(minimize, rule, batch_size)
    result = call(max_steps=steps)
    params, state = by_hand(rule, batch_size, given_to(name), jit, steps)
    assert_close(result.state.params, params)
    assert_close(result.state.opt_state, state)
    where = judged(name, params, state)
    assert_close(result.params, where)
    value, grad = jax.value_and_grad(loss)(where, (X, Y))
    assert_close(result.value, value)
    assert_close(result.grad_norm, optax.tree.norm(grad))
    assert result.value < start_value()
    types = lambda tree: jax.tree.map(lambda x: jnp.asarray(x).dtype, tree)
    assert types(result.params) == types(START)
    assert types(result.state.opt_state) == types(rule.init(START))
    first = call(max_steps=3)
    rest = call(max_steps=steps - 3, state=first.state, key=None)
    assert_same_bits(rest, result)


@pytest.mark.thin(6)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper(name):
    check(name, BATCH)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", [*SEARCHES, "sam", "free_in_parts"])
def test_batch_descent(name):
    check(name, None)


def test_schedule_free_is_judged_at_the_mean_of_its_sequence():
    """In the words of the paper: x is the mean of z, and y between the two."""
    rate, b1 = 0.1, 0.9
    z = y = x = jax.tree.map(np.asarray, START)
    for t in range(STEPS):
        rows = rows_of(t, BATCH)
        grad = jax.grad(loss)(y, (X[rows], Y[rows]))
        z = jax.tree.map(lambda z, g: z - rate * g, z, grad)
        x = jax.tree.map(lambda x, z: x + (z - x) / (t + 1), x, z)
        y = jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)
    result = minimize(FREE, BATCH)
    assert_close(result.params, x)
    assert_close(result.state.params, y)


def test_frozen_parameters_keep_every_bit():
    result = minimize(WRAPPED["selective_transform"][0], BATCH)
    assert_same_bits(np.asarray(result.params["w"]), START["w"])
    assert not np.any(np.asarray(result.params["b"]) == START["b"])


def probe(seen):
    """A rule that keeps what it is given in its state, of ``seen`` steps."""

    def init(params):
        tree = jax.tree.map(lambda p: jnp.zeros((seen, *p.shape), p.dtype), params)
        value = jnp.zeros(seen)
        return {
            "count": jnp.int32(0),
            "params": tree,
            "grad": tree,
            "updates": tree,
            "value": value,
            "value_fn": value,
            "elsewhere": value,
        }

    def update(updates, state, params, *, value, grad, value_fn):
        at = state["count"]
        saw = {
            "params": params,
            "grad": grad,
            "updates": updates,
            "value": value,
            "value_fn": value_fn(params),
            "elsewhere": value_fn(jax.tree.map(lambda p: p + 1, params)),
        }
        new = {
            name: jax.tree.map(lambda all, one: all.at[at].set(one), state[name], tree)
            for name, tree in saw.items()
        }
        step = jax.tree.map(lambda g: -0.05 * g, updates)
        return step, {"count": at + 1, **new}

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.optimized
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_all_a_rule_is_given_is_of_the_same_batch(batch_size, microbatch_size):
    result = minimize(probe(STEPS), batch_size, microbatch_size=microbatch_size)
    saw = result.state.opt_state
    for t in range(STEPS):
        rows = rows_of(t, batch_size)
        params, grad, updates = (
            jax.tree.map(lambda x: x[t], saw[name])
            for name in ("params", "grad", "updates")
        )
        value, slope = jax.value_and_grad(loss)(params, (X[rows], Y[rows]))
        assert_close(saw["value"][t], value)
        assert_close(saw["value_fn"][t], value)
        assert_close(grad, slope)
        assert_same_bits(grad, updates)
        elsewhere = loss(jax.tree.map(lambda p: p + 1, params), (X[rows], Y[rows]))
        assert_close(saw["elsewhere"][t], elsewhere)


@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_a_rule_is_given_the_random_numbers_of_the_step(batch_size):
    def noisy(params, batch, *, key):
        return loss(params, batch) * jax.random.uniform(key, minval=0.5)

    run = partial(jaxgd.minimize, noisy, START, (X, Y), with_key=True, max_steps=STEPS)
    saw = run(optimizer=probe(STEPS), batch_size=batch_size, key=KEY).state.opt_state
    assert_close(saw["value_fn"], saw["value"])
    rows = [rows_of(t, batch_size) for t in range(STEPS)]
    params = [jax.tree.map(lambda x: x[t], saw["params"]) for t in range(STEPS)]
    plain = [loss(p, (X[r], Y[r])) for p, r in zip(params, rows, strict=True)]
    factors = np.asarray(saw["value"]) / np.asarray(plain)
    assert np.unique(factors.round(4)).size == STEPS  # each step its own


def injected(rate):
    return optax.inject_hyperparams(optax.sgd)(rate)


# name: (optimizer, learning_rate, rates in the history)
NO_RATE = np.full(STEPS, np.nan)
FIXED = np.full(STEPS, 0.05)
SCHEDULED = np.array([DECAY(t) for t in range(STEPS)])
RATES = {
    "object": (ADAM, None, NO_RATE),
    "factory": (optax.adam, 0.05, FIXED),
    "factory_of_schedule": (optax.adam, DECAY, SCHEDULED),
    "injected": (injected(0.05), None, FIXED),
    "injected_schedule": (injected(DECAY), None, SCHEDULED),
    "injected_factory": (optax.inject_hyperparams(optax.sgd), DECAY, SCHEDULED),
    "injected_in_chain": (optax.chain(optax.clip(1.0), injected(0.05)), None, FIXED),
    "multi_steps": (lambda rate: optax.MultiSteps(optax.sgd(rate), 2), DECAY, NO_RATE),
    "every_other": (
        lambda rate: optax.conditionally_mask(optax.sgd(rate), every_other),
        DECAY,
        NO_RATE,
    ),
    "sam": (lambda rate: contrib.sam(optax.sgd(rate), ASCENT), DECAY, NO_RATE),
    "same_parts": (
        optax.partition({"w": injected(0.05), "b": injected(0.05)}, LABELS),
        None,
        FIXED,
    ),
    "other_parts": (
        optax.partition({"w": injected(0.05), "b": injected(0.01)}, LABELS),
        None,
        NO_RATE,
    ),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", RATES)
def test_rate_in_the_history(name):
    optimizer, rate, expected = RATES[name]
    given = {} if rate is None else {"learning_rate": rate}
    result = minimize(optimizer, BATCH, **given)
    np.testing.assert_allclose(result.history.learning_rate, expected, rtol=1e-6)


def test_injected_rate_is_data(count_compilations):
    """A rate inside of a ready rule's state can be set between two runs."""
    rule = injected(0.05)
    state = minimize(rule, BATCH, max_steps=2).state
    opt_state = optax.tree.set(state.opt_state, learning_rate=jnp.float32(0.01))
    state = jaxgd.State(state.params, opt_state, state.step, state.run)
    with count_compilations() as count:
        result = minimize(rule, BATCH, state=state, key=None, max_steps=2)
    assert count() == 0
    np.testing.assert_allclose(result.history.learning_rate, [0.05, 0.05, 0.01, 0.01])


def test_apply_if_finite_leaves_out_a_batch_that_is_not_finite():
    y = Y.copy()
    y[int(jaxgd.batch_rows(KEY, N, 1, 5)[0])] = np.nan
    rule = optax.apply_if_finite(SGD, 3)
    result = jaxgd.minimize(
        loss, START, (X, y), optimizer=rule, batch_size=1, max_steps=STEPS, key=KEY
    )
    assert result.status == jaxgd.Status.MAX_STEPS
    assert result.skipped == result.state.opt_state.total_notfinite >= 1
    expected, _ = by_hand(rule, 1, y=y)
    assert_close(result.params, expected)
    alone = jaxgd.minimize(
        loss, START, (X, y), optimizer=SGD, batch_size=1, max_steps=STEPS, key=KEY
    )
    assert alone.status == jaxgd.Status.DIVERGED
    assert alone.steps == 4  # the last whose own batch is finite, too


def test_a_rule_of_complex_parameters():
    """Through optax's own split into real and imaginary parts, as two real ones."""
    start = np.array([1 + 2j, -1j], np.complex64)
    to = np.array([2 - 1j, 1.0], np.complex64)

    def of_complex(z):
        return jnp.sum(jnp.abs(z - to) ** 2)

    def of_real(pair):
        return of_complex(pair["real"] + 1j * pair["imag"])

    rule = contrib.split_real_and_imaginary(ADAM)
    run = partial(jaxgd.minimize, max_steps=STEPS)
    actual = run(of_complex, start, optimizer=rule).params
    pair = {"real": start.real.copy(), "imag": start.imag.copy()}
    expected = run(of_real, pair, optimizer=ADAM).params
    assert actual.dtype == np.complex64
    assert_close({"real": actual.real, "imag": actual.imag}, expected)


@pytest.mark.parametrize(
    "rule", [contrib.schedule_free_sgd(0.3, b1=0.5), contrib.schedule_free_adamw(0.1)]
)
def test_batch_descent_stops_by_what_it_returns(rule):
    stop = jaxgd.gradient_norm(atol=1e-3)
    result = minimize(rule, stop=stop, max_steps=3000)
    assert result.status == jaxgd.Status.GRADIENT_SMALL
    assert result.grad_norm <= 1e-3
    assert result.criteria[0].measured == result.grad_norm
    own = jax.grad(loss)(result.params, (X, Y))
    np.testing.assert_allclose(optax.tree.norm(own), result.grad_norm, rtol=0.02)
    assert result.evaluations == 2 * (int(result.steps) + 1)
