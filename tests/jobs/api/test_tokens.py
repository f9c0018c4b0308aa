"""Forged, expired and misused access tokens: none is accepted, and the error never says why."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from typing import Any

import jwt
import pytest
from allauth.headless.tokens.strategies.jwt import internal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from django.conf import settings
from django.test import Client

from tests.jobs.api.conftest import make_session

ENDPOINTS = (
    ("get", "/v1/models"),
    ("get", "/v1/files"),
    ("get", "/v1/fine_tuning/jobs"),
    ("post", "/v1/chat/completions"),
    ("delete", "/v1/files/file-01"),
)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: dict[str, Any] | str, payload: dict[str, Any] | str, key: bytes | None) -> str:
    parts = [
        b64((part if isinstance(part, str) else json.dumps(part)).encode()) for part in (header, payload)
    ]
    signature = hmac.new(key, ".".join(parts).encode(), hashlib.sha256).digest() if key is not None else b""
    return ".".join([*parts, b64(signature)])


def forged_tokens(user: Any, session: Any) -> dict[str, str]:
    """Many are signed with the real key, so that only the invalid claim can cause the rejection."""
    now = int(time.time())
    key = settings.SECRET_KEY.encode()
    sub, sid = str(user.pk), internal.session_key_to_sid(session.session_key)
    payload_claims = {
        "iat": now,
        "exp": now + 300,
        "sid": sid,
        "jti": str(uuid.uuid4()),
        "token_use": "access",
        "sub": sub,
    }
    header = {"alg": "HS256", "typ": "JWT"}
    valid = jwt.encode(payload_claims, settings.SECRET_KEY, "HS256")
    first, second, third = valid.split(".")
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def with_claims(**changes: Any) -> str:
        return sign(header, {**payload_claims, **changes}, key)

    def without_claim(name: str) -> str:
        return sign(header, {k: v for k, v in payload_claims.items() if k != name}, key)

    def with_header(header: dict[str, Any], with_key: bytes | None = key) -> str:
        return sign(header, payload_claims, with_key)

    flipped = third[:-2] + ("A" if third[-2] != "A" else "B") + third[-1]
    return {
        "alg none": with_header({"alg": "none"}, None),
        "alg None": with_header({"alg": "None"}, None),
        "alg NONE": with_header({"alg": "NONE"}, None),
        "alg missing": with_header({"typ": "JWT"}),
        "alg null": with_header({"alg": None}),
        "alg is a list": with_header({"alg": ["HS256"]}),
        "alg in lower case": with_header({"alg": "hs256"}),
        "another hash algorithm": jwt.encode(payload_claims, settings.SECRET_KEY, "HS512"),
        "RS256 with another key": jwt.encode(payload_claims, private, "RS256"),
        "HS256 signed with a public key": sign(header, payload_claims, pem),
        "HS256 signed with a public key, trimmed": sign(header, payload_claims, pem.strip()),
        "empty key": with_header(header, b""),
        "short key": with_header(header, b"secret"),
        "Django's default key": with_header(header, b"django-insecure-key"),
        "kid is a path": with_header({**header, "kid": "../../dev/null"}, b""),
        "kid is SQL": with_header({**header, "kid": "x' UNION SELECT 'k"}, b"k"),
        "jku": with_header({**header, "jku": "http://127.0.0.1:9/keys"}, b"k"),
        "x5u": with_header({**header, "x5u": "http://127.0.0.1:9/cert"}, b"k"),
        "jwk in the header": with_header({**header, "jwk": {"kty": "oct", "k": b64(b"k")}}, b"k"),
        "unknown crit": with_header({**header, "crit": ["exp2"], "exp2": 1}),
        "expired a second ago": with_claims(exp=now - 1, iat=now - 301),
        "expired yesterday": with_claims(exp=now - 86_400, iat=now - 86_700),
        "exp is text": with_claims(exp="never"),
        "exp is a number as text": with_claims(exp=str(now + 300)),
        "exp is a fraction": with_claims(exp=now + 299.5),
        "exp in 10 years": with_claims(exp=now + 315_360_000),
        "exp out of range": with_claims(exp=1e30),
        "exp null": with_claims(exp=None),
        "exp true": with_claims(exp=True),
        "exp missing": without_claim("exp"),
        "iat missing": without_claim("iat"),
        "iat in the future": with_claims(iat=now + 3600, exp=now + 3900),
        "nbf in an hour": with_claims(nbf=now + 3600),
        "an audience": with_claims(aud="llmtuner"),
        "audiences": with_claims(aud=["llmtuner", "other"]),
        "an issuer": with_claims(iss="https://accounts.example.com"),
        "refresh as access": with_claims(token_use="refresh"),
        "id as access": with_claims(token_use="id"),
        "token_use missing": without_claim("token_use"),
        "sid missing": without_claim("sid"),
        "sid of no session": with_claims(sid=internal.session_key_to_sid("0" * 32)),
        "sid is a number": with_claims(sid=7),
        "sid is the bare session key": with_claims(sid=session.session_key),
        "another user's sub": with_claims(sub=str(user.pk + 1)),
        "sub is a number": with_claims(sub=user.pk),
        "sub missing": without_claim("sub"),
        "jti missing": without_claim("jti"),
        "an extra claim": with_claims(is_staff=True),
        "duplicate claim": sign(header, json.dumps(payload_claims)[:-1] + f', "sub": "{user.pk + 1}"}}', key),
        "signature flipped": f"{first}.{second}.{flipped}",
        "signature truncated": f"{first}.{second}.{third[:-4]}",
        "no signature": f"{first}.{second}.",
        "two parts": f"{first}.{second}",
        "four parts": f"{valid}.{third}",
        "five parts, as if encrypted": f"{first}..{second}.{third}.AAAA",
        "padding": valid + "==",
        "a space inside": f"{first}. {second}.{third}",
        "payload replaced": f"{first}.{b64(json.dumps({**payload_claims, 'sub': str(user.pk + 1)}).encode())}.{third}",
        "payload is not an object": sign(header, "[1]", key),
        "one megabyte long": valid + "A" * 1_000_000,
        "empty": "",
        "not a token": "token",
        "the session key itself": session.session_key,
    }


def send(endpoint: tuple[str, str], token: str) -> Any:
    method, path = endpoint
    return (
        getattr(Client(raise_request_exception=False), method)(
            path, data="{}", content_type="application/json", headers={"authorization": f"Bearer {token}"}
        )
        if method != "get"
        else Client(raise_request_exception=False).get(path, headers={"authorization": f"Bearer {token}"})
    )


@pytest.mark.usefixtures("stores")
def test_forged_and_expired_tokens_are_rejected_with_the_same_response(alice: Any) -> None:
    tokens = forged_tokens(alice, make_session(alice))
    assert len(tokens) >= 40
    bodies = set()
    for name, token in tokens.items():
        for endpoint in ENDPOINTS:
            response = send(endpoint, token)
            assert response.status_code == 401, (name, endpoint, response.content[:200])
            bodies.add(response.content)
    assert len(bodies) == 1


@pytest.mark.usefixtures("stores")
def test_a_valid_token_works_until_it_is_revoked(alice: Any) -> None:
    def token_with(session: Any) -> str:
        return internal.create_access_token(alice, session, {})

    models = ("get", "/v1/models")
    session = make_session(alice)
    token = token_with(session)
    assert send(models, token).status_code == 200
    assert send(models, token.upper()).status_code == 401

    session.delete()  # signed out
    assert send(models, token).status_code == 401

    token = token_with(make_session(alice))
    alice.set_password("another-long-password-1")
    alice.save()
    assert send(models, token).status_code == 401

    token = token_with(make_session(alice))
    assert send(models, token).status_code == 200
    alice.is_active = False
    alice.save()
    assert send(models, token).status_code == 401


@pytest.mark.usefixtures("stores")
def test_a_token_is_accepted_only_in_the_authorization_header(alice: Any) -> None:
    session = make_session(alice)
    token = internal.create_access_token(alice, session, {})
    client = Client(raise_request_exception=False)
    client.cookies[settings.SESSION_COOKIE_NAME] = session.session_key
    assert client.get("/v1/models").status_code == 401
    assert client.get(f"/v1/models?access_token={token}&token={token}").status_code == 401
    assert client.get("/v1/models", headers={"authorization": f"Basic {token}"}).status_code == 401
    assert client.get("/v1/models", headers={"x-session-token": session.session_key}).status_code == 401
