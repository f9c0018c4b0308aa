"""Forged, expired and misused access tokens: none opens anything, and the refusal never says why."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from importlib import import_module
from typing import Any

import jwt
import pytest
from allauth.headless.tokens.strategies.jwt import internal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.test import Client

ENDPOINTS = (
    ("get", "/v1/models"),
    ("get", "/v1/files"),
    ("get", "/v1/fine_tuning/jobs"),
    ("post", "/v1/chat/completions"),
    ("delete", "/v1/files/file-01"),
)


def session_of(user: Any) -> Any:
    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    return session


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: dict[str, Any] | str, payload: dict[str, Any] | str, key: bytes | None) -> str:
    parts = [
        b64((part if isinstance(part, str) else json.dumps(part)).encode()) for part in (header, payload)
    ]
    signature = hmac.new(key, ".".join(parts).encode(), hashlib.sha256).digest() if key is not None else b""
    return ".".join([*parts, b64(signature)])


def forgeries(user: Any, session: Any) -> dict[str, str]:
    """Many with the true key: then only the claim that is wrong stands between the token and the door."""
    now = int(time.time())
    key = settings.SECRET_KEY.encode()
    sub, sid = str(user.pk), internal.session_key_to_sid(session.session_key)
    good = {
        "iat": now,
        "exp": now + 300,
        "sid": sid,
        "jti": str(uuid.uuid4()),
        "token_use": "access",
        "sub": sub,
    }
    head = {"alg": "HS256", "typ": "JWT"}
    true = jwt.encode(good, settings.SECRET_KEY, "HS256")
    first, second, third = true.split(".")
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def claims(**changes: Any) -> str:
        return by_hand(head, {**good, **changes}, key)

    def without(name: str) -> str:
        return by_hand(head, {k: v for k, v in good.items() if k != name}, key)

    def headed(header: dict[str, Any], with_key: bytes | None = key) -> str:
        return by_hand(header, good, with_key)

    flipped = third[:-2] + ("A" if third[-2] != "A" else "B") + third[-1]
    return {
        "alg none": headed({"alg": "none"}, None),
        "alg None": headed({"alg": "None"}, None),
        "alg NONE": headed({"alg": "NONE"}, None),
        "alg missing": headed({"typ": "JWT"}),
        "alg null": headed({"alg": None}),
        "alg a list": headed({"alg": ["HS256"]}),
        "alg in lower case": headed({"alg": "hs256"}),
        "another hash": jwt.encode(good, settings.SECRET_KEY, "HS512"),
        "RS256 of somebody's key": jwt.encode(good, private, "RS256"),
        "HS256 signed with a public key": by_hand(head, good, pem),
        "HS256 signed with a public key, trimmed": by_hand(head, good, pem.strip()),
        "empty key": headed(head, b""),
        "short key": headed(head, b"secret"),
        "key of Django's template": headed(head, b"django-insecure-key"),
        "kid is a path": headed({**head, "kid": "../../dev/null"}, b""),
        "kid is SQL": headed({**head, "kid": "x' UNION SELECT 'k"}, b"k"),
        "jku": headed({**head, "jku": "http://127.0.0.1:9/keys"}, b"k"),
        "x5u": headed({**head, "x5u": "http://127.0.0.1:9/cert"}, b"k"),
        "jwk in the header": headed({**head, "jwk": {"kty": "oct", "k": b64(b"k")}}, b"k"),
        "unknown crit": headed({**head, "crit": ["exp2"], "exp2": 1}),
        "expired a second ago": claims(exp=now - 1, iat=now - 301),
        "expired yesterday": claims(exp=now - 86_400, iat=now - 86_700),
        "exp a text": claims(exp="never"),
        "exp a number as text": claims(exp=str(now + 300)),
        "exp a fraction": claims(exp=now + 299.5),
        "exp in 10 years": claims(exp=now + 315_360_000),
        "exp beyond all time": claims(exp=1e30),
        "exp null": claims(exp=None),
        "exp true": claims(exp=True),
        "exp missing": without("exp"),
        "iat missing": without("iat"),
        "iat in the future": claims(iat=now + 3600, exp=now + 3900),
        "nbf in an hour": claims(nbf=now + 3600),
        "an audience": claims(aud="llmtuner"),
        "audiences": claims(aud=["llmtuner", "other"]),
        "an issuer": claims(iss="https://accounts.example.com"),
        "refresh as access": claims(token_use="refresh"),
        "id as access": claims(token_use="id"),
        "no use": without("token_use"),
        "no session": without("sid"),
        "a session of nobody": claims(sid=internal.session_key_to_sid("0" * 32)),
        "a session that is no text": claims(sid=7),
        "sid is the bare session key": claims(sid=session.session_key),
        "somebody else's sub": claims(sub=str(user.pk + 1)),
        "sub a number": claims(sub=user.pk),
        "sub missing": without("sub"),
        "jti missing": without("jti"),
        "an extra claim": claims(is_staff=True),
        "a claim twice": by_hand(head, json.dumps(good)[:-1] + f', "sub": "{user.pk + 1}"}}', key),
        "signature flipped": f"{first}.{second}.{flipped}",
        "signature cut": f"{first}.{second}.{third[:-4]}",
        "no signature": f"{first}.{second}.",
        "two parts": f"{first}.{second}",
        "four parts": f"{true}.{third}",
        "five parts, as if encrypted": f"{first}..{second}.{third}.AAAA",
        "padding": true + "==",
        "a space inside": f"{first}. {second}.{third}",
        "payload exchanged": f"{first}.{b64(json.dumps({**good, 'sub': str(user.pk + 1)}).encode())}.{third}",
        "payload no object": by_hand(head, "[1]", key),
        "a megabyte": true + "A" * 1_000_000,
        "nothing": "",
        "a word": "token",
        "the session key itself": session.session_key,
    }


def request_once(endpoint: tuple[str, str], token: str) -> Any:
    method, path = endpoint
    return (
        getattr(Client(raise_request_exception=False), method)(
            path, data="{}", content_type="application/json", headers={"authorization": f"Bearer {token}"}
        )
        if method != "get"
        else Client(raise_request_exception=False).get(path, headers={"authorization": f"Bearer {token}"})
    )


@pytest.mark.usefixtures("stores")
def test_no_forged_or_expired_token_is_accepted_and_all_refusals_are_alike(alice: Any):
    forged = forgeries(alice, session_of(alice))
    assert len(forged) >= 40
    bodies = set()
    for name, token in forged.items():
        for endpoint in ENDPOINTS:
            answer = request_once(endpoint, token)
            assert answer.status_code == 401, (name, endpoint, answer.content[:200])
            bodies.add(answer.content)
    assert len(bodies) == 1


@pytest.mark.usefixtures("stores")
def test_the_true_token_opens_and_every_way_to_end_it_ends_it(alice: Any):
    def token_with(session: Any) -> str:
        return internal.create_access_token(alice, session, {})

    models = ("get", "/v1/models")
    session = session_of(alice)
    token = token_with(session)
    assert request_once(models, token).status_code == 200
    assert request_once(models, token.upper()).status_code == 401

    session.delete()  # signed out
    assert request_once(models, token).status_code == 401

    token = token_with(session_of(alice))
    alice.set_password("another-long-password-1")
    alice.save()
    assert request_once(models, token).status_code == 401

    token = token_with(session_of(alice))
    assert request_once(models, token).status_code == 200
    alice.is_active = False
    alice.save()
    assert request_once(models, token).status_code == 401


@pytest.mark.usefixtures("stores")
def test_a_token_counts_only_in_the_authorization_header(alice: Any):
    session = session_of(alice)
    token = internal.create_access_token(alice, session, {})
    client = Client(raise_request_exception=False)
    client.cookies[settings.SESSION_COOKIE_NAME] = session.session_key
    assert client.get("/v1/models").status_code == 401
    assert client.get(f"/v1/models?access_token={token}&token={token}").status_code == 401
    assert client.get("/v1/models", headers={"authorization": f"Basic {token}"}).status_code == 401
    assert client.get("/v1/models", headers={"x-session-token": session.session_key}).status_code == 401
