"""What every page promises a browser: a strict policy, kept by our own markup, and no copies left behind."""

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


class Offences(HTMLParser):
    """What the policy would block: inline code and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [f"<{tag} {name}>" for name in given if name == "style" or name.startswith("on")]
        self.found += [f"<{tag} {name}>" for name in given if name.startswith("hx-on")]
        if tag == "style":
            self.found.append("<style>")
        if tag == "script" and "src" not in given and given.get("type") != "application/json":
            self.found.append("<script> without src")
        for name in ("src", "href", "action"):
            value = given.get(name) or ""
            if value.startswith(("javascript:", "//", "http:")):
                self.found.append(f"<{tag} {name}={value}>")
        if given.get("id"):
            self.ids.append(str(given["id"]))


def policy_of(answer) -> dict[str, str]:
    parts = [part.strip().partition(" ") for part in answer.headers["Content-Security-Policy"].split(";")]
    return {name: value for name, _, value in parts}


def assert_safe(answer) -> None:
    assert policy_of(answer).items() >= POLICY.items()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "no-store" in answer.headers["Cache-Control"]
    assert answer.headers["X-Request-ID"].startswith("req_")
    seen = Offences(answer.content.decode())
    assert not seen.found
    assert len(seen.ids) == len(set(seen.ids)), "an id stands twice"


@pytest.mark.parametrize("address", VISITOR)
def test_visitor_pages_send_the_security_headers(db, page: Client, address: str):
    assert_safe(page.get(address))


@pytest.mark.parametrize("address", MEMBER)
def test_account_pages_send_the_security_headers(alice: User, page: Client, address: str):
    sign_in(page, alice)
    answer = page.get(address)
    if answer.status_code == 302:  # it asks for the password once more
        page.post("/accounts/reauthenticate/", {"password": "correct-horse-battery-9"})
        answer = page.get(address)
    assert answer.status_code == 200
    assert_safe(answer)


@pytest.mark.parametrize("address", STAFF)
def test_the_admin_has_the_same_content_security_policy(sam: User, page: Client, address: str):
    sign_in(page, sam)
    answer = page.get(address)
    assert answer.status_code == 200
    assert policy_of(answer).items() >= POLICY.items()


@pytest.mark.parametrize("address", STAFF)
def test_the_admin_is_for_staff_only(alice: User, page: Client, address: str):
    sign_in(page, alice)
    assert page.get(address).status_code in {302, 403}


def test_staff_cannot_make_anyone_a_superuser(sam: User, page: Client):
    helper = make_user("helper", is_staff=True, password=PASSWORD)
    helper.user_permissions.set(Permission.objects.filter(codename__in=["view_user", "change_user"]))
    sign_in(page, helper)
    wish = {"is_active": "on", "is_staff": "on", "is_superuser": "on"}
    page.post(f"/admin/accounts/user/{helper.pk}/change/", wish)
    helper.refresh_from_db()
    assert not helper.is_superuser
    assert page.post(f"/admin/accounts/user/{sam.pk}/change/", {}).status_code == 403
    sam.refresh_from_db()
    assert sam.is_active


def test_an_error_page_shows_the_request_id_and_no_details(db, page: Client, monkeypatch):
    def breaks(user: User) -> list[str]:
        raise RuntimeError("SELECT secret FROM settings")

    monkeypatch.setattr("accounts.views._rows", breaks)
    user = User.objects.create_user("kim@example.com")
    page.force_login(user)
    page.raise_request_exception = False
    answer = page.get("/account/")
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] in answer.content.decode()
    assert "SELECT" not in answer.content.decode()
    assert_safe(answer)


def test_an_unavailable_store_gets_503(db, page: Client, monkeypatch):
    from redis.exceptions import ConnectionError as RedisIsAway

    def is_away(*args: object, **kwargs: object) -> None:
        raise RedisIsAway("redis://:password@10.0.0.7:6379")

    monkeypatch.setattr("django.core.cache.cache.get", is_away)
    monkeypatch.setattr("django.core.cache.cache.add", is_away)
    answer = page.post("/accounts/login/", {"login": "kim@example.com", "password": "guess"})
    assert answer.status_code == 503
    assert "10.0.0.7" not in answer.content.decode()


def test_an_unknown_page_looks_like_another_users_page(db, page: Client):
    assert page.get("/jobs-of-bob/").content == page.get("/no-such-thing/").content


@pytest.mark.parametrize("address", ["/_allauth/app/v1/nothing", "/_allauth/nothing"])
def test_api_errors_are_json(db, page: Client, address: str):
    answer = page.get(address)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("address", ["/accounts/login/", "/accounts/password/reset/"])
def test_an_unknown_host_header_is_refused(db, page: Client, address: str):
    assert page.get(address, headers={"Host": "evil.example"}).status_code == 400


def test_forms_without_a_csrf_token_are_refused(alice: User):
    page = Client(enforce_csrf_checks=True)
    answer = page.post("/accounts/login/", {"login": alice.email, "password": "correct-horse-battery-9"})
    assert answer.status_code == 403
    assert "Reload the page" in answer.content.decode()


def test_static_files_are_compressed_and_cached(page: Client):
    answer = page.get("/static/css/app.css", headers={"Accept-Encoding": "gzip"})
    assert answer.status_code == 200
    assert answer.headers["Content-Encoding"] == "gzip"
    assert "max-age" in answer.headers["Cache-Control"]
    assert len(answer.content) < 40_000


def test_cookies_are_httponly_and_samesite(alice: User, page: Client):
    sign_in(page, alice)
    for name in ("session", "csrf"):
        assert page.cookies[name]["httponly"]
        assert page.cookies[name]["samesite"] == "Lax"


def test_all_middleware_is_async():
    """One middleware that is only sync would put the whole path, streams included, into threads."""
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
