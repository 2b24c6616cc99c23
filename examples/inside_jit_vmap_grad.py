"""``minimize`` as part of a larger JAX program: inside jit, under vmap, under grad.

What it shows, on ridge regression:

1. inside ``jax.jit``: a fit is one more function of arrays, and its result a pytree;
2. under ``jax.vmap``: one fit per learning rate, in one program; a lane that diverges
   says so and does not disturb the others;
3. under ``jax.grad``: with ``stop=None`` the descent is a scan of fixed length, and the
   loss on other rows is differentiated through it with respect to the ridge penalty
   and the learning rate, and compared with finite differences.
"""

import jax
import jax.numpy as jnp

import jaxgd


def make_rows(key, n, columns=10, noise=1.0):
    """Rows (x, y) of a linear model with noise; the same model for every key."""
    x = jax.random.normal(key, (n, columns))
    e = jax.random.normal(jax.random.fold_in(key, 1), (n,))
    return x, x @ jnp.linspace(-1, 1, columns) + noise * e


def squared_error(params, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2) / 2


def ridge(params, batch, penalty):
    return squared_error(params, batch) + penalty / 2 * jnp.sum(params**2)


def inside_jit(train, penalty=0.1):
    """Standardizes, fits and predicts in one compiled program."""

    @jax.jit
    def fit(x, y, penalty):
        center, scale = x.mean(axis=0), x.std(axis=0)
        x = (x - center) / scale
        start = jnp.zeros(x.shape[1])
        result = jaxgd.minimize(
            ridge, start, (x, y), args=(penalty,), learning_rate=0.3
        )
        return result, x @ result.params

    result, _ = fit(*train, penalty)
    print("inside jit")
    print(result)
    return result


def under_vmap(train, learning_rates, penalty=0.1):
    """One lane per learning rate."""
    start = jnp.zeros(train[0].shape[1])

    @jax.vmap
    def fit(learning_rate):
        return jaxgd.minimize(
            ridge, start, train, args=(penalty,), learning_rate=learning_rate
        )

    results = fit(jnp.asarray(learning_rates))
    print(f"\nunder vmap: {results}")
    print("  learning rate  status          steps         value")
    for i, learning_rate in enumerate(learning_rates):
        one = results[i]
        status = jaxgd.Status(int(one.status)).name
        print(f"  {learning_rate:13}  {status:14} {one.steps:6}  {one.value:12.6g}")
    return results


def under_grad(train, valid, penalty=0.1, learning_rate=0.1, steps=30, h=1e-3):
    """The derivatives of a validation loss, and the same by central differences."""
    start = jnp.zeros(train[0].shape[1])

    def valid_loss(penalty, learning_rate):
        fit = jaxgd.minimize(
            ridge,
            start,
            train,
            args=(penalty,),
            learning_rate=learning_rate,
            max_steps=steps,
            stop=None,
        )
        return squared_error(fit.params, valid)

    at = (penalty, learning_rate)
    derivatives = jax.jit(jax.grad(valid_loss, argnums=(0, 1)))(*at)
    differences = []
    print(f"\nunder grad: validation loss {valid_loss(*at):.6f} after {steps} steps")
    print("  with respect to   derivative  finite difference")
    for i, name in enumerate(["penalty", "learning rate"]):
        up, down = (
            valid_loss(*(x + sign * h * (i == j) for j, x in enumerate(at)))
            for sign in (1, -1)
        )
        differences.append((up - down) / (2 * h))
        print(f"  {name:14} {derivatives[i]:13.8f}  {differences[i]:17.8f}")
    return derivatives, differences


def main(n=200, learning_rates=(1e-3, 0.03, 0.3, 1.0, 3.0), steps=30):
    """Runs the three; returns what each returned."""
    train, valid = (make_rows(jax.random.key(seed), n) for seed in (0, 1))
    return (
        inside_jit(train),
        under_vmap(train, learning_rates),
        under_grad(train, valid, steps=steps),
    )


if __name__ == "__main__":
    main()
