"""What an attempt writes to the store, and when: events in frozen batches, progress, the lease, the checkpoint pointer.

One call of `write` makes at most one round of writes and never waits longer than the heartbeat's timeout. After 20 s without
a successful write, it sends only heartbeats until one succeeds, because the lease may be lost, and then nothing else may be
written. Meanwhile the trainer keeps running and its lines are buffered here. When the buffer is full, the trainer waits.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from django.conf import settings
from pynamodb.exceptions import PynamoDBException

from jobs.events import event_log
from jobs.events.event_log import Batch
from jobs.lifecycle.transitions import Claim
from jobs.store import failpoints
from jobs.worker.resume_check import ResumeCheck

MAX_BUFFERED_BYTES = 64 << 20  # of lines that wait for the store
RETRY_S = 1.0


class Writer:
    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.lines: deque[str] = deque()
        self.bytes = 0
        self.first_at = 0.0  # when the oldest buffered line arrived
        self.next_seq = int(claim.job.last_seq) + 1
        self.batch: Batch | None = None  # was sent at least once, but may not be stored
        self.progress: dict[str, Any] = dict(claim.job.progress or {})
        self.metrics: dict[str, Any] = dict(claim.job.metrics or {})
        self.phase = "preparing"
        self.plan: dict[str, Any] | None = None
        self.estimate: dict[str, Any] | None = None
        self.resume_result: dict[str, Any] | None = None
        # A stored checkpoint that the pointer doesn't name yet. It must wait until the events up to number "after" are
        # stored too, because a trainer that resumes from it will not print them again.
        self.pointer: dict[str, Any] | None = None
        self.pointer_moved = False  # superseded checkpoints are still to be deleted
        self.confirmed_at = time.monotonic()  # the last successful write
        self.not_before = 0.0
        self.flushing = False  # True at the end, when batches don't wait until they are full

    @property
    def unwritten(self) -> bool:
        return bool(self.batch or self.lines or self.pointer)

    @property
    def last_assigned_seq(self) -> int:
        """The number of the newest line, stored or not."""
        return self.next_seq - 1 + (len(self.batch.lines) if self.batch else 0) + len(self.lines)

    @property
    def pointer_is_due(self) -> bool:
        return self.pointer is not None and self.next_seq > self.pointer["after"]

    @property
    def full(self) -> bool:
        return self.bytes > MAX_BUFFERED_BYTES

    def emit(self, event: dict[str, Any]) -> None:
        """Adds an event that the worker itself created."""
        self.add(json.dumps({"time": round(time.time(), 3), "level": "info"} | event, ensure_ascii=False))

    def add(self, line: str) -> None:
        if not self.lines:
            self.first_at = time.monotonic()
        self.lines.append(line)
        self.bytes += len(line.encode())

    def write(self) -> bool:
        """Writes everything that is due. Returns True if the store confirmed it, which means that we still hold the lease.
        Raises LostRace."""
        now = time.monotonic()
        if now < self.not_before:
            return False
        fenced = now - self.confirmed_at > settings.JOBS["self_fence_s"]
        if self.batch is None and not fenced:
            self.batch = self._freeze(now)
        heartbeat_due = now - self.confirmed_at >= settings.JOBS["heartbeat_s"]
        if self.batch is None and not self.pointer_is_due and not heartbeat_due:
            return False
        try:
            self._send(None if fenced else self.batch)
            if self.pointer and self.pointer_is_due and not fenced:
                failpoints.hit("checkpoint stored")
                self.claim.move_pointer(
                    {name: self.pointer[name] for name in self.pointer if name != "after"}
                )
                self.pointer, self.pointer_moved = None, True
        except PynamoDBException:
            self.not_before = time.monotonic() + RETRY_S
            return False
        self.confirmed_at = time.monotonic()
        return True

    def _send(self, batch: Batch | None) -> None:
        if batch:
            event_log.append(self.claim, batch)
            failpoints.hit("chunk stored")
        first, last = (batch.first_seq, batch.last_seq) if batch else (None, None)
        self.claim.heartbeat(
            self.progress,
            self.metrics,
            first,
            last,
            phase=self.phase,
            plan=self.plan,
            estimate=self.estimate,
            resume_check=self.resume_result,
        )
        self.plan = self.estimate = self.resume_result = None  # each is sent once
        if batch:
            self.batch = None
            self.next_seq = batch.last_seq + 1
            event_log.announce(self.claim.job_id, batch.last_seq)

    def _freeze(self, now: float) -> Batch | None:
        """The next batch, if one is due: full by number or size, or its first line has waited long enough."""
        limits = settings.JOBS
        full = len(self.lines) >= limits["chunk_events"] or self.bytes >= limits["chunk_bytes"]
        if not self.lines or not (full or self.flushing or now - self.first_at >= limits["chunk_s"]):
            return None
        lines: list[str] = []
        size = 0
        while self.lines and len(lines) < min(limits["chunk_events"], event_log.MAX_CHUNK_EVENTS):
            length = len(self.lines[0].encode())
            if lines and size + length > limits["chunk_bytes"]:
                break
            lines.append(self.lines.popleft())
            size += length
        self.bytes -= size
        self.first_at = now
        return Batch(self.next_seq, tuple(lines))

    def report_unfinished(self, check: ResumeCheck | None) -> None:
        """Reports the partial result of the resume check if training ended before the check was complete."""
        if check and check.compared and not check.reported:
            self.report(check)

    def report(self, check: ResumeCheck) -> None:
        event = check.report()
        self.resume_result = {key: value for key, value in event.items() if key not in ("t", "level")}
        self.emit(event)
