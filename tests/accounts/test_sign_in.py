"""Signing up, in and out on the pages."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from django.core import mail
from django.http import HttpResponse
from django.test import Client
from django.urls import reverse

from accounts.models import User
from tests.accounts.conftest import is_signed_in, sign_in
from tests.factories import PASSWORD, make_user

NEW_PASSWORD = "another-horse-battery-4"
CODE = re.compile(r"^([A-Z0-9]{3,}[-A-Z0-9]*)$", re.M)


def code_in_mail() -> str:
    match = CODE.search(mail.outbox[-1].body)
    assert match, mail.outbox[-1].body
    return match[1]


def change_address(page: Client, to: str) -> HttpResponse:
    """Requests the change and reauthenticates, as the page demands."""
    redirect = page.post("/accounts/email/", {"email": to, "action_add": ""})
    return page.post(redirect.headers["Location"], {"password": PASSWORD, "next": "/accounts/email/"})


def test_without_a_mail_server_signing_up_leads_to_the_sign_in_page(db, page: Client):
    response = page.post(
        "/accounts/signup/?next=/models/", {"email": "New@Example.com", "password1": PASSWORD}
    )
    assert response.headers["Location"] == "/accounts/login/?next=%2Fmodels%2F"
    assert "the password you chose" in page.get("/accounts/login/").content.decode()
    assert not is_signed_in(page)
    user = User.objects.get(email="new@example.com")
    assert user.owner_id.startswith("user-")
    assert user.password.startswith("argon2$")
    sign_in(page, user)
    assert is_signed_in(page)


def test_the_slug_in_model_ids_does_not_reveal_other_users(db):
    one, two = (User.objects.create_user(f"kim@{domain}.example", PASSWORD) for domain in ("one", "two"))
    assert re.fullmatch(r"kim-[0-9a-f]{6}", one.slug)
    assert re.fullmatch(r"kim-[0-9a-f]{6}", two.slug)
    assert one.slug != two.slug


def test_with_a_mail_server_an_address_is_verified_by_code(db, page: Client, mail_server):
    page.post("/accounts/signup/", {"email": "new@example.com", "password1": PASSWORD})
    assert not is_signed_in(page)
    page.post("/accounts/confirm-email/", {"code": code_in_mail()})
    assert is_signed_in(page)


def test_a_wrong_code_does_not_verify(db, page: Client, mail_server):
    page.post("/accounts/signup/", {"email": "new@example.com", "password1": PASSWORD})
    for _ in range(4):
        page.post("/accounts/confirm-email/", {"code": "AAA-AAA"})
    page.post("/accounts/confirm-email/", {"code": code_in_mail()})  # after three tries the code is invalid
    assert not is_signed_in(page)


@pytest.fixture(params=["mail server", "no mail server"])
def with_and_without_mail(request: pytest.FixtureRequest) -> None:
    if request.param == "mail server":
        request.getfixturevalue("mail_server")


def visible_parts(response: HttpResponse, email: str) -> tuple[int, str, dict[str, str], list[str]]:
    """Everything a client sees of a response, except what is random in every response."""
    headers = {
        name: value for name, value in response.headers.items() if name not in {"X-Request-ID", "Expires"}
    }
    body = re.sub(r'"session_token": "\w+"', "", response.content.decode().replace(email, "EMAIL"))
    return response.status_code, body, headers, sorted(response.cookies)


def sign_up_on_the_page(email: str) -> tuple[object, ...]:
    page = Client()
    response = page.post("/accounts/signup/", {"email": email, "password1": PASSWORD})
    text = page.get(response.headers["Location"]).content.decode().replace(email, "EMAIL")
    return visible_parts(response, email), re.sub(r'name="csrfmiddlewaretoken" value="\w+"', "", text)


def sign_up_by_api(email: str) -> tuple[object, ...]:
    body = {"email": email, "password": PASSWORD}
    response = Client().post("/_allauth/app/v1/auth/signup", body, content_type="application/json")
    return visible_parts(response, email)


@pytest.mark.usefixtures("with_and_without_mail")
@pytest.mark.parametrize("sign_up", [sign_up_on_the_page, sign_up_by_api])
def test_signing_up_does_not_reveal_who_has_an_account(
    alice: User, sign_up: Callable[[str], tuple[object, ...]]
):
    before = alice.password
    assert sign_up(alice.email) == sign_up("free@example.com")
    assert User.objects.count() == 2
    alice.refresh_from_db()
    assert alice.password == before


@pytest.mark.usefixtures("with_and_without_mail")
def test_a_weak_password_does_not_reveal_who_has_an_account(alice: User):
    def sign_up(email: str) -> tuple[object, ...]:
        body = {"email": email, "password": "short"}
        return visible_parts(
            Client().post("/_allauth/app/v1/auth/signup", body, content_type="application/json"), email
        )

    assert sign_up(alice.email) == sign_up("free@example.com")


@pytest.mark.usefixtures("with_and_without_mail")
def test_changing_the_address_does_not_reveal_who_has_an_account(alice: User, bob: User):
    def change_to(email: str) -> tuple[object, ...]:
        page = Client()
        sign_in(page, bob)
        response = change_address(page, email)
        assert mail.outbox[-1].to == [email]
        return visible_parts(response, email)

    assert change_to(alice.email) == change_to("free@example.com")


def test_sign_up_can_be_closed(db, page: Client, settings):
    settings.SIGNUP_OPEN = False
    page.post("/accounts/signup/", {"email": "new@example.com", "password1": PASSWORD})
    assert not User.objects.filter(email="new@example.com").exists()


@pytest.mark.parametrize("password", ["short", "password123", "1234567890"])
def test_weak_passwords_are_refused(db, page: Client, password: str):
    page.post("/accounts/signup/", {"email": "new@example.com", "password1": password})
    assert not User.objects.exists()


def test_signing_in_creates_a_new_session(alice: User, page: Client):
    page.get("/accounts/login/")
    page.session["before"] = 1
    before = page.session.session_key
    sign_in(page, alice)
    assert is_signed_in(page)
    assert page.session.session_key != before


def test_a_wrong_password_and_an_unknown_address_get_the_same_page(alice: User):
    def page_for(email: str) -> str:
        page = (
            Client()
            .post("/accounts/login/", {"login": email, "password": "wrong-horse-battery"})
            .content.decode()
        )
        return re.sub(r'value="[^"]*"', "", page.replace(email, ""))

    assert page_for(alice.email) == page_for("nobody@example.com")


def test_signing_out_ends_the_session_on_the_server(alice: User, page: Client):
    sign_in(page, alice)
    stolen = page.cookies["session"].value
    page.post("/accounts/logout/")
    thief = Client()
    thief.cookies["session"] = stolen
    assert not is_signed_in(thief)


def test_a_get_request_does_not_sign_out(alice: User, page: Client):
    sign_in(page, alice)
    page.get("/accounts/logout/")
    assert is_signed_in(page)


def test_a_deactivated_user_is_signed_out_at_once(alice: User, page: Client):
    sign_in(page, alice)
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert not is_signed_in(page)
    fresh = Client()
    sign_in(fresh, alice)
    assert not is_signed_in(fresh)


def test_changing_the_password_signs_out_every_other_device(alice: User, page: Client):
    other = Client()
    sign_in(page, alice)
    sign_in(other, alice)
    fields = {"oldpassword": PASSWORD, "password1": NEW_PASSWORD, "password2": NEW_PASSWORD}
    page.post("/accounts/password/change/", fields)
    assert is_signed_in(page)
    assert not is_signed_in(other)


def test_a_password_is_reset_with_an_emailed_code(alice: User, page: Client):
    page.post("/accounts/password/reset/", {"email": alice.email.upper()})
    assert mail.outbox[-1].to == [alice.email]
    choose = page.post(reverse("account_confirm_password_reset_code"), {"code": code_in_mail()})
    page.post(choose.headers["Location"], {"password1": NEW_PASSWORD, "password2": NEW_PASSWORD})
    fresh = Client()
    sign_in(fresh, alice, NEW_PASSWORD)
    assert is_signed_in(fresh)


def test_a_reset_for_an_unknown_address_looks_like_any_other(alice: User):
    known = Client().post("/accounts/password/reset/", {"email": alice.email})
    unknown = Client().post("/accounts/password/reset/", {"email": "nobody@example.com"})
    assert (known.status_code, known.headers["Location"]) == (
        unknown.status_code,
        unknown.headers["Location"],
    )


@pytest.mark.parametrize("lookalike", ["alıce@example.com", "ﬁona@example.com", " alice@example.com\u202e"])
def test_a_reset_code_is_never_sent_to_a_lookalike_address(db, lookalike: str, page: Client):
    addresses = {"alice@example.com", "fiona@example.com"}
    for address in addresses:
        User.objects.create_user(address, PASSWORD)
    page.post("/accounts/password/reset/", {"email": lookalike})
    to_others = [message for message in mail.outbox if not set(message.to) <= addresses]
    assert not [message for message in to_others if CODE.search(message.body)]


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"]
)
def test_signing_in_does_not_redirect_to_another_site(alice: User, page: Client, target: str):
    response = page.post("/accounts/login/", {"login": alice.email, "password": PASSWORD, "next": target})
    assert response.headers["Location"] == "/"


def test_signing_in_redirects_to_the_requested_page(db, page: Client):
    user = make_user("kim", password=PASSWORD)
    redirect = page.get("/account/")
    assert redirect.headers["Location"] == "/accounts/login/?next=/account/"
    response = page.post("/accounts/login/", {"login": user.email, "password": PASSWORD, "next": "/account/"})
    assert response.headers["Location"] == "/account/"
