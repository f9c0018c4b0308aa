"""IDs that sort by time (ULIDs), and the months after which partitions of lists are named."""

from __future__ import annotations

import secrets
import time

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's Base32


def new_id(prefix: str) -> str:
    """`<prefix>-<ULID>`: 48 bits of milliseconds, then 80 random bits."""
    number = int(time.time() * 1000) << 80 | secrets.randbits(80)
    return prefix + "-" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def time_of(id: str) -> float:
    """Creation time of an ID in Unix seconds."""
    number = 0
    for letter in id.rpartition("-")[2]:
        number = number << 5 | CROCKFORD.index(letter)
    return (number >> 80) / 1000


def month_of(when: float) -> str:
    """`2026-11`, part of a list's partition key."""
    return time.strftime("%Y-%m", time.gmtime(when))
