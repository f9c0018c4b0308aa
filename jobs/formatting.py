"""Formats numbers and times for display. Unknown values become an em dash."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

UNKNOWN = "—"
BYTE_UNITS = ("B", "KB", "MB", "GB", "TB")


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    if value is None or value == "" or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def count(value: Any) -> str:
    """1480 → 1,480"""
    number = finite(value)
    return UNKNOWN if number is None else f"{number:,.0f}"


def compact(value: Any) -> str:
    """124439808 → 124M"""
    number = finite(value)
    if number is None:
        return UNKNOWN
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}"


def size(value: Any) -> str:
    """31400000 → 31.4 MB"""
    number = finite(value)
    if number is None:
        return UNKNOWN
    for unit in BYTE_UNITS:
        if number < 1000 or unit == BYTE_UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return UNKNOWN


def memory(value: Any) -> str:
    """Formats memory, in powers of two: 1406140000 → 1.31 GiB"""
    number = finite(value)
    if number is None:
        return UNKNOWN
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def gib(value: Any) -> str:
    """Formats a machine's memory, without decimals: 24 GiB"""
    number = finite(value)
    return UNKNOWN if number is None else f"{number / 2**30:.0f} GiB"


def loss(value: Any) -> str:
    number = finite(value)
    return UNKNOWN if number is None else f"{number:.3f}" if abs(number) < 100 else f"{number:.1f}"


def rate(value: Any) -> str:
    """Formats learning rates and other small numbers: 0.00021 → 2.1e-4"""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if number == 0 or 0.001 <= abs(number) < 10_000:
        return f"{number:.4g}"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: Any) -> str:
    """0.62 → 62%"""
    number = finite(value)
    return UNKNOWN if number is None else f"{100 * number:.0f}%"


def duration(value: Any) -> str:
    """Formats seconds: 45 s, 12 min, 3 h 5 min"""
    number = finite(value)
    if number is None:
        return UNKNOWN
    seconds = max(0, round(number))
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{hours} h"


def span(low: Any, high: Any) -> str:
    """Formats two durations as a range: 31–36 min"""
    first, second = duration(low), duration(high)
    if first == second or second == UNKNOWN:
        return first
    amount, _, unit = first.partition(" ")
    return (
        f"{amount}–{second}"
        if second.endswith(f" {unit}") and second.count(" ") == 1
        else f"{first} – {second}"
    )


def money(value: Any) -> str:
    number = finite(value)
    if number is None:
        return UNKNOWN
    if 0 < number < 0.01:
        return "< $0.01"
    return f"${number:,.2f}"


def moment(value: Any) -> dt.datetime | None:
    """Unix seconds, a datetime, or an ISO string → an aware datetime in the current time zone."""
    if isinstance(value, dt.datetime):
        return _local(value if value.tzinfo else value.replace(tzinfo=dt.UTC))
    if isinstance(value, str):
        try:
            return moment(dt.datetime.fromisoformat(value))
        except ValueError:
            return None
    number = finite(value)
    if number is None:
        return None
    return _local(dt.datetime.fromtimestamp(number, dt.UTC))


def _local(value: dt.datetime) -> dt.datetime:
    local: dt.datetime = timezone.localtime(value)
    return local


def when(value: Any) -> str | SafeString:
    """A <time> element, which static/js/site.js shows in the reader's time zone: 10:21 UTC today, Mar 3, 10:21 UTC
    this year; the full date is in its title."""
    at = moment(value)
    if at is None:
        return UNKNOWN
    now = timezone.localtime()
    if at.date() == now.date():
        text = f"{at:%H:%M %Z}"
    elif at.year == now.year:
        text = f"{at:%b} {at.day}, {at:%H:%M %Z}"
    else:
        text = f"{at:%b} {at.day}, {at.year}"
    return format_html(
        '<time datetime="{}" data-style="moment" title="{}">{}</time>',
        at.isoformat(),
        f"{at:%Y-%m-%d %H:%M:%S %Z}",
        text,
    )


def exact(value: Any) -> str:
    """The time for the `datetime` attribute of an element; empty if it is unknown."""
    at = moment(value)
    return "" if at is None else at.isoformat()


def clock(value: Any) -> str:
    at = moment(value)
    return UNKNOWN if at is None else f"{at:%H:%M:%S}"


def from_now(seconds: Any) -> str:
    """The time of day this many seconds from now."""
    number = finite(seconds)
    return UNKNOWN if number is None else f"{moment(time.time() + number):%H:%M %Z}"


def short_id(value: str) -> str:
    """ftjob-01K8Q3Z…7ZC"""
    prefix, _, rest = str(value).partition("-")
    return f"{prefix}-{rest[:5]}…{rest[-3:]}" if len(rest) > 12 else str(value)


def short_hash(value: Any) -> str:
    text = str(value or "")
    return f"{text[:4]}…{text[-2:]}" if len(text) > 8 else text or UNKNOWN


def tail(model_id: str) -> str:
    """The last part of a model ID, which distinguishes models with the same name."""
    return str(model_id).rpartition(":")[2]


def lines(numbers: Sequence[int], shown: int = 3) -> str:
    """Formats line numbers: Lines 88, 203, 611 and 9 more"""
    if not numbers:
        return ""
    head = ", ".join(f"{n:,}" for n in numbers[:shown])
    more = f" and {len(numbers) - shown:,} more" if len(numbers) > shown else ""
    return f"Line{'s' if len(numbers) > 1 else ''} {head}{more}"


def sparkline(values: Iterable[float], box: str = "160x40") -> str:
    """The SVG path of a small line chart; static/js/job.js draws the same one for live updates."""
    width, height = (int(side) for side in box.split("x"))
    numbers = [n for n in (finite(v) for v in values) if n is not None]
    if len(numbers) < 2:
        return ""
    low, high = min(numbers), max(numbers)
    extent = (high - low) or 1.0
    step = width / (len(numbers) - 1)
    points = (
        f"{i * step:.1f},{4 + (height - 8) * (1 - (n - low) / extent):.1f}" for i, n in enumerate(numbers)
    )
    return "M" + " L".join(points)
