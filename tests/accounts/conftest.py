"""Sign-in attempts are counted in Redis, so each of these tests starts with cleared counters."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import get_resolver

from accounts.models import User
from tests.factories import PASSWORD, make_user


@pytest.fixture(scope="session", autouse=True)
def url_patterns() -> None:
    """Loads the URLs before a test changes the settings that some of allauth's depend on."""
    assert get_resolver().url_patterns


@pytest.fixture(autouse=True)
def no_attempts_counted(rate_limits: None) -> None:
    """Every test of this folder starts with cleared counters."""


@pytest.fixture
def mail_server(settings: Any) -> None:
    """Settings as with a mail server. Messages still stay in memory."""
    settings.EMAIL_URL = "smtp://mail.example.com"
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    settings.ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED = True


@pytest.fixture
def page() -> Client:
    return Client()


def sign_in(page: Client, user: User, password: str = PASSWORD, **headers: str):
    return page.post("/accounts/login/", {"login": user.email, "password": password}, headers=headers)


def is_signed_in(page: Client) -> bool:
    return page.get("/account/").status_code == 200


@pytest.fixture
def alice(db: None) -> User:
    """Alice signs in with a password."""
    return make_user("alice", password=PASSWORD)


@pytest.fixture
def sam(db: None) -> User:
    return make_user("sam", password=PASSWORD, is_staff=True, is_superuser=True)


@pytest.fixture
def bob(db: None) -> User:
    return make_user("bob", password=PASSWORD)
