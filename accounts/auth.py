"""Authentication of `/v1` by a bearer credential: an API key, or an access token of allauth's headless app client.

Cookies are ignored, so that a web page cannot use the API on behalf of its visitor. All failures have the same response, so
that it does not reveal whether a key is unknown or expired.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from allauth.headless import app_settings
from allauth.headless.tokens.strategies.jwt.internal import validate_access_token
from django.http import HttpRequest

from accounts import api_keys
from accounts.models import User

MAX_CREDENTIAL = 4096  # characters; a real access token has about 600
LEEWAY_S = 30
# Exactly the claims that allauth signs. A token with any other claim was not issued for this purpose.
CLAIMS = {"iat", "exp", "sid", "jti", "token_use", "sub"}
_CANONICAL = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Caller:
    owner: str
    slug: str
    scopes: frozenset[str]
    user: User
    credential: str  # `key:<prefix>` or `jwt`, for logs and rate limits; never the secret


class TwoCredentials(Exception):
    """The request has two different credentials. Guessing which one is meant would be a security risk."""


def authenticate(request: HttpRequest) -> Caller | None:
    """The caller, or None. Runs SQL queries, so call it in a thread."""
    secret = _credential(request)
    if secret is None:
        return None
    if secret.startswith("sk-"):
        key = api_keys.verify(secret)
        return key and _caller(key.user, frozenset(key.scopes.split()), f"key:{key.prefix}")
    user = _user_of_token(secret)
    return user and _caller(user, frozenset(api_keys.SCOPES), "jwt")


def _caller(user: User, scopes: frozenset[str], credential: str) -> Caller:
    return Caller(owner=user.owner_id, slug=user.slug, scopes=scopes, user=user, credential=credential)


def _credential(request: HttpRequest) -> str | None:
    credentials = set()
    header = request.META.get("HTTP_AUTHORIZATION", "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        credentials.add(value.strip())
    # Clients written for other vendors send the key in these headers.
    credentials |= {
        request.META[name].strip() for name in ("HTTP_X_API_KEY", "HTTP_API_KEY") if request.META.get(name)
    }
    if len(credentials) > 1 or "," in header:
        raise TwoCredentials
    secret = credentials.pop() if credentials else None
    return secret if secret and len(secret) <= MAX_CREDENTIAL else None


def _user_of_token(token: str) -> User | None:
    """The user of an access token. allauth checks the signature, the times, and that the token's session still exists; we also
    check its form strictly."""
    if not _CANONICAL.fullmatch(token):
        return None
    validated = validate_access_token(token)
    if validated is None:
        return None
    user, payload = validated
    if (
        set(payload) != CLAIMS
        or not _has_valid_lifetime(payload)
        or not isinstance(user, User)
        or not user.is_active
    ):
        return None
    return user


def _has_valid_lifetime(payload: dict[str, Any]) -> bool:
    issued, expires = payload["iat"], payload["exp"]
    if type(issued) is not int or type(expires) is not int:
        return False
    return bool(0 < expires - issued <= app_settings.JWT_ACCESS_TOKEN_EXPIRES_IN + LEEWAY_S)
