"""Celery's tasks: doorbells. Each is a few lines that call the module doing the work.

Losing a message loses nothing: all unfinished work has a row in the store, and the reconciler rings for it again.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task(name="run_next", queue="training")
def run_next() -> None:
    """An empty bell: claims and runs the best waiting job, until none is left that fits this worker."""
    raise NotImplementedError


@shared_task(name="check_dataset", queue="checks")
def check_dataset(owner: str, dataset_id: str) -> None:
    """Reads the whole file in a limited child process; stores the report and says ready or rejected."""
    raise NotImplementedError


@shared_task(name="after_end", queue="checks")
def after_end(owner: str, job_id: str) -> None:
    """What follows from a job's end (model row, notifications, quota): lifecycle's effects, safe to repeat."""
    raise NotImplementedError


@shared_task(name="generate", queue="inference")
def generate(request: dict[str, Any]) -> None:
    """Relays one request for text to this worker's server. See `jobs.inference`."""
    raise NotImplementedError


def ring_training(waiting: int) -> None:
    """Rings for training workers, unless as many bells lie in the list as jobs are `waiting`. Best effort: never raises."""
    raise NotImplementedError


def ring(task: Any, *args: str) -> None:
    """Sends a task's message. Best effort: never raises and never waits long; the reconciler rings again."""
    raise NotImplementedError
