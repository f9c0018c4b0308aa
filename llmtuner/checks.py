"""Refuses to start where it would be unsafe. `LLMTUNER_ENV=production` turns these on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.exceptions import ImproperlyConfigured

from llmtuner import env


@register(Tags.security)
def production_is_safe(**kwargs: Any) -> list[CheckMessage]:
    if settings.LLMTUNER_ENV not in {"development", "test", "production"}:
        return [Error("LLMTUNER_ENV must be development, test or production", id="llmtuner.E001")]
    return list(_problems()) if settings.PRODUCTION else []


def refuse_unsafe_start() -> None:
    """For servers, which run no system checks by themselves."""
    if problems := production_is_safe():
        raise ImproperlyConfigured("; ".join(f"{problem.msg} ({problem.id})" for problem in problems))


def _problems() -> Iterator[CheckMessage]:
    if settings.DEBUG:
        yield Error(
            "DEBUG is on: errors would show code and settings to strangers",
            hint="Unset DEBUG.",
            id="llmtuner.E002",
        )
    key = env.text("SECRET_KEY")
    if len(key) < 50 or len(set(key)) < 5 or key.startswith("django-insecure-"):
        hint = 'python -c "import secrets; print(secrets.token_urlsafe(64))"'
        yield Error("SECRET_KEY must be set to at least 50 random characters", hint=hint, id="llmtuner.E003")
    if not settings.HTTPS:
        yield Error("PUBLIC_URL must begin with https://", hint="Passwords travel to it.", id="llmtuner.E004")
    if not settings.ALLOWED_HOSTS or any(host.startswith(("*", ".")) for host in settings.ALLOWED_HOSTS):
        yield Error(
            "ALLOWED_HOSTS must name each host", hint="ALLOWED_HOSTS=tuner.example.com", id="llmtuner.E005"
        )
    if not (settings.SESSION_COOKIE_SECURE and settings.CSRF_COOKIE_SECURE):
        yield Error("Cookies must be sent over https only", id="llmtuner.E006")
    if settings.GOOGLE_ENDPOINTS:
        yield Error(
            "GOOGLE_ENDPOINTS points sign-in at another provider", hint="Unset it.", id="llmtuner.E007"
        )
    if settings.FAILPOINTS:
        yield Error("FAILPOINTS makes processes die on purpose", hint="Unset it.", id="llmtuner.E008")
    if not settings.EMAIL_URL:
        yield Error("EMAIL_URL must name a mail server: addresses are verified by mail", id="llmtuner.E009")
    if settings.ACCOUNT_EMAIL_VERIFICATION != "mandatory":
        yield Error("E-mail addresses must be verified", id="llmtuner.E010")
    if settings.LOOPBACK or not settings.PUBLIC_HOST:
        yield Error("PUBLIC_URL must be the address people use, not localhost", id="llmtuner.E011")
    if settings.CACHES["default"]["BACKEND"] != "django.core.cache.backends.redis.RedisCache":
        yield Error("Rate limits must be counted in Redis, shared by all processes", id="llmtuner.E012")
    if settings.GOOGLE_CLIENT_ID and not env.text("GOOGLE_CLIENT_SECRET"):
        yield Error("GOOGLE_CLIENT_ID is set without GOOGLE_CLIENT_SECRET", id="llmtuner.E013")
