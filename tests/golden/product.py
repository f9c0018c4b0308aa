"""All product modules that the golden tests import. When a module moves or a name in it changes, only this file changes;
the recorded formats stay as they are."""

from __future__ import annotations

from typing import Any

from accounts.api_keys import PATTERN as API_KEY_PATTERN
from accounts.api_keys import SCOPES as API_KEY_SCOPES
from accounts.api_keys import _digest as api_key_digest
from jobs.lifecycle.submission import JobRequest
from jobs.notifications import webhooks
from jobs.registry import hub_models
from jobs.registry.base_models import tokenizer_family as tokenizer_family
from jobs.store import outbox, queue, tables
from jobs.store.blobs import LINK_SALT, read_link
from jobs.store.child_process import ENVIRONMENT as TRAINER_ENVIRONMENT
from jobs.store.reasons import REASONS as JOB_REASONS
from jobs.store.states import JobStatus
from jobs.store.tables import ENDED as ENDED_STATUSES
from jobs.store.tables import TABLES
from jobs.views.live import PATH as STREAM_PATH
from llmtuner.api import api
from llmtuner.celery import app as celery_app
from training.__main__ import COMMANDS as TRAINER_COMMANDS
from training.engine.checkpoint import FILES as CHECKPOINT_FILES
from training.engine.checkpoint import FORMAT as CHECKPOINT_FORMAT
from training.plan.catalog import BaseModel, base_models
from training.plan.config import FIELDS, UNHASHED, parse, settings_hash
from training.plan.events import EXIT as EXIT_CODES
from training.plan.events import MAX_LINE_BYTES, PHASES
from training.plan.events import REASONS as TRAINER_REASONS
from training.plan.run_file import Run

JOB_STATUSES = [status.value for status in JobStatus]
WORK_KINDS = outbox.KINDS
WORK_PARTITION = outbox.PARTITION
WEBHOOK_EVENT_TYPES = (*webhooks.EVENT_TYPES, webhooks.TEST_TYPE)
HUB_ID = hub_models.ID
shard = queue.shard
SHARDS = queue.SHARDS
time_of = tables.time_of
month_of = tables.month_of


def webhook_headers(secret: str, delivery_id: str, payload: str, now: float) -> dict[str, str]:
    delivery = tables.WebhookDelivery("user-A", delivery_id, payload=payload)
    return webhooks.signed(secret, delivery, now)


def request_hash(**fields: Any) -> str:
    """The `body_hash` of a submission."""
    return JobRequest(**fields).hash()


__all__ = [
    "API_KEY_PATTERN",
    "API_KEY_SCOPES",
    "CHECKPOINT_FILES",
    "CHECKPOINT_FORMAT",
    "ENDED_STATUSES",
    "EXIT_CODES",
    "FIELDS",
    "HUB_ID",
    "JOB_REASONS",
    "JOB_STATUSES",
    "LINK_SALT",
    "MAX_LINE_BYTES",
    "PHASES",
    "SHARDS",
    "STREAM_PATH",
    "TABLES",
    "TRAINER_COMMANDS",
    "TRAINER_ENVIRONMENT",
    "TRAINER_REASONS",
    "UNHASHED",
    "WEBHOOK_EVENT_TYPES",
    "WORK_KINDS",
    "WORK_PARTITION",
    "BaseModel",
    "Run",
    "api",
    "api_key_digest",
    "base_models",
    "celery_app",
    "month_of",
    "parse",
    "read_link",
    "request_hash",
    "settings_hash",
    "shard",
    "time_of",
    "tokenizer_family",
    "webhook_headers",
]
