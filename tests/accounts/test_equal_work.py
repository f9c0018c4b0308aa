"""Whether an address has an account cannot be told by the work that an answer takes.

Work is counted, not timed: hashing a password is nearly all of it, and a busy machine changes no count. `bin/bench
accounts` prints how long the answers take.
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
    """Argon2, as in use, and a count of how often it ran."""

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


def sign_in_by_program(email: str) -> None:
    body = {"email": email, "password": "wrong-horse-battery"}
    Client().post("/_allauth/app/v1/auth/login", body, content_type="application/json")


def reset(email: str) -> None:
    Client().post("/accounts/password/reset/", {"email": email})


def reset_by_program(email: str) -> None:
    Client().post("/_allauth/app/v1/auth/password/request", {"email": email}, content_type="application/json")


def sign_up(email: str) -> None:
    Client().post("/accounts/signup/", {"email": email, "password1": PASSWORD})


def sign_up_by_program(email: str) -> None:
    body = {"email": email, "password": PASSWORD}
    Client().post("/_allauth/app/v1/auth/signup", body, content_type="application/json")


def work_of(request_once: Callable[[str], None], email: str) -> Work:
    cache.clear()  # so that no limit answers instead
    hashes.clear()
    mails = len(mail.outbox)
    with CaptureQueriesContext(connection) as queries:
        request_once(email)
    return Work(hashes["argon2"], len(mail.outbox) - mails, len(queries))


@pytest.fixture
def known(db: None, settings: Any) -> str:
    settings.PASSWORD_HASHERS = [f"{__name__}.CountingHasher", *settings.PASSWORD_HASHERS[1:]]
    return make_user("kim", password=PASSWORD).email


@pytest.fixture
def mail_server(settings: Any) -> None:
    settings.EMAIL_URL = "smtp://mail.example.com"
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    settings.ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED = True


def both(request_once: Callable[[str], None], known: str) -> tuple[Work, Work]:
    """The work for a known and for an unknown address. The first request of all also fills caches of the process."""
    request_once("warm-up@example.com")
    return work_of(request_once, known), work_of(request_once, "nobody@example.com")


@pytest.mark.parametrize(
    ("request_once", "hashed", "mailed"),
    [(sign_in, 1, 0), (sign_in_by_program, 1, 0), (reset, 0, 1), (reset_by_program, 0, 1)],
)
def test_signing_in_and_resetting_do_equal_work_for_known_and_unknown_addresses(
    known: str, request_once: Callable[[str], None], hashed: int, mailed: int
):
    one, other = both(request_once, known)
    assert (one.hashes, one.mails) == (other.hashes, other.mails) == (hashed, mailed)
    assert abs(one.queries - other.queries) <= 1  # an unknown address is looked for in a second table


@pytest.mark.parametrize("request_once", [sign_up, sign_up_by_program])
def test_signing_up_does_equal_work_without_a_mail_server(known: str, request_once: Callable[[str], None]):
    one, other = both(request_once, known)
    assert (one.hashes, one.mails) == (other.hashes, other.mails) == (1, 0)
    assert one.queries == other.queries


@pytest.mark.parametrize("request_once", [sign_up, sign_up_by_program])
def test_signing_up_does_equal_work_with_a_mail_server(
    known: str, mail_server: None, request_once: Callable[[str], None]
):
    one, other = both(request_once, known)
    assert (one.hashes, one.mails) == (other.hashes, other.mails) == (1, 1)
    assert abs(one.queries - other.queries) <= 6  # short reads by a key
    assert User.objects.filter(email="nobody@example.com").exists()
