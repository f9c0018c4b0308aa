"""`/webhook_endpoints`: the URLs that are notified when the caller's jobs end."""

from __future__ import annotations

from typing import Any

from ninja import Router

from jobs.api import paging
from jobs.api.caller import READ, WRITE, CallerRequest
from jobs.api.errors import bad, not_found
from jobs.api.schemas.common import Deleted, Error, Page
from jobs.api.schemas.webhooks import WebhookCreate, WebhookEndpoint, WebhookWithSecret
from jobs.notifications import webhooks
from jobs.store.tables import WebhookEndpoint as Row

router = Router(auth=READ)
Json = dict[str, Any]


@router.post("", response={200: WebhookWithSecret, 400: Error}, auth=WRITE, summary="Add a webhook")
def create_webhook(request: CallerRequest, body: WebhookCreate) -> Json:
    """The signing secret is returned only in this response. Unknown event types are refused."""
    unknown = [event for event in body.event_types if event not in webhooks.EVENT_TYPES]
    if unknown:
        raise bad(
            f"There is no event type '{unknown[0]}'. Available: {', '.join(webhooks.EVENT_TYPES)}.",
            "event_types",
        )
    try:
        row = webhooks.add_endpoint(request.auth.owner, body.url, body.name, tuple(body.event_types))
    except webhooks.BadAddress as refusal:
        raise bad(str(refusal), "url") from refusal
    return {**show(row), "signing_secret": row.secret}


@router.get("", response={200: Page[WebhookEndpoint], 400: Error}, summary="List webhooks")
def list_webhooks(request: CallerRequest, after: paging.After = None) -> Json:
    rows = [show(row) for row in webhooks.list_endpoints(request.auth.owner)]
    return paging.page(paging.rest(rows, after), False)


@router.get(
    "/{webhook_endpoint_id}", response={200: WebhookEndpoint, 404: Error}, summary="Retrieve a webhook"
)
def retrieve_webhook(request: CallerRequest, webhook_endpoint_id: str) -> Json:
    return show(_find(request, webhook_endpoint_id))


@router.delete(
    "/{webhook_endpoint_id}", response={200: Deleted, 404: Error}, auth=WRITE, summary="Remove a webhook"
)
def delete_webhook(request: CallerRequest, webhook_endpoint_id: str) -> Json:
    row = _find(request, webhook_endpoint_id)
    webhooks.remove_endpoint(request.auth.owner, row.endpoint_id)
    return {"id": row.endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


def _find(request: CallerRequest, endpoint_id: str) -> Row:
    row = webhooks.find_endpoint(request.auth.owner, endpoint_id)
    if row is None:
        raise not_found("webhook")
    return row


def show(row: Row) -> Json:
    return {
        "id": row.endpoint_id,
        "object": "webhook_endpoint",
        "created_at": int(row.created_at),
        "name": row.name,
        "url": row.url,
        "event_types": list(row.events) or list(webhooks.EVENT_TYPES),
        "signing_secret_hint": row.secret[-4:],
        "llmtuner": {"active": row.active, "last_result": row.last_result},
    }
