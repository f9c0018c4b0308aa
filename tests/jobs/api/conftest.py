"""A running server, its users with their API keys, and the official client with only its address and key changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import openai
import pytest


@dataclass(frozen=True)
class ApiUser:
    email: str
    owner: str
    user: Any
    key: str  # has every scope
    reader: str  # may only read
    expired: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def make_api_user(name: str) -> ApiUser:
    """Each name has the same owner ID in every test, so that tests share trained models; only the SQL rows are new."""
    from datetime import timedelta

    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model
    from django.utils import timezone

    from accounts import api_keys

    email, owner = f"{name}-api@example.com", f"user-API{name.upper()}"
    user = get_user_model().objects.create_user(email=email, owner_id=owner)
    EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
    scopes = ["read", "write", "inference"]
    _, key = api_keys.create(user, "all", scopes)
    _, reader = api_keys.create(user, "reader", ["read"])
    _, expired = api_keys.create(user, "expired", scopes, timezone.now() - timedelta(seconds=1))
    return ApiUser(email, owner, user, key, reader, expired)


def make_session(user: Any) -> Any:
    """A stored session of a signed-in user."""
    from django.conf import settings
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY

    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    return session


@pytest.fixture
def users(transactional_db: None, rate_limits: None) -> dict[str, ApiUser]:
    """Committed, so that the web process sees them. None of their requests counts toward the next test's limit."""
    return {name: make_api_user(name) for name in ("alice", "bob")}


def put_model(user: ApiUser, name: str, folder: Path, trained_on: str = "chat") -> str:
    """Stores an exported folder as the user's model. Returns its ID."""
    from jobs.store import blobs, tables
    from jobs.store.tables import TunedModel

    row = TunedModel(user.owner, f"ft:starter:{name}::12345678", name=name, base="starter", method="full")
    row.trained_on, row.prefix, row.files = trained_on, f"models/{name}", []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        blobs.put_file(f"{row.prefix}/{path.name}", [content])
        sha256 = hashlib.sha256(content).hexdigest()
        row.files.append({"name": path.name, "bytes": len(content), "sha256": sha256})
    tables.put_new(row)
    return str(row.model_id)


def make_client(url: str, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture
def client(web: Any, users: dict[str, ApiUser]) -> Iterator[openai.OpenAI]:
    """Alice's client."""
    with make_client(web.url, users["alice"].key) as opened:
        yield opened


@pytest.fixture
def bob_client(web: Any, users: dict[str, ApiUser]) -> Iterator[openai.OpenAI]:
    with make_client(web.url, users["bob"].key) as opened:
        yield opened


@pytest.fixture(scope="module")
def web_with_inference(web: Any) -> Iterator[Any]:
    """The web process and one inference worker."""
    web.start_worker("inference")
    yield web
    web.stop("inference")


def training_rows(n: int = 24) -> bytes:
    """A small JSONL file of chats."""
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
