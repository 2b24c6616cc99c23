"""The objective: its value and gradient, at once or in blocks of rows."""
