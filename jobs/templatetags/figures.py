"""Template filters: the functions of jobs/formatting.py, and a few that only templates need."""

from __future__ import annotations

from typing import Any

from django import template

from jobs import formatting

register = template.Library()

for name in (
    "count",
    "compact",
    "size",
    "memory",
    "gib",
    "loss",
    "rate",
    "percent",
    "duration",
    "span",
    "money",
    "moment",
    "when",
    "clock",
    "from_now",
    "short_id",
    "short_hash",
    "tail",
    "lines",
    "sparkline",
):
    register.filter(name, getattr(formatting, name))


@register.filter
def get(mapping: Any, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, dict) else getattr(mapping, key, None)


@register.filter
def plus(value: float, more: float) -> float:
    return value + more


@register.filter(name="from")
def taken_from(value: float, whole: float) -> float:
    return whole - value
