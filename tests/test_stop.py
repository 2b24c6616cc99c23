"""Stop rules as pure functions, the judgment of success, and rules of your own."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxgd
from jaxgd import Check, Status, StopRule, _tree
from jaxgd._rules.adapter import Kind
from jaxgd._stop.judge import STILL_STEPS, fresh_watch, make_judge
from jaxgd._stop.rules import (
    auto_rule,
    describe,
    fields_used,
    fingerprint,
    memory_of,
    name_of,
)

pytestmark = pytest.mark.thin(4)

GRAD, VALUE, PARAMS = jaxgd.gradient_norm, jaxgd.value_change, jaxgd.params_change
TARGET, ANY, ALL = jaxgd.target_value, jaxgd.any_of, jaxgd.all_of
NAN, INF = np.nan, np.inf
P = jnp.ones(2)


def checks(**columns):
    """Checks out of columns of equal length; what is not given is NaN."""
    length = len(next(iter(columns.values())))
    columns = {"step": range(length)} | columns
    rows = [columns.get(name, [NAN] * length) for name in Check._fields]
    kinds = [np.int32, *[np.float32] * 6]
    return [
        Check(*(kind(x) for kind, x in zip(kinds, row, strict=True)))
        for row in zip(*rows, strict=True)
    ]


def follow(rule, checks):
    """The memory after the checks, where the rule held, and with which status."""
    memory, held, codes = rule.init(checks[0]), "", []
    for check in checks:
        memory, holds = rule.update(memory, check)
        held += "x" if holds else "."
        status = rule.status(memory) if callable(rule.status) else rule.status
        codes.append(Status(int(status)))
    return memory, held, codes


# name: rule, columns of the checks, where the rule holds
RULES = {
    "gradient, atol": (GRAD(0.5), {"grad_norm": [2, 0.6, 0.5, 0.4, 1]}, "..xx."),
    "gradient, rtol": (GRAD(rtol=0.5), {"grad_norm": [4, 3, 2, 1]}, "..xx"),
    "gradient, both": (GRAD(1, 0.5), {"grad_norm": [4, 3.1, 3, 1]}, "..xx"),
    "gradient, zero start": (GRAD(rtol=0.1), {"grad_norm": [0, 1]}, "x."),
    "value, atol": (VALUE(atol=1), {"value": [9, 7, 6, 7, 9]}, "..xx."),
    "value, rtol": (VALUE(0.5), {"value": [9, 4, 3, 2, -2]}, "..xx."),
    "value, rtol of |f|": (VALUE(0.5), {"value": [-1, -4, -6]}, "..x"),
    "value, never first": (VALUE(atol=INF), {"value": [1, 1]}, ".x"),
    "value, patience": (
        VALUE(atol=0, patience=2),
        {"value": [1, 1, 2, 2, 2, 2, 3]},
        "....xx.",
    ),
    "params, atol": (
        PARAMS(atol=1),
        {"update_norm": [NAN, 2, 1, 2], "params_norm": [1] * 4},
        "..x.",
    ),
    "params, rtol": (
        PARAMS(0.5),
        {"update_norm": [NAN, 2, 2, 2], "params_norm": [9, 3, 4, 3]},
        "..x.",
    ),
    "params, patience": (
        PARAMS(atol=0, patience=3),
        {"update_norm": [NAN, 0, 0, 1, 0, 0, 0, 0], "params_norm": [1] * 8},
        "......xx",
    ),
    "target": (TARGET(2), {"value": [3, 2, 2.5, 1]}, ".x.x"),
    "target, negative": (TARGET(-2), {"value": [0, -1, -2, -3]}, "..xx"),
    "any": (
        ANY(TARGET(1), GRAD(1)),
        {"value": [9, 9, 1, 1], "grad_norm": [9, 1, 9, 1]},
        ".xxx",
    ),
    "all": (
        ALL(TARGET(1), GRAD(1)),
        {"value": [9, 9, 1, 1], "grad_norm": [9, 1, 9, 1]},
        "...x",
    ),
    "any keeps count": (
        ANY(VALUE(atol=0, patience=2), TARGET(-9)),
        {"value": [1, 1, 1, 2]},
        "..x.",
    ),
    "all keeps count": (
        ALL(VALUE(atol=0, patience=2), GRAD(1)),
        {"value": [1] * 4, "grad_norm": [0, 0, 2, 0]},
        "...x",
    ),
    "any of all": (
        ANY(ALL(TARGET(1), GRAD(1)), TARGET(0)),
        {"value": [9, 1, 1, 0], "grad_norm": [1, 2, 1, 9]},
        "..xx",
    ),
    "all of any": (
        ALL(ANY(TARGET(0), GRAD(1)), TARGET(5)),
        {"value": [9, 5, 5, 0], "grad_norm": [1, 2, 1, 9]},
        "..xx",
    ),
    "one rule": (ANY(ALL(TARGET(1))), {"value": [2, 1]}, ".x"),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", RULES)
def test_where_a_rule_holds(name):
    rule, columns, expected = RULES[name]
    _, held, _ = follow(rule, checks(**columns))
    assert held == expected
    # The same memory as one pytree of fixed form: what a compiled loop asks for.
    stacked = jax.tree.map(lambda *x: np.stack(x), *checks(**columns))
    memory = rule.init(checks(**columns)[0])
    like = jax.tree.map(lambda m: (jnp.shape(m), jnp.result_type(m)), memory)
    one = jax.tree.map(lambda x: x[-1], stacked)
    after, _ = rule.update(memory, one)
    assert like == jax.tree.map(lambda m: (jnp.shape(m), jnp.result_type(m)), after)


@pytest.mark.parametrize("name", RULES)
def test_nan_satisfies_no_rule(name):
    rule, columns, _ = RULES[name]
    good = checks(**columns)[0]
    bad = Check(np.int32(1), *[np.float32(NAN)] * 6)
    assert follow(rule, [bad] * 3)[1] == "..."
    assert follow(rule, [good, bad, bad])[1][1:] == ".."


def test_statuses_of_combined_rules():
    columns = {"value": [9, 1, 1], "grad_norm": [1, 9, 1]}
    G, T = Status.GRADIENT_SMALL, Status.TARGET_REACHED
    for rule, expected in (
        (ANY(TARGET(1), GRAD(1)), [G, T, T]),  # the first that holds
        (ANY(GRAD(1), TARGET(1)), [G, T, G]),
        (ANY(ANY(TARGET(-1), GRAD(1)), TARGET(1)), [G, T, G]),
    ):
        assert follow(rule, checks(**columns))[2] == expected
    for rule, expected in (
        (ALL(TARGET(1), GRAD(1)), T),  # the first of all
        (ALL(GRAD(1), TARGET(1)), G),
        (ALL(ANY(TARGET(-1), GRAD(1)), TARGET(1)), G),
        (ANY(ALL(GRAD(1), TARGET(1)), TARGET(-1)), G),
    ):
        assert follow(rule, checks(**columns))[2][-1] == expected


# The judgment.


def unseen(rule, params):
    return fresh_watch(memory_of(rule, params), _tree.real_dtype(params))


def verdicts(rule, columns, moved=None, params=P, **kind):
    """The statuses that ``make_judge`` gives, check by check."""
    judge = make_judge(rule, params, Kind(**kind))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *checks(**columns))
    if moved is not None:
        moved = jnp.asarray(moved)

    def one(watch, x):
        check, moved = x
        return judge(watch, check, moved)

    _, codes = jax.lax.scan(one, unseen(rule, params), (stacked, moved))
    return [Status(int(code)) for code in codes]


EPS = float(np.finfo(np.float32).eps)
LOOSE = VALUE(0.1)
SETTLED, STALLED = Status.VALUE_SETTLED, Status.STALLED
# name: rule, values, gradient norms, whether the last step moved, the last status
JUDGMENTS = {
    "tiny steps": (LOOSE, [1, 0.99], [1, 0.6], None, STALLED),
    "large gradient of the start forgotten": (
        LOOSE,
        [9, 5, 4.9],
        [1, 9, 4],
        None,
        SETTLED,
    ),
    "halved gradient": (LOOSE, [1, 0.99], [1, 0.5], None, SETTLED),
    "floor of the value": (LOOSE, [1, 1], [1, 0.1], None, STALLED),
    "floor, two units apart": (LOOSE, [1, 1 + 2 * EPS], [1, 0.1], None, STALLED),
    "floor, four units apart": (LOOSE, [1, 1 + 4 * EPS], [1, 0.1], None, SETTLED),
    "at the resolution": (LOOSE, [1, 1], [1, 9 * EPS**0.5], None, SETTLED),
    "above the resolution": (LOOSE, [1, 1], [1, 11 * EPS**0.5], None, STALLED),
    "unmoved": (LOOSE, [1, 0.99], [1, 0.1], False, STALLED),
    "moved": (LOOSE, [1, 0.99], [1, 0.1], True, SETTLED),
    "small gradients, not smaller than the first": (
        LOOSE,
        [1, 1],
        [1e-9] * 2,
        None,
        STALLED,
    ),
    "target is success": (TARGET(1), [2, 1], [1, 1], None, Status.TARGET_REACHED),
    "gradient is success": (GRAD(1), [2, 2], [2, 1], None, Status.GRADIENT_SMALL),
    "any, settled": (ANY(TARGET(-9), LOOSE), [1, 1], [1, 1], None, STALLED),
    "any, target first": (
        ANY(TARGET(1), LOOSE),
        [2, 2],
        [1, 1],
        None,
        STALLED,
    ),
    "any, both": (
        ANY(TARGET(1), VALUE(atol=9)),
        [2, 1],
        [1, 1],
        None,
        Status.TARGET_REACHED,
    ),
    "all, gradient first": (
        ALL(GRAD(1), LOOSE),
        [1, 1],
        [2, 1],
        None,
        Status.GRADIENT_SMALL,
    ),
}


@pytest.mark.parametrize("name", JUDGMENTS)
def test_success_or_stalled(name):
    rule, value, grad_norm, moved, expected = JUDGMENTS[name]
    columns = {"value": value, "grad_norm": grad_norm}
    columns |= {"update_norm": [1] * len(value), "params_norm": [1] * len(value)}
    moved = None if moved is None else [True, moved]
    found = verdicts(rule, columns, moved)
    assert found[-1] == expected
    assert found[:-1] == [Status.RUNNING] * (len(value) - 1)


def test_params_change_is_judged_alike():
    columns = {"value": [9, 8], "update_norm": [NAN, 1e-3], "params_norm": [1, 1]}
    for norms, status in (([1, 0.9], STALLED), ([1, 0.1], Status.PARAMS_SETTLED)):
        found = verdicts(PARAMS(0.1), columns | {"grad_norm": norms})
        assert found[-1] == status


@pytest.mark.full
def test_the_floor_follows_the_dtype(x64):
    for dtype, norm, status in (
        (jnp.float32, 1e-4, SETTLED),
        (jnp.float64, 1e-4, STALLED),
        (jnp.float64, 1e-8, SETTLED),
    ):
        judge = make_judge(LOOSE, jnp.ones(2, dtype))
        watch = unseen(LOOSE, jnp.ones(2, dtype))
        for grad_norm in (1.0, norm):
            numbers = [jnp.asarray(x, dtype) for x in (1.0, grad_norm, *[NAN] * 4)]
            watch, code = judge(watch, Check(jnp.int32(0), *numbers))
        assert code == status


NEVER = TARGET(-INF)
MANY = STILL_STEPS + 30


def still(moved, value=None, update_norm=None):
    columns = {
        "value": [1] * MANY if value is None else value,
        "grad_norm": [1] * MANY,
        "update_norm": [1] * MANY if update_norm is None else update_norm,
        "params_norm": [1] * MANY,
    }
    found = verdicts(NEVER, columns, moved)
    return found.index(STALLED) if STALLED in found else None


def test_a_run_that_stands_still_has_stalled():
    # The first check has no step before it.
    assert still([False] * MANY) == STILL_STEPS == 100
    assert still([False] * 20 + [True] + [False] * (MANY - 21)) == 20 + STILL_STEPS
    assert still([False] * 99 + [True] + [False] * 30) is None
    assert still([True] * MANY) is None
    # Further apart than a step, nothing is said.
    columns = {"value": [1] * MANY, "grad_norm": [1] * MANY}
    assert set(verdicts(NEVER, columns)) == {Status.RUNNING}


def test_a_cycle_at_rounding_has_stalled():
    moved, tiny = [True] * MANY, [3 * EPS] * MANY
    assert still(moved, [1, 1 + EPS] * (MANY // 2), tiny) == STILL_STEPS
    assert still(moved, [1, 1 + EPS] * (MANY // 2), [5 * EPS] * MANY) is None
    falling = [1 - i * EPS for i in range(MANY)]
    assert still(moved, falling, tiny) is None
    assert still(moved, falling[:26] + [1] * (MANY - 26), tiny) == 25 + STILL_STEPS


def test_a_rule_that_holds_comes_before_standing_still():
    columns = {"value": [2] * 100 + [0], "grad_norm": [1] * 101}
    columns |= {"update_norm": [0] * 101, "params_norm": [1] * 101}
    found = verdicts(TARGET(1), columns, [False] * 101)
    assert found == [Status.RUNNING] * 100 + [Status.TARGET_REACHED]


AT_REST, PRECISE = Status.AT_REST, Status.PRECISION_REACHED


def rest(gain, last, **kind):
    """The end of a run whose last ordinary step was ``gain`` times its gradient."""
    columns = {
        "value": [2, 1.5, *[1] * MANY],
        "grad_norm": [2, 1.5, *[1] * MANY],
        "update_norm": [NAN, gain * 2, gain * 1.5, *[last] * (MANY - 1)],
        "params_norm": [1] * (MANY + 2),
    }
    found = verdicts(NEVER, columns, [True] * 3 + [False] * (MANY - 1), **kind)
    return next(code for code in found if code != Status.RUNNING)


def test_a_rule_at_rest_and_steps_that_are_too_small():
    assert rest(0.1, 0.0, rests=True) == AT_REST
    assert rest(0.1, 1e-6, rests=True) == AT_REST
    # Steps of the gradient's own size are not at rest, however small they are.
    assert rest(1e-9, 1e-9, rests=True) == STALLED
    assert rest(0.1, 1e-3, rests=True) == STALLED
    # Plain descent and searches have no fixed points of their own.
    assert rest(0.1, 0.0, rests=False) == STALLED


def test_a_run_at_its_precision_has_not_stalled():
    # The excess is the square of the gradient, to the end: 1e-8 of the fall is left.
    norms = [2.0**-i for i in range(14)] + [2.0**-13] * MANY
    columns = {
        "value": [1 + g**2 for g in norms],
        "grad_norm": norms,
        "update_norm": norms,
        "params_norm": [1] * len(norms),
    }
    found = verdicts(NEVER, columns, [True] * 14 + [False] * MANY)
    assert next(code for code in found if code != Status.RUNNING) == PRECISE
    columns["grad_norm"] = [1 + g for g in norms]  # a gradient that stays
    found = verdicts(NEVER, columns, [True] * 14 + [False] * MANY)
    assert next(code for code in found if code != Status.RUNNING) == STALLED


def decrease(columns, **kind):
    """``Check.expected_decrease`` as a rule sees it, check by check."""
    seen = own(lambda m, c: (c.expected_decrease, False), init=lambda c: c.value)
    judge, watch = make_judge(seen, P, Kind(**kind)), unseen(seen, P)
    found = []
    for check in checks(**columns):
        watch, _ = judge(watch, check)
        found.append(float(watch.memory))
    return found


def test_the_decrease_to_come_of_linear_convergence():
    # J - J* = 4**-k, and its gradient norm 2**-k: exact at the sixth check and later.
    k = np.arange(9.0)
    columns = {"value": 5 + 4**-k, "grad_norm": 2**-k}
    found = decrease(columns)
    assert found[:5] == [INF] * 5
    # The largest of the last five estimates is that of four checks before.
    np.testing.assert_allclose(found[5:], 4 ** -(k[5:] - 4), rtol=1e-4)


def test_a_decrease_that_came_refutes_what_was_expected():
    columns = {
        "value": [5, 5, 5, 5, 5, 5, 4, 4],
        "grad_norm": [1] * 8,
        "expected_decrease": [1e-9] * 8,
    }
    found = decrease(columns, reported=True)
    np.testing.assert_allclose(found[4:6], 1e-9)
    assert found[:4] + found[6:] == [INF] * 6


def test_a_gradient_of_zero_leaves_nothing_to_come():
    assert decrease({"value": [1, 1], "grad_norm": [1, 0]})[1] == 0


def test_a_value_that_settles_by_steps_far_too_small_has_stalled():
    # Of two descents to 0 by the same 1e-3 a check, one has 500 times as far to go.
    k = np.arange(40.0)
    slow = {"value": 0.999**k, "grad_norm": 0.9995**k}
    fast = {"value": 1 + 0.3**k, "grad_norm": 0.3 ** (k / 2)}
    rule = VALUE(2e-3)
    assert verdicts(rule, slow)[3] == STALLED
    codes = verdicts(rule, fast)
    assert next(code for code in codes if code != Status.RUNNING) == SETTLED


# What the loop asks of a rule.


def own(update, init=lambda check: (), status=Status.GRADIENT_SMALL, **kw):
    return StopRule(init=init, update=update, status=status, **kw)


FIELDS = {
    "gradient": (GRAD(1.0), {"grad_norm"}),
    "value": (VALUE(1.0), {"value"}),
    "params": (PARAMS(1.0), {"update_norm", "params_norm"}),
    "target": (TARGET(1.0), {"value"}),
    "any": (ANY(GRAD(1.0), ALL(TARGET(1.0))), {"grad_norm", "value"}),
    "own": (own(lambda m, c: (m, c.grad_max < 1)), {"grad_max"}),
    "own, nothing": (own(lambda m, c: (m, jnp.bool_(True))), set()),
    "own, in init only": (
        own(lambda m, c: (m, m < 1), init=lambda c: c.params_norm),
        {"params_norm"},
    ),
    "own, kept in memory only": (
        own(lambda m, c: (c.update_norm, c.step > 3), init=lambda c: 0.0),
        {"update_norm", "step"},
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_used(name):
    rule, fields = FIELDS[name]
    assert fields_used(rule, P) == fields


def in_closure(bound):
    return own(lambda memory, check: (memory, check.value < bound))


def with_bound(bound, memory, check):
    return memory, check.value < bound


class Bound:
    def __init__(self, bound=1.0):
        self.bound = bound

    def update(self, memory, check):
        return memory, check.value < self.bound

    def __call__(self, memory, check):
        return self.update(memory, check)

    @partial(jax.jit, static_argnums=0)
    def compiled(self, memory, check):
        return self.update(memory, check)


class Unhashable(Bound):
    __hash__ = None


lambda_here = lambda memory, check: (memory, check.value < 1)
HERE = __name__

# rule: its name
NAMES = {
    "gradient": (GRAD(1.0), "gradient_norm"),
    "auto": (auto_rule(P), "auto"),
    "value": (VALUE(1.0), "value_change"),
    "params": (PARAMS(1.0), "params_change"),
    "target": (TARGET(1.0), "target_value"),
    "any": (ANY(GRAD(1.0), TARGET(1.0)), "any_of(gradient_norm, target_value)"),
    "other order": (ANY(TARGET(1.0), GRAD(1.0)), "any_of(target_value, gradient_norm)"),
    "nested": (
        ALL(ANY(GRAD(1.0), own(with_bound, name="mine")), TARGET(1.0)),
        "all_of(any_of(gradient_norm, mine), target_value)",
    ),
    "any of own": (ANY(own(with_bound)), f"any_of({HERE}.with_bound)"),
    "renamed any": (replace(ANY(GRAD(1.0)), name="all"), "all"),
    "own name": (own(with_bound, name="é, 3 in a row"), "é, 3 in a row"),
    "empty": (own(with_bound, name=""), ""),
    "function": (own(with_bound), f"{HERE}.with_bound"),
    "lambda": (own(lambda_here), f"{HERE}.<lambda>"),
    "lambda of a function": (in_closure(1.0), f"{HERE}.in_closure.<locals>.<lambda>"),
    "Partial": (own(Partial(with_bound, 1.0)), f"{HERE}.with_bound"),
    "functools.partial": (own(partial(with_bound, 1.0)), f"{HERE}.with_bound"),
    "compiled": (own(jax.jit(with_bound)), f"{HERE}.with_bound"),
    "compiled partial": (
        own(Partial(jax.jit(partial(with_bound, 1.0)))),
        f"{HERE}.with_bound",
    ),
    "method": (own(Bound().update), f"{HERE}.Bound.update"),
    "compiled method": (own(Bound().compiled), f"{HERE}.Bound.compiled"),
    "object": (own(Bound()), f"{HERE}.Bound"),
    "class": (own(Bound), f"{HERE}.Bound"),
    "unhashable object": (own(Unhashable()), f"{HERE}.Unhashable"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    rule, expected = NAMES[name]
    assert name_of(rule) == expected
    # As the compiled program sees the rule.
    numbers, structure = _tree.split(rule, np.float32)
    assert name_of(structure.join(numbers)) == expected


def test_a_name_is_text():
    message = "name of a StopRule must be a str or None, got 3 of type int: pass for"
    with pytest.raises(TypeError, match=message):
        own(with_bound, name=3)
    with pytest.raises(TypeError, match="must be a str or None, got b'mine' of type"):
        own(with_bound, name=b"mine")


def remembers(memory, **more):
    return own(lambda m, c: (m, c.value < 1), init=lambda c: memory, **more)


# Files hold these numbers: one that changes forgets the memory of every saved run.
PRINTS = {
    "gradient": (GRAD(1.0), 2276293004),
    "value": (VALUE(1.0), 2490704020),
    "params": (PARAMS(1.0, patience=3), 2285118832),
    "target": (TARGET(1.0), 2715599672),
    "any": (ANY(GRAD(1.0), TARGET(1.0)), 2474321470),
    "all": (ALL(GRAD(1.0), TARGET(1.0)), 2378356574),
    "other order": (ANY(TARGET(1.0), GRAD(1.0)), 2511562909),
    "nested": (ANY(ALL(GRAD(1.0), TARGET(1.0))), 1760754542),
    "own": (remembers((), name="mine"), 1772671891),
    "other name": (remembers((), name="ours"), 3292440832),
    "name of all of Unicode": (remembers((), name="é\ud800"), 1860533264),
    "scalar": (remembers(1.0, name="mine"), 3399590665),
    "integer": (remembers(1, name="mine"), 1512841136),
    "array": (remembers(np.ones((3, 2), "f"), name="mine"), 1205744603),
    "bfloat16": (remembers(jnp.ones((3, 2), jnp.bfloat16), name="mine"), 2782515649),
    "key": (remembers(jax.random.key(0), name="mine"), 1038638351),
    "tuple": (remembers((1.0, 2.0), name="mine"), 1188614344),
    "dict": (remembers({"a": 1.0, "b": (2.0,)}, name="mine"), 359561218),
    "other keys": (remembers({"a": 1.0, "c": (2.0,)}, name="mine"), 2288097652),
    "check": (remembers(checks(value=[1])[0], name="mine"), 3556618406),
}


@pytest.mark.parametrize("name", PRINTS)
def test_fingerprints_are_the_same_in_every_version(name):
    rule, expected = PRINTS[name]
    assert fingerprint(rule, P) == expected


def test_fingerprints_tell_names_and_forms_of_memory_apart():
    prints = [number for _, number in PRINTS.values()]
    assert len(set(prints)) == len(prints)
    assert all(0 <= number < 2**32 for number in prints)


def test_fingerprints_see_no_numbers_and_no_code():
    for make in (GRAD, VALUE, PARAMS, TARGET, lambda x: own(Partial(with_bound, x))):
        assert fingerprint(make(0.5), P) == fingerprint(make(0.25), P)
    above = own(lambda m, c: (m, c.grad_norm > 2), name="mine")
    assert fingerprint(above, P) == PRINTS["own"][1]


def test_memory_in_the_dtype_of_the_parameters_is_of_another_form(x64):
    wide = jnp.ones(2, jnp.float64)
    assert fingerprint(GRAD(1.0), wide) != fingerprint(GRAD(1.0), P.astype("f"))
    assert fingerprint(TARGET(1.0), wide) == fingerprint(TARGET(1.0), P.astype("f"))


def test_describe():
    columns = {"value": [9, 5, 4], "grad_norm": [4, 3, 2]}
    columns |= {"update_norm": [NAN, 2, 1], "params_norm": [8, 8, 8]}
    rows = checks(**columns)
    last = rows[-1]
    # rule: name, measured, threshold, verdict after the last check
    expected = {
        GRAD: (GRAD(1, 0.25), ("gradient norm", 2, 2, True)),
        VALUE: (VALUE(0.25, 0.5), ("change of objective", 1, 1.5, True)),
        "patience": (VALUE(0.25, patience=2), ("change of objective", 1, 1, False)),
        PARAMS: (PARAMS(0.125), ("change of parameters", 1, 1, True)),
        TARGET: (TARGET(3), ("objective", 4, 3, False)),
    }
    for rule, wanted in expected.values():
        memory, _, _ = follow(rule, rows)
        (found,) = describe(rule, memory, last, None)
        assert isinstance(found, jaxgd.Criterion)
        assert (found.name, *map(float, found[1:3])) == wanted[:3]
        assert bool(found.holds) == wanted[3]
    plain = own(lambda m, c: (m, c.value < 5))
    nested = ALL(GRAD(1, 0.25), ANY(TARGET(3), plain))
    memory, _, _ = follow(nested, rows)
    found = describe(nested, memory, last, None)
    names = ["gradient norm", "objective", "your stop rule"]
    assert [c.name for c in found] == names
    assert [bool(c.holds) for c in found] == [True, False, True]
    assert np.isnan(found[2].threshold)


def test_a_criterion_is_a_pytree_of_its_numbers():
    criterion = jaxgd.Criterion("objective", 1.0, 2.0, True)
    leaves, treedef = jax.tree.flatten(criterion)
    assert leaves == [1.0, 2.0, True]
    assert jax.tree.unflatten(treedef, leaves) == criterion


# dtypes: what of the objective is its rounding, what of its fall is nothing
AUTO = {
    "float32": ((jnp.float32,), 2.0**-23, 1e-10),
    "float64": ((jnp.float64,), 2.0**-52, 1e-16),
    "bfloat16": ((jnp.bfloat16,), 2.0**-7, 1e-4),
    "float16": ((jnp.float16,), 2.0**-10, 1e-4),
    "complex64": ((jnp.complex64,), 2.0**-23, 1e-10),
    "complex128": ((jnp.complex128,), 2.0**-52, 1e-16),
    "mixed": ((jnp.float64, jnp.bfloat16, jnp.float32), 2.0**-52, 1e-16),
}


@pytest.mark.parametrize("name", AUTO)
def test_automatic_thresholds_follow_the_dtype(name, x64):
    dtypes, rounding, share = AUTO[name]
    rule = auto_rule([jnp.ones(1, dtype) for dtype in dtypes])

    def last(value, expected):
        rows = checks(value=[3.0, value], expected_decrease=[INF, expected])
        _, held, codes = follow(rule, rows)
        return held[-1] == "x", codes[-1]

    # Of an objective that stays, its rounding; of one that vanishes, of its fall.
    for value, edge in ((-2.0, 2 * rounding), (0.0, 3 * share)):
        assert last(value, 1.01 * edge)[0] is False
        assert last(value, 0.99 * edge)[0] is True
    assert last(2.0, 1.9 * rounding) == (True, Status.GRADIENT_SMALL)
    near = 3 - rounding  # so little a fall that its rounding is no small part of it
    assert last(near, 2.9 * rounding)[1] == Status.PRECISION_REACHED
    assert last(0.0, 0.5 * share) == (True, Status.GRADIENT_SMALL)
    assert last(1.0, 0.0) == (True, Status.GRADIENT_SMALL)
    assert last(1.0, INF)[0] is last(1.0, NAN)[0] is False


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_rule_that_is_automatic_has_no_unit(scale):
    rule = auto_rule(P)
    value = scale * np.array([8, 2, 1.1, 1.001, 1.0])
    left = scale * np.array([INF, 1, 0.1, 1e-3, 1e-8])
    assert follow(rule, checks(value=value, expected_decrease=left))[1] == "....x"


def test_the_change_of_the_parameters_is_that_of_the_step_that_led_here():
    """Steps of 1/2, 1/4, ...: the fifth is the first of at most 1/32."""
    result = jaxgd.minimize(
        lambda x: x**2 / 2, 1.0, learning_rate=0.5, stop=PARAMS(atol=1 / 32)
    )
    assert result.steps == 5
    assert result.params == 1 / 32


# Rules of your own within a run.

X = np.random.default_rng(0).normal(size=(23, 2)).astype("f")
Y = (X @ np.array([1, 2]) + 0.1).astype("f")


def least_squares(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def run(**arguments):
    return jaxgd.minimize(
        least_squares, jnp.zeros(2), (X, Y), learning_rate=0.1, **arguments
    )


def entry_small(bound, memory, check):
    return memory, check.grad_max <= bound


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_rule_with_a_number(batch_size, count_compilations):
    rule = lambda bound: own(Partial(entry_small, bound))
    first = run(stop=rule(0.5), batch_size=batch_size)
    with count_compilations() as count:
        second = run(stop=rule(0.1), batch_size=batch_size)
    assert count() == 0
    assert 0 < first.steps < second.steps
    for bound, result in ((0.5, first), (0.1, second)):
        assert result.status == Status.GRADIENT_SMALL
        grad = jax.grad(least_squares)(result.params, (X, Y))
        assert np.abs(grad).max() <= bound
        spacing = 1 if batch_size is None else 5
        before = run(max_steps=int(result.steps) - spacing, batch_size=batch_size)
        if batch_size is None or result.steps > 5:
            grad = jax.grad(least_squares)(before.params, (X, Y))
            assert np.abs(grad).max() > bound
    assert "your stop rule: holds" in first.report()
    assert "your stop rule: does not hold" in run(stop=rule(0.0), max_steps=3).report()


def no_better(patience, memory, check):
    """``patience`` checks in a row that are no better than the best of all before."""
    best, waited = memory
    waited = jnp.where(check.value < 0.9 * best, 0, waited + 1)
    return (jnp.minimum(best, check.value), waited), waited >= patience


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_rule_with_memory(batch_size):
    rule = own(
        Partial(no_better, 3.0),
        init=lambda check: (check.value * 2, jnp.int32(0)),
        status=Status.TARGET_REACHED,
    )
    result = run(stop=rule, batch_size=batch_size, max_steps=500)
    assert result.status == Status.TARGET_REACHED
    values = result.checks.value if batch_size else result.history.value
    values = [*values, *([] if batch_size else [result.value])]
    best, waited, held = values[0] * 2, 0, []
    for value in values:
        waited = 0 if value < np.float32(0.9) * best else waited + 1
        best = min(best, value)
        held.append(waited >= 3)
    assert held[-1]
    assert not any(held[:-1])


# Whose memory it is.


def waits(patience=9):
    """So many checks: a rule whose memory tells how long it has been there."""
    return lambda memory, check: (memory + 1, memory + 1 >= patience)


def after_no_checks(check):
    return jnp.int32(0)


def of_checks(update, init=after_no_checks, **more):
    return own(update, init=init, status=Status.TARGET_REACHED, **more)


def count_up(patience, memory, check):
    return memory + 1, memory + 1 >= patience


PLAIN = of_checks(waits())
MINE, OURS = (replace(PLAIN, name=name) for name in ("mine", "ours"))

# first rule, second rule, whether it keeps the memory
MEMORIES = {
    "a function": (PLAIN, PLAIN, True),
    "of the same name": (
        MINE,
        of_checks(lambda m, c: (m + 1, m > 7), name="mine"),
        True,
    ),
    "of other code": (of_checks(waits(99)), PLAIN, True),
    "of another name": (MINE, OURS, False),
    "a renamed lambda": (
        PLAIN,
        of_checks(lambda m, c: (m + 1, m > 7)),
        False,
    ),
    "its name": (
        of_checks(partial(count_up, 99)),
        of_checks(partial(count_up, 9), name=f"{HERE}.count_up"),
        True,
    ),
    "the same number": (
        of_checks(Partial(count_up, 9.0)),
        of_checks(Partial(count_up, np.float32(9))),
        True,
    ),
    "another number": (
        of_checks(Partial(count_up, 8.0)),
        of_checks(Partial(count_up, 9.0)),
        False,
    ),
    "a number that is no data": (
        of_checks(partial(count_up, 99)),
        of_checks(partial(count_up, 9)),
        True,
    ),
    "another form": (
        of_checks(
            lambda m, c: ((m[0] + 1,), m[0] > 99), lambda c: (jnp.int32(0),), name="x"
        ),
        of_checks(waits(), name="x"),
        False,
    ),
    "another dtype": (
        of_checks(lambda m, c: (m + 1, m > 99), lambda c: jnp.float32(0), name="x"),
        of_checks(waits(), name="x"),
        False,
    ),
    "another container": (
        of_checks(
            lambda m, c: ([m[0] + 1], m[0] > 99), lambda c: [jnp.int32(0)], name="x"
        ),
        of_checks(
            lambda m, c: ((m[0] + 1,), m[0] > 7), lambda c: (jnp.int32(0),), name="x"
        ),
        False,
    ),
    "any": (ANY(TARGET(-1.0), MINE), ANY(TARGET(-1.0), MINE), True),
    "any, another name": (ANY(TARGET(-1.0), MINE), ANY(TARGET(-1.0), OURS), False),
    "any, another number": (ANY(TARGET(-1.0), MINE), ANY(TARGET(-2.0), MINE), False),
    "all": (ANY(MINE, MINE), ALL(MINE, MINE), False),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_rule_keeps_the_memory_of_its_name(name):
    first, second, keeps = MEMORIES[name]
    half = run(stop=first, max_steps=4)
    assert half.status == Status.MAX_STEPS
    result = run(stop=second, state=half.state)
    assert result.status == Status.TARGET_REACHED
    # 9 checks, the first at step 0, or anew at step 4.
    assert result.steps == (8 if keeps else 12)


@pytest.mark.parametrize(
    ("name", "waited", "stays"),
    [("mine", 3, True), ("mine", 6, False), ("ours", 3, False)],
)
def test_a_rule_that_has_ended_a_run_has_ended_it(name, waited, stays):
    """If it still has its name, and still holds there."""
    ended = run(stop=of_checks(waits(3), name="mine"), batch_size=5)
    assert ended.status == Status.TARGET_REACHED
    later = of_checks(waits(waited), name=name)
    result = run(stop=later, batch_size=5, state=ended.state, epochs=20)
    assert (result.steps == ended.steps) == stays


def test_a_status_out_of_the_memory():
    rule = StopRule(
        init=lambda check: jnp.int32(0),
        update=lambda memory, check: (
            jnp.where(check.step >= 5, int(Status.TARGET_REACHED), 0),
            check.step >= 5,
        ),
        status=lambda memory: memory,
        describe=lambda memory, check: (
            jaxgd.Criterion("my steps", -check.step, -5, check.step >= 5),
        ),
    )
    result = run(stop=rule)
    assert result.status == Status.TARGET_REACHED
    assert result.steps == 5
    assert "my steps -5 <= -5: holds" in result.report()


@pytest.mark.full
def test_a_lambda_does_not_end_a_run_by_what_another_found():
    """All lambdas of a function have one name, and rules without memory one form."""
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    start, how = np.zeros(5, np.float32), {"batch_size": 10, "learning_rate": 0.02}

    def rule(limit):
        return jaxgd.StopRule(
            init=lambda check: (),
            update=lambda memory, check: (memory, check.grad_norm <= limit),
            status=jaxgd.Status.GRADIENT_SMALL,
        )

    def fun(p, rows):
        return jnp.mean((rows @ p - 1) ** 2)

    first = jaxgd.minimize(fun, start, x, stop=rule(0.9), epochs=30, **how)
    assert first.converged
    how |= {"state": first.state, "epochs": 2}
    assert jaxgd.minimize(fun, start, x, stop=rule(0.9), **how).steps == first.steps
    other = jaxgd.minimize(fun, start, x, stop=rule(0.0), **how)
    assert other.steps == first.steps + 40
