"""Signing in with Google in a real browser, against a local OpenID Connect provider.

It has its own studio, because a process reads the addresses of the provider from the environment when it starts. The
browser also applies the form-action policy to the redirect after our form, which no test client would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests import services
from tests.conftest import Studio

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def studio_with_google(
    stores: None, django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("google")
    provider = services.openid_provider(folder).start()
    issuer, url = f"http://localhost:{provider.port}", f"http://localhost:{services.free_port()}"
    endpoints = {
        "AUTHORIZE_URL": f"{issuer}/oauth2/authorize",
        "ACCESS_TOKEN_URL": f"{issuer}/oauth2/token",
        "ID_TOKEN_ISSUER": issuer,
    }
    environment = {
        "PUBLIC_URL": url,
        "GOOGLE_CLIENT_ID": "llm-tuner",
        "GOOGLE_CLIENT_SECRET": "a-secret",
        "GOOGLE_ENDPOINTS": ",".join(f"{name}={value}" for name, value in endpoints.items()),
    }
    requests.put(
        f"{issuer}/users/kim@example.com",
        json={"email": "kim@example.com", "email_verified": True},
        timeout=5,
    ).raise_for_status()
    studio = Studio(url, folder, environment=environment)
    studio.start_web()
    yield url
    studio.stop()
    provider.kill()


def test_google_sign_in_works_in_a_browser(chromium: Any, studio_with_google: str, transactional_db: None):
    context = chromium.new_context(base_url=studio_with_google)
    context.set_default_timeout(60_000)
    page = context.new_page()
    console_errors: list[str] = []
    page.on(
        "console", lambda message: console_errors.append(message.text) if message.type == "error" else None
    )
    page.goto("/accounts/login/?next=/account/")
    page.get_by_role("button", name="Continue with Google").click()
    page.wait_for_url("**/oauth2/authorize**")
    page.locator("input[name=sub]").first.fill("kim@example.com")
    page.locator("input[name=sub]").first.press("Enter")
    page.wait_for_url(f"{studio_with_google}/**")
    assert page.get_by_role("link", name="Create account").count() == 0
    page.goto("/account/")
    assert page.locator("dd", has_text="kim@example.com").is_visible()
    # The provider's own page loads files from other sites, so only policy violations count.
    assert not [error for error in console_errors if "Content Security Policy" in error]
    context.close()
