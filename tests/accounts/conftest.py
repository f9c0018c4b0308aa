"""Sign-in is limited by counters in Redis, so each of these tests starts with none."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import get_resolver

from accounts.models import User
from tests.factories import PASSWORD, make_user


@pytest.fixture(scope="session", autouse=True)
def addresses() -> None:
    """Found before a test changes the settings that some of allauth's depend on."""
    assert get_resolver().url_patterns


@pytest.fixture(autouse=True)
def counters(rate_limits: None) -> None:
    """Every test of this folder starts with no attempt counted."""


@pytest.fixture
def page() -> Client:
    return Client()


def sign_in(page: Client, user: User, password: str = PASSWORD, **headers: str):
    return page.post("/accounts/login/", {"login": user.email, "password": password}, headers=headers)


def is_signed_in(page: Client) -> bool:
    return page.get("/account/").status_code == 200


@pytest.fixture
def alice(db: None) -> User:
    """Alice signs in by typing."""
    return make_user("alice", password=PASSWORD)


@pytest.fixture
def sam(db: None) -> User:
    return make_user("sam", password=PASSWORD, is_staff=True, is_superuser=True)


@pytest.fixture
def bob(db: None) -> User:
    return make_user("bob", password=PASSWORD)
