"""What the frame around every page needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django import forms, template
from django.conf import settings
from django.forms import BoundField
from django.urls import NoReverseMatch, reverse
from django.utils.safestring import SafeString

register = template.Library()

ACCOUNT_PAGES = {
    "accounts:overview": "Overview",
    "account_email": "Email",
    "account_change_password": "Password",
    "mfa_index": "Two-step sign-in",
    "socialaccount_connections": "Google",
    "usersessions_list": "Devices",
    "jobs:notifications": "Notifications",
}
PAGES = {
    "jobs:jobs": "Jobs",
    "jobs:datasets": "Datasets",
    "jobs:models": "Models",
    "jobs:playground": "Playground",
    "accounts:api_keys": "API",
}


@dataclass(frozen=True)
class Link:
    href: str
    label: str
    current: bool


def links_to(pages: dict[str, str], here: str) -> list[Link]:
    """Links to the pages that exist. The one we are on, or the closest one above it, is marked."""
    found = {}
    for name, label in pages.items():
        try:
            found[reverse(name)] = label
        except NoReverseMatch:
            continue
    above = max((href for href in found if here.startswith(href)), key=len, default=None)
    return [Link(href, label, href == above) for href, label in found.items()]


def _path(context: dict[str, Any]) -> str:
    request = context.get("request")
    return request.path if request else ""


@register.simple_tag(takes_context=True)
def main_nav(context: dict[str, Any]) -> list[Link]:
    return links_to(PAGES, _path(context))


@register.simple_tag(takes_context=True)
def account_nav(context: dict[str, Any]) -> list[Link]:
    pages = dict(ACCOUNT_PAGES)
    if not settings.GOOGLE_CLIENT_ID:
        del pages["socialaccount_connections"]
    return links_to(pages, _path(context))


@register.filter
def styled(field: BoundField) -> SafeString:
    """A form field's control with the classes of our look."""
    kind = getattr(field.field.widget, "input_type", "")
    name = {"select": "select", "checkbox": "checkbox checkbox-sm checkbox-primary"}.get(kind, "input w-full")
    if isinstance(field.field.widget, forms.Textarea):
        name = "textarea w-full"
    classes = f"{name} {field.field.widget.attrs.get('class', '')}".strip()
    # Placeholders repeat the label and vanish when one types: the label alone is better.
    return field.as_widget(
        attrs={"class": classes, "placeholder": ""} | ({"aria-invalid": "true"} if field.errors else {})
    )


BROWSERS = {"Edg/": "Edge", "OPR/": "Opera", "Firefox/": "Firefox", "Chrome/": "Chrome", "Safari/": "Safari"}
SYSTEMS = {
    "iPhone": "iPhone",
    "iPad": "iPad",
    "Android": "Android",
    "Windows": "Windows",
    "Mac OS X": "macOS",
    "CrOS": "ChromeOS",
    "Linux": "Linux",
}


@register.filter
def browser(user_agent: str) -> str:
    """`Firefox on Linux`: enough to know one's own device again."""
    name = next((name for mark, name in BROWSERS.items() if mark in user_agent), "")
    system = next((system for mark, system in SYSTEMS.items() if mark in user_agent), "")
    return (
        " on ".join(part for part in (name, system) if part) or user_agent.split("/")[0][:40] or "A program"
    )
