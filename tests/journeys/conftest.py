"""People with their browsers, over the real stores. Pages are asked with Django's test client."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from tests import services
from tests.conftest import Studio


@pytest.fixture(autouse=True)
def over_real_stores(stores: None) -> None:
    """Every page here reads DynamoDB."""


def make_person(name: str, **fields: Any) -> User:
    """Without a password: nobody types one here, and hashing it takes longer than most of these tests."""
    return User.objects.create_user(email=f"{name}-{secrets.token_hex(4)}@example.com", **fields)


@pytest.fixture
def alice(db: None) -> User:
    return make_person("alice")


@pytest.fixture
def bob(db: None) -> User:
    return make_person("bob")


@pytest.fixture
def sam(db: None) -> User:
    return make_person("sam", is_staff=True, is_superuser=True)


def browser_of(user: User) -> Client:
    client = Client()
    client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


@pytest.fixture
def alices(alice: User) -> Client:
    """Alice's browser."""
    return browser_of(alice)


@pytest.fixture
def bobs(bob: User) -> Client:
    return browser_of(bob)


@pytest.fixture
def sams(sam: User) -> Client:
    return browser_of(sam)


@pytest.fixture
def start_web(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a web process of the test's own with these settings, and returns its port."""
    studios = []

    def start(**environment: str) -> int:
        port = services.free_port()
        studio = Studio(f"http://localhost:{port}", tmp_path, environment=environment)
        studios.append(studio)
        studio.start_web()
        return port

    yield start
    for studio in studios:
        studio.stop()
