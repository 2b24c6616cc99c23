"""Linear regression on three points, beside the same descent written out in NumPy.

What it shows: ``jaxgd.minimize`` with a rate alone is the textbook update
``theta <- theta - rate * X.T @ (X @ theta - y) / m``. The gradient is never written
down: it comes from the objective. The five runs share one compiled program, for the
number of steps is data.
"""

import jax.numpy as jnp
import numpy as np

import jaxgd

X = np.array([[1, 2], [1, 3], [1, 4]], np.float32)  # [m, 2], the first column is 1
Y = np.array([2, 5, 9], np.float32)  # [m]


def objective(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


def descend_in_numpy(theta, rate, steps):
    for _ in range(steps):
        theta = theta - np.float32(rate) * (X.T @ (X @ theta - Y) / np.float32(3))
    return theta


def main(learning_rate=0.01, iterations=(0, 1, 10, 100, 1000)):
    """Prints both descents; returns the last result and the largest difference."""
    start = np.zeros(2, np.float32)
    differences = []
    print("iteration  by     theta                     objective")
    for steps in iterations:
        result = jaxgd.minimize(
            objective, start, (X, Y), learning_rate=learning_rate, max_steps=steps
        )
        by_hand = descend_in_numpy(start, learning_rate, steps)
        half_mse = np.mean((X @ by_hand - Y) ** 2) / 2
        for by, theta, value in [
            ("jaxgd", result.params, result.value),
            ("NumPy", by_hand, half_mse),
        ]:
            print(f"{steps:9}  {by}  [{theta[0]:.6f}, {theta[1]:.6f}]  {value:12.6f}")
        differences.append(np.abs(result.params - by_hand).max())
    print(f"\nlargest difference in theta: {max(differences):.1e} (float32)\n")
    print(result)
    return result, float(max(differences))


if __name__ == "__main__":
    main()
