"""Signing in with Google, against a local OpenID Connect provider."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import requests
from django.test import Client

from accounts.models import User
from tests import services
from tests.accounts.conftest import is_signed_in
from tests.factories import PASSWORD, make_user


@dataclass
class Google:
    """The provider, and what a user does there."""

    url: str

    def add_user(self, sub: str, email: str, *, verified: bool = True) -> None:
        requests.put(f"{self.url}/users/{sub}", json={"email": email, "email_verified": verified}, timeout=5)

    def agree(self, page: Client, sub: str) -> str:
        """Clicks our button, consents at the provider, and returns the callback URL that the provider redirects to."""
        redirect = page.post("/accounts/google/login/")
        assert redirect.status_code == 302
        assert redirect.headers["Location"].startswith(self.url)
        callback = requests.post(
            redirect.headers["Location"], data={"sub": sub}, allow_redirects=False, timeout=5
        )
        result = urlsplit(callback.headers["Location"])
        return f"{result.path}?{result.query}"


@pytest.fixture(scope="module")
def provider(folder: Path) -> Iterator[str]:
    service = services.openid_provider(folder).start()
    yield f"http://localhost:{service.port}"
    service.kill()


@pytest.fixture
def google(provider: str, settings, monkeypatch) -> Google:
    from allauth.socialaccount.providers.google.views import GoogleOAuth2Adapter

    settings.GOOGLE_CLIENT_ID = "llm-tuner"
    monkeypatch.setenv("GOOGLE_CLIENT_SECRET", "a-secret")
    # allauth reads these once, on import; a deployment sets them with GOOGLE_ENDPOINTS.
    monkeypatch.setattr(GoogleOAuth2Adapter, "authorize_url", f"{provider}/oauth2/authorize")
    monkeypatch.setattr(GoogleOAuth2Adapter, "access_token_url", f"{provider}/oauth2/token")
    monkeypatch.setattr("allauth.socialaccount.providers.google.views.ID_TOKEN_ISSUER", provider)
    return Google(provider)


def test_the_first_sign_in_creates_an_account(db, google: Google, page: Client):
    google.add_user("g-1", "new@example.com")
    page.get(google.agree(page, "g-1"))
    assert is_signed_in(page)
    assert User.objects.get(email="new@example.com").has_usable_password() is False


def test_signing_in_again_uses_the_same_account(db, google: Google, page: Client):
    google.add_user("g-2", "new@example.com")
    page.get(google.agree(page, "g-2"))
    again = Client()
    again.get(google.agree(again, "g-2"))
    assert is_signed_in(again)
    assert User.objects.count() == 1


def test_the_button_is_shown_only_when_google_is_configured(db, page: Client, settings):
    assert "Continue with Google" not in page.get("/accounts/login/").content.decode()
    settings.GOOGLE_CLIENT_ID = "llm-tuner"
    assert "Continue with Google" in page.get("/accounts/login/").content.decode()


def test_a_forged_state_does_not_sign_in(db, google: Google, page: Client):
    google.add_user("g-3", "new@example.com")
    callback = urlsplit(google.agree(page, "g-3"))
    query = {name: values[0] for name, values in parse_qs(callback.query).items()} | {"state": "forged"}
    page.get(f"{callback.path}?{urlencode(query)}")
    assert not is_signed_in(page)


def test_a_callback_meant_for_another_browser_does_not_sign_in(db, google: Google, page: Client):
    google.add_user("g-4", "attacker@example.com")
    callback = google.agree(Client(), "g-4")
    page.get(callback)
    assert not is_signed_in(page)


def test_an_authorization_code_works_once(db, google: Google, page: Client):
    google.add_user("g-5", "new@example.com")
    callback = google.agree(page, "g-5")
    page.get(callback)
    assert is_signed_in(page)
    page.post("/accounts/logout/")
    page.get(callback)
    assert not is_signed_in(page)


def test_an_unverified_email_address_does_not_sign_in(db, google: Google, page: Client):
    google.add_user("g-6", "new@example.com", verified=False)
    page.get(google.agree(page, "g-6"))
    assert not is_signed_in(page)
    assert not User.objects.exists()


@pytest.mark.parametrize("verified", [True, False])
def test_google_does_not_sign_in_to_a_local_account_with_the_same_address(
    db, google: Google, page: Client, verified: bool
):
    alice = make_user("alice", password=PASSWORD)
    google.add_user("g-7", alice.email, verified=verified)
    response = page.get(google.agree(page, "g-7"), follow=True)
    assert response.request["PATH_INFO"] == "/accounts/login/"
    message = "Sign in with its password" if verified else "has not verified"
    assert message in response.content.decode()
    assert not is_signed_in(page)
    assert User.objects.count() == 1
    # No form, where one could try other addresses.
    assert b"<form" not in page.get("/accounts/3rdparty/signup/").content


def test_denied_consent_shows_that_sign_in_was_cancelled(db, google: Google, page: Client):
    redirect = page.post("/accounts/google/login/")
    state = parse_qs(urlsplit(redirect.headers["Location"]).query)["state"][0]
    response = page.get(f"/accounts/google/login/callback/?error=access_denied&state={state}", follow=True)
    assert "Sign-in cancelled" in response.content.decode()
    assert not is_signed_in(page)


def test_the_authorization_request_uses_state_and_pkce(db, google: Google, page: Client):
    redirect = page.post("/accounts/google/login/")
    query = parse_qs(urlsplit(redirect.headers["Location"]).query)
    assert len(query["state"][0]) >= 16
    assert query["code_challenge_method"] == ["S256"]
    assert set(query["scope"][0].split()) == {"openid", "email"}


def test_a_get_request_does_not_start_the_sign_in(db, google: Google, page: Client):
    assert page.get("/accounts/google/login/").status_code == 200


def test_the_endpoints_can_be_set_by_environment_variable():
    code = (
        "import django; django.setup()\n"
        "from allauth.socialaccount.providers.google.views import AUTHORIZE_URL\n"
        "from llmtuner.middleware import _google_origin\n"
        "print(AUTHORIZE_URL, _google_origin())"
    )
    environment = os.environ | {"GOOGLE_ENDPOINTS": "AUTHORIZE_URL=http://localhost:9/oauth2/authorize"}
    environment["DJANGO_SETTINGS_MODULE"] = "llmtuner.settings"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=services.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["http://localhost:9/oauth2/authorize", "http://localhost:9"]
