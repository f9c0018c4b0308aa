"""Loads the project's own system checks, and Celery, whose messages web and workers send."""

from __future__ import annotations

from django.apps import AppConfig


class LLMTunerConfig(AppConfig):
    name = "llmtuner"

    def ready(self) -> None:
        from llmtuner import celery, checks  # noqa: F401  both register themselves
