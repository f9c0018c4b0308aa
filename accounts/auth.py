"""Who calls `/v1`: a bearer credential, which is an API key or an access token of allauth's headless app client.

Cookies are never looked at here, so a page a person visits cannot use the API in their name.
Every refusal has the same body: it does not tell an unknown key from an expired one.
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
# Exactly what allauth signs. A token with another claim was not made by this studio for this purpose.
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
    """Two different credentials came with one request: guessing which one counts is how holes are made."""


def authenticate(request: HttpRequest) -> Caller | None:
    """The caller, or None. Runs SQL: call it from a thread."""
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
    given = set()
    header = request.META.get("HTTP_AUTHORIZATION", "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        given.add(value.strip())
    # Tools written for other vendors send the key under these names.
    given |= {
        request.META[name].strip() for name in ("HTTP_X_API_KEY", "HTTP_API_KEY") if request.META.get(name)
    }
    if len(given) > 1 or "," in header:
        raise TwoCredentials
    secret = given.pop() if given else None
    return secret if secret and len(secret) <= MAX_CREDENTIAL else None


def _user_of_token(token: str) -> User | None:
    """allauth checks signature, times and that the session behind the token still lives; we are stricter about its form."""
    if not _CANONICAL.fullmatch(token):
        return None
    answer = validate_access_token(token)
    if answer is None:
        return None
    user, payload = answer
    if (
        set(payload) != CLAIMS
        or not _times_are_sane(payload)
        or not isinstance(user, User)
        or not user.is_active
    ):
        return None
    return user


def _times_are_sane(payload: dict[str, Any]) -> bool:
    issued, expires = payload["iat"], payload["exp"]
    if type(issued) is not int or type(expires) is not int:
        return False
    return 0 < expires - issued <= app_settings.JWT_ACCESS_TOKEN_EXPIRES_IN + LEEWAY_S
