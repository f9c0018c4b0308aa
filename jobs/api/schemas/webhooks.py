"""Webhook endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Schema
from pydantic import Field, StrictStr

from jobs.api.schemas.common import Request


class WebhookCreate(Request):
    name: Annotated[StrictStr, Field(max_length=200)] = ""
    url: Annotated[StrictStr, Field(min_length=1, max_length=2000)]
    event_types: Annotated[list[StrictStr], Field(min_length=1, max_length=50)]


class WebhookEndpoint(Schema):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None = None
    llmtuner: dict[str, Any] = Field(
        default={}, description="Whether the webhook is active, and the result of the last delivery."
    )


class WebhookWithSecret(WebhookEndpoint):
    signing_secret: str
