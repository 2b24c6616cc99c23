"""Update rules: those of optax, and the four that optax has not."""
