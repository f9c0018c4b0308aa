"""The states of a job: submission, every transition between states, estimates, and what follows the end."""
