from __future__ import annotations

from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"
    verbose_name = "Work"

    def ready(self) -> None:
        # Importing these modules registers outbox handlers, steps to run after a job's end, and receivers of signals about
        # users and datasets. They import all other modules that register any.
        import jobs.datasets.checks
        import jobs.datasets.model_imports
        import jobs.datasets.multipart
        import jobs.datasets.reports
        import jobs.lifecycle.estimates
        import jobs.personal_data  # noqa: F401
