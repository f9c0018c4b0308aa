"""The navigation around every page. It is in this package because it names the pages of both apps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django import template
from django.conf import settings
from django.urls import NoReverseMatch, reverse

register = template.Library()

MAIN_PAGES = {
    "jobs:jobs": "Jobs",
    "jobs:datasets": "Datasets",
    "jobs:models": "Models",
    "jobs:playground": "Playground",
    "accounts:api_keys": "API",
}
ACCOUNT_MENU = {
    "accounts:overview": "Account",
    "accounts:api_keys": "API keys",
    "admin:index": "Oversight",  # for staff
}
ACCOUNT_PAGES = {
    "accounts:overview": "Overview",
    "account_email": "Email",
    "account_change_password": "Password",
    "mfa_index": "Two-step sign-in",
    "socialaccount_connections": "Google",
    "usersessions_list": "Devices",
    "jobs:notifications": "Notifications",
}


@dataclass(frozen=True)
class Link:
    href: str
    label: str
    current: bool


@register.simple_tag(takes_context=True)
def main_nav(context: dict[str, Any]) -> list[Link]:
    return _links(MAIN_PAGES, _path(context))


@register.simple_tag(takes_context=True)
def account_menu(context: dict[str, Any]) -> list[Link]:
    pages = dict(ACCOUNT_MENU)
    if not context["user"].is_staff:
        del pages["admin:index"]
    return _links(pages, _path(context))


@register.simple_tag(takes_context=True)
def account_nav(context: dict[str, Any]) -> list[Link]:
    pages = dict(ACCOUNT_PAGES)
    if not settings.GOOGLE_CLIENT_ID:
        del pages["socialaccount_connections"]
    return _links(pages, _path(context))


def _links(pages: dict[str, str], path: str) -> list[Link]:
    """Links to the pages that exist. The current page, or else its closest ancestor, is marked as current."""
    labels = {}
    for name, label in pages.items():
        try:
            labels[reverse(name)] = label
        except NoReverseMatch:
            continue
    current = max((href for href in labels if path.startswith(href)), key=len, default=None)
    return [Link(href, label, href == current) for href, label in labels.items()]


def _path(context: dict[str, Any]) -> str:
    request = context.get("request")
    return str(request.path) if request else ""
