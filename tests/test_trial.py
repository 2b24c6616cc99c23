"""``value`` and ``grad_norm`` are those of all rows, or a warning says otherwise."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgd
from jaxgd._call import fit

pytestmark = pytest.mark.thin(4)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3000, 4)).astype(np.float32)
Y = (X @ np.array([1, -2, 0.5, 3]) + RNG.normal(size=3000)).astype(np.float32)
W = RNG.uniform(0.2, 3, 3000).astype(np.float32)
SHOWN = (np.arange(3000) < 2000).astype(np.float32)  # padding in the last rows
DATA = {"x": X, "y": Y, "w": W, "shown": SHOWN}
START = np.array([0.3, 0.1, -0.2, 0.4], np.float32)


def off(p, rows):
    return rows["x"] @ p - rows["y"]


def mean(p, rows):
    return jnp.mean(off(p, rows) ** 2)


def mean_with_penalty(p, rows):
    return mean(p, rows) + 0.3 * jnp.sum(p**2)


def logistic(p, rows):
    return jnp.mean(jnp.logaddexp(0.0, -jnp.sign(rows["y"]) * (rows["x"] @ p)))


def half(p, rows):
    """Mixed precision."""
    x, y = rows["x"].astype(jnp.bfloat16), rows["y"]
    return jnp.mean(((x @ p.astype(jnp.bfloat16)).astype(jnp.float32) - y) ** 2)


def total(p, rows):
    return jnp.sum(off(p, rows) ** 2)


def total_with_penalty(p, rows):
    return total(p, rows) + 40 * jnp.sum(p**2)


def scaled(p, rows):
    return jnp.sum(off(p, rows) ** 2) / 32


def weighted(p, rows):
    return jnp.sum(rows["w"] * off(p, rows) ** 2) / jnp.sum(rows["w"])


def masked(p, rows):
    shown = rows["shown"]
    return jnp.sum(shown * off(p, rows) ** 2) / jnp.sum(shown)


def root(p, rows):
    return jnp.sqrt(mean(p, rows))


def ranking(p, rows):
    z, y = rows["x"] @ p, rows["y"]
    later = y[:, None] > y[None]
    return jnp.mean(jnp.where(later, jax.nn.softplus(z[None] - z[:, None]), 0))


def contrastive(p, rows):
    z = rows["x"] * p
    logits = z @ rows["x"].T
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


def length(p, rows):
    return jnp.linalg.norm(off(p, rows))


def unbiased(p, rows):
    return jnp.sum(off(p, rows) ** 2) / (len(rows["y"]) - 1)


def moments(p, rows):
    return (jnp.mean(rows["x"] @ p) - jnp.mean(rows["y"])) ** 2


def broadcast(p, rows):
    return jnp.mean((rows["x"] @ p[:, None] - rows["y"]) ** 2)


KINDS = {
    total: "twice the mean of its halves: a sum; divide by the number of rows",
    total_with_penalty: "a term that sees no rows: a sum",
    scaled: "a sum",
    weighted: "a weighted or masked mean",
    masked: "a weighted or masked mean",
    root: "their mean is within another function",
    ranking: "rows are compared with each other",
    length: "how many rows there are",
    unbiased: "how many rows there are",
    moments: "their mean is within another function",
    broadcast: r"rows of data\['y'\] are shuffled against the others; .*\(n, 1\)",
}
MINI = {"batch_size": 8, "learning_rate": 1e-5, "max_steps": 20}


@pytest.mark.parametrize("fun", [mean, mean_with_penalty, logistic, half])
@pytest.mark.parametrize("start", [START, np.zeros(4, np.float32)], ids=["", "zero"])
def test_means_are_told_without_a_word(fun, start):
    found = jaxgd.minimize(fun, start, DATA, **MINI)
    np.testing.assert_allclose(found.value, fun(found.params, DATA), rtol=1e-5)
    assert "all 3000 rows" in found.report()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_means_of_any_scale(scale):
    fun = lambda p, rows: scale * mean(p, rows)
    jaxgd.minimize(fun, START, DATA, **{**MINI, "learning_rate": 1e-5 / scale})


def test_means_of_what_cancels():
    """Where rounding is far above that of the value."""

    def tiny(p, rows):
        z = rows["x"] @ p
        return jnp.mean(1e6 * jnp.exp(0.01 * z) - 1e6 - 1e4 * z)

    jaxgd.minimize(tiny, START, DATA, **MINI)


def test_means_of_what_a_loop_solves(x64):
    def root_of(p, rows):
        """z = cos(z + x p), solved for all rows until the last is exact to 1e-7."""
        x = rows["x"] @ p

        def more(state):
            return jnp.max(jnp.abs(state[0] - state[1])) > 1e-7

        def again(state):
            return jnp.cos(state[0] + x) / 2, state[0]

        z, _ = jax.lax.while_loop(more, again, (jnp.zeros_like(x), x + 1))
        return jnp.mean((jax.lax.stop_gradient(z) + x - rows["y"]) ** 2)

    data = {name: np.float64(x) for name, x in DATA.items()}
    jaxgd.minimize(root_of, np.float64(START), data, **MINI)


def test_means_at_their_solution_and_on_raw_columns():
    """Values that are nothing but rounding, and columns far from zero."""
    solved = X @ START
    jaxgd.minimize(mean, START, {"x": X, "y": solved}, **MINI)
    raw = np.stack([np.linspace(0, 1e5, 3000), np.full(3000, 1e3)], 1).astype("f")
    far = {"x": raw, "y": (raw @ [1.0, 50.0]).astype("f")}
    how = {**MINI, "learning_rate": 1e-12}
    jaxgd.minimize(mean, np.zeros(2, "f"), far, **how)


@pytest.mark.thin(4)
@pytest.mark.parametrize("fun", KINDS)
def test_what_is_no_mean_is_named_and_told_of_all_rows(fun):
    with pytest.warns(UserWarning, match=KINDS[fun]) as seen:
        found = jaxgd.minimize(fun, START, DATA, **MINI)
    assert [w.filename for w in seen] == [__file__]
    assert "told of all rows at once" in str(seen[0].message)
    value, grad = jax.value_and_grad(fun)(found.params, DATA)
    np.testing.assert_allclose(found.value, value, rtol=1e-5)
    np.testing.assert_allclose(found.grad_norm, jnp.linalg.norm(grad), rtol=1e-4)
    assert "all 3000 rows" in found.report()


@pytest.mark.parametrize("fun", [weighted, total])
def test_microbatches_of_what_is_no_mean_are_left_out(fun):
    how = {"learning_rate": 1e-5, "max_steps": 3}
    with pytest.warns(UserWarning, match="no mean"):
        split = jaxgd.minimize(fun, START, DATA, microbatch_size=50, **how)
    whole = jaxgd.minimize(fun, START, DATA, **how)
    np.testing.assert_array_equal(split.params, whole.params)
    np.testing.assert_array_equal(split.value, whole.value)


def test_weights_in_blocks_do_not_converge_elsewhere():
    w = np.repeat(np.float32([1, 100]), 50)
    v = np.repeat(np.float32([0, 1]), 50)

    def fun(p, rows):
        return jnp.sum(rows[0] * (p - rows[1]) ** 2) / jnp.sum(rows[0])

    with pytest.warns(UserWarning, match="weights 0.0099 and 0.99"):
        found = jaxgd.minimize(fun, np.float32(0), (w, v), microbatch_size=50)
    assert found.converged
    np.testing.assert_allclose(found.params, 100 / 101, rtol=1e-6)
    np.testing.assert_allclose(found.value, 100 / 101**2, rtol=1e-4)


def test_rules_see_the_same_numbers():
    with pytest.warns(UserWarning, match="no mean"):
        found = jaxgd.minimize(
            total, START, DATA, **{**MINI, "max_steps": 800}, stop=jaxgd.target_value(0)
        )
    assert found.checks.step.tolist() == [375, 750]
    with pytest.warns(UserWarning, match="no mean"):
        part = jaxgd.minimize(total, START, DATA, **{**MINI, "max_steps": 375})
    np.testing.assert_allclose(
        found.checks.value[0], total(part.params, DATA), rtol=1e-5
    )


def test_contrastive_losses_are_told_in_batches_and_it_is_said():
    how = {**MINI, "batch_size": 100}
    with pytest.warns(UserWarning, match="how many rows there are.*blocks of 100 rows"):
        found = jaxgd.minimize(contrastive, START, {"x": X}, **how)
    batches = [contrastive(found.params, {"x": x}) for x in X.reshape(30, 100, 4)]
    np.testing.assert_allclose(found.value, np.mean(batches), rtol=1e-5)
    assert "(mean over blocks of 100 rows)" in found.report()


def test_what_does_not_fit_is_told_in_blocks_and_it_is_said(monkeypatch):
    monkeypatch.setattr(fit, "_WHOLE_BYTES", 10_000)
    with pytest.warns(UserWarning, match="do not fit.* means over blocks of 8 rows"):
        found = jaxgd.minimize(weighted, START, DATA, **MINI)
    blocks = [
        weighted(found.params, {k: v[i : i + 8] for k, v in DATA.items()})
        for i in range(0, 3000, 8)
    ]
    np.testing.assert_allclose(found.value, np.mean(blocks), rtol=1e-4)
    assert "(mean over blocks of 8 rows)" in found.report()


def test_lanes_are_counted_where_all_rows_are_to_fit(monkeypatch):
    at_once = fit._work_at_once
    seen = []

    def work(*given):
        seen.append(at_once(*given))
        return seen[-1]

    monkeypatch.setattr(fit, "_work_at_once", work)
    with pytest.warns(UserWarning, match="all rows at once"):
        jaxgd.minimize(total, START, DATA, **MINI)
    monkeypatch.setattr(fit, "_WHOLE_BYTES", 2 * seen[0])
    how = {**MINI, "learning_rate": None}
    with pytest.warns(UserWarning, match="do not fit"):
        jaxgd.sweep(total, START, DATA, over={"learning_rate": [1e-5] * 3}, **how)


def test_a_run_that_goes_on_is_tried_where_it_is():
    """``params`` are structure alone there."""
    first = jaxgd.minimize(mean, START, DATA, **MINI)
    lost = np.full(4, np.nan, np.float32)
    jaxgd.minimize(mean, lost, DATA, state=first.state, **MINI)
    with pytest.warns(UserWarning, match="a sum"):
        found = jaxgd.minimize(total, lost, DATA, state=first.state, **MINI)
    np.testing.assert_allclose(found.value, total(found.params, DATA), rtol=1e-5)


@pytest.mark.full
def test_batch_descent_warns_of_shapes_alone():
    with pytest.warns(UserWarning, match=r"\(n, 1\) and \(n,\) broadcast"):
        jaxgd.minimize(broadcast, START, DATA, max_steps=2)
    for fun in (total, root, ranking):
        found = jaxgd.minimize(fun, START, DATA, learning_rate=1e-5, max_steps=2)
        np.testing.assert_allclose(found.value, fun(found.params, DATA), rtol=1e-5)


def test_everything_that_splits_rows_warns():
    calls = [
        lambda: jaxgd.sharpness(total, START, DATA),
        lambda: list(jaxgd.iterate(total, START, DATA, every=10, **MINI)),
        lambda: jaxgd.sweep(
            total,
            START,
            DATA,
            over={"learning_rate": [1e-5]},
            **{**MINI, "learning_rate": None},
        ),
        lambda: jaxgd.find_learning_rate(
            total, START, DATA, batch_size=8, max_steps=40
        ),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="a sum; divide") as seen:
            call()
        assert {w.filename for w in seen} == {__file__}
    with warnings.catch_warnings(action="ignore"):
        found = jaxgd.sharpness(total, START, DATA, rtol=1e-4)
    expected = np.linalg.eigvalsh(2.0 * X.T @ X)[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_stream_is_tried_as_well():
    stream = jaxgd.Stream(DATA)
    with pytest.warns(UserWarning, match="a sum"):
        jaxgd.minimize(total, START, stream, **MINI)

    def blocks():
        for i in range(0, 3000, 100):
            yield {k: v[i : i + 100] for k, v in DATA.items()}

    with pytest.warns(UserWarning, match="a sum"):
        jaxgd.minimize(total, START, jaxgd.Stream(blocks, rows=3000), **MINI)
    jaxgd.minimize(mean, START, jaxgd.Stream(blocks, rows=3000), **MINI)


@pytest.mark.full
def test_what_cannot_be_tried_is_taken_for_a_mean():
    def random(p, rows, key):
        keep = jax.random.bernoulli(key, 0.5, rows["y"].shape)
        return jnp.mean(keep * off(p, rows) ** 2)

    def of_one_shape(p, rows):
        assert rows["y"].shape in ((8,), (3000,))
        return jnp.mean(off(p, rows) ** 2)

    jaxgd.minimize(random, START, DATA, with_key=True, **MINI)
    how = {**MINI, "final_evaluation": False}
    jaxgd.minimize(of_one_shape, START, DATA, **how)
    jax.jit(lambda p: jaxgd.minimize(total, p, DATA, **how).params)(START)


def test_a_trial_calls_nothing_with_effects():
    calls = []

    def fun(p, rows):
        jax.debug.callback(lambda _: calls.append(1), p[0])
        return total(p, rows)

    jaxgd.minimize(
        fun, START, DATA, **{**MINI, "max_steps": 1, "final_evaluation": False}
    )
    jax.effects_barrier()
    assert len(calls) <= 2  # the step and the look at the last iterate


@pytest.mark.full
def test_networks_with_layers_of_any_kind():
    def deep(p, rows):
        h = rows["x"]
        for w in p["layers"]:
            h = jnp.tanh(h @ w)
        return jnp.mean((h @ p["out"] - rows["y"]) ** 2)

    params = {
        "layers": [RNG.normal(size=(4, 4)).astype("f") for _ in range(12)],
        "out": RNG.normal(size=4).astype("f"),
    }
    how = {"optimizer": optax.adam, "learning_rate": 1e-3, "batch_size": 8}
    jaxgd.minimize(deep, params, DATA, max_steps=5, **how)

    def normalized(p, rows):
        z = rows["x"] * p
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-3)
        return jnp.mean((z.sum(1) - rows["y"]) ** 2)

    with pytest.warns(UserWarning, match="no mean over rows"):
        jaxgd.minimize(normalized, START, DATA, **MINI)
