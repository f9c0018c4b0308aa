"""allauth's adapters. They decide who may sign up, what Google must have verified, and how often a refresh token is valid."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import secrets
from typing import Any, ClassVar

from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.app_settings import EmailVerificationMethod
from allauth.account.models import EmailAddress
from allauth.account.utils import passthrough_next_redirect_url
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.core.internal.httpkit import is_headless_request
from allauth.headless.base.response import AuthenticationResponse
from allauth.headless.tokens.strategies.jwt import JWTTokenStrategy, internal
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.models import Authenticator
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
    error_messages: ClassVar = {
        **DefaultAccountAdapter.error_messages,
        "account_inactive": "This account is inactive.",
        "email_password_mismatch": "The email address or the password is incorrect.",
        "enter_current_password": "Enter your current password.",
        "rate_limited": "Too many requests. Wait a few minutes, then try again.",
        "too_many_login_attempts": "Too many failed attempts. Wait a few minutes, then try again.",
    }

    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.SIGNUP_OPEN)

    def clean_email(self, email: str) -> str:
        """Refuses addresses that no mail server accepts, with invisible characters or an invalid domain."""
        email = str(super().clean_email(email))
        try:
            email.rpartition("@")[2].encode("idna")
        except UnicodeError as e:
            raise ValidationError("Enter a valid email address.") from e
        if not email.isprintable():
            raise ValidationError("Enter a valid email address.")
        return email

    def send_account_already_exists_mail(self, email: str) -> None:
        """Creates an account and rolls it back, so that sign-up takes just as long for an address that already has one."""
        with transaction.atomic():
            user = User.objects.create_user(f"{secrets.token_hex(8)}@invalid", secrets.token_hex(8))
            EmailAddress.objects.create(user=user, email=user.email)
            transaction.set_rollback(True)
        super().send_account_already_exists_mail(email)

    def save_user(
        self, request: HttpRequest, user: User, form: BaseForm, commit: bool = True
    ) -> AbstractBaseUser:
        """Creates the account. The database refuses a second account with the same address. If no email is sent, the response
        is nevertheless the same as for a success, and the same work was done up to that point."""
        try:
            with transaction.atomic():
                return super().save_user(request, user, form, commit)
        except IntegrityError as e:
            if not User.objects.filter(email=user.email).exists():
                raise
            raise ImmediateHttpResponse(self._respond_signed_up(request)) from e

    def pre_login(self, request: HttpRequest, user: AbstractBaseUser, **login: Any) -> HttpResponse | None:
        """Signing up does not sign the user in unless the address was verified by email, because that would reveal that it had
        no account. Google's users are signed in, because Google has verified them."""
        unverified = login["email_verification"] == EmailVerificationMethod.NONE
        if login["signup"] and unverified and "sociallogin" not in (login["signal_kwargs"] or {}):
            return self._respond_signed_up(request)
        return super().pre_login(request, user, **login)

    def _respond_signed_up(self, request: HttpRequest) -> HttpResponse:
        # allauth leaves an empty password only for a new account.
        request.session.pop("account_verified_email", None)
        if is_headless_request(request):
            # allauth responds with 401 and lists sign-in among the next steps.
            return AuthenticationResponse(request)
        messages.info(
            request,
            "You can now sign in with your email address and the password you chose. "
            "If there was already an account with this address, its password has not changed.",
        )
        response = redirect(passthrough_next_redirect_url(request, resolve_url("account_login"), "next"))
        # The view does this only for a new account, because otherwise save_user raises before it.
        add_never_cache_headers(response)
        return response

    def get_client_ip(self, request: HttpRequest) -> str:
        """A client that bypassed the proxies, with a forged header or none, is identified by its connection's address."""
        try:
            return str(super().get_client_ip(request))
        except (ImproperlyConfigured, PermissionDenied):
            return str(request.META.get("REMOTE_ADDR") or "0.0.0.0")  # noqa: S104  means "unknown"; nothing is bound


