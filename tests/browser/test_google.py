"""Signing in with Google in a real browser, against a local OpenID Connect provider.

It has its own studio, because a process reads the addresses of the provider from the environment when it starts. The
browser also applies the form-action policy to the redirect after our form, which no test client would notice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests import services

pytestmark = pytest.mark.browser


def start(argv: list[str], url: str, **environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", *argv],
        cwd=services.ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=services._die_with_parent,
    )
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            assert process.poll() is None, f"{argv[0]} ended"
            time.sleep(0.1)
        else:
            return process
    raise RuntimeError(f"{argv[0]} does not respond at {url}")


@pytest.fixture(scope="module")
def studio_with_google(stores: None, django_db_setup: None) -> Iterator[str]:
    google, web = services.free_port(), services.free_port()
    issuer, url = f"http://localhost:{google}", f"http://localhost:{web}"
    endpoints = {
        "AUTHORIZE_URL": f"{issuer}/oauth2/authorize",
        "ACCESS_TOKEN_URL": f"{issuer}/oauth2/token",
        "ID_TOKEN_ISSUER": issuer,
    }
    processes = [
        start(["oidc_provider_mock", "--port", str(google)], issuer),
        start(
            ["llmtuner", "web"],
            f"{url}/healthz",
            WEB_PORT=str(web),
            DJANGO_SETTINGS_MODULE="tests.settings",
            PUBLIC_URL=url,
            GOOGLE_CLIENT_ID="llm-tuner",
            GOOGLE_CLIENT_SECRET="a-secret",
            GOOGLE_ENDPOINTS=",".join(f"{name}={value}" for name, value in endpoints.items()),
        ),
    ]
    requests.put(
        f"{issuer}/users/kim@example.com",
        json={"email": "kim@example.com", "email_verified": True},
        timeout=5,
    ).raise_for_status()
    yield url
    services.terminate(processes)


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
