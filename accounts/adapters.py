"""Where allauth asks us: who may sign up, and what Google must have vouched for."""

from __future__ import annotations

from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.models import SocialApp, SocialLogin
from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest
from django.shortcuts import redirect

from llmtuner import env


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.SIGNUP_OPEN)


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
            secret=env.text("GOOGLE_CLIENT_SECRET"),
            settings={
                "scope": ["openid", "email"],
                "auth_params": {"prompt": "select_account"},
                "oauth_pkce_enabled": True,
            },
        )
        return [app] if client_id in (None, app.client_id) else []

    def pre_social_login(self, request: HttpRequest, sociallogin: SocialLogin) -> None:
        """Only an address that Google has verified counts: anything else could be somebody else's."""
        if sociallogin.is_existing or any(address.verified for address in sociallogin.email_addresses):
            return
        messages.error(
            request, "Google has not verified that e-mail address, so we cannot sign you in with it."
        )
        raise ImmediateHttpResponse(redirect("account_login"))
