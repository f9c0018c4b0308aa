"""What a worker runs: claiming jobs, the trainer process, its output, artifacts, the reconciler and Celery tasks."""
