"""Filters for form fields and for the list of devices."""

from __future__ import annotations

from django import forms, template
from django.forms import BoundField
from django.utils.safestring import SafeString

register = template.Library()


@register.filter
def styled(field: BoundField) -> SafeString:
    """A form field's control with our CSS classes."""
    kind = getattr(field.field.widget, "input_type", "")
    name = {"select": "select", "checkbox": "checkbox checkbox-sm checkbox-primary"}.get(kind, "input w-full")
    if isinstance(field.field.widget, forms.Textarea):
        name = "textarea w-full"
    classes = f"{name} {field.field.widget.attrs.get('class', '')}".strip()
    if kind == "password" and field.name != "password1":
        field.help_text = ""  # a link to the password reset, which the page already has
    # Placeholders repeat the label and disappear while typing: the label alone is better.
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
    """For example `Firefox on Linux`: enough to recognize a device."""
    name = next((name for token, name in BROWSERS.items() if token in user_agent), "")
    system = next((system for token, system in SYSTEMS.items() if token in user_agent), "")
    return " on ".join(filter(None, (name, system))) or user_agent.split("/")[0][:40] or "Unknown program"