class TokenStrategy(JWTTokenStrategy):
    def refresh_token(self, refresh_token: str) -> tuple[str, str] | None:
        """The next access and refresh tokens. If a refresh token is used twice, its session ends, and with it all tokens of that
        sign-in: the token was copied, and we cannot tell whether the thief or the owner used it first (RFC 9700, 4.14.2)."""
        payload = internal.decode_token(refresh_token, "refresh")  # signed by us and not expired, or None
        session = internal.get_token_session(payload) if payload else None
        if payload is None or session is None:
            return None
        key = session.session_key
        with transaction.atomic():
            # One at a time: of two requests with the same token, the second must see that the token is used.
            Session.objects.select_for_update().filter(session_key=key).first()
            tokens: tuple[str, str] | None = super().refresh_token(refresh_token)
            if tokens is None:
                log.warning("user %s: a refresh token was reused; its session is revoked", payload["sub"])
                UserSession.objects.filter(session_key=key).delete()
                Session.objects.filter(session_key=key).delete()
        return tokens


class MFAAdapter(DefaultMFAAdapter):
    """Encrypts the secrets of second factors, so that the database alone does not reveal them."""

    def encrypt(self, text: str) -> str:
        return _cipher().encrypt(text.encode()).decode()

    def generate_authenticator_name(self, user: AbstractBaseUser, type: Authenticator.Type) -> str:
        """What the form for a new passkey suggests: Passkey, Passkey 2, …"""
        number = Authenticator.objects.filter(user_id=user.pk, type=type).count() + 1
        return f"Passkey {number}" if number > 1 else "Passkey"

    def decrypt(self, encrypted_text: str) -> str:
        return _cipher().decrypt(encrypted_text.encode()).decode()


def _cipher() -> MultiFernet:
    """The keys, derived from SECRET_KEY and its fallbacks. Old keys can still decrypt what they encrypted."""
    keys = [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]
    digests = [hashlib.sha256(b"second factors:" + key.encode()).digest() for key in keys]
    return MultiFernet([Fernet(base64.urlsafe_b64encode(digest)) for digest in digests])


class SocialAccountAdapter(DefaultSocialAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest, sociallogin: SocialLogin) -> bool:
        return bool(settings.SIGNUP_OPEN)

    def list_apps(
        self, request: HttpRequest, provider: str | None = None, client_id: str | None = None
    ) -> list[Any]:
        """Google, as configured by the environment; nothing is stored in the database."""
        if not settings.GOOGLE_CLIENT_ID or provider not in (None, "google"):
            return []
        app = SocialApp(
            provider="google",
            name="Google",
            client_id=settings.GOOGLE_CLIENT_ID,
            secret=os.environ.get("GOOGLE_CLIENT_SECRET", "").strip(),  # kept out of the settings
            settings={
                "scope": ["openid", "email"],
                "auth_params": {"prompt": "select_account"},
                "oauth_pkce_enabled": True,
            },
        )
        return [app] if client_id in (None, app.client_id) else []

    def get_app(self, request: HttpRequest, provider: str, client_id: str | None = None) -> SocialApp:
        """Pages of a provider that is not configured do not exist."""
        try:
            return super().get_app(request, provider, client_id)
        except SocialApp.DoesNotExist as e:
            raise Http404 from e

    def pre_social_login(self, request: HttpRequest, sociallogin: SocialLogin) -> None:
        """Only accepts addresses that Google has verified: any other could be someone else's."""
        if sociallogin.is_existing:
            return
        if not any(address.verified for address in sociallogin.email_addresses):
            messages.error(
                request, "Google has not verified this email address, so you cannot sign in with it."
            )
            raise ImmediateHttpResponse(redirect("account_login"))
        emails = [address.email.lower() for address in sociallogin.email_addresses]
        if request.user.is_anonymous and User.objects.filter(email__in=emails).exists():
            # The address may not belong to the person who created the account, so the account's password is required.
            messages.error(
                request,
                "There is already an account with this address. Sign in with its password, or reset it. "
                "Then you can connect Google on your account page.",
            )
            raise ImmediateHttpResponse(redirect("account_login"))
