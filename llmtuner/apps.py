"""Loads the project's system checks and the Celery app, through which the web server and the workers send tasks."""

from __future__ import annotations

from django.apps import AppConfig


class LLMTunerConfig(AppConfig):
    name = "llmtuner"

    def ready(self) -> None:
        from llmtuner import celery, checks  # noqa: F401  importing registers them
