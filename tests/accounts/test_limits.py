"""Guessing passwords: at most 12 are checked within ten minutes, whatever client address a request claims."""

from __future__ import annotations

import pytest
from django.test import Client

from accounts.models import User
from tests.accounts.conftest import is_signed_in, sign_in
from tests.factories import PASSWORD, make_user

ALLOWED = 12


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Every password that was compared with a user's password."""
    passwords: list[str] = []
    check_password = User.check_password

    def record_and_check(self: User, raw: str) -> bool:
        passwords.append(raw)
        return check_password(self, raw)

    monkeypatch.setattr(User, "check_password", record_and_check)
    return passwords


def guess(page: Client, user: User, times: int, **headers: str) -> None:
    for i in range(times):
        sign_in(page, user, f"guess-{i}", **{name: value.format(i=i) for name, value in headers.items()})


def test_guesses_at_one_account_are_limited(alice: User, page: Client, checked: list[str]):
    guess(page, alice, 100)
    assert 0 < len(checked) <= ALLOWED


def test_the_right_password_is_also_refused_while_limited(alice: User, page: Client):
    guess(page, alice, 20)
    sign_in(page, alice)
    assert not is_signed_in(page)


def test_guesses_from_one_ip_address_at_many_accounts_are_limited(db, page: Client, checked: list[str]):
    for i in range(30):
        guess(page, make_user(f"user{i}", password=PASSWORD), 1)
    assert len(checked) <= ALLOWED


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "True-Client-IP", "X-Client-IP"]
)
def test_forged_forwarding_headers_do_not_evade_the_limit(
    alice: User, bob: User, page: Client, checked: list[str], header: str
):
    value = "for=203.0.113.{i}" if header == "Forwarded" else "203.0.113.{i}"
    for user in (alice, bob):
        guess(page, user, 25, **{header: value})
    assert len(checked) <= ALLOWED


def test_behind_a_proxy_only_the_address_it_added_counts(db, page: Client, settings, checked: list[str]):
    settings.ALLAUTH_TRUSTED_PROXY_COUNT = 1
    for i in range(30):  # everything before the last comma comes from the client
        guess(
            page,
            make_user(f"user{i}", password=PASSWORD),
            1,
            **{"X-Forwarded-For": f"203.0.113.{i}, 198.51.100.7"},
        )
    assert len(checked) <= ALLOWED


def test_requests_that_bypass_the_proxies_are_limited_too(db, page: Client, settings, checked: list[str]):
    settings.ALLAUTH_TRUSTED_PROXY_COUNT = 2
    for i in range(30):
        guess(page, make_user(f"user{i}", password=PASSWORD), 1, **{"X-Forwarded-For": f"203.0.113.{i}"})
    assert 0 < len(checked) <= ALLOWED


def test_the_admin_has_no_sign_in_of_its_own(sam: User, page: Client, checked: list[str]):
    assert page.get("/admin/login/").headers["Location"].startswith("/accounts/login/")
    for _ in range(30):
        page.post("/admin/login/", {"username": sam.email, "password": PASSWORD})
    assert not checked
    assert not is_signed_in(page)


def test_api_sign_ins_are_limited_too(alice: User, page: Client, checked: list[str]):
    for i in range(30):
        body = {"email": alice.email, "password": f"guess-{i}"}
        page.post("/_allauth/app/v1/auth/login", body, content_type="application/json")
    assert 0 < len(checked) <= ALLOWED


def test_password_reset_emails_are_limited(alice: User, page: Client):
    from django.core import mail

    for _ in range(12):
        page.post("/accounts/password/reset/", {"email": alice.email})
    assert len(mail.outbox) <= 5


def test_a_limited_request_gets_429_and_a_message(page: Client, db):
    for i in range(25):
        response = page.post("/accounts/password/reset/", {"email": f"nobody{i}@example.com"})
    assert response.status_code == 429
    assert "Too many attempts" in response.content.decode()


def test_a_running_server_ignores_forwarding_headers(web, transactional_db):
    import requests

    user = make_user("alice", password=PASSWORD)
    page = requests.Session()
    limited = set()
    for i in range(ALLOWED + 3):
        page.get(f"{web.url}/accounts/login/", timeout=10)
        fields = {"login": user.email, "password": f"guess-{i}", "csrfmiddlewaretoken": page.cookies["csrf"]}
        headers = {"X-Forwarded-For": f"203.0.113.{i}", "Referer": web.url}
        response = page.post(f"{web.url}/accounts/login/", fields, headers=headers, timeout=10)
        limited.add("too many" in response.text.lower())
    assert limited == {True, False}
