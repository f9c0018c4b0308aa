"""The work of a request does not reveal whether an address has an account.

Work is counted, not timed: hashing a password is nearly all of it, and counts do not depend on how busy the machine is.
`bin/bench accounts` prints the response times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib.auth.hashers import Argon2PasswordHasher
from django.core import mail
from django.core.cache import cache
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from accounts.models import User
from tests.factories import PASSWORD, make_user

hashes: Counter[str] = Counter()


class CountingHasher(Argon2PasswordHasher):
    """Argon2 as in production, with a count of its calls."""

    def encode(self, *args: Any, **kwargs: Any) -> str:
        hashes["argon2"] += 1
        return super().encode(*args, **kwargs)

    def verify(self, *args: Any, **kwargs: Any) -> bool:
        hashes["argon2"] += 1
        return super().verify(*args, **kwargs)


@dataclass(frozen=True)
class Work:
    hashes: int
    mails: int
    queries: int


def sign_in(email: str) -> None:
    Client().post("/accounts/login/", {"login": email, "password": "wrong-horse-battery"})


def sign_in_by_api(email: str) -> None:
    body = {"email": email, "password": "wrong-horse-battery"}
    Client().post("/_allauth/app/v1/auth/login", body, content_type="application/json")


def reset(email: str) -> None:
    Client().post("/accounts/password/reset/", {"email": email})


def reset_by_api(email: str) -> None:
    Client().post("/_allauth/app/v1/auth/password/request", {"email": email}, content_type="application/json")


def sign_up(email: str) -> None:
    Client().post("/accounts/signup/", {"email": email, "password1": PASSWORD})


def sign_up_by_api(email: str) -> None:
    body = {"email": email, "password": PASSWORD}
    Client().post("/_allauth/app/v1/auth/signup", body, content_type="application/json")


def work_of(request_once: Callable[[str], None], email: str) -> Work:
    cache.clear()  # so that no rate limit applies
    hashes.clear()
    mails = len(mail.outbox)
    with CaptureQueriesContext(connection) as queries:
        request_once(email)
    return Work(hashes["argon2"], len(mail.outbox) - mails, len(queries))


@pytest.fixture
def known(db: None, settings: Any) -> str:
    settings.PASSWORD_HASHERS = [f"{__name__}.CountingHasher", *settings.PASSWORD_HASHERS[1:]]
    return make_user("kim", password=PASSWORD).email


def measure_both(request_once: Callable[[str], None], known: str) -> tuple[Work, Work]:
    """The work for a known and for an unknown address."""
    request_once("warm-up@example.com")  # the first request also fills caches of the process
    return work_of(request_once, known), work_of(request_once, "nobody@example.com")


@pytest.mark.parametrize(
    ("request_once", "hashed", "mailed"),
    [(sign_in, 1, 0), (sign_in_by_api, 1, 0), (reset, 0, 1), (reset_by_api, 0, 1)],
)
def test_signing_in_and_resetting_do_equal_work_for_known_and_unknown_addresses(
    known: str, request_once: Callable[[str], None], hashed: int, mailed: int
):
    known_work, unknown_work = measure_both(request_once, known)
    assert (
        (known_work.hashes, known_work.mails) == (unknown_work.hashes, unknown_work.mails) == (hashed, mailed)
    )
    # An unknown address is looked up in a second table.
    assert abs(known_work.queries - unknown_work.queries) <= 1


@pytest.mark.parametrize("request_once", [sign_up, sign_up_by_api])
def test_signing_up_does_equal_work_without_a_mail_server(known: str, request_once: Callable[[str], None]):
    known_work, unknown_work = measure_both(request_once, known)
    assert (known_work.hashes, known_work.mails) == (unknown_work.hashes, unknown_work.mails) == (1, 0)
    assert known_work.queries == unknown_work.queries


@pytest.mark.parametrize("request_once", [sign_up, sign_up_by_api])
def test_signing_up_does_equal_work_with_a_mail_server(
    known: str, mail_server: None, request_once: Callable[[str], None]
):
    known_work, unknown_work = measure_both(request_once, known)
    assert (known_work.hashes, known_work.mails) == (unknown_work.hashes, unknown_work.mails) == (1, 1)
    assert abs(known_work.queries - unknown_work.queries) <= 6  # cheap reads by key
    assert User.objects.filter(email="nobody@example.com").exists()
