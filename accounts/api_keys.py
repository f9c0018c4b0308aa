"""API keys: created on a page, shown once, stored as a hash, looked up by prefix, revoked at once.

A key has the form `sk-llmt-<prefix>-<secret>`. The prefix is public and indexed. The secret has 256 random bits, so a plain
SHA-256 of the whole key is enough: it cannot be guessed, and it is fast enough for every request. Every request reads the
row again, so a revoked key is refused from the next request on, in every process.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from accounts.models import ApiKey, User

SCOPES = {
    "read": "View and download files, jobs and models",
    "write": "Upload files; create, change and delete anything",
    "inference": "Generate text with models",
}
PATTERN = re.compile(r"sk-llmt-([a-z0-9]{12})-[A-Za-z0-9_-]{43}")
LIFETIMES = {"30": "30 days", "90": "90 days", "365": "1 year", "": "No expiration"}
MAX_KEYS = 50
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_LAST_USED_INTERVAL = timedelta(minutes=1)  # at most one write per minute


def create(
    user: User, name: str, scopes: list[str] | tuple[str, ...], expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """Creates a key. Returns its row and the key itself, which is not stored anywhere."""
    prefix = "".join(secrets.choice(_ALPHABET) for _ in range(12))
    secret = f"sk-llmt-{prefix}-{secrets.token_urlsafe(32)}"
    key = ApiKey.objects.create(
        user=user,
        name=name.strip()[:80] or "Key",
        prefix=prefix,
        digest=_digest(secret),
        scopes=" ".join(scope for scope in SCOPES if scope in scopes),
        expires_at=expires_at,
    )
    return key, secret


def verify(secret: str) -> ApiKey | None:
    """The valid key for this secret. None if it is unknown, wrong, revoked or expired, or if its owner is deactivated."""
    match = PATTERN.fullmatch(secret)
    if match is None:
        return None
    key: ApiKey | None = ApiKey.objects.select_related("user").filter(prefix=match[1]).first()
    if key is None or not hmac.compare_digest(key.digest, _digest(secret)):
        return None
    if not key.is_valid or not key.user.is_active:
        return None
    now = timezone.now()
    if key.last_used_at is None or now - key.last_used_at > _LAST_USED_INTERVAL:
        # The time is only informative, so an error is no reason to refuse the request.
        with suppress(DatabaseError):
            ApiKey.objects.filter(pk=key.pk).update(last_used_at=now)
    return key


def revoke(user: User, pk: int) -> None:
    key = get_object_or_404(ApiKey, pk=pk, user=user)
    if key.revoked_at is None:
        ApiKey.objects.filter(pk=key.pk).update(revoked_at=timezone.now())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# ---- the page ----------------------------------------------------------------------------------


@login_required
@never_cache
def page(request: HttpRequest) -> HttpResponse:
    """GET lists the keys. POST creates one and shows it, only once. It does not redirect, so that the key need not be stored."""
    assert isinstance(request.user, User)
    secret: str | None = None
    errors: dict[str, str] = {}
    form: dict[str, Any] = {"name": "", "days": "90", "scopes": list(SCOPES)}
    if request.method == "POST":
        form = {
            "name": request.POST.get("name", "").strip(),
            "days": request.POST.get("days", ""),
            "scopes": [scope for scope in SCOPES if scope in request.POST.getlist("scopes")],
        }
        errors = _errors(request.user, form)
        if not errors:
            days = str(form["days"])
            expires_at = timezone.now() + timedelta(days=int(days)) if days else None
            _, secret = create(request.user, str(form["name"]), list(form["scopes"]), expires_at)
    own = ApiKey.objects.filter(user=request.user).order_by("-created_at")
    valid_keys = own.valid()
    keys = [*valid_keys, *own.exclude(pk__in=valid_keys)[:MAX_KEYS]]
    context = {
        "keys": keys,
        "secret": secret,
        "errors": errors,
        "form": form,
        "scopes": SCOPES,
        "lifetimes": LIFETIMES,
        "base_url": request.build_absolute_uri("/v1"),
    }
    return render(request, "accounts/api_keys.html", context, status=400 if errors else 200)


def _errors(user: User, form: dict[str, Any]) -> dict[str, str]:
    errors = {}
    if not form["name"] or len(str(form["name"])) > 80:
        errors["name"] = "Enter a name of at most 80 characters."
    if not form["scopes"]:
        errors["scopes"] = "Choose at least one permission."
    if form["days"] not in LIFETIMES:
        errors["days"] = "Choose when the key expires."
    if ApiKey.objects.filter(user=user).valid().count() >= MAX_KEYS:
        errors["name"] = f"You have {MAX_KEYS} active keys. Revoke one that you no longer use."
    return errors


@login_required
@require_POST
def revoke_page(request: HttpRequest, pk: int) -> HttpResponse:
    assert isinstance(request.user, User)
    revoke(request.user, pk)
    messages.success(request, "The key has been revoked.")
    return redirect("accounts:api_keys")
