"""Variables for all templates."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.http import HttpRequest


def site(request: HttpRequest) -> dict[str, Any]:
    return {
        "google_enabled": bool(settings.GOOGLE_CLIENT_ID),
        "signup_open": settings.SIGNUP_OPEN,
        "email_enabled": bool(settings.EMAIL_URL),
    }
