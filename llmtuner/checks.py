"""Refuses to start where it would be unsafe, or would keep its data in this machine's own stores unasked.
`LLMTUNER_ENV=production` turns these on."""

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
    """For servers, which run no system checks by themselves."""
    if found := problems(needs_sql):
        raise ImproperlyConfigured("; ".join(f"{problem.msg} ({problem.id})" for problem in found))


def _store_problems(needs_sql: bool) -> Iterator[CheckMessage]:
    """What was forgotten would otherwise be a store of this machine alone, empty, and without a backup."""
    if needs_sql and not env.text("DATABASE_URL").startswith(("postgres://", "postgresql://")):
        yield Error("DATABASE_URL must be set to a PostgreSQL database", id="llmtuner.E014")
    if not env.text("REDIS_URL") or env.text("LLMTUNER_OWN_REDIS"):
        yield Error("REDIS_URL must be set: production uses no embedded Redis", id="llmtuner.E015")
    if "DYNAMODB_ENDPOINT" not in os.environ or env.text("LLMTUNER_OWN_DYNAMODB"):
        yield Error(
            "DYNAMODB_ENDPOINT must be set: production uses no embedded DynamoDB",
            hint="Leave it empty for AWS's own: DYNAMODB_ENDPOINT=",
            id="llmtuner.E016",
        )
    if not settings.AWS_STORAGE_BUCKET_NAME:
        yield Error(
            "AWS_STORAGE_BUCKET_NAME must be set: files are shared by all machines", id="llmtuner.E017"
        )


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
