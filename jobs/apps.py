from __future__ import annotations

from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"
    verbose_name = "Work"

    def ready(self) -> None:
        # These modules register themselves: handlers of work in the outbox, steps after a job's end, receivers of
        # signals about people and datasets. The rest of them is imported by these.
        import jobs.datasets.checks
        import jobs.datasets.multipart
        import jobs.datasets.reports
        import jobs.lifecycle.estimates
        import jobs.personal_data  # noqa: F401
