"""Whether an address has an account cannot be told by how long an answer takes.

Processor time is compared (hashing a password is nearly all of it), so a busy machine does not matter, and the median of
pairs, so a stray one does not either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core import mail
from django.core.cache import cache
from django.test import Client

from accounts.models import User
from tests.factories import PASSWORD, make_user

PAIRS = 9
MOST_MS = 10.0


def milliseconds(ask: Callable[[str], Any], email: str) -> float:
    cache.clear()  # so that no limit answers instead
    began = time.process_time()
    ask(email)
    return (time.process_time() - began) * 1000


def difference(ask: Callable[[str], Any], known: list[str]) -> float:
    """Median of known less unknown, taken in turns."""
    ask(known[0])
    ask("warm-up@example.com")
    return statistics.median(
        milliseconds(ask, email) - milliseconds(ask, f"nobody-{i}@example.com")
        for i, email in enumerate(known)
    )


@pytest.fixture
def known(db: None) -> list[str]:
    return [make_user("kim").email for _ in range(PAIRS)]


def sign_in(email: str) -> None:
    Client().post("/accounts/login/", {"login": email, "password": "wrong-horse-battery"})


def token(email: str) -> None:
    body = {"email": email, "password": "wrong-horse-battery"}
    Client().post("/_allauth/app/v1/auth/login", body, content_type="application/json")


def reset(email: str) -> None:
    Client().post("/accounts/password/reset/", {"email": email})


def sign_up(email: str) -> None:
    Client().post("/accounts/signup/", {"email": email, "password1": PASSWORD})


@pytest.mark.parametrize("ask", [sign_in, token, reset])
def test_known_and_unknown_take_the_same_time(known: list[str], ask: Callable[[str], Any]):
    assert abs(difference(ask, known)) <= MOST_MS


def test_signing_up_takes_the_same_time(known: list[str], settings):
    settings.EMAIL_URL = "smtp://mail.example.com"
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    settings.ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED = True
    assert abs(difference(sign_up, known)) <= MOST_MS
    assert len(mail.outbox) >= 2 * PAIRS
    assert User.objects.filter(email__startswith="nobody-").count() == PAIRS
