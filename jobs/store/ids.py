"""IDs that sort by time (ULIDs), and the months after which partitions of lists are named."""

from __future__ import annotations

import time

from ulid import ULID, PureRandomPolicy, ULIDGenerator

# The default policy counts upwards within a millisecond. Two processes forked in that millisecond would create the same
# IDs, and each ID would reveal the next one.
_generator = ULIDGenerator(policy=PureRandomPolicy())


def new_id(prefix: str) -> str:
    """`<prefix>-<ULID>`: 48 bits of milliseconds, then 80 random bits."""
    return f"{prefix}-{_generator.generate()}"


def time_of(id: str) -> float:
    """Creation time of an ID in Unix seconds."""
    return ULID.from_str(id.rpartition("-")[2]).timestamp


def month_of(when: float) -> str:
    """`2026-11`, part of a list's partition key."""
    return time.strftime("%Y-%m", time.gmtime(when))
