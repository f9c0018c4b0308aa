"""Checks that refuse to start with unsafe settings, or with settings that would silently use the embedded stores of this
machine. `LLMTUNER_ENV=production` turns them on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.exceptions import ImproperlyConfigured

from llmtuner import env


@register(Tags.security)
def production_is_safe(**kwargs: Any) -> list[CheckMessage]:
    return problems(needs_sql=True)


def problems(needs_sql: bool) -> list[CheckMessage]:
    if settings.LLMTUNER_ENV not in {"development", "test", "production"}:
        return [Error("LLMTUNER_ENV must be development, test or production", id="llmtuner.E001")]
    if not settings.PRODUCTION:
        return []
    return [*_problems(), *_store_problems(needs_sql)]


def refuse_unsafe_start(needs_sql: bool = True) -> None:
    """Raises an exception that names all problems. For servers, which do not run Django's system checks."""
    if errors := problems(needs_sql):
        raise ImproperlyConfigured("; ".join(f"{error.msg} ({error.id})" for error in errors))


def _store_problems(needs_sql: bool) -> Iterator[CheckMessage]:
    """Checks that each store is configured. Without its variable, an embedded store would be used: empty, on one machine, and
    without a backup."""
    if needs_sql and not env.text("DATABASE_URL").startswith(("postgres://", "postgresql://")):
        yield Error("DATABASE_URL must be set to a PostgreSQL database", id="llmtuner.E014")
    if not env.text("REDIS_URL") or env.text("LLMTUNER_OWN_REDIS"):
        yield Error("REDIS_URL must be set: the embedded Redis is not for production", id="llmtuner.E015")
    if "DYNAMODB_ENDPOINT" not in os.environ or env.text("LLMTUNER_OWN_DYNAMODB"):
        yield Error(
            "DYNAMODB_ENDPOINT must be set: the embedded DynamoDB is not for production",
            hint="Leave it empty to use AWS: DYNAMODB_ENDPOINT=",
            id="llmtuner.E016",
        )
    if not settings.AWS_STORAGE_BUCKET_NAME:
        yield Error("AWS_STORAGE_BUCKET_NAME must be set: all machines share the files", id="llmtuner.E017")


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
        yield Error(
            "PUBLIC_URL must start with https://",
            hint="Without HTTPS, passwords could be intercepted.",
            id="llmtuner.E004",
        )
    if not settings.ALLOWED_HOSTS or any(host.startswith(("*", ".")) for host in settings.ALLOWED_HOSTS):
        yield Error(
            "ALLOWED_HOSTS must list every host name",
            hint="ALLOWED_HOSTS=tuner.example.com",
            id="llmtuner.E005",
        )
    if not (settings.SESSION_COOKIE_SECURE and settings.CSRF_COOKIE_SECURE):
        yield Error("Cookies must be sent over HTTPS only", id="llmtuner.E006")
    if settings.GOOGLE_ENDPOINTS:
        yield Error(
            "GOOGLE_ENDPOINTS sends sign-in to another provider", hint="Unset it.", id="llmtuner.E007"
        )
    if settings.FAILPOINTS:
        yield Error("FAILPOINTS kills processes on purpose", hint="Unset it.", id="llmtuner.E008")
    if not settings.EMAIL_URL:
        yield Error(
            "EMAIL_URL must be set to a mail server: addresses are verified by email", id="llmtuner.E009"
        )
    if settings.ACCOUNT_EMAIL_VERIFICATION != "mandatory":
        yield Error(
            "ACCOUNT_EMAIL_VERIFICATION must be mandatory: email addresses must be verified",
            id="llmtuner.E010",
        )
    if settings.LOOPBACK or not settings.PUBLIC_HOST:
        yield Error("PUBLIC_URL must be the URL that users open, not localhost", id="llmtuner.E011")
    if settings.CACHES["default"]["BACKEND"] != "django.core.cache.backends.redis.RedisCache":
        yield Error("Rate limits must be counted in Redis, shared by all processes", id="llmtuner.E012")
    if settings.GOOGLE_CLIENT_ID and not env.text("GOOGLE_CLIENT_SECRET"):
        yield Error("GOOGLE_CLIENT_ID is set, but GOOGLE_CLIENT_SECRET is not", id="llmtuner.E013")
