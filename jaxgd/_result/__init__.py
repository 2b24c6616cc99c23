"""What comes back: result, history, diagnosis, pictures."""
