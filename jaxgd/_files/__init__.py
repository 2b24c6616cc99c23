"""A run that outlives its process: files, and going on from a state."""
