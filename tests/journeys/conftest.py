"""People with their browsers, over the real stores. Pages are asked with Django's test client."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from django.test import Client

from accounts.models import User


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
