"""A real Chromium against the real studio. Without Chromium these tests are skipped."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.factories import browser_of, make_user

# What htmx logs for a request that was pending when its page was closed. Failed requests are logged differently.
ABORTED = ("htmx:afterRequest", "htmx:sendAbort")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def chromium(django_db_setup: None) -> Iterator[Any]:
    """For one module at a time: Playwright runs an event loop in this thread, which Django mistakes for async code."""
    if not CHROMIUM:
        pytest.skip(
            "Chromium is not installed, so the browser tests were left out. Debian: apt-get install chromium"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def wait_until(page: Any, condition: Callable[[], Any]) -> None:
    """Waits for the condition while the page keeps running."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


@pytest.fixture
def console_errors() -> list[str]:
    """Errors in the browser's console, including violations of the content security policy."""
    return []


def is_error(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith(ABORTED)


@pytest.fixture
def page(
    chromium: Any, web: Any, transactional_db: None, rate_limits: None, console_errors: list[str]
) -> Iterator[Any]:
    context = chromium.new_context(base_url=web.url, accept_downloads=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.on("console", lambda m: console_errors.append(m.text) if is_error(m) else None)
    page.on("pageerror", lambda error: console_errors.append(str(error)))
    yield page
    context.close()
    assert not console_errors


@pytest.fixture
def owner(page: Any, web: Any) -> str:
    """Signs the page in as Alice with a session cookie. Returns her owner ID."""
    user = make_user("alice")
    cookie = browser_of(user).cookies["session"]
    page.context.add_cookies([{"name": "session", "value": cookie.value, "url": web.url}])
    return user.owner_id
