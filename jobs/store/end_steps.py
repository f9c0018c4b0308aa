"""A registry of the steps that run after a job has ended. Modules register their own steps.

Steps must be idempotent, because all of them run again if a later one fails. jobs/apps.py imports every module that has one.
"""

from __future__ import annotations

from collections.abc import Callable

from jobs.store.tables import Job

Step = Callable[[Job], None]
_steps: list[tuple[int, Step]] = []


def step(order: int) -> Callable[[Step], Step]:
    """Registers a step; those with a lower `order` run first. Its argument is the ended job, which may be void or deleted."""

    def register(function: Step) -> Step:
        _steps.append((order, function))
        return function

    return register


def run(job: Job) -> None:
    for _, function in sorted(_steps, key=lambda entry: entry[0]):
        function(job)
