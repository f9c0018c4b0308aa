"""Everything that is decided before a run: settings, base models, estimates and warnings. Also the events of the
trainer. Imports no torch."""
