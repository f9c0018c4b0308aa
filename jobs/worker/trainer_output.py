"""Reads the trainer's output. Each line becomes an event of the job, and the values that the worker needs are kept here.

The output may be malformed: a line that is not an event becomes a log line, shortened and redacted.
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
from jobs.worker.resume_check import ResumeCheck
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
    ]
)
MAX_LOG_BYTES = 2 << 20  # log lines of one attempt that are kept
THIN_AFTER = 50_000  # after this many events, only every tenth step is kept
PROGRESS = ("step", "tokens", "tokens_per_s", "epoch", "eta_s")
METRICS = ("loss", "lr", "grad_norm", "accuracy", "memory", "gemm_share", "tokens_per_s")


class TrainerOutput:
    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.resume_check: ResumeCheck | None = None
        self.begin()
        # Until this attempt has been rehearsed: the times that an earlier attempt measured.
        self.rehearsed: dict[str, Any] = dict(writer.claim.job.estimate or {})
        self.newest: dict[str, Any] | None = None  # checkpoint
        self.verdict: dict[str, Any] | None = None
        self.micro_batch = 0
        self.log_bytes = 0
        self.phase_at = time.monotonic()

    def begin(self) -> None:
        """Resets the values that belong to a single trainer process."""
        self.ready = False
        self.failed: dict[str, Any] | None = None
        self.done: dict[str, Any] | None = None
        self.last_line_at = self.last_step_at = time.monotonic()
        self.step_time_known = False  # rehearsed or measured by this trainer, on this machine
        self.step_times: deque[float] = deque(maxlen=50)  # seconds between metric lines
        self._dead_since: float | None = None

    def silent_for(self) -> float:
        return time.monotonic() - self.last_line_at

    def expected_silence(self) -> float:
        """The seconds expected between two lines in the current phase, according to the rehearsal or to measurements: either a
        step and a checkpoint that it may have to wait for, or an evaluation."""
        if self.writer.phase == "evaluating":
            return self._rehearsed("evaluation_s")
        measured = statistics.median(self.step_times) if self.step_times else 0.0
        return max(measured, self._rehearsed("step_s")) + self._rehearsed("checkpoint_s")

    def _rehearsed(self, name: str) -> float:
        value = self.rehearsed.get(name)
        return float(value) if isinstance(value, (int, float)) else 0.0

    def seconds_since_exit(self, child: Child) -> float:
        """Seconds since the trainer was first seen to have exited. Its pipe should close at that moment."""
        self._dead_since = self._dead_since or time.monotonic()
        return time.monotonic() - self._dead_since

    def read(self, child: Child, wait: float) -> list[dict[str, Any]]:
        """Reads what has arrived, waiting at most `wait` seconds. Returns new checkpoints."""
        # The store has been unreachable for long: by not reading, we make the trainer wait.
        if self.writer.full:
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
                        self._handle(event, checkpoints)
        return checkpoints

    def _parse(self, line: str) -> dict[str, Any] | None:
        self.last_line_at = time.monotonic()
        try:
            event = json.loads(line, parse_constant=_reject_constant)
        except ValueError:
            event = None
        if not isinstance(event, dict) or event.get("t") not in KINDS:
            self._free_text(line)
            return None
        return event

    def _free_text(self, line: str) -> None:
        if self.log_bytes > MAX_LOG_BYTES:
            return
        text = redact(line)
        self.log_bytes += len(text)
        self.writer.emit({"t": "log", "level": "warning", "message": text, "source": "output"})
        if self.log_bytes > MAX_LOG_BYTES:
            self.writer.emit(
                {
                    "t": "log",
                    "level": "warning",
                    "message": "The log has reached its size limit. Further output is not kept.",
                }
            )

    def _handle(self, event: dict[str, Any], checkpoints: list[dict[str, Any]]) -> None:
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
            self._record_phase_time(writer.phase)
            writer.phase = event["phase"]
        elif kind == "plan":
            writer.plan = event
            writer.progress["total_steps"] = event.get("total_steps")
            self.micro_batch = int((event.get("settings") or {}).get("micro_batch_tokens") or 0)
        elif kind == "eval":
            writer.metrics |= _evaluation(event, event.get("step"))
            if event.get("step") == 0:
                writer.metrics["base_eval_loss"] = event.get("loss")
        elif kind == "estimate":
            writer.estimate = self.rehearsed = event
            self.step_time_known = True
        elif kind == "verdict":
            self.verdict = event
        elif kind == "checkpoint" and not event.get("final"):
            self.newest = dict(event)
            # + 1 for its own line, added below
            checkpoints.append(event | {"after": self.writer.last_assigned_seq + 1})
        elif kind == "failed":
            self.failed = event
        elif kind == "done":
            self.done = dict(event)
            self._show_kept(event)
        self._keep(event)

    def _show_kept(self, done: dict[str, Any]) -> None:
        """The figures of the evaluation of the exported weights, which may be an earlier one than the last."""
        metrics = done.get("metrics") or {}
        if "kept_step" in done and "examples" in metrics:
            self.writer.metrics |= _evaluation(metrics, done["kept_step"])

    def _record_phase_time(self, phase: str) -> None:
        """Adds the time since the last change of phase to `phase`. Later estimates use these times."""
        now = time.monotonic()
        spent = self.writer.progress.setdefault("spent", {})
        spent[phase] = round(spent.get(phase, 0.0) + now - self.phase_at, 3)
        self.phase_at = now

    def _metric(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        self.step_times.append(now - self.last_step_at)
        self.last_step_at = now
        self.step_time_known = True
        writer = self.writer
        writer.phase = "training"
        writer.progress |= {name: event[name] for name in PROGRESS if name in event}
        writer.metrics |= {name: event[name] for name in METRICS if name in event}
        # Whether a step is kept depends only on its number, so a resumed attempt keeps the same ones.
        if writer.next_seq < THIN_AFTER or event["step"] % 10 == 0:
            self._keep(event)
        if self.resume_check and self.resume_check.compare(event):
            writer.report(self.resume_check)

    def _keep(self, event: dict[str, Any]) -> None:
        for name in ("message", "advice"):
            if isinstance(event.get(name), str):
                event[name] = redact(event[name])
        event.pop("path", None)  # paths on this machine are not shown to users
        self.writer.add(json.dumps(event, ensure_ascii=False, separators=(",", ":")))


def _evaluation(values: dict[str, Any], step: Any) -> dict[str, Any]:
    """An evaluation as metrics of the job."""
    names = ("loss", "accuracy", "exact_match")
    return {f"eval_{name}": values[name] for name in names if name in values} | {"eval_step": step}


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not valid JSON: numbers must be finite or absent")
