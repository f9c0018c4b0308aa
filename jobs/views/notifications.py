"""How a person is told of their jobs' ends: e-mail, and webhooks with what became of the last notices."""

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

SHOWN = 20  # notices


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def page(request: HttpRequest) -> HttpResponse:
    """GET lists; POST adds a webhook and answers with the only sight of its secret (no redirect, so it is stored nowhere
    else)."""
    owner = _person(request).owner_id
    form: dict[str, Any] = {"url": "", "name": "", "events": list(webhooks.EVENT_TYPES)}
    errors: dict[str, str] = {}
    made: WebhookEndpoint | None = None
    if request.method == "POST":
        form = {
            "url": request.POST.get("url", "").strip(),
            "name": request.POST.get("name", "").strip(),
            "events": [event for event in webhooks.EVENT_TYPES if event in request.POST.getlist("events")],
        }
        errors = _errors(form)
        if not errors:
            try:
                made = webhooks.add_endpoint(owner, form["url"], form["name"], tuple(form["events"]))
            except webhooks.BadAddress as refusal:
                errors["url"] = str(refusal)
    endpoints = webhooks.list_endpoints(owner)
    context = {
        "endpoints": [(row, row.events or list(webhooks.EVENT_TYPES)) for row in endpoints],
        "notices": [_notice(row, endpoints) for row in webhooks.recent(owner, SHOWN)],
        "made": made,
        "form": form,
        "errors": errors,
        "types": webhooks.EVENT_TYPES,
        "sends_mail": bool(settings.EMAIL_URL),
        "allows_private": settings.WEBHOOKS_ALLOW_PRIVATE,
    }
    return render(request, "jobs/notifications.html", context, status=400 if errors else 200)


@dataclass(frozen=True)
class Notice:
    """A line of the list."""

    at: datetime
    event: str
    job_id: str
    place: str
    status: str
    words: str


def _notice(row: WebhookDelivery, endpoints: list[WebhookEndpoint]) -> Notice:
    place = row.delivery_id.rpartition("#")[2]
    urls = {endpoint.endpoint_id: endpoint.name or endpoint.url for endpoint in endpoints}
    words = row.last_result or "on its way"
    if row.status == "pending" and row.tries:
        words = f"{words}, tried {int(row.tries)} times; again later"
    elif row.status == "given up":
        words = f"not sent: {words}"
    where = "e-mail" if place == "email" else urls.get(place, "a webhook that was deleted")
    at = datetime.fromtimestamp(float(row.created_at), UTC)
    return Notice(at, row.event, row.job_id, where, row.status, words)


def _errors(form: dict[str, Any]) -> dict[str, str]:
    errors = {}
    if len(form["name"]) > 80:
        errors["name"] = "Use at most 80 characters."
    if not form["events"]:
        errors["events"] = "Choose at least one thing to be told of."
    return errors


@login_required
@require_POST
def email(request: HttpRequest) -> HttpResponse:
    wanted = request.POST.get("wanted") == "1"
    person = _person(request)
    person.notify_by_email = wanted
    webhooks.set_email(person.owner_id, person.notification_email)  # first: what workers go by
    person.save(update_fields=["notify_by_email"])
    messages.success(
        request, "You get an e-mail when a job ends." if wanted else "You get no e-mail about jobs."
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
    messages.success(request, "The webhook is deleted.")
    return redirect("jobs:notifications")


def _person(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # login_required came first
    return request.user


def _find(request: HttpRequest, endpoint_id: str) -> WebhookEndpoint:
    row = webhooks.find_endpoint(_person(request).owner_id, endpoint_id)
    if row is None:
        raise Http404
    return row
