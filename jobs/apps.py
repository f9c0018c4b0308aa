from __future__ import annotations

from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"
    verbose_name = "Work"

    def ready(self) -> None:
        # These register themselves: for people who take their data or leave, and as handlers of work in the outbox.
        from jobs import checking, estimates, people, reports  # noqa: F401
