"""The page where users create API keys: each is shown once, has a name and scopes, and can be revoked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from accounts import api_keys
from accounts.models import ApiKey


@pytest.fixture
def page(alice: Any) -> Client:
    client = Client()
    client.force_login(alice)
    return client


def test_a_key_is_shown_once_and_works(page: Client, alice: Any) -> None:
    response = page.post("/account/keys/", {"name": "nightly", "days": "90", "scopes": ["read", "inference"]})
    secret = re.search(rb"sk-llmt-[a-z0-9]{12}-[\w-]{43}", response.content)
    assert secret
    key = api_keys.verify(secret[0].decode())
    assert key
    assert (key.user, key.name, key.scopes) == (alice, "nightly", "read inference")
    assert key.expires_at
    assert secret[0] not in page.get("/account/keys/").content
    assert response.headers["Cache-Control"]


@pytest.mark.parametrize(
    "invalid",
    [
        {"name": ""},
        {"name": "x" * 81},
        {"scopes": []},
        {"scopes": ["admin"]},
        {"days": "7"},
        {"days": "-1"},
    ],
)
def test_an_invalid_form_creates_no_key(invalid: dict[str, Any], page: Client) -> None:
    response = page.post("/account/keys/", {"name": "k", "days": "30", "scopes": ["read"], **invalid})
    assert response.status_code == 400
    assert not ApiKey.objects.exists()


def test_a_revoked_key_stops_working_and_is_listed_as_revoked(page: Client, alice: Any) -> None:
    key, secret = api_keys.create(alice, "old", ["read"])
    assert api_keys.verify(secret)
    page.post(f"/account/keys/{key.pk}/revoke/")
    assert api_keys.verify(secret) is None
    assert b"revoked" in page.get("/account/keys/").content


def test_another_users_key_cannot_be_revoked(page: Client, bob: Any) -> None:
    key, secret = api_keys.create(bob, "bobs", ["read"])
    assert page.post(f"/account/keys/{key.pk}/revoke/").status_code == 404
    assert api_keys.verify(secret)


def test_a_stolen_database_contains_no_usable_key(alice: Any) -> None:
    key, secret = api_keys.create(alice, "k", ["read"])
    row = ApiKey.objects.values().get(pk=key.pk)
    assert secret.rpartition("-")[2] not in str(row)
    assert api_keys.verify(f"sk-llmt-{key.prefix}-{key.digest[:43]}") is None


def test_the_keys_of_a_deactivated_user_stop_working(alice: Any) -> None:
    _, secret = api_keys.create(alice, "k", ["read"])
    alice.is_active = False
    alice.save()
    assert api_keys.verify(secret) is None
