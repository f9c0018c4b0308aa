"""Every page has a strict content security policy that its own markup follows, security headers, and no-store."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from django.contrib.auth.models import Permission
from django.test import Client

from accounts import api_keys
from accounts.models import User
from tests.accounts.conftest import sign_in
from tests.factories import PASSWORD, make_user

VISITOR = ["/accounts/login/", "/accounts/signup/", "/accounts/password/reset/", "/nowhere"]
MEMBER = [
    "/account/",
    "/account/keys/",
    "/accounts/email/",
    "/accounts/password/change/",
    "/accounts/2fa/",
    "/accounts/sessions/",
    "/accounts/logout/",
    "/accounts/reauthenticate/",
    "/accounts/2fa/totp/activate/",
    "/accounts/2fa/webauthn/add/",
    "/accounts/2fa/webauthn/",
    "/account/delete/",
    "/accounts/3rdparty/",
]
STAFF = ["/admin/", "/admin/accounts/user/", "/admin/accounts/apikey/"]
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "font-src": "'self'",
    "form-action": "'self' https://accounts.google.com",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
}


class MarkupCheck(HTMLParser):
    """Collects what the policy would block: inline code and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.violations: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.violations += [
            f"<{tag} {name}>" for name in attributes if name == "style" or name.startswith("on")
        ]
        self.violations += [f"<{tag} {name}>" for name in attributes if name.startswith("hx-on")]
        if tag == "style":
            self.violations.append("<style>")
        if tag == "script" and "src" not in attributes and attributes.get("type") != "application/json":
            self.violations.append("<script> without src")
        for name in ("src", "href", "action"):
            value = attributes.get(name) or ""
            if value.startswith(("javascript:", "//", "http:")):
                self.violations.append(f"<{tag} {name}={value}>")
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))


def policy_of(response) -> dict[str, str]:
    parts = [part.strip().partition(" ") for part in response.headers["Content-Security-Policy"].split(";")]
    return {name: value for name, _, value in parts}


def assert_security_headers(response) -> None:
    assert policy_of(response).items() >= POLICY.items()
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "no-store" in response.headers["Cache-Control"]
    assert response.headers["X-Request-ID"].startswith("req_")
    check = MarkupCheck(response.content.decode())
    assert not check.violations
    assert len(check.ids) == len(set(check.ids)), "duplicate id"


@pytest.mark.parametrize("address", VISITOR)
def test_visitor_pages_send_the_security_headers(db, page: Client, address: str):
    assert_security_headers(page.get(address))


@pytest.mark.parametrize("address", MEMBER)
def test_account_pages_send_the_security_headers(alice: User, page: Client, address: str):
    sign_in(page, alice)
    response = page.get(address)
    if response.status_code == 302:  # it requires reauthentication
        page.post("/accounts/reauthenticate/", {"password": "correct-horse-battery-9"})
        response = page.get(address)
    assert response.status_code == 200
    assert_security_headers(response)


@pytest.mark.parametrize("address", STAFF)
def test_the_admin_has_the_same_content_security_policy(sam: User, page: Client, address: str):
    sign_in(page, sam)
    response = page.get(address)
    assert response.status_code == 200
    assert policy_of(response).items() >= POLICY.items()


@pytest.mark.parametrize("address", STAFF)
def test_the_admin_is_for_staff_only(alice: User, page: Client, address: str):
    sign_in(page, alice)
    assert page.get(address).status_code in {302, 403}


def test_staff_cannot_make_anyone_a_superuser(sam: User, page: Client):
    helper = make_user("helper", is_staff=True, password=PASSWORD)
    helper.user_permissions.set(Permission.objects.filter(codename__in=["view_user", "change_user"]))
    sign_in(page, helper)
    fields = {"is_active": "on", "is_staff": "on", "is_superuser": "on"}
    page.post(f"/admin/accounts/user/{helper.pk}/change/", fields)
    helper.refresh_from_db()
    assert not helper.is_superuser
    assert page.post(f"/admin/accounts/user/{sam.pk}/change/", {}).status_code == 403
    sam.refresh_from_db()
    assert sam.is_active


