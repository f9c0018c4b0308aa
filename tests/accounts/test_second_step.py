"""Two-factor authentication with an authenticator app."""

from __future__ import annotations

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal import auth as totp
from django.test import Client

from accounts.models import User
from tests.accounts.conftest import is_signed_in, sign_in
from tests.factories import PASSWORD


@pytest.fixture
def secret(alice: User, page: Client) -> str:
    """The TOTP secret of Alice, who has set up her authenticator app on the pages."""
    sign_in(page, alice)
    page.get("/accounts/2fa/totp/activate/")
    page.post("/accounts/reauthenticate/", {"password": PASSWORD})
    secret = page.get("/accounts/2fa/totp/activate/").context["form"].secret
    page.post("/accounts/2fa/totp/activate/", {"code": code_of(secret)})
    assert Authenticator.objects.filter(user=alice, type=Authenticator.Type.TOTP).exists()
    return secret


def code_of(secret: str, later: int = 0) -> str:
    counter = next(totp.yield_hotp_counters_from_time()) + later
    return totp.format_hotp_value(totp.hotp_value(secret, counter))


def test_a_new_account_can_set_up_totp_without_a_mail_server(db, page: Client):
    page.post("/accounts/signup/", {"email": "new@example.com", "password1": PASSWORD})
    sign_in(page, User.objects.get(email="new@example.com"))  # without email, sign-up does not sign in
    page.get("/accounts/2fa/totp/activate/")
    page.post("/accounts/reauthenticate/", {"password": PASSWORD})
    assert page.get("/accounts/2fa/totp/activate/").context["form"].secret


def test_the_password_alone_no_longer_signs_in(alice: User, secret: str):
    fresh = Client()
    assert sign_in(fresh, alice).headers["Location"].startswith("/accounts/2fa/authenticate/")
    assert not is_signed_in(fresh)


def test_a_totp_code_completes_the_sign_in(alice: User, secret: str):
    from django.core.cache import cache

    cache.clear()  # the code used for the set-up counts as used
    fresh = Client()
    sign_in(fresh, alice)
    fresh.post("/accounts/2fa/authenticate/", {"code": code_of(secret)})
    assert is_signed_in(fresh)


def test_a_wrong_totp_code_does_not_sign_in(alice: User, secret: str):
    fresh = Client()
    sign_in(fresh, alice)
    fresh.post("/accounts/2fa/authenticate/", {"code": "000000"})
    assert not is_signed_in(fresh)


def test_a_recovery_code_works_once(alice: User, secret: str):
    codes = (
        Authenticator.objects.get(user=alice, type=Authenticator.Type.RECOVERY_CODES)
        .wrap()
        .get_unused_codes()
    )
    outcomes = []
    for _ in range(2):
        fresh = Client()
        sign_in(fresh, alice)
        fresh.post("/accounts/2fa/authenticate/", {"code": codes[0]})
        outcomes.append(is_signed_in(fresh))
    assert outcomes == [True, False]


def test_the_database_stores_no_plaintext_secret(alice: User, secret: str):
    stored = str(list(Authenticator.objects.filter(user=alice).values_list("data", flat=True)))
    assert secret not in stored
