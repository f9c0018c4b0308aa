"""A running studio, its people with their keys, and the official client, pointed at it and otherwise unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest


@dataclass(frozen=True)
class Person:
    email: str
    owner: str
    user: Any
    key: str  # may do everything
    reader: str  # may only read
    expired: str


def _person(name: str) -> Person:
    """The same owner in every module, so that what one module trained another may use; the SQL rows are made again,
    because tests with `transactional_db` empty the tables."""
    from datetime import timedelta

    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model
    from django.utils import timezone

    from accounts import api_keys
    from tests.factories import PASSWORD

    email, owner = f"{name}-api@example.com", f"user-API{name.upper()}"
    users = get_user_model().objects
    user = users.filter(email=email).first() or users.create_user(
        email=email, password=PASSWORD, owner_id=owner
    )
    EmailAddress.objects.get_or_create(user=user, email=email, verified=True, primary=True)
    every = ["read", "write", "inference"]
    _, key = api_keys.create(user, "all", every)
    _, reader = api_keys.create(user, "reader", ["read"])
    _, expired = api_keys.create(user, "expired", every, timezone.now() - timedelta(seconds=1))
    return Person(email, owner, user, key, reader, expired)


@pytest.fixture(scope="module")
def people(django_db_setup: None, django_db_blocker: Any) -> Iterator[dict[str, Person]]:
    """Committed, so that the web process sees them; gone again at the module's end."""
    with django_db_blocker.unblock():
        found = {name: _person(name) for name in ("alice", "bob")}
    yield found
    with django_db_blocker.unblock():
        for person in found.values():
            person.user.delete()


def client_of(url: str, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="module")
def client(web: Any, people: dict[str, Person]) -> openai.OpenAI:
    return client_of(web.url, people["alice"].key)


@pytest.fixture(scope="module")
def bobs_client(web: Any, people: dict[str, Person]) -> openai.OpenAI:
    return client_of(web.url, people["bob"].key)


def rows(n: int = 24) -> bytes:
    words = ["red", "blue", "green", "black", "white", "brown"]
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"colour {i}?"},
                {"role": "assistant", "content": words[i % 6]},
            ]
        }
        for i in range(n)
    )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
