"""What the frame around every page needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django import template
from django.urls import NoReverseMatch, reverse

register = template.Library()

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


@register.simple_tag(takes_context=True)
def main_nav(context: dict[str, Any]) -> list[Link]:
    """The pages of the header, the one we are on (or below) marked."""
    request = context.get("request")
    here = request.path if request else ""
    links = []
    for name, label in PAGES.items():
        try:
            href = reverse(name)
        except NoReverseMatch:
            continue
        links.append(Link(href, label, here.startswith(href)))
    return links
