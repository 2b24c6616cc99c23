"""Linear regression on three points, beside the same loop written out in NumPy.

What it shows: plain gradient descent is the textbook update
``theta <- theta - rate * X.T @ (X @ theta - y) / m``, here applied 1000 times. The
gradient is never written down: it comes from the objective. ``state=result.state``
goes on with a run, so the descent stops at iterations 0, 1, 10, 100 and 1000 to compare.
"""

import jax.numpy as jnp
import numpy as np

import jaxgd

X = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]], np.float32)  # [rows, (1, x)]
Y = np.array([2.0, 5.0, 9.0], np.float32)  # [rows]


def half_mean_squared_error(theta, batch):
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) / 2


def descend_in_numpy(theta, learning_rate, steps):
    """The same update as a loop, in the same precision."""
    rate = np.float32(learning_rate)
    for _ in range(steps):
        theta = theta - rate * (X.T @ (X @ theta - Y) / np.float32(len(Y)))
    return theta, float(np.mean((X @ theta - Y) ** 2) / 2)


def main(learning_rate=0.01, iterations=(0, 1, 10, 100, 1000)):
    """Prints both descents; returns the result and the largest difference in theta."""
    start = np.zeros(2, np.float32)
    result, difference = None, 0.0
    print(f"{'iteration':>9}   {'jaxgd: theta':<22}{'objective':<14}", end="")
    print(f"{'NumPy: theta':<22}{'objective':<14}")
    for iteration in iterations:
        result = jaxgd.minimize(
            half_mean_squared_error,
            start,
            (X, Y),
            learning_rate=learning_rate,
            max_steps=iteration - (0 if result is None else int(result.steps)),
            state=None if result is None else result.state,
        )
        theta, objective = descend_in_numpy(start, learning_rate, iteration)
        ours = f"[{result.params[0]:.6f}, {result.params[1]:.6f}]"
        theirs = f"[{theta[0]:.6f}, {theta[1]:.6f}]"
        print(f"{iteration:>9}   {ours:<22}{float(result.value):<14.8f}", end="")
        print(f"{theirs:<22}{objective:<14.8f}")
        difference = max(difference, float(np.abs(result.params - theta).max()))
    print(f"largest difference in theta: {difference:.1e}")
    print()
    print(result)
    return result, difference


if __name__ == "__main__":
    main()
