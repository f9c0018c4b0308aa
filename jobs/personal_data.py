"""A user's data other than the account: exported on request, and deleted together with the account."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from allauth.account.signals import email_changed
from django.db.models.signals import post_save
from django.dispatch import receiver
from pynamodb.exceptions import PynamoDBException

from accounts.models import User
from accounts.signals import exporting, leaving
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.registry import tuned_models
from jobs.store import access, outbox, tables
from jobs.store.tables import EstimateRecord, HubModel, Upload, WebhookEndpoint

log = logging.getLogger(__name__)

PAGE = 100


@receiver(exporting)
def export(owner: str, **kwargs: Any) -> dict[str, Any]:
    """All rows that a user owns, without internal fields."""
    return {
        "datasets": [_plain(row, DATASET) for row in _all(access.list_datasets, owner)],
        "jobs": [_plain(row, JOB) for row in _all(access.list_jobs, owner)],
        "models": [_plain(row, MODEL) for row in _all(access.list_models, owner)],
        "hub_models": [row.name for row in tables.rows(HubModel, owner)],
        "webhooks": [{"id": row.endpoint_id, "url": row.url} for row in webhooks.list_endpoints(owner)],
    }


DATASET = ("dataset_id", "name", "purpose", "status", "bytes", "sha256", "summary", "created_at")
JOB = (
    "job_id",
    "name",
    "status",
    "base",
    "method",
    "dataset_id",
    "settings",
    "prompts",
    "metadata",
    "created_at",
)
MODEL = (
    "model_id",
    "name",
    "job_id",
    "base",
    "method",
    "files",
    "metrics",
    "verdict",
    "aliases",
    "created_at",
)


def _plain(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def _all(list_page: Callable[[str, int, str | None], Any], owner: str) -> Iterator[Any]:
    after = None
    while True:
        page = list_page(owner, PAGE, after)
        yield from page
        if not page.has_more:
            return
        after = page.rows[-1].id


@receiver(email_changed)
def update_notification_email(user: User, **kwargs: Any) -> None:
    _set_email(user)


@receiver(post_save, sender=User)
def stop_mail_to_inactive_users(instance: User, **kwargs: Any) -> None:
    if not instance.is_active:
        _set_email(instance)


def _set_email(user: User) -> None:
    """Updates the address for notifications. Best effort: if the store cannot be reached, the next submission sets it."""
    try:
        webhooks.set_email(user.owner_id, user.notification_email)
    except PynamoDBException as error:
        log.warning("the notification address of %s was not updated: %s", user.owner_id, str(error)[:200])


@receiver(leaving)
def begin_to_leave(owner: str, **kwargs: Any) -> None:
    """Cancels running jobs at once; the rest goes through the outbox, which survives any crash."""
    outbox.put("leave", owner, owner)
    _cancel_all(owner)
    outbox.enqueue("leave", owner, owner)


@outbox.handler("leave")
def leave(owner: str, _id: str) -> bool:
    """Deletes everything that can be deleted now. True when nothing is left; a running job stays until its worker stops."""
    _cancel_all(owner)
    for job in list(_all(access.list_jobs, owner)):
        with contextlib.suppress(transitions.Refused, access.NotFound):
            transitions.delete(owner, job.job_id, with_model=True)
    _delete_each(access.list_models, owner, tuned_models.delete)
    _delete_each(access.list_datasets, owner, datasets.delete)
    kept = (
        (Upload, "upload_id"),
        (WebhookEndpoint, "endpoint_id"),
        (HubModel, "name"),
        (EstimateRecord, "job_id"),
    )
    for table, name in kept:
        for row in list(tables.rows(table, owner)):
            tables.remove(table, owner, getattr(row, name))
    return not any(access.list_jobs(owner, 1))


def _cancel_all(owner: str) -> None:
    for job in _all(access.list_jobs, owner):
        if not job.ended:
            with contextlib.suppress(transitions.Refused, transitions.LostRace, access.NotFound):
                transitions.set_desired(owner, job.job_id, "cancel")


def _delete_each(list_page: Callable[..., Any], owner: str, delete: Callable[[str, str], None]) -> None:
    for row in list(_all(list_page, owner)):
        with contextlib.suppress(access.NotFound):
            delete(owner, row.id)
