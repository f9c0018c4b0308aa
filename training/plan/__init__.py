"""What is decided before a run: settings, base models, estimates, warnings, and the events of a trainer.
No torch."""
