"""The worker: it claims jobs, runs the trainer, reads its output and stores its artifacts. Also the reconciler and the
Celery tasks."""
