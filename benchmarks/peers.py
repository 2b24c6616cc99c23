"""The other ways to the same descent, each as its documentation would write it.

Every maker takes a problem and returns a function of no arguments that does ``steps``
steps and returns the parameters reached. All take the rows that jaxgd takes, made
beforehand where a peer has no order of its own, so the peers are spared that work.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxgd
from benchmarks._measure import Missing, needs


def on_device(tree):
    """A pytree of arrays on the default device."""
    return jax.tree.map(jnp.asarray, tree)


def rows_of(problem, batch_size, steps) -> np.ndarray:
    """The rows of all steps, int32[steps, batch_size], as jaxgd takes them."""
    n = len(problem.data[0])
    every = jnp.arange(steps, dtype=jnp.int32)
    return np.asarray(jaxgd.batch_rows(0, n, batch_size, every))


def take(data, rows):
    return jax.tree.map(lambda x: x[rows], data)


def bare_scan(problem, rule, steps, batch_size=None):
    """The loop one would write by hand for speed: nothing but steps, in one program.

    It reports the value of every step, and computes the rows of a step in the step.
    """
    data = on_device(problem.data)

    @jax.jit
    def run(params, data, key):
        def step(carry, t):
            params, opt_state = carry
            batch = data
            if batch_size is not None:
                n = len(problem.data[0])
                batch = take(data, jaxgd.batch_rows(key, n, batch_size, t))
            value, grad = jax.value_and_grad(problem.fun)(params, batch)
            updates, opt_state = rule.update(grad, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        carry = params, rule.init(params)
        (params, _), values = lax.scan(step, carry, jnp.arange(steps, dtype=jnp.int32))
        return params, values

    key = jax.random.key(0)
    return lambda: run(problem.init, data, key)[0]


def optax_loop(problem, rule, steps, batch_size=None):
    """The loop of the optax documentation: a jitted step called from Python."""
    data = on_device(problem.data)
    rows = None if batch_size is None else rows_of(problem, batch_size, steps)

    @jax.jit
    def step(params, opt_state, data, rows):
        batch = data if rows is None else take(data, rows)
        value, grad = jax.value_and_grad(problem.fun)(params, batch)
        updates, opt_state = rule.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def run():
        params = on_device(problem.init)
        opt_state = rule.init(params)
        for t in range(steps):
            of_step = None if rows is None else rows[t]
            params, opt_state, _ = step(params, opt_state, data, of_step)
        return params

    return run


def jaxopt_solver(problem, rule, steps, batch_size=None):
    """jaxopt's ``OptaxSolver``: its own iterator, or its own loop under ``jit``."""
    jaxopt = needs("jaxopt")
    # tol=-1 has no gradient small enough to end the run early.
    solver = jaxopt.OptaxSolver(problem.fun, rule, maxiter=steps, tol=-1.0)
    data = on_device(problem.data)
    if batch_size is None:
        run = jax.jit(lambda params, data: solver.run(params, data).params)
        return lambda: run(problem.init, data)
    rows = rows_of(problem, batch_size, steps)
    step = jax.jit(
        lambda params, state, data, rows: solver.update(params, state, take(data, rows))
    )

    def by_iterator():
        params = on_device(problem.init)
        state = solver.init_state(params, take(data, rows[0]))
        for t in range(steps):
            params, state = step(params, state, data, rows[t])
        return params

    return by_iterator


def optimistix_minimiser(problem, rule, steps):
    """optimistix's ``OptaxMinimiser`` under ``jit``: for full batches only."""
    optx = needs("optimistix")
    solver = optx.OptaxMinimiser(rule, rtol=0.0, atol=0.0)
    data = on_device(problem.data)

    @jax.jit
    def run(params, data):
        return optx.minimise(
            problem.fun, solver, params, data, max_steps=steps, throw=False
        ).value

    return lambda: run(on_device(problem.init), data)


def numpy_loop(problem, rate, steps):
    """The textbook loop in NumPy, for half the mean square of ``x @ theta - y``."""
    x, y = problem.data
    rate, m = x.dtype.type(rate), x.dtype.type(len(x))

    def run():
        theta = problem.init
        for _ in range(steps):
            theta = theta - rate * (x.T @ (x @ theta - y) / m)
        return theta

    return run


def sklearn_epoch(problem, rate, estimator: str, **settings):
    """One shuffled epoch of scikit-learn's SGD, its inner loop in Cython."""
    linear_model = needs("sklearn.linear_model")
    x, y = problem.data
    # Its inner loop is faster in the dtype it is given, if that is what it works in.
    model = getattr(linear_model, estimator)(
        penalty=None,
        learning_rate="constant",
        eta0=rate,
        max_iter=1,
        tol=None,
        shuffle=True,
        random_state=0,
        **settings,
    )

    def run():
        model.fit(x, y)
        return {"intercept": model.intercept_[0], "weights": model.coef_.ravel()}

    return run


def torch_loop(problem, rule: str, rate, steps, batch_size, device):
    """The training loop of the PyTorch tutorials, data on the device."""
    torch = needs("torch")
    if device == "tpu" or (device == "gpu" and not torch.cuda.is_available()):
        raise Missing(f"torch has no {device.upper()} here")
    where = "cuda" if device == "gpu" else "cpu"
    x, y = (torch.from_numpy(np.asarray(a)).to(where) for a in problem.data)
    rows = torch.from_numpy(rows_of(problem, batch_size, steps).astype(np.int64))
    rows = rows.to(where)
    layers, loss = _torch_model(torch, problem)

    def run():
        model = layers().to(where)
        name = {"sgd": "SGD", "adam": "Adam"}[rule]
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=rate)
        if where == "cuda":
            torch.cuda.synchronize()
        for t in range(steps):
            of_step = rows[t]
            optimizer.zero_grad()
            loss(model, x[of_step], y[of_step]).backward()
            optimizer.step()
        return _torch_params(problem, model)

    return run


def _torch_model(torch, problem):
    """(maker of a model with the problem's start, its loss)."""
    if problem.name == "logistic":
        layers, activation = [problem.init], None
        penalty = float(problem.fun.args[0])
    else:
        activation = torch.nn.Tanh
        layers = [
            {"weights": p["weights"], "intercept": p["bias"]} for p in problem.init
        ]
        penalty = 0.0

    def make():
        parts = []
        for place, layer in enumerate(layers):
            weights = np.asarray(layer["weights"])
            weights = weights.reshape(len(weights), -1)
            linear = torch.nn.Linear(*weights.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(weights.T.copy()))
                linear.bias.copy_(torch.from_numpy(np.atleast_1d(layer["intercept"])))
            parts.append(linear)
            if activation is not None and place < len(layers) - 1:
                parts.append(activation())
        return torch.nn.Sequential(*parts)

    functional = torch.nn.functional

    def logistic(model, x, y):
        value = functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        return value + penalty / 2 * (model[0].weight ** 2).sum()

    def entropy(model, x, y):
        return functional.cross_entropy(model(x), y.long())

    return make, logistic if problem.name == "logistic" else entropy


def _torch_params(problem, model):
    linear = [part for part in model if hasattr(part, "weight")]
    arrays = [
        (part.weight.detach().cpu().numpy().T, part.bias.detach().cpu().numpy())
        for part in linear
    ]
    if problem.name == "logistic":
        weights, intercept = arrays[0]
        return {"weights": weights.ravel(), "intercept": intercept[0]}
    return tuple({"weights": w, "bias": b} for w, b in arrays)
