"""Refresh tokens: each works once, and reusing one revokes all tokens of the same sign-in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from allauth.usersessions.models import UserSession
from django.contrib.sessions.models import Session
from django.db import connections
from django.test import Client

from accounts.models import User
from tests.factories import PASSWORD, make_user


def post(path: str, body: dict[str, Any]) -> Any:
    return Client().post(f"/_allauth/app/v1/{path}", body, content_type="application/json")


def sign_in(user: User) -> dict[str, Any]:
    """Signs in by the API. Returns `access_token`, `refresh_token` and `session_token`."""
    return post("auth/login", {"email": user.email, "password": PASSWORD}).json()["meta"]


def refresh(token: str) -> Any:
    return post("tokens/refresh", {"refresh_token": token})


def is_valid(access_token: str) -> bool:
    response = Client().get(
        "/_allauth/app/v1/auth/session", headers={"authorization": f"Bearer {access_token}"}
    )
    return response.status_code == 200


def test_refreshing_returns_a_new_token_pair(alice: User):
    first = sign_in(alice)
    second = refresh(first["refresh_token"]).json()["data"]
    third = refresh(second["refresh_token"]).json()["data"]
    assert len({first["refresh_token"], second["refresh_token"], third["refresh_token"]}) == 3
    assert is_valid(third["access_token"])


def test_a_reused_refresh_token_revokes_all_tokens_of_its_sign_in(alice: User):
    first = sign_in(alice)
    second = refresh(first["refresh_token"]).json()["data"]
    third = refresh(second["refresh_token"]).json()["data"]
    assert refresh(first["refresh_token"]).status_code == 400
    for pair in (first, second, third):
        assert not is_valid(pair["access_token"])
        assert refresh(pair["refresh_token"]).status_code == 400
    response = Client().get(
        "/_allauth/app/v1/auth/session", headers={"x-session-token": first["session_token"]}
    )
    assert response.status_code == 410
    assert not Session.objects.exists()
    assert not UserSession.objects.filter(user=alice).exists()  # removed from the list of devices, too


def test_a_reused_refresh_token_leaves_other_sign_ins_alone(alice: User, bob: User):
    stolen, other, bobs = sign_in(alice), sign_in(alice), sign_in(bob)
    refresh(stolen["refresh_token"])
    assert refresh(stolen["refresh_token"]).status_code == 400
    assert not is_valid(stolen["access_token"])
    for pair in (other, bobs):
        assert is_valid(pair["access_token"])
        assert refresh(pair["refresh_token"]).status_code == 200


def test_a_forged_refresh_token_revokes_nothing(alice: User):
    pair = sign_in(alice)
    head, payload, signature = pair["refresh_token"].split(".")
    forged = f"{head}.{payload}.{signature[::-1]}"
    for token in (forged, pair["access_token"], "", "x"):
        assert refresh(token).status_code == 400
    assert is_valid(pair["access_token"])
    assert refresh(pair["refresh_token"]).status_code == 200


def test_concurrent_uses_of_one_refresh_token_get_one_pair(transactional_db: None):
    """The second use is a reuse and revokes the tokens, so a stolen token cannot stay unnoticed."""

    def refresh_in_thread(token: str) -> int:
        try:
            return refresh(token).status_code
        finally:
            connections.close_all()

    pair = sign_in(make_user("alice", password=PASSWORD))
    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(pool.map(refresh_in_thread, [pair["refresh_token"]] * 4))
    assert statuses == [200, 400, 400, 400]
    assert not is_valid(pair["access_token"])
