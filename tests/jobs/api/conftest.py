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


def make_person(name: str) -> Person:
    """The same owner in every test, so that what one trained another may use; only the SQL rows are made again."""
    from datetime import timedelta

    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model
    from django.utils import timezone

    from accounts import api_keys

    email, owner = f"{name}-api@example.com", f"user-API{name.upper()}"
    user = get_user_model().objects.create_user(email=email, owner_id=owner)
    EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
    every = ["read", "write", "inference"]
    _, key = api_keys.create(user, "all", every)
    _, reader = api_keys.create(user, "reader", ["read"])
    _, expired = api_keys.create(user, "expired", every, timezone.now() - timedelta(seconds=1))
    return Person(email, owner, user, key, reader, expired)


@pytest.fixture
def people(transactional_db: None) -> dict[str, Person]:
    """Committed, so that the web process sees them."""
    return {name: make_person(name) for name in ("alice", "bob")}


def client_of(url: str, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture
def client(web: Any, people: dict[str, Person]) -> Iterator[openai.OpenAI]:
    """Alice's."""
    with client_of(web.url, people["alice"].key) as opened:
        yield opened


@pytest.fixture
def bobs_client(web: Any, people: dict[str, Person]) -> Iterator[openai.OpenAI]:
    with client_of(web.url, people["bob"].key) as opened:
        yield opened


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
