"""Jobs and base models are stored in DynamoDB (`jobs.store.tables`). These unmanaged models have no tables: they only give
Django's admin an entry and permissions; `jobs.admin` has the views."""

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


class ImportedBase(models.Model):
    class Meta:
        managed = False
        default_permissions = ("view", "add", "delete")
        verbose_name = "base model"
        verbose_name_plural = "base models"

    def __str__(self) -> str:
        return "a base model"
