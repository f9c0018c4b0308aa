"""Filters for form fields and for the list of devices."""

from __future__ import annotations

from django import forms, template
from django.forms import BoundField
from django.utils.safestring import SafeString

register = template.Library()


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
