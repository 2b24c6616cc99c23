"""The one loop: plan, step, chunks and events, lanes, program, host."""
