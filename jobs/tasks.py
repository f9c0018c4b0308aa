"""Celery's tasks: doorbells. Each is a few lines that call the module doing the work.

Losing a message loses nothing: all unfinished work has a row in the store, and the reconciler rings for it again.
"""

from __future__ import annotations

from celery import shared_task


@shared_task(name="run_next")
def run_next() -> None:
    """An empty bell: claims and runs the best waiting job, until none is left that fits this worker."""
    from jobs import lifecycle, runner, standby, worker

    with worker.Busy():
        while not worker.STOP.is_set():
            claim = lifecycle.claim_next(worker.as_asked())
            if claim is None:
                return
            worker.holds(claim.job_id)
            runner.run(claim, worker.STOP)
            worker.holds("")
            if not worker.STOP.is_set():
                standby.warm_up()


@shared_task(name="check_dataset")
def check_dataset(owner: str, dataset_id: str) -> None:
    """Reads the whole file in a limited child process; stores the report and says ready or rejected."""
    from jobs import checking

    checking.check(owner, dataset_id)


@shared_task(name="after_end")
def after_end(owner: str, job_id: str) -> None:
    """What follows from a job's end (model row, notifications, quota), safe to repeat."""
    from jobs import endings

    endings.after_end(owner, job_id)


@shared_task(name="errand")
def errand(kind: str, owner: str, id: str, lease: str = "") -> None:
    """A check or a deletion that stands in the list of unfinished work. See `jobs.errands`."""
    from jobs import errands

    errands.run(kind, owner, id, lease)


@shared_task(name="deliver")
def deliver(owner: str, id: str, lease: str = "") -> None:
    """Sends one webhook or mail. A queue of its own: the other side may let us wait. See `jobs.webhooks`."""
    from jobs import errands, webhooks, worker

    def work() -> None:
        if not worker.STOP.is_set():
            errands.run("deliver", owner, id, lease)

    webhooks.DELIVERIES.run(owner, id, work)


@shared_task(name="generate")
def generate() -> None:
    """An empty bell: relays the requests for text that wait, one after another, until none is left that may run."""
    from jobs import relay, worker

    while not worker.STOP.is_set() and relay.serve_next():
        pass
