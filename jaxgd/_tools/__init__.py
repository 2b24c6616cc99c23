"""What is made of runs: timings, a learning rate, the sharpness."""
