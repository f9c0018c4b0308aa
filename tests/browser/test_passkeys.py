"""Passkeys in a real browser with a virtual authenticator: set-up, sign-in without a password, second factor, removal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from allauth.mfa.models import Authenticator

from tests.factories import PASSWORD, make_user

pytestmark = pytest.mark.browser

AUTHENTICATOR = {  # built into the device, with user verification such as a fingerprint
    "protocol": "ctap2",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserVerified": True,
    "automaticPresenceSimulation": True,
}


@pytest.fixture
def device(page: Any) -> Iterator[Any]:
    """A devtools session of the page, with a virtual authenticator."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("WebAuthn.enable")
    devtools.send("WebAuthn.addVirtualAuthenticator", {"options": AUTHENTICATOR})
    yield devtools
    devtools.detach()


@pytest.fixture
def alice(page: Any) -> Any:
    return make_user("alice", password=PASSWORD)


def sign_in(page: Any, user: Any) -> None:
    page.goto("/accounts/login/")
    page.fill("input[name=login]", user.email)
    page.fill("input[name=password]", PASSWORD)
    page.click("main form button:has-text('Sign in')")


def add_passkey(page: Any, user: Any) -> None:
    sign_in(page, user)
    page.wait_for_url("**/jobs/")
    page.goto("/accounts/2fa/webauthn/add/")
    page.fill("input[name=password]", PASSWORD)  # required again before a change that could lock a user out
    page.click("main form button:has-text('Continue')")
    page.fill("input[name=name]", "My laptop")
    page.check("input[name=passwordless]")
    page.click("#mfa_webauthn_add")
    page.wait_for_url(lambda address: "/add/" not in address)
    assert Authenticator.objects.get(user=user, type=Authenticator.Type.WEBAUTHN)


def sign_out(page: Any) -> None:
    page.context.clear_cookies()


def test_a_passkey_signs_in_without_a_password(page: Any, alice: Any, device: Any) -> None:
    add_passkey(page, alice)
    page.goto("/accounts/2fa/webauthn/")
    assert page.get_by_text("My laptop").is_visible()
    sign_out(page)
    page.goto("/accounts/login/")
    page.click("#passkey_login")
    page.wait_for_url("**/jobs/")
    page.goto("/account/")
    assert alice.email in page.locator("main").inner_text()


def test_with_a_passkey_the_password_is_only_the_first_step(page: Any, alice: Any, device: Any) -> None:
    add_passkey(page, alice)
    sign_out(page)
    sign_in(page, alice)
    page.wait_for_url("**/accounts/2fa/authenticate/**")
    page.goto("/jobs/")
    assert "/jobs/" not in page.url.partition("?")[0]
    page.goto("/accounts/2fa/authenticate/")
    page.click("#mfa_webauthn_authenticate")
    page.wait_for_url("**/jobs/")


def test_a_removed_passkey_does_not_sign_in(
    page: Any, alice: Any, device: Any, console_errors: list[str]
) -> None:
    add_passkey(page, alice)
    page.goto("/accounts/2fa/webauthn/")
    page.click("text=Remove")
    page.click("main button:has-text('Remove')")
    page.wait_for_url("**/accounts/2fa/webauthn/")
    assert not Authenticator.objects.filter(user=alice, type=Authenticator.Type.WEBAUTHN).exists()
    sign_out(page)
    page.goto("/accounts/login/")
    with page.expect_navigation():  # the form is shown again with the error
        page.click("#passkey_login")
    page.goto("/jobs/")
    assert "/accounts/login/" in page.url
    console_errors.clear()  # the browser logs the response 400
