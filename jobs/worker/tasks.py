"""Celery tasks. Each one only calls the module that does the work.

Losing a message does no harm: all unfinished work has a row in the store, and the reconciler enqueues it again.
"""

from __future__ import annotations

from celery import shared_task


@shared_task(name="run_next")
def run_next() -> None:
    """Claims and runs the next waiting job until none is left that fits this worker. The message carries no data."""
    from jobs.lifecycle import transitions
    from jobs.worker import prewarmed, runner, worker_process

    with worker_process.Busy():
        while not worker_process.STOP.is_set():
            claim = transitions.claim_next(worker_process.capabilities())
            if claim is None:
                return
            worker_process.set_current_job(claim.job_id)
            runner.run(claim, worker_process.STOP)
            worker_process.set_current_job("")
            if not worker_process.STOP.is_set():
                prewarmed.warm_up()


@shared_task(name="check_dataset")
def check_dataset(owner: str, dataset_id: str) -> None:
    """Reads the whole file in a sandboxed child process, stores the report, and marks the dataset ready or rejected."""
    from jobs.datasets import checks

    checks.check(owner, dataset_id)


@shared_task(name="after_end")
def after_end(owner: str, job_id: str) -> None:
    """Does the work that remains after a job has ended (model row, notifications, quotas). Idempotent."""
    from jobs.lifecycle import finalize

    finalize.after_end(owner, job_id)


@shared_task(name="errand")
def errand(kind: str, owner: str, id: str, lease: str = "") -> None:
    """Does a check or a deletion from the outbox. See `jobs.store.outbox`."""
    from jobs.store import outbox

    outbox.run(kind, owner, id, lease)


@shared_task(name="deliver")
def deliver(owner: str, id: str, lease: str = "") -> None:
    """Sends one webhook or email, in a separate queue because receivers may be slow. See `jobs.notifications.webhooks`."""
    from jobs.notifications import webhooks
    from jobs.store import outbox
    from jobs.worker import worker_process

    def work() -> None:
        if not worker_process.STOP.is_set():
            outbox.run("deliver", owner, id, lease)

    webhooks.DELIVERIES.run(owner, id, work)


@shared_task(name="generate")
def generate() -> None:
    """Serves queued generation requests one after another until none is left that may run. The message carries no data."""
    from jobs.inference import inference_worker
    from jobs.worker import worker_process

    while not worker_process.STOP.is_set() and inference_worker.serve_next():
        pass
