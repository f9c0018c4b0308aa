"""Where allauth asks us: who may sign up, what Google must have vouched for, and how often a refresh token is good."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import secrets
from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.app_settings import EmailVerificationMethod
from allauth.account.models import EmailAddress
from allauth.account.utils import passthrough_next_redirect_url
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.core.internal.httpkit import is_headless_request
from allauth.headless.base.response import AuthenticationResponse
from allauth.headless.tokens.strategies.jwt import JWTTokenStrategy, internal
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.models import SocialApp, SocialLogin
from allauth.usersessions.models import UserSession
from cryptography.fernet import Fernet, MultiFernet
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.sessions.models import Session
from django.core.exceptions import ImproperlyConfigured, PermissionDenied, ValidationError
from django.db import IntegrityError, transaction
from django.forms import BaseForm
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, resolve_url
from django.utils.cache import add_never_cache_headers

from accounts.models import User

log = logging.getLogger(__name__)


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.SIGNUP_OPEN)

    def clean_email(self, email: str) -> str:
        """Refuses what no mail server takes: invisible characters, and domains that are none."""
        email = super().clean_email(email)
        try:
            email.rpartition("@")[2].encode("idna")
        except UnicodeError as e:
            raise ValidationError("That is no email address.") from e
        if not email.isprintable():
            raise ValidationError("That is no email address.")
        return email

    def send_account_already_exists_mail(self, email: str) -> None:
        """Does the work of making an account and drops it, so that sign-up takes as long for an address that has one."""
        with transaction.atomic():
            user = User.objects.create_user(f"{secrets.token_hex(8)}@invalid", secrets.token_hex(8))
            EmailAddress.objects.create(user=user, email=user.email)
            transaction.set_rollback(True)
        super().send_account_already_exists_mail(email)

    def save_user(
        self, request: HttpRequest, user: User, form: BaseForm, commit: bool = True
    ) -> AbstractBaseUser:
        """Makes the account. Where no mail is sent, the database's refusal of a second one with the same address is answered
        like success: until then, the same work was done."""
        try:
            with transaction.atomic():
                return super().save_user(request, user, form, commit)
        except IntegrityError as e:
            if not User.objects.filter(email=user.email).exists():
                raise
            raise ImmediateHttpResponse(self._respond_signed_up(request)) from e

    def pre_login(self, request: HttpRequest, user: AbstractBaseUser, **login: Any) -> HttpResponse | None:
        """Nobody is signed in by signing up without a code from a mail: it would tell that the address had no account.
        Google's users are, for Google knows them."""
        unverified = login["email_verification"] == EmailVerificationMethod.NONE
        if login["signup"] and unverified and "sociallogin" not in (login["signal_kwargs"] or {}):
            return self._respond_signed_up(request)
        return super().pre_login(request, user, **login)

    def _respond_signed_up(self, request: HttpRequest) -> HttpResponse:
        request.session.pop(
            "account_verified_email", None
        )  # allauth leaves it, empty, with a new account only
        if is_headless_request(request):
            return AuthenticationResponse(request)  # 401, and sign-in among what can be done next
        messages.info(
            request,
            "You can sign in now with your address and the password you chose. "
            "If there already was an account with this address, it keeps its old password.",
        )
        response = redirect(passthrough_next_redirect_url(request, resolve_url("account_login"), "next"))
        add_never_cache_headers(response)  # the view does so for a new account only: save_user raises past it
        return response

    def get_client_ip(self, request: HttpRequest) -> str:
        """Who came past the proxies, with a forged or no header, is known by the address of the connection."""
        try:
            return str(super().get_client_ip(request))
        except (ImproperlyConfigured, PermissionDenied):
            return str(request.META.get("REMOTE_ADDR") or "0.0.0.0")  # noqa: S104  a name for "unknown", nothing is bound


class TokenStrategy(JWTTokenStrategy):
    def refresh_token(self, refresh_token: str) -> tuple[str, str] | None:
        """The next access and refresh token. A refresh token that was used before ends its session, and with it all tokens
        of that sign-in: it was copied, and nobody can tell whether the thief or the owner came first (RFC 9700, 4.14.2)."""
        payload = internal.decode_token(refresh_token, "refresh")  # signed by us and not expired, or None
        session = internal.get_token_session(payload) if payload else None
        if payload is None or session is None:
            return None
        key = session.session_key
        with transaction.atomic():
            # One at a time: of two requests with the same token the second must see that it is used.
            Session.objects.select_for_update().filter(session_key=key).first()
            tokens = super().refresh_token(refresh_token)
            if tokens is None:
                log.warning(
                    "user %s: a used refresh token came again; its sign-in is revoked", payload["sub"]
                )
                UserSession.objects.filter(session_key=key).delete()
                Session.objects.filter(session_key=key).delete()
        return tokens


class MFAAdapter(DefaultMFAAdapter):
    """Second factors' secrets are useless to whoever reads only the database."""

    def encrypt(self, text: str) -> str:
        return _cipher().encrypt(text.encode()).decode()

    def decrypt(self, encrypted_text: str) -> str:
        return _cipher().decrypt(encrypted_text.encode()).decode()


def _cipher() -> MultiFernet:
    """Keys derived from SECRET_KEY; old ones still open what they closed."""
    keys = [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]
    digests = [hashlib.sha256(b"second factors:" + key.encode()).digest() for key in keys]
    return MultiFernet([Fernet(base64.urlsafe_b64encode(digest)) for digest in digests])


class SocialAccountAdapter(DefaultSocialAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest, sociallogin: SocialLogin) -> bool:
        return bool(settings.SIGNUP_OPEN)

    def list_apps(
        self, request: HttpRequest, provider: str | None = None, client_id: str | None = None
    ) -> list[Any]:
        """Google as the environment configures it; nothing is kept in the database."""
        if not settings.GOOGLE_CLIENT_ID or provider not in (None, "google"):
            return []
        app = SocialApp(
            provider="google",
            name="Google",
            client_id=settings.GOOGLE_CLIENT_ID,
            secret=os.environ.get("GOOGLE_CLIENT_SECRET", "").strip(),  # never among the settings
            settings={
                "scope": ["openid", "email"],
                "auth_params": {"prompt": "select_account"},
                "oauth_pkce_enabled": True,
            },
        )
        return [app] if client_id in (None, app.client_id) else []

    def get_app(self, request: HttpRequest, provider: str, client_id: str | None = None) -> SocialApp:
        """What is not configured is no page of ours."""
        try:
            return super().get_app(request, provider, client_id)
        except SocialApp.DoesNotExist as e:
            raise Http404 from e

    def pre_social_login(self, request: HttpRequest, sociallogin: SocialLogin) -> None:
        """Only an address that Google has verified counts: anything else could be somebody else's."""
        if sociallogin.is_existing:
            return
        if not any(address.verified for address in sociallogin.email_addresses):
            messages.error(
                request, "Google has not verified that e-mail address, so we cannot sign you in with it."
            )
            raise ImmediateHttpResponse(redirect("account_login"))
        emails = [address.email.lower() for address in sociallogin.email_addresses]
        if request.user.is_anonymous and User.objects.filter(email__in=emails).exists():
            # The account may be that of somebody who only claimed the address: it is not opened without its password.
            messages.error(
                request,
                "There is an account with this address already. Sign in with its password, or reset that first. "
                "Then you can connect Google on your account page.",
            )
            raise ImmediateHttpResponse(redirect("account_login"))
