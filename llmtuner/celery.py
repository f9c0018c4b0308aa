"""Celery: a doorbell over Redis, never the record (DynamoDB holds that)."""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")

app = Celery("llmtuner")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["jobs"])
