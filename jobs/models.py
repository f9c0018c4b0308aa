"""Jobs are stored in DynamoDB (`jobs.store.tables`). This unmanaged model has no table: it only gives Django's admin an
entry and permissions for overseeing jobs; `jobs.admin` has the views."""

from __future__ import annotations

from django.db import models


class OverseenJob(models.Model):
    class Meta:
        managed = False
        default_permissions = ("view", "change")
        verbose_name = "job"
        verbose_name_plural = "jobs"

    def __str__(self) -> str:
        return "a job"
