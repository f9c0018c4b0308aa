"""What the trainer says: each line is read once, kept for the page, and what matters of it is remembered.

Nothing it says is trusted to be well-formed: a line that is no event becomes a line of the log, capped and redacted.
"""

from __future__ import annotations

import json
import select
import statistics
import time
from collections import deque
from typing import Any

from jobs.store.child_process import Child
from jobs.store.redact import redact
from jobs.worker.attempt_writer import Writer
from jobs.worker.resume_check import Proof
from training.plan.events import PHASES

KINDS = frozenset(
    [
        "phase",
        "plan",
        "metric",
        "eval",
        "sample",
        "checkpoint",
        "log",
        "estimate",
        "verdict",
        "resumed",
        "failed",
        "done",
        "ready",
        "progress",
    ]
)
MOST_LOG_BYTES = 2 << 20  # of free text in one attempt
THIN_AFTER = 50_000  # events; then only each tenth step is kept
PROGRESS = ("step", "tokens", "tokens_per_s", "epoch", "eta_s")
METRICS = ("loss", "lr", "grad_norm", "accuracy", "memory", "gemm_share", "tokens_per_s")


class Listener:
    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.proof: Proof | None = None
        self.begin()
        self.rehearsed: dict[str, Any] = dict(
            writer.claim.job.estimate or {}
        )  # of an earlier attempt, at first
        self.newest: dict[str, Any] | None = None  # checkpoint
        self.verdict: dict[str, Any] | None = None
        self.micro_batch = 0
        self.log_bytes = 0
        self.phase_at = time.monotonic()

    def begin(self) -> None:
        """A trainer starts."""
        self.ready = False
        self.failed: dict[str, Any] | None = None
        self.done: dict[str, Any] | None = None
        self.heard_at = self.stepped_at = time.monotonic()
        self.knows_its_step = False  # this trainer, on this machine: rehearsed or measured
        self.steps: deque[float] = deque(maxlen=50)  # seconds between metric lines
        self._gone_at: float | None = None

    def silent_for(self) -> float:
        return time.monotonic() - self.heard_at

    def expected_silence(self) -> float:
        """Seconds that pass between two lines in the phase it is in, as far as was rehearsed or measured: those of a step
        and of a checkpoint it may wait for, or of an evaluation."""
        if self.writer.phase == "evaluating":
            return self._rehearsed("evaluation_s")
        measured = statistics.median(self.steps) if self.steps else 0.0
        return max(measured, self._rehearsed("step_s")) + self._rehearsed("checkpoint_s")

    def _rehearsed(self, name: str) -> float:
        value = self.rehearsed.get(name)
        return float(value) if isinstance(value, (int, float)) else 0.0

    def deaf_since(self, child: Child) -> float:
        """Seconds since a dead trainer's pipe should have ended."""
        self._gone_at = self._gone_at or time.monotonic()
        return time.monotonic() - self._gone_at

    def hear(self, child: Child, wait: float) -> list[dict[str, Any]]:
        """Takes what has come, after at most `wait` seconds; returns new checkpoints."""
        if self.writer.full:  # the store is away for long: the trainer waits for it, in its write
            time.sleep(wait)
            return []
        pipes = [pipe for pipe in (child.out, child.err) if not pipe.ended]
        ready, _, _ = select.select([pipe.fd for pipe in pipes], [], [], wait) if pipes else ([], [], [])
        if not pipes:
            time.sleep(wait)
        checkpoints: list[dict[str, Any]] = []
        for pipe in pipes:
            if pipe.fd not in ready:
                continue
            for line in pipe.lines():
                if pipe is child.err:
                    self._free_text(line)
                else:
                    event = self._parse(line)
                    if event:
                        self._take(event, checkpoints)
        return checkpoints

    def _parse(self, line: str) -> dict[str, Any] | None:
        self.heard_at = time.monotonic()
        try:
            event = json.loads(line, parse_constant=_refuse)
        except ValueError:
            event = None
        if not isinstance(event, dict) or event.get("t") not in KINDS:
            self._free_text(line)
            return None
        return event

    def _free_text(self, line: str) -> None:
        if self.log_bytes > MOST_LOG_BYTES:
            return
        text = redact(line)
        self.log_bytes += len(text)
        self.writer.say({"t": "log", "level": "warning", "message": text, "source": "output"})
        if self.log_bytes > MOST_LOG_BYTES:
            self.writer.say({"t": "log", "level": "warning", "message": "More was printed than is kept."})

    def _take(self, event: dict[str, Any], checkpoints: list[dict[str, Any]]) -> None:
        kind, writer = event["t"], self.writer
        if kind == "ready":
            self.ready = True
            return
        self.ready = True
        event.setdefault("time", round(time.time(), 3))
        if kind == "metric":
            self._metric(event)
            return
        if kind == "phase" and event.get("phase") in PHASES:
            self._spend(writer.phase)
            writer.phase = event["phase"]
        elif kind == "plan":
            writer.plan = event
            writer.progress["total_steps"] = event.get("total_steps")
            self.micro_batch = int((event.get("settings") or {}).get("micro_batch_tokens") or 0)
        elif kind == "eval":
            told = {
                f"eval_{name}": event[name] for name in ("loss", "accuracy", "exact_match") if name in event
            }
            writer.metrics |= told | {"eval_step": event.get("step")}
            if event.get("step") == 0:
                writer.metrics["base_eval_loss"] = event.get("loss")
        elif kind == "estimate":
            writer.estimate = self.rehearsed = event
            self.knows_its_step = True
        elif kind == "verdict":
            self.verdict = event
        elif kind == "checkpoint" and not event.get("final"):
            self.newest = dict(event)
            checkpoints.append(
                event | {"after": self.writer.last_given + 1}
            )  # + 1: its own line, added below
        elif kind == "failed":
            self.failed = event
        elif kind == "done":
            self.done = dict(event)
        self._keep(event)

    def _spend(self, phase: str) -> None:
        """Adds the time since the last phase to this one: what estimates learn from."""
        now = time.monotonic()
        spent = self.writer.progress.setdefault("spent", {})
        spent[phase] = round(spent.get(phase, 0.0) + now - self.phase_at, 3)
        self.phase_at = now

    def _metric(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        self.steps.append(now - self.stepped_at)
        self.stepped_at = now
        self.knows_its_step = True
        writer = self.writer
        writer.phase = "training"
        writer.progress |= {name: event[name] for name in PROGRESS if name in event}
        writer.metrics |= {name: event[name] for name in METRICS if name in event}
        # Which steps are kept hangs on the step alone, so that a resumed attempt keeps the same ones.
        if writer.next_seq < THIN_AFTER or event["step"] % 10 == 0:
            self._keep(event)
        if self.proof and self.proof.see(event):
            writer.say_proof(self.proof)

    def _keep(self, event: dict[str, Any]) -> None:
        for name in ("message", "advice"):
            if isinstance(event.get(name), str):
                event[name] = redact(event[name])
        event.pop("path", None)  # where it lies on this machine is nobody's business
        self.writer.add(json.dumps(event, ensure_ascii=False, separators=(",", ":")))


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON; numbers are finite or absent")
