"""Every alias of optax that takes a rate: one loop, four ways, the same steps.

The table is complete by construction: an alias of a later optax that is not in it fails
the first test. Wrappers, parts and line searches are in test_optax_wrappers.py.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib
from optax_loop import (
    BATCH,
    START,
    STEPS,
    X,
    Y,
    assert_close,
    assert_same_bits,
    by_hand,
    loss,
    minimize,
    start_value,
)

# Transformations that are no rules of their own, and rules around another rule.
PARTS = {
    "optax.scale_by_backtracking_linesearch",
    "optax.scale_by_learning_rate",
    "optax.scale_by_polyak",
    "optax.scale_by_rprop",
    "optax.scale_by_zoom_linesearch",
    "contrib.scale_by_madgrad",
    "contrib.schedule_free",
}
REFUSED = {"contrib.dpsgd"}

# name: (rate, hyperparams)
ALIASES = {
    "optax.adabelief": (0.05, {}),
    "optax.adadelta": (50.0, {"rho": 0.9}),
    "optax.adafactor": (0.1, {"min_dim_size_to_factor": 2}),
    "optax.adagrad": (0.1, {}),
    "optax.adam": (0.05, {"b1": 0.8}),
    "optax.adamax": (0.05, {}),
    "optax.adamaxw": (0.05, {"weight_decay": 1e-3}),
    "optax.adamw": (0.05, {"nesterov": True}),
    "optax.adan": (0.05, {}),
    "optax.amsgrad": (0.05, {}),
    "optax.fromage": (0.05, {}),
    "optax.lamb": (0.05, {}),
    "optax.lars": (0.05, {}),
    "optax.lbfgs": (None, {"memory_size": 4}),
    "optax.lion": (0.05, {}),
    "optax.nadam": (0.05, {}),
    "optax.nadamw": (0.05, {}),
    "optax.noisy_sgd": (0.05, {"key": 7}),
    "optax.novograd": (0.05, {}),
    "optax.optimistic_adam": (0.05, {}),
    "optax.optimistic_adam_v2": (0.05, {}),
    "optax.optimistic_gradient_descent": (0.05, {"alpha": 0.5}),
    "optax.polyak_sgd": (0.2, {"f_min": 0.01}),
    "optax.radam": (0.05, {}),
    "optax.rmsprop": (0.05, {"momentum": 0.5, "centered": True}),
    "optax.rprop": (0.05, {}),
    "optax.sgd": (0.05, {"momentum": 0.9, "nesterov": True}),
    "optax.sign_sgd": (0.05, {}),
    "optax.signum": (0.05, {}),
    "optax.sm3": (0.05, {}),
    "optax.yogi": (0.05, {}),
    "contrib.acprop": (0.05, {}),
    "contrib.ademamix": (0.05, {}),
    "contrib.adopt": (0.05, {}),
    "contrib.cocob": (1.0, {}),
    "contrib.dadapt_adamw": (1.0, {"estim_lr0": 0.01}),
    "contrib.dog": (1.0, {"init_step": ("learning_rate", 0.05)}),
    "contrib.dowg": (1.0, {"init_estim_sq_dist": 0.01}),
    "contrib.galore": (0.05, {"rank": 2}),
    "contrib.madgrad": (0.05, {}),
    "contrib.momo": (0.1, {"lower_bound": 0.01}),
    "contrib.momo_adam": (0.05, {}),
    "contrib.muon": (0.05, {}),
    "contrib.prodigy": (1.0, {"estim_lr0": 0.01}),
    "contrib.schedule_free_adamw": (0.05, {"b1": 0.8}),
    "contrib.schedule_free_sgd": (0.1, {"warmup_steps": 2}),
    "contrib.simplified_ademamix": (0.001, {}),
    "contrib.sophia": (0.05, {"update_interval": 3}),
}
# A loop by hand must be compiled where eager loops and branches would be, every step.
COMPILED = {"optax.lbfgs", "contrib.sophia"}
# What a search does next to the solution is rounding.
FEWER_STEPS = {"optax.lbfgs": 4}
DEPRECATED = pytest.mark.filterwarnings("ignore:.*optimistic_adam:DeprecationWarning")
EXTRAS = {"contrib.sophia": lambda value_fn: {"obj_fn": value_fn}}


def find(name):
    module, alias = name.split(".")
    return getattr({"optax": optax, "contrib": contrib}[module], alias)


def takes_a_rate(name):
    """Whether a public name is a function that builds a rule from a rate."""
    builder = find(name)
    if inspect.isclass(builder) or not callable(builder):
        return False
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):  # a type alias
        return False
    returns, empty = signature.return_annotation, inspect.Signature.empty
    rates = {"learning_rate", "max_learning_rate"} & set(signature.parameters)
    builds = inspect.isclass(returns) and issubclass(
        returns, optax.GradientTransformation
    )
    return bool(rates) and (builds or returns is empty)


def test_table_is_complete():
    public = [f"optax.{n}" for n in dir(optax)] + [f"contrib.{n}" for n in dir(contrib)]
    found = {n for n in public if "._" not in n and takes_a_rate(n)}
    known = set(ALIASES) | PARTS | REFUSED
    assert found - known == set(), "not in the table"
    assert known - found == set(), "no longer in optax"


def judged(name, params, state):
    """Where the rule is to be evaluated, by its own function."""
    if "schedule_free" in name:
        return contrib.schedule_free_eval_params(state, params)
    return params


def check_run(result, expected, start_state, name):
    params, state = expected
    assert_close(result.state.params, params)
    assert_close(result.state.opt_state, state)
    where = judged(name, params, state)
    assert_close(result.params, where)
    value, grad = jax.value_and_grad(loss)(where, (X, Y))
    assert_close(result.value, value)
    assert_close(result.grad_norm, optax.tree.norm(grad))
    assert result.value < start_value()
    for a, b in zip(
        jax.tree.leaves((result.params, result.state.params, result.state.opt_state)),
        jax.tree.leaves((START, START, start_state)),
        strict=True,
    ):
        assert a.dtype == jnp.asarray(b).dtype


def check_resumed(whole, call):
    first = call(max_steps=3)
    assert first.steps == 3
    rest = call(max_steps=whole.steps - 3, state=first.state, key=None)
    assert_same_bits(rest, whole)


@pytest.mark.thin(16)
@DEPRECATED
@pytest.mark.parametrize("name", ALIASES)
def test_alias(name):
    """In batch descent and in mini-batches by turns: both ways of a few are below."""
    factory, (rate, hyperparams) = find(name), ALIASES[name]
    given = {} if rate is None else {"learning_rate": rate}
    rule = factory(*given.values(), **hyperparams)
    steps = FEWER_STEPS.get(name, STEPS)
    batch_size, call = (
        None,
        partial(minimize, factory, hyperparams=hyperparams, **given),
    )
    if list(ALIASES).index(name) % 2:
        batch_size, call = BATCH, partial(minimize, rule, BATCH)
    result = call(max_steps=steps)
    assert result.steps == steps
    jit, extras = name in COMPILED, EXTRAS.get(name)
    expected = by_hand(rule, batch_size, extras, jit, steps)
    check_run(result, expected, rule.init(START), name)
    check_resumed(result, call)


@pytest.mark.full
@pytest.mark.parametrize("name", ["optax.adam", "contrib.momo"])
def test_the_other_way_around(name):
    """As an object in batch descent, as a factory with mini-batches."""
    factory, (rate, hyperparams) = find(name), ALIASES[name]
    rule = factory(rate, **hyperparams)
    ways = {
        None: partial(minimize, rule),
        BATCH: partial(
            minimize, factory, BATCH, learning_rate=rate, hyperparams=hyperparams
        ),
    }
    for batch_size, call in ways.items():
        expected = by_hand(rule, batch_size)
        check_run(call(), expected, rule.init(START), name)


def test_the_table_can_fail():
    expected = by_hand(optax.adam(0.05))
    with pytest.raises(AssertionError):
        assert_close(minimize(optax.adam(0.0501)).params, expected[0])
