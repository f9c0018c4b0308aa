"""Loads the project's own system checks."""

from __future__ import annotations

from django.apps import AppConfig


class LLMTunerConfig(AppConfig):
    name = "llmtuner"

    def ready(self) -> None:
        from llmtuner import checks  # noqa: F401  registers itself
