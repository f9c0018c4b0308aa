"""A real Chromium before the real studio. Where there is none, these tests say that they were left out."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.factories import browser_of, make_user

# How htmx tells of a request that was under way when its page was left. One that failed has other words for it.
LEFT = ("htmx:afterRequest", "htmx:sendAbort")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def chromium(django_db_setup: None) -> Iterator[Any]:
    """For a module at a time: Playwright keeps an event loop running in this thread, which Django takes for async code."""
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


def until(page: Any, is_so: Callable[[], Any]) -> None:
    """Waits until it is so, while the page goes on."""
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console says that it should not: errors, also those of the content security policy."""
    return []


def is_complaint(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith(LEFT)


@pytest.fixture
def page(
    chromium: Any, web: Any, transactional_db: None, rate_limits: None, complaints: list[str]
) -> Iterator[Any]:
    context = chromium.new_context(base_url=web.url, accept_downloads=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.on("console", lambda m: complaints.append(m.text) if is_complaint(m) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert not complaints


@pytest.fixture
def owner(page: Any, web: Any) -> str:
    """Signed in as Alice, by the cookie of a session."""
    user = make_user("alice")
    cookie = browser_of(user).cookies["session"]
    page.context.add_cookies([{"name": "session", "value": cookie.value, "url": web.url}])
    return user.owner_id