def test_an_error_page_shows_the_request_id_and_no_details(db, page: Client, monkeypatch):
    def fail(user: User) -> list[str]:
        raise RuntimeError("SELECT secret FROM settings")

    monkeypatch.setattr("accounts.views._rows", fail)
    user = User.objects.create_user("kim@example.com")
    page.force_login(user)
    page.raise_request_exception = False
    response = page.get("/account/")
    assert response.status_code == 500
    assert response.headers["X-Request-ID"] in response.content.decode()
    assert "SELECT" not in response.content.decode()
    assert_security_headers(response)


def test_an_unavailable_store_gets_503(db, page: Client, monkeypatch):
    from redis.exceptions import ConnectionError as RedisConnectionError

    def fail(*args: object, **kwargs: object) -> None:
        raise RedisConnectionError("redis://:password@10.0.0.7:6379")

    monkeypatch.setattr("django.core.cache.cache.get", fail)
    monkeypatch.setattr("django.core.cache.cache.add", fail)
    response = page.post("/accounts/login/", {"login": "kim@example.com", "password": "guess"})
    assert response.status_code == 503
    assert "10.0.0.7" not in response.content.decode()


def test_an_unknown_page_looks_like_another_users_page(db, page: Client):
    assert page.get("/jobs-of-bob/").content == page.get("/no-such-thing/").content


@pytest.mark.parametrize("address", ["/_allauth/app/v1/nothing", "/_allauth/nothing"])
def test_api_errors_are_json(db, page: Client, address: str):
    response = page.get(address)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("address", ["/accounts/login/", "/accounts/password/reset/"])
def test_an_unknown_host_header_is_refused(db, page: Client, address: str):
    assert page.get(address, headers={"Host": "evil.example"}).status_code == 400


def test_forms_without_a_csrf_token_are_refused(alice: User):
    page = Client(enforce_csrf_checks=True)
    response = page.post("/accounts/login/", {"login": alice.email, "password": "correct-horse-battery-9"})
    assert response.status_code == 403
    assert "Reload the page" in response.content.decode()


def test_static_files_are_compressed_and_cached(page: Client):
    response = page.get("/static/css/app.css", headers={"Accept-Encoding": "gzip"})
    assert response.status_code == 200
    assert response.headers["Content-Encoding"] == "gzip"
    assert "max-age" in response.headers["Cache-Control"]
    assert len(response.content) < 40_000


def test_cookies_are_httponly_and_samesite(alice: User, page: Client):
    sign_in(page, alice)
    for name in ("session", "csrf"):
        assert page.cookies[name]["httponly"]
        assert page.cookies[name]["samesite"] == "Lax"


def test_all_middleware_is_async():
    """One sync-only middleware would move every request, including the event streams, into threads."""
    from django.conf import settings
    from django.utils.module_loading import import_string

    assert all(import_string(name).async_capable for name in settings.MIDDLEWARE)


def test_staff_can_revoke_a_key_but_not_restore_it(alice: User, sam: User):
    key, secret = api_keys.create(alice, "stolen", ["read"])
    page = Client()
    sign_in(page, sam)
    page.post(
        "/admin/accounts/apikey/", {"action": "revoke", "_selected_action": [key.pk], "index": 0}, follow=True
    )
    assert api_keys.verify(secret) is None
    change = {"name": "x", "revoked_at_0": "", "revoked_at_1": "", "_save": "Save"}
    page.post(f"/admin/accounts/apikey/{key.pk}/change/", change, follow=True)
    assert api_keys.verify(secret) is None


def test_the_account_menu_leads_staff_to_oversight(alices: Client, sams: Client) -> None:
    menu = [(client, client.get("/account/").content.decode()) for client in (alices, sams)]
    for client, text in menu:
        assert '<a href="/account/">Account</a>' in text
        assert '<a href="/account/keys/">API keys</a>' in text
        assert ('<a href="/admin/">Oversight</a>' in text) == (client is sams)
