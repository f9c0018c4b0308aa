"""Notifications about finished jobs: email, webhooks, and recent deliveries."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from accounts.models import User
from jobs.notifications import webhooks
from jobs.store import quotas
from jobs.store.tables import WebhookDelivery, WebhookEndpoint

MAX_DELIVERIES = 20  # shown


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def page(request: HttpRequest) -> HttpResponse:
    """GET lists the webhooks. POST adds one and shows its secret, only this once. It does not redirect, so that the secret
    need not be stored anywhere else."""
    owner = _user(request).owner_id
    form: dict[str, Any] = {"url": "", "name": "", "events": list(webhooks.EVENT_TYPES)}
    errors: dict[str, str] = {}
    created: WebhookEndpoint | None = None
    if request.method == "POST":
        form = {
            "url": request.POST.get("url", "").strip(),
            "name": request.POST.get("name", "").strip(),
            "events": [event for event in webhooks.EVENT_TYPES if event in request.POST.getlist("events")],
        }
        errors = _errors(form)
        if not errors:
            try:
                created = webhooks.add_endpoint(owner, form["url"], form["name"], tuple(form["events"]))
            except webhooks.BadAddress as refusal:
                errors["url"] = str(refusal)
    endpoints = webhooks.list_endpoints(owner)
    context = {
        "endpoints": [(row, row.events or list(webhooks.EVENT_TYPES)) for row in endpoints],
        "deliveries": [_delivery(row, endpoints) for row in webhooks.recent(owner, MAX_DELIVERIES)],
        "created": created,
        "form": form,
        "errors": errors,
        "types": webhooks.EVENT_TYPES,
        "sends_mail": bool(settings.EMAIL_URL),
        "allows_private": settings.WEBHOOKS_ALLOW_PRIVATE,
    }
    return render(request, "jobs/notifications.html", context, status=400 if errors else 200)


@dataclass(frozen=True)
class DeliveryRow:
    """A row of the list of recent deliveries."""

    at: datetime
    event: str
    job_id: str
    destination: str
    status: str
    result: str


def _delivery(row: WebhookDelivery, endpoints: list[WebhookEndpoint]) -> DeliveryRow:
    channel = row.delivery_id.rpartition("#")[2]
    urls = {endpoint.endpoint_id: endpoint.name or endpoint.url for endpoint in endpoints}
    result = row.last_result or "sending"
    if row.status == "pending" and row.tries:
        result = f"{result}, {int(row.tries)} attempts so far; will retry"
    elif row.status == "given up":
        result = f"not delivered: {result}"
    destination = "email" if channel == "email" else urls.get(channel, "a deleted webhook")
    at = datetime.fromtimestamp(float(row.created_at), UTC)
    return DeliveryRow(at, row.event, row.job_id, destination, row.status, result)


def _errors(form: dict[str, Any]) -> dict[str, str]:
    errors = {}
    if len(form["name"]) > 80:
        errors["name"] = "Use at most 80 characters."
    if not form["events"]:
        errors["events"] = "Choose at least one event."
    return errors


@login_required
@require_POST
def email(request: HttpRequest) -> HttpResponse:
    wanted = request.POST.get("wanted") == "1"
    user = _user(request)
    user.notify_by_email = wanted
    webhooks.set_email(user.owner_id, user.notification_email)  # first: workers use this copy
    user.save(update_fields=["notify_by_email"])
    messages.success(
        request,
        "You will receive an email when a job ends."
        if wanted
        else "You will no longer receive emails about jobs.",
    )
    return redirect("jobs:notifications")


@login_required
@require_POST
def test(request: HttpRequest, webhook_endpoint_id: str) -> HttpResponse:
    endpoint = _find(request, webhook_endpoint_id)
    try:
        webhooks.send_test(endpoint)
    except quotas.OverQuota as over:
        messages.error(request, str(over))
    else:
        messages.success(request, "A test event is being sent. Its delivery status appears below.")
    return redirect("jobs:notifications")


@login_required
@require_POST
def delete(request: HttpRequest, webhook_endpoint_id: str) -> HttpResponse:
    row = _find(request, webhook_endpoint_id)
    webhooks.remove_endpoint(row.owner, row.endpoint_id)
    messages.success(request, "The webhook was deleted.")
    return redirect("jobs:notifications")


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # guaranteed by login_required
    return request.user


def _find(request: HttpRequest, endpoint_id: str) -> WebhookEndpoint:
    row = webhooks.find_endpoint(_user(request).owner_id, endpoint_id)
    if row is None:
        raise Http404
    return row
