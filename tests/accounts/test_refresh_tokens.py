"""Refresh tokens: each is good once, and one that comes back ends everything that came of the same sign-in."""

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
    """The tokens of a program that signs in: `access_token`, `refresh_token`, `session_token`."""
    return post("auth/login", {"email": user.email, "password": PASSWORD}).json()["meta"]


def refresh(token: str) -> Any:
    return post("tokens/refresh", {"refresh_token": token})


def opens(access_token: str) -> bool:
    answer = Client().get(
        "/_allauth/app/v1/auth/session", headers={"authorization": f"Bearer {access_token}"}
    )
    return answer.status_code == 200


def test_refreshing_returns_a_new_token_pair(alice: User):
    first = sign_in(alice)
    second = refresh(first["refresh_token"]).json()["data"]
    third = refresh(second["refresh_token"]).json()["data"]
    assert len({first["refresh_token"], second["refresh_token"], third["refresh_token"]}) == 3
    assert opens(third["access_token"])


def test_a_reused_refresh_token_revokes_all_tokens_of_its_sign_in(alice: User):
    first = sign_in(alice)
    second = refresh(first["refresh_token"]).json()["data"]
    third = refresh(second["refresh_token"]).json()["data"]
    assert refresh(first["refresh_token"]).status_code == 400
    for pair in (first, second, third):
        assert not opens(pair["access_token"])
        assert refresh(pair["refresh_token"]).status_code == 400
    answer = Client().get(
        "/_allauth/app/v1/auth/session", headers={"x-session-token": first["session_token"]}
    )
    assert answer.status_code == 410
    assert not Session.objects.exists()
    assert not UserSession.objects.filter(user=alice).exists()  # and it's gone from the list of devices


def test_a_reused_refresh_token_leaves_other_sign_ins_alone(alice: User, bob: User):
    stolen, other, bobs = sign_in(alice), sign_in(alice), sign_in(bob)
    refresh(stolen["refresh_token"])
    assert refresh(stolen["refresh_token"]).status_code == 400
    assert not opens(stolen["access_token"])
    for pair in (other, bobs):
        assert opens(pair["access_token"])
        assert refresh(pair["refresh_token"]).status_code == 200


def test_a_forged_refresh_token_revokes_nothing(alice: User):
    pair = sign_in(alice)
    head, payload, signature = pair["refresh_token"].split(".")
    forged = f"{head}.{payload}.{signature[::-1]}"
    for token in (forged, pair["access_token"], "", "x"):
        assert refresh(token).status_code == 400
    assert opens(pair["access_token"])
    assert refresh(pair["refresh_token"]).status_code == 200


def test_concurrent_uses_of_one_refresh_token_get_one_pair(transactional_db: None):
    """Whichever comes second has reused a token, so neither the thief nor the owner goes on unnoticed."""

    def refresh_in_thread(token: str) -> int:
        try:
            return refresh(token).status_code
        finally:
            connections.close_all()

    pair = sign_in(make_user("alice", password=PASSWORD))
    with ThreadPoolExecutor(4) as pool:
        answers = sorted(pool.map(refresh_in_thread, [pair["refresh_token"]] * 4))
    assert answers == [200, 400, 400, 400]
    assert not opens(pair["access_token"])
