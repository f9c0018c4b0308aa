"""The account page, where users can also export and delete their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from allauth.account.decorators import reauthentication_required
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.socialaccount.models import SocialAccount
from allauth.usersessions.models import UserSession
from django.conf import settings
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts.forms import DeleteAccountForm
from accounts.models import ApiKey, User
from accounts.signals import exporting, leaving


@dataclass(frozen=True)
class Row:
    label: str
    value: str
    note: str = ""
    action: str = ""
    href: str = ""


@login_required
@require_safe
def overview(request: HttpRequest) -> HttpResponse:
    return render(request, "accounts/overview.html", {"rows": _rows(_user(request))})


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # guaranteed by login_required
    return request.user


def _rows(user: User) -> list[Row]:
    address = EmailAddress.objects.filter(user=user, primary=True).first()
    types = set(Authenticator.objects.filter(user=user).values_list("type", flat=True))
    names = [name for type_, name in _SECOND_FACTORS.items() if type_ in types]
    devices = len(UserSession.objects.purge_and_list(user))
    keys = ApiKey.objects.filter(user=user).valid().count()
    has_password = user.has_usable_password()
    password = "account_change_password" if has_password else "account_set_password"
    rows = [
        Row(
            "Email",
            user.email,
            "Verified" if address and address.verified else "",
            "Change",
            reverse("account_email"),
        ),
        Row(
            "Password",
            "Set" if has_password else "None",
            "",
            "Change" if has_password else "Set",
            reverse(password),
        ),
        Row("Two-step sign-in", " and ".join(names) or "Off", "", "Manage", reverse("mfa_index")),
        Row("Devices", f"{devices} signed in", "", "Manage", reverse("usersessions_list")),
        Row("API keys", f"{keys} active" if keys else "None", "", "Manage", reverse("accounts:api_keys")),
    ]
    if settings.GOOGLE_CLIENT_ID:
        connected = SocialAccount.objects.filter(user=user, provider="google").exists()
        state = "Connected" if connected else "Not connected"
        rows.insert(3, Row("Google", state, "", "Manage", reverse("socialaccount_connections")))
    rows.append(Row("Name in model IDs", user.slug))
    return rows


_SECOND_FACTORS = {Authenticator.Type.TOTP: "Authenticator app", Authenticator.Type.WEBAUTHN: "Passkeys"}


@login_required
@require_POST
def sign_out_device(request: HttpRequest, pk: int) -> HttpResponse:
    session = get_object_or_404(UserSession, pk=pk, user=_user(request))
    session.end()
    messages.success(request, "The device has been signed out.")
    return redirect("usersessions_list")


@login_required
@require_safe
@reauthentication_required
def export(request: HttpRequest) -> HttpResponse:
    user = _user(request)
    content: dict[str, Any] = {"exported_at": timezone.now(), "account": _account_of(user)}
    for _, section in exporting.send(sender=User, owner=user.owner_id):
        content |= section
    response = JsonResponse(content, json_dumps_params={"indent": 2, "ensure_ascii": False})
    response["Content-Disposition"] = 'attachment; filename="llm-tuner-data.json"'
    return response


def _account_of(user: User) -> dict[str, Any]:
    """All SQL data about a user, except for secrets with which someone else could sign in as them."""
    keys = ApiKey.objects.filter(user=user)
    return {
        "email": user.email,
        "addresses": list(EmailAddress.objects.filter(user=user).values("email", "verified", "primary")),
        "id": user.owner_id,
        "slug": user.slug,
        "notify_by_email": user.notify_by_email,
        "joined_at": user.date_joined,
        "last_signed_in_at": user.last_login,
        "google": list(SocialAccount.objects.filter(user=user).values("uid", "extra_data", "date_joined")),
        "second_factors": list(
            Authenticator.objects.filter(user=user).values("type", "created_at", "last_used_at")
        ),
        "devices": list(
            UserSession.objects.filter(user=user).values("ip", "user_agent", "created_at", "last_seen_at")
        ),
        "api_keys": list(
            keys.values("name", "prefix", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
        ),
    }


@login_required
@require_http_methods(["GET", "POST"])
@reauthentication_required
def delete(request: HttpRequest) -> HttpResponse:
    """Deletes the user's data first and the user last, so that the user can try again after a crash."""
    user = _user(request)
    form = DeleteAccountForm(request.POST or None, email=user.email)
    if not form.is_valid():
        return render(request, "accounts/delete.html", {"form": form}, status=400 if form.is_bound else 200)
    ApiKey.objects.filter(user=user).update(revoked_at=timezone.now())  # no new work through the API
    leaving.send(sender=User, owner=user.owner_id)
    for session in UserSession.objects.filter(user=user):
        session.end()
    logout(request)
    user.delete()
    messages.success(request, "Your account has been deleted.")
    return redirect("account_login")
