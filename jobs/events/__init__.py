"""What happened to a job: the numbered event log, and the history that is computed from it."""
