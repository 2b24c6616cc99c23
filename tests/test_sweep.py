"""Lanes against single runs, and the grid around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import START, X, Y, least_squares, logistic

import jaxgd
from jaxgd import Status

pytestmark = pytest.mark.thin(4)

RATES = [1e-3, 0.02, 0.1, 0.3, 1.0, 10.0]
STARTS = {"w": np.linspace(-2, 2, 12).reshape(3, 4).astype("f"), "b": np.ones(3, "f")}


def valley(x, height=1.0):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2) * height


def with_aux(p, batch):
    x, y = batch
    off = x @ p["w"] + p["b"] - y
    return jnp.mean(off**2), {"worst": jnp.max(jnp.abs(off)), "rows": x.shape[0]}


def noisy(p, batch, *, key):
    x, y = batch
    x = x + 0.1 * jax.random.normal(key, x.shape)
    return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)


def single(fun, over, names, place, key_of=None, **kw):
    """The run of one lane by itself."""
    kw = {"params": START, "data": (X, Y), **kw}
    for name, i in zip(names, place, strict=False):
        value = jax.tree.map(lambda x, i=i: x[i], over[name])
        if name in ("params", "args", "learning_rate"):
            kw[name] = value
        else:
            kw["hyperparams"] = {**kw.get("hyperparams", {}), name: float(value)}
    if key_of is not None:
        kw["key"] = jax.random.fold_in(jax.random.key(0), place[-1])
    params, data = kw.pop("params"), kw.pop("data")
    return jaxgd.minimize(fun, params, data, **kw)


def array(over):
    return jax.tree.map(lambda v: v, {k: np.asarray(v) if isinstance(v, list) else v
                                      for k, v in over.items()})  # fmt: skip


BATCH, SOME, ONE = {}, {"batch_size": 5}, {"batch_size": 1}
SETTLED = jaxgd.any_of(jaxgd.value_change(1e-3, patience=2), jaxgd.gradient_norm(1e-3))
CASES = {
    "rates": (least_squares, {"learning_rate": RATES}, 1, BATCH),
    "rates, a rule": (least_squares, {"learning_rate": RATES}, 1, {"stop": SETTLED}),
    "rates, checks": (
        least_squares,
        {"learning_rate": RATES},
        1,
        SOME | {"stop": SETTLED},
    ),
    "moved": (
        logistic,
        {"learning_rate": RATES},
        1,
        SOME | {"stop": jaxgd.params_change(1e-2)},
    ),
    "adam": (
        least_squares,
        {"learning_rate": RATES[2:], "b1": [0.5, 0.9]},
        1,
        SOME | {"optimizer": optax.adam, "hyperparams": {"eps": 1e-7}},
    ),
    "hyperparameter alone": (
        least_squares,
        {"momentum": [0.0, 0.5, 0.9, 1.1]},
        1,
        {"optimizer": optax.sgd, "learning_rate": 0.1},
    ),
    "starts": (least_squares, {"params": STARTS}, 1, {"stop": SETTLED}),
    "problems": (
        least_squares,
        {"args": (np.array([0.0, 0.1, 1.0]),)},
        1,
        SOME | {"learning_rate": 0.05},
    ),
    "seeds": (least_squares, {}, 3, SOME | {"learning_rate": 0.05}),
    "rates and seeds": (
        least_squares,
        {"learning_rate": RATES[1:]},
        2,
        SOME | {"stop": SETTLED},
    ),
    "three axes": (
        least_squares,
        {"args": (np.array([0.0, 1.0]),), "learning_rate": RATES[1:4]},
        2,
        SOME,
    ),
    "aux": (with_aux, {"learning_rate": RATES}, 1, {"has_aux": True}),
    "aux of checks": (
        with_aux,
        {"learning_rate": RATES},
        1,
        SOME | {"has_aux": True, "stop": SETTLED, "final_evaluation": False},
    ),
    "keys": (noisy, {"learning_rate": RATES}, 1, SOME | {"with_key": True}),
    "keys of a batch run": (
        noisy,
        {"learning_rate": RATES},
        2,
        {"with_key": True, "stop": jaxgd.value_change(1e-2)},
    ),
    "microbatches": (
        least_squares,
        {"learning_rate": RATES},
        1,
        SOME | {"microbatch_size": 2},
    ),
    "schedule-free": (
        least_squares,
        {"learning_rate": RATES},
        1,
        SOME | {"optimizer": optax.contrib.schedule_free_sgd, "stop": SETTLED},
    ),
    "no rate": (least_squares, {"params": STARTS}, 1, SOME),
}


def test_lanes_count_the_trials_of_their_own_steps():
    def fun(x):
        return (x[0] - 1) ** 4 + 10 * (x[1] - x[0] ** 2) ** 2

    starts = np.array([[1.0, 1.0], [-1.2, 1.0], [3.0, -2.0]], np.float32)
    kw = {"stop": jaxgd.target_value(1e-4)}
    found = jaxgd.sweep(fun, None, over={"params": starts}, **kw)
    for i, start in enumerate(starts):
        alone = jaxgd.minimize(fun, start, **kw)
        assert int(found[i].steps) == int(alone.steps)
        assert int(found[i].evaluations) == int(alone.evaluations)
    assert len({int(n) for n in found.results.evaluations}) == 3


@pytest.mark.thin(9)
@pytest.mark.parametrize("name", CASES)
def test_lanes_are_runs(name):
    fun, over, seeds, kw = CASES[name]
    kw = {"max_steps": 150, **kw}
    if "batch_size" not in kw:  # the automatic one looks at the last digits
        kw = {"stop": jaxgd.gradient_norm(atol=1e-6, rtol=1e-5), **kw}
    start = None if "params" in over else START
    found = jaxgd.sweep(fun, start, (X, Y), over=over, seeds=seeds, **kw)
    sizes = [
        len(jax.tree.leaves(v)[0]) if not isinstance(v, list) else len(v)
        for v in over.values()
    ]
    assert found.shape == (*sizes, *([seeds] if seeds > 1 else []))
    for place in np.ndindex(found.shape):
        keyed = True if seeds > 1 else None
        alone = single(fun, array(over), list(over), place, keyed, **kw)
        lane = found[place]
        assert int(lane.status) == int(alone.status), place
        assert int(lane.steps) == int(alone.steps), place
        assert int(lane.evaluations) == int(alone.evaluations), place
        for record in ("history", "checks"):
            ours, theirs = getattr(lane, record), getattr(alone, record)
            np.testing.assert_array_equal(ours.step, theirs.step)
            near(ours.value, theirs.value)
        near(lane.params, alone.params)
        near((lane.value, lane.aux), (alone.value, alone.aux))
        near(lane.grad_norm, alone.grad_norm, 1e-3)
        for ours, theirs in zip(lane.criteria, alone.criteria, strict=True):
            assert bool(ours.holds) == bool(theirs.holds)


def near(a, b, rtol=2e-4):
    """Equal to rounding; to less where a run is about to overflow."""

    def one(a, b):
        a, b = np.asarray(a), np.asarray(b)
        size = np.max(np.abs(b), initial=0)
        if np.isnan(size) or size < 1e6:
            size = np.nan_to_num(size)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (size + 0.1))

    jax.tree.map(one, a, b)


@pytest.mark.full
@pytest.mark.parametrize(
    "optimizer",
    [None, optax.lbfgs, jaxgd.barzilai_borwein],
    ids=["default", "lbfgs", "bb"],
)
def test_starts_of_a_line_search(optimizer):
    """Rounding takes such runs apart, so what counts is where they end."""
    starts = np.random.default_rng(0).normal(size=(5, 4)).astype("f")
    found = jaxgd.sweep(
        valley,
        None,
        over={"params": starts},
        optimizer=optimizer,
        max_steps=2000,
        stop=jaxgd.gradient_norm(1e-2),
    )
    assert found.results.converged.all()
    for i in range(5):
        alone = jaxgd.minimize(
            valley,
            starts[i],
            optimizer=optimizer,
            max_steps=2000,
            stop=jaxgd.gradient_norm(1e-2),
        )
        assert found[i].steps < 3 * alone.steps + 20
        # Terms of a hundred cancel in this gradient.
        grad = np.linalg.norm(jax.grad(valley)(found[i].params))
        np.testing.assert_allclose(found[i].grad_norm, grad, 1e-3, atol=2e-5)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_lane_that_diverges_harms_no_other(batch_size):
    kw = {"batch_size": batch_size, "max_steps": 200, "args": (0.0,)}
    calm = jaxgd.sweep(
        least_squares, START, (X, Y), over={"learning_rate": [0.01, 0.1, 0.2]}, **kw
    )
    wild = jaxgd.sweep(
        least_squares, START, (X, Y), over={"learning_rate": [0.01, 1e3, 0.2]}, **kw
    )
    assert wild[1].status == Status.DIVERGED
    assert np.isfinite(jax.tree.leaves(wild[1].params)[0]).all()
    for i in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, calm[i].params, wild[i].params)
        assert calm[i].value == wild[i].value


@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_program_ends_with_the_last_lane(batch_size):
    """2**31 steps would take hours."""
    found = jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [0.01, 0.1, 1e9]},
        batch_size=batch_size,
        stop=jaxgd.target_value(1.0),
        max_steps=2**31 - 1,
    )
    kinds = [Status.TARGET_REACHED, Status.TARGET_REACHED, Status.DIVERGED]
    assert found.results.status.tolist() == kinds


@pytest.mark.parametrize(("limit", "rate"), [(7, 3.0), (400, 3.0), (130, 30.0)])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_last_finite_iterate(batch_size, limit, rate):
    """Wherever in its chunk, or before it, the step that is lost."""
    for steps in range(limit, limit + 4):
        kw = {"batch_size": batch_size, "max_steps": steps}
        found = jaxgd.sweep(
            least_squares, START, (X, Y), over={"learning_rate": [rate, 0.1]}, **kw
        )
        alone = jaxgd.minimize(least_squares, START, (X, Y), learning_rate=rate, **kw)
        assert int(found[0].status) == int(alone.status)
        assert int(found[0].steps) == int(alone.steps)
        assert int(found[1].steps) == steps or found[1].status == Status.GRADIENT_SMALL


def test_parameters_that_blow_up_unseen():
    """Infinite parameters whose objective is finite."""

    def flat(x):
        return jnp.tanh(x[0]) + 0 * jnp.where(jnp.isfinite(x[1]), x[1], 0.0)

    def rule(rate):
        return optax.stateless(
            lambda g, p: jnp.array([-rate * g[0], jnp.where(rate > 1, p[1] * p[1], 0)])
        )

    kw = {"optimizer": rule, "max_steps": 100, "stop": None}
    start = np.array([0.0, 10.0], "f")
    found = jaxgd.sweep(flat, start, over={"learning_rate": [0.1, 2.0]}, **kw)
    alone = jaxgd.minimize(
        flat, start, learning_rate=2.0, **kw | {"stop": jaxgd.target_value(-9)}
    )
    assert found.results.status.tolist() == [Status.MAX_STEPS, Status.DIVERGED]
    assert int(found[1].steps) == int(alone.steps)
    np.testing.assert_array_equal(found[1].params, alone.params)


@pytest.mark.full
def test_a_start_that_is_not_finite():
    starts = np.array([[1.0, 1.0], [np.nan, 1.0], [2.0, 2.0]], "f")
    found = jaxgd.sweep(lambda x: jnp.sum(x**2), None, over={"params": starts})
    assert found[1].status == Status.NON_FINITE
    assert found.results.converged.tolist() == [True, False, True]
    assert "NON_FINITE" in found.table().splitlines()[-1]


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_lane_goes_on_by_itself(batch_size):
    kw = {"batch_size": batch_size, "args": (0.1,), "stop": SETTLED}
    found = jaxgd.sweep(
        least_squares, START, (X, Y), over={"learning_rate": RATES}, max_steps=12, **kw
    )
    for i in (0, 1):
        whole = jaxgd.minimize(
            least_squares, START, (X, Y), learning_rate=RATES[i], max_steps=40, **kw
        )
        on = jaxgd.minimize(
            least_squares,
            START,
            (X, Y),
            learning_rate=RATES[i],
            max_steps=28,
            state=found[i].state,
            **kw,
        )
        assert int(on.steps) == int(whole.steps)
        near(on.params, whole.params)
        np.testing.assert_array_equal(on.history.step, whole.history.step)


@pytest.mark.full
@pytest.mark.parametrize("kw", [BATCH, SOME], ids=["batch", "mini-batch"])
def test_new_values_cost_no_compilation(kw, count_compilations):
    def call(rates, b1, penalties, seeds_key=0):
        jaxgd.sweep(
            least_squares,
            START,
            (X, Y),
            over={"learning_rate": rates, "b1": b1, "args": (penalties,)},
            optimizer=optax.adam,
            seeds=2,
            key=seeds_key,
            max_steps=20,
            **kw,
        )

    call([0.1, 0.2], [0.5, 0.9], np.array([0.0, 1.0]))
    for arguments in (
        ([0.3, 1], [0.6, 0.7], np.array([0.5, 2.0])),
        (np.float32([0.3, 1]), jnp.array([0.6, 0.7]), jnp.array([0.5, 2.0])),
        ((0.01, 0.02), (np.float32(0.1), 0.2), np.float32([3, 4])),
    ):
        with count_compilations() as count:
            call(*arguments)
        assert count() == 0, arguments


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes_stay(dtype, x64):
    starts = jnp.asarray(np.ones((3, 2)), dtype)
    found = jaxgd.sweep(
        lambda x: jnp.sum(x**2),
        None,
        over={"params": starts, "learning_rate": [0.1, 0.2]},
        max_steps=5,
    )
    assert found.results.params.dtype == dtype
    assert found.shape == (3, 2)
    near(found[1, 1].params, np.full(2, 0.6**5), 5e-2)


def test_best_and_table():
    rates = [1e-3, 0.1, 0.3, 100.0]
    found = jaxgd.sweep(
        least_squares, START, (X, Y), over={"learning_rate": rates}, max_steps=60
    )
    assert found.best_settings == {"learning_rate": 0.3}
    assert found.best.value == found.results.value[2]
    assert found.best.message == Status.GRADIENT_SMALL.message
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "learning_rate",
        "objective",
        "gradient",
        "steps",
        "status",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["0.3", "0.1", "0.001", "100"]
    assert lines[-1].split()[1:3] == ["-", "-"]
    assert "DIVERGED" in lines[-1]
    status = {len(line) - len(line.split()[-1]) for line in lines}
    assert len(status) == 1  # aligned


@pytest.mark.full
def test_best_of_seeds_is_of_their_mean():
    """One lucky seed of a setting that may diverge does not win."""
    found = jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [0.01, 0.02, 50.0]},
        seeds=3,
        batch_size=2,
        epochs=3,
    )
    means = np.asarray(found.results.value, float).mean(axis=1)
    i, seed = int(np.argmin(means[:2])), found.best_settings["seed"]
    assert found.best_settings["learning_rate"] == [0.01, 0.02][i]
    assert found.best.value == min(found.results.value[i])
    assert found.best.value == found[i, seed].value
    np.testing.assert_allclose(found.scores[:2], means[:2])
    assert np.isinf(found.scores[2])
    row = str(found).splitlines()[1].split()
    np.testing.assert_allclose(float(row[1]), means[i], 1e-4)
    spread = np.std(np.asarray(found.results.value[i], float))
    np.testing.assert_allclose(float(row[2]), spread, 0.1)


def test_seeds_share_batches_across_settings():
    """Paired: the same seed is the same rows in every setting."""
    found = jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [0.0, 0.0]},
        seeds=2,
        batch_size=3,
        epochs=2,
    )
    values = np.asarray(found.results.history.value)
    np.testing.assert_array_equal(values[0], values[1])
    assert (values[0, 0] != values[0, 1]).any()


@pytest.mark.full
def test_starts_are_shown_by_their_place():
    starts = np.array([[3.0, 1.0], [0.5, 0.5]], "f")
    found = jaxgd.sweep(lambda x: jnp.sum(x**4), None, over={"params": starts})
    assert str(found).splitlines()[1].split()[0] in ("#0", "#1")
    best = found.best_settings["params"]
    np.testing.assert_array_equal(best, starts[found._best[0]])


ERRORS = [
    (TypeError, "over must be a dict", {"over": [0.1]}),
    (ValueError, "over must name what differs", {"over": {}}),
    (TypeError, "names as keys", {"over": {1: [0.1]}}),
    (TypeError, "list of floating numbers", {"over": {"learning_rate": 0.1}}),
    (
        TypeError,
        "list of floating",
        {"over": {"learning_rate": [optax.constant_schedule(1)]}},
    ),
    (ValueError, "one axis", {"over": {"learning_rate": np.ones((2, 2))}}),
    (ValueError, "one axis", {"over": {"learning_rate": []}}),
    (ValueError, "NaN", {"over": {"learning_rate": [0.1, np.nan]}}),
    (ValueError, "finite and >= 0", {"over": {"learning_rate": [0.1, -1.0]}}),
    (ValueError, "finite and >= 0", {"over": {"learning_rate": [0.1, np.inf]}}),
    (ValueError, "mean 'learning_rate'", {"over": {"lr": [0.1]}}),
    (ValueError, "argument seeds", {"over": {"key": [1, 2]}}),
    (TypeError, "tuple of stacked arrays", {"over": {"args": np.ones(5)}}),
    (
        TypeError,
        "write 1.0 instead of 1",
        {"over": {"momentum": [0, 1]}, "optimizer": optax.sgd, "learning_rate": 0.1},
    ),
    (
        ValueError,
        "must not be given beside",
        {"over": {"learning_rate": [0.1]}, "learning_rate": 0.1},
    ),
    (
        ValueError,
        "must not be given beside",
        {"over": {"args": (np.ones(2),)}, "args": (1.0,)},
    ),
    (ValueError, "one for all lanes", {"over": {"batch_size": [1.0, 2.0]}}),
    (TypeError, "axis of lanes", {"over": {"args": (1.0,)}}),
    (ValueError, "equally many lanes", {"over": {"args": (np.ones(2), np.ones(3))}}),
    (ValueError, "a lane at least", {"over": {"args": (np.ones(0),)}}),
    (ValueError, "seeds must be at least 1", {"over": {}, "seeds": 0}),
    (TypeError, "did you mean 'batch_size'", {"over": {}, "seeds": 2, "batchsize": 2}),
    (TypeError, "begins anew", {"over": {}, "seeds": 2, "state": None}),
    (
        ValueError,
        "ready rule",
        {"over": {"learning_rate": [0.1]}, "optimizer": optax.sgd(0.1)},
    ),
    (
        ValueError,
        "b7",
        {"over": {"b7": [0.1]}, "optimizer": optax.adam, "learning_rate": 0.1},
    ),
]


@pytest.mark.parametrize(("kind", "text", "kw"), ERRORS)
def test_errors(kind, text, kw, count_compilations):
    with count_compilations() as count, pytest.raises(kind, match=text):
        jaxgd.sweep(least_squares, START, (X, Y), **kw)
    assert count() == 0


def test_no_objective_to_compare():
    found = jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [0.1, 0.2]},
        batch_size=5,
        final_evaluation=False,
    )
    with pytest.raises(ValueError, match="final_evaluation=True"):
        found.best  # noqa: B018

    assert "-" in str(found).splitlines()[1]  # printing it is no error


def test_the_argument_gives_way_to_over():
    starts = np.array([[1.0, 1.0], [2.0, 0.5]], "f")
    bowl = lambda p: jnp.sum(p**2)
    for params in (None, starts[0], jnp.ones(2), "whatever"):
        found = jaxgd.sweep(bowl, params, over={"params": starts}, learning_rate=0.1)
        assert found.shape == (2,)
    for other in ({"learning_rate": jnp.float32(0.1)}, {"learning_rate": 0.1}):
        with pytest.raises(ValueError, match="must not be given beside"):
            jaxgd.sweep(bowl, starts[0], over={"learning_rate": [0.1]}, **other)


def test_no_best_where_all_are_lost():
    found = jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [1e3, 1e4]},
        batch_size=5,
    )
    assert str(found).count("DIVERGED") == 2
    with pytest.raises(ValueError, match="smaller rates"):
        found.best_settings  # noqa: B018


def test_not_inside_jit():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda r: jaxgd.sweep(valley, np.ones(3), over={"learning_rate": r}))(
            jnp.ones(3)
        )


@pytest.mark.full
def test_lanes_multiply_parameters_not_data(monkeypatch):
    """Temporaries of the compiled program, 8 times the rows or 4 times the lanes."""
    compiled = []
    run = jaxgd._api.sweep._run

    def recorded(*args):
        compiled.append(run.lower(*args).compile().memory_analysis())
        return run(*args)

    monkeypatch.setattr(jaxgd._api.sweep, "_run", recorded)
    rng = np.random.default_rng(0)
    for n, lanes in ((4096, 4), (8 * 4096, 4), (4096, 16)):
        x = rng.normal(size=(n, 32)).astype("f")
        jaxgd.sweep(
            least_squares,
            {"w": np.zeros(32, "f"), "b": np.float32(0)},
            (x, x[:, 0]),
            over={"learning_rate": np.geomspace(1e-3, 0.1, lanes)},
            batch_size=16,
            max_steps=3,
        )
    small, tall, wide = (memory.temp_size_in_bytes for memory in compiled)
    data = 4096 * 33 * 4
    assert tall < small + data  # of 8 times that
    assert wide < small + 12 * data


def inner(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for part in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            sub = getattr(part, "jaxpr", part)
            if hasattr(sub, "eqns"):
                yield from inner(sub)


@pytest.mark.full
@pytest.mark.parametrize("kw", [{}, SOME | {"stop": SETTLED}], ids=["batch", "checks"])
def test_a_full_chunk_selects_nothing_in_its_steps(kw, monkeypatch):
    """Freezing each step costs memory traffic; a batched predicate does just that."""
    seen = []

    def traced(*args):
        seen.append(jax.make_jaxpr(run, static_argnums=(0, 1, 2))(*args))
        return run(*args)

    run = jaxgd._api.sweep._run
    monkeypatch.setattr(jaxgd._api.sweep, "_run", traced)
    jaxgd.sweep(
        least_squares,
        START,
        (X, Y),
        over={"learning_rate": [0.01, 0.1, 0.2]},
        max_steps=5,
        **kw,
    )
    steps = [
        eqn
        for eqn in inner(seen[0].jaxpr)
        if eqn.primitive.name == "scan"
        and [v.aval.shape for v in eqn.outvars].count((3, 4)) == 1  # the parameters
    ]
    assert steps
    for eqn in steps:
        body = eqn.params["jaxpr"].jaxpr
        chosen = [e for e in inner(body) if e.primitive.name == "select_n"]
        assert (3, 4) not in [e.outvars[0].aval.shape for e in chosen]
    whiles = [e for e in inner(seen[0].jaxpr) if e.primitive.name == "while"]
    assert whiles
    for eqn in whiles:
        assert eqn.params["cond_jaxpr"].out_avals[0].shape == ()


@pytest.fixture(params=[1, 4])
def short_chunks(request, monkeypatch):
    """Chunks of so few steps that lanes end in all of them, and before them."""
    monkeypatch.setattr(jaxgd._loop.parts, "chunk_size", lambda *_: request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.thin(6)
@pytest.mark.parametrize(
    "kw",
    [{"stop": SETTLED}, {"batch_size": 5}, {"batch_size": 9, "stop": SETTLED}],
    ids=["a rule", "mini-batches", "checks"],
)
def test_short_chunks(kw, short_chunks):
    """Lanes that end one after the other, some of them one step before a chunk."""
    rates = [0.05, 0.3, 0.59, 0.62, 0.7, 1.0, 2.0, 3.0, 10.0, 100.0, 1e4, 1e9, 1e15]
    kw = {"max_steps": 60, **kw}
    found = jaxgd.sweep(
        least_squares, START, (X, Y), over={"learning_rate": rates}, **kw
    )
    steps = []
    for i, rate in enumerate(rates):
        alone = jaxgd.minimize(least_squares, START, (X, Y), learning_rate=rate, **kw)
        lane = found[i]
        assert int(lane.status) == int(alone.status), rate
        assert int(lane.steps) == int(alone.steps), rate
        assert int(lane.evaluations) == int(alone.evaluations), rate
        np.testing.assert_array_equal(lane.history.step, alone.history.step)
        near(lane.params, alone.params, 2e-3)
        near(lane.history.value, alone.history.value, 2e-3)
        steps.append(int(lane.steps))
    assert len(set(steps)) > 6
