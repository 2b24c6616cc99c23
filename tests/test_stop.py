"""Stop rules as pure functions, the judgment of success, and rules of your own."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxgd
from jaxgd import Check, Status, StopRule
from jaxgd._stop import (
    STILL_STEPS,
    auto_rule,
    describe,
    fields_used,
    fingerprint,
    fresh_watch,
    make_judge,
)

GRAD, VALUE, PARAMS = jaxgd.gradient_norm, jaxgd.value_change, jaxgd.params_change
TARGET, ANY, ALL = jaxgd.target_value, jaxgd.any_of, jaxgd.all_of
NAN, INF = np.nan, np.inf
P = jnp.ones(2)


def checks(**columns):
    """Checks out of columns of equal length; what is not given is NaN."""
    length = len(next(iter(columns.values())))
    columns = {"step": range(length)} | columns
    rows = [columns.get(name, [NAN] * length) for name in Check._fields]
    kinds = [np.int32, *[np.float32] * 5]
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
    bad = Check(np.int32(1), *[np.float32(NAN)] * 5)
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


def verdicts(rule, columns, moved=None, params=P):
    """The statuses that ``make_judge`` gives, check by check."""
    judge = make_judge(rule, params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *checks(**columns))
    if moved is not None:
        moved = jnp.asarray(moved)

    def one(watch, x):
        check, moved = x
        return judge(watch, check, moved)

    _, codes = jax.lax.scan(one, fresh_watch(rule, params), (stacked, moved))
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
    "below every gradient that counts": (LOOSE, [1, 1], [1e-6] * 2, None, SETTLED),
    "just above": (LOOSE, [1, 1], [1.1e-6] * 2, None, STALLED),
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


def test_the_floor_follows_the_dtype(x64):
    for dtype, norm, status in (
        (jnp.float32, 1e-4, SETTLED),
        (jnp.float64, 1e-4, STALLED),
        (jnp.float64, 1e-8, SETTLED),
    ):
        judge = make_judge(LOOSE, jnp.ones(2, dtype))
        watch = fresh_watch(LOOSE, jnp.ones(2, dtype))
        for grad_norm in (1.0, norm):
            numbers = [jnp.asarray(x, dtype) for x in (1.0, grad_norm, NAN, NAN, NAN)]
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


def as_compiled(rule):
    """The rule as the compiled program sees it: its numbers are arrays."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32) if isinstance(x, float) else x, rule
    )


def in_closure(bound):
    return own(lambda memory, check: (memory, check.value < bound))


def through(function):
    return own(lambda memory, check: (memory, function(check.value)))


def below_one(value):
    return value < 1


def above_one(value):
    return value > 1


def with_bound(bound, memory, check):
    return memory, check.value < bound


def default_bound(value):
    return own(lambda memory, check, bound=value: (memory, check.value < bound))


class Bound:
    def __init__(self, bound):
        self.bound = bound

    def update(self, memory, check):
        return memory, check.value < self.bound


PRINTS = {
    "gradient": GRAD(1.0),
    "value": VALUE(1.0),
    "params": PARAMS(1.0),
    "target": TARGET(1.0),
    "any": ANY(GRAD(1.0), TARGET(1.0)),
    "all": ALL(GRAD(1.0), TARGET(1.0)),
    "any, other order": ANY(TARGET(1.0), GRAD(1.0)),
    "nested": ANY(ALL(GRAD(1.0), TARGET(1.0))),
    "own": own(lambda m, c: (m, c.value < 1)),
    "own, other comparison": own(lambda m, c: (m, c.value > 1)),
    "own, other number": own(lambda m, c: (m, c.value < 2)),
    "own, other field": own(lambda m, c: (m, c.grad_norm < 1)),
    "own, other status": own(lambda m, c: (m, c.value < 1), status=Status.STALLED),
    "own, other init": own(lambda m, c: (m, c.value < 1), init=lambda c: 0.0),
    "closure": in_closure(1.0),
    "closure, other number": in_closure(2.0),
    "Partial": own(Partial(with_bound, 1.0)),
}


def test_fingerprints_tell_rules_apart():
    prints = {name: fingerprint(as_compiled(rule)) for name, rule in PRINTS.items()}
    assert len(set(prints.values())) == len(prints)
    assert all(0 <= number < 2**32 for number in prints.values())


# Rules that differ in what their function holds.
HELD = {
    "function": (through(below_one), through(above_one)),
    "default argument": (default_bound(1.0), default_bound(2.0)),
    "functools.partial": tuple(own(partial(with_bound, b)) for b in (1.0, 2.0)),
    "method": (own(Bound(1.0).update), own(Bound(2.0).update)),
    "array": (in_closure(np.float32(1)), in_closure(np.float32(2))),
}


@pytest.mark.parametrize("name", HELD)
def test_fingerprints_see_what_a_function_holds(name):
    first, second = HELD[name]
    assert fingerprint(first) != fingerprint(second)


def test_fingerprints_do_not_depend_on_numbers():
    for make in (GRAD, VALUE, PARAMS, TARGET, lambda x: own(Partial(with_bound, x))):
        a, b = (fingerprint(as_compiled(make(x))) for x in (0.5, 0.25))
        assert a == b


def test_fingerprints_are_the_same_in_another_process():
    names = [name for name in PRINTS if "own" not in name]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_stop as t; print(*"
        f"[t.fingerprint(t.as_compiled(t.PRINTS[n])) for n in {[*PRINTS]!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        timeout=60,
    )
    here = [fingerprint(as_compiled(rule)) for rule in PRINTS.values()]
    # The name of this module may differ from run to run; that of the rules may not.
    theirs = dict(zip(PRINTS, map(int, done.stdout.split()), strict=True))
    ours = dict(zip(PRINTS, here, strict=True))
    if __name__ != "test_stop":
        theirs, ours = ({n: x[n] for n in names} for x in (theirs, ours))
    assert theirs == ours


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


AUTO = {
    "float32": ((jnp.float32,), 1e-6, 1e-5),
    "float64": ((jnp.float64,), 1e-10, 1e-8),
    "bfloat16": ((jnp.bfloat16,), 1e-3, 1e-2),
    "float16": ((jnp.float16,), 1e-3, 1e-2),
    "complex64": ((jnp.complex64,), 1e-6, 1e-5),
    "complex128": ((jnp.complex128,), 1e-10, 1e-8),
    "the coarsest": ((jnp.float64, jnp.bfloat16, jnp.float32), 1e-3, 1e-2),
}


@pytest.mark.parametrize("name", AUTO)
def test_automatic_tolerances_follow_the_dtype(name, x64):
    dtypes, atol, rtol = AUTO[name]
    rule = auto_rule([jnp.ones(1, dtype) for dtype in dtypes])
    threshold = lambda first: float(rule.describe(first, checks(value=[1])[0])[0][2])
    np.testing.assert_allclose(threshold(0.0), atol, rtol=1e-6)
    np.testing.assert_allclose(threshold(1e9), rtol * 1e9, rtol=1e-6)


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
