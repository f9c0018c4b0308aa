"""A job's life: submission, every transition between states, estimates, and the work after it has ended."""
