"""The numbered events of a job: stored in chunks, announced on Redis, followed by any number of watchers.

Store first, announce second. A watcher replays from the last number it has and then follows; Redis only says that
there is news, so losing it costs at most one poll. The store is read once per job and process, however many watch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.lifecycle import Claim


@dataclass(frozen=True)
class Event:
    """`data` is the trainer's line as JSON (with "t" and "time"); `seq` counts from 1 without gaps."""

    seq: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Lines that are stored together. Frozen: once sent, a batch is only ever sent again as it was."""

    first_seq: int
    lines: tuple[str, ...]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.lines) - 1


def append(claim: Claim, batch: Batch) -> None:
    """Puts the chunk if none is there, or one of a lower epoch. The heartbeat that follows moves `last_seq`, and only
    then do readers see it. Raises LostRace when a later holder has written here."""
    raise NotImplementedError


def read(owner: str, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
    """Events after number `after`, at most about `limit` (whole chunks are read), gap-free. When the job has ended the
    last one is `{"t": "end", "status", "reason", "message", "advice", "model"}`, formed from the Job item itself.
    Raises jobs.access.NotFound."""
    raise NotImplementedError


async def follow(owner: str, job_id: str, after: int = 0) -> AsyncIterator[list[Event]]:
    """Replays after `after`, then follows. Yields lists, never empty ones; ends after the event "end".

    Raises jobs.access.NotFound (also later, when the job is deleted) and `TooSlow` for a watcher that doesn't keep up.
    Closing the generator frees everything. Callers re-authorise every 30 s themselves."""
    raise NotImplementedError
    yield []


def announce(job_id: str, last_seq: int) -> None:
    """Rings for the watchers of a job. Best effort: never raises, never waits longer than a second."""
    raise NotImplementedError


class TooSlow(Exception):
    """The watcher took its events too slowly; it may come back with the last number it has."""
