"""A job's history, built from its events: its curve, its log, its samples and the results of its resume checks.

The page builds it once from all events. The live stream describes each new event with the same sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jobs.events.event_log import Event
from jobs.formatting import clock, count, exact, loss, memory, rate, short_hash, size
from jobs.store.states import JobStatus
from training.plan.events import REASONS

KEPT_LOG_LINES = 300  # the page shows the end of a long log; the full log is a download
KEPT_POINTS = 1500  # more points than a screen has pixels across
# Training and evaluation have no line here, because their metrics are in the log.
PHASE_SENTENCES = {
    "preparing": "Preparing: loading the model and the data",
    "rehearsing": "Rehearsing the largest batch, an evaluation and a checkpoint",
    "exporting": "Exporting the model and comparing it with the trained weights",
}

END_WORDS: dict[str, str] = {
    JobStatus.SUCCEEDED: "The model is ready",
    JobStatus.FAILED: "Failed",
    JobStatus.CANCELLED: "Cancelled",
}
END_LEVELS: dict[str, str] = {JobStatus.FAILED: "error", JobStatus.CANCELLED: "warn"}


@dataclass(frozen=True)
class LogLine:
    """A line of the log. Of consecutive lines whose `kind` is "metric", only the newest is shown."""

    seq: int
    at: str  # 10:42:07
    level: str  # info, warn, error
    text: str
    kind: str = ""
    exact: str = ""  # the time with its zone


@dataclass
class ResumeResult:
    """Steps that were run again after a resume, and how many of their losses were bit-identical."""

    at: str = ""
    resumed_from: int = 0
    first: int | None = None
    last: int = 0
    steps: int = 0
    equal: int = 0
    exact: bool = True
    why: str = ""


@dataclass
class JobHistory:
    seq: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)  # by step; a later attempt's wins
    evals: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[int, str]] = field(default_factory=dict)  # prompt → step → text
    log: list[LogLine] = field(default_factory=list)
    resumes: list[ResumeResult] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> JobHistory:
        """`events` must be in order."""
        history = cls()
        for event in events:
            history.apply(event)
        return history

    @property
    def latest(self) -> dict[str, Any]:
        return self.metrics[max(self.metrics)] if self.metrics else {}

    @property
    def base_eval(self) -> dict[str, Any]:
        return self.evals.get(0, {})

    @property
    def latest_eval(self) -> dict[str, Any]:
        return self.evals[max(self.evals)] if self.evals else {}

    @property
    def kept_eval(self) -> dict[str, Any]:
        """The evaluation of the weights kept, if they are not those of the last one."""
        step = self.done.get("kept_step")
        return self.evals.get(step, {}) if step is not None and step != max(self.evals, default=step) else {}

    @property
    def shown_log(self) -> list[LogLine]:
        return self.log[-KEPT_LOG_LINES:]

    def apply(self, event: Event) -> None:
        """Adds the next event."""
        self.seq = max(self.seq, event.seq)
        data = event.data
        kind, step = data.get("t"), int(data.get("step") or 0)
        if kind == "metric":
            self._compare_with_earlier_attempt(step, data)
            self.metrics[step] = data
        elif kind == "eval":
            self.evals[step] = data
        elif kind == "sample":
            self.samples.setdefault(str(data.get("prompt", "")), {})[step] = str(data.get("text", ""))
        elif kind == "resumed":
            exact, why = bool(data.get("exact")), str(data.get("why") or "")
            self.resumes.append(ResumeResult(clock(data.get("time")), step, exact=exact, why=why))
        elif kind == "checkpoint":
            self.checkpoints.append(data)
        elif kind in ("plan", "estimate", "verdict", "failed", "done"):
            setattr(self, kind, data)
        line = log_line(event.seq, data)
        if line and line.kind == "metric" and self.log and self.log[-1].kind == "metric":
            self.log[-1] = line
        elif line:
            self.log.append(line)

    def _compare_with_earlier_attempt(self, step: int, event: dict[str, Any]) -> None:
        before = self.metrics.get(step)
        if not self.resumes or before is None or "loss_hex" not in before or "loss_hex" not in event:
            return
        resume = self.resumes[-1]
        if step <= resume.resumed_from:
            return
        resume.first = step if resume.first is None else min(resume.first, step)
        resume.last = max(resume.last, step)
        resume.steps += 1
        resume.equal += before["loss_hex"] == event["loss_hex"]


def log_line(seq: int, event: dict[str, Any]) -> LogLine | None:
    text, level = sentence(event)
    return (
        LogLine(seq, clock(event.get("time")), level, text, str(event.get("t")), exact(event.get("time")))
        if text
        else None
    )


def sentence(event: dict[str, Any]) -> tuple[str, str]:
    """(the sentence shown, its level). The sentence is empty for events that the log leaves out."""
    get = event.get
    kind = get("t")
    level = {"warning": "warn"}.get(str(get("level")), str(get("level") or "info"))
    if kind == "log":
        return str(get("message", "")), level
    if kind == "phase":
        return PHASE_SENTENCES.get(str(get("phase")), ""), "info"
    if kind == "plan":
        return (
            f"{count(get('total_steps'))} steps planned: {count(get('examples'))} examples, "
            f"{count(get('tokens'))} tokens, {count(get('trained_tokens'))} of them trained on",
            "info",
        )
    if kind == "metric":
        parts = [f"Step {get('step')}", f"loss {loss(get('loss'))}", f"lr {rate(get('lr'))}"]
        return "  ".join([*parts, f"{count(get('tokens_per_s'))} tokens/s"]), "info"
    if kind == "eval":
        which = "of the base model" if get("step") == 0 else f"at step {get('step')}"
        accuracy = f", token accuracy {loss(get('accuracy'))}" if get("accuracy") is not None else ""
        return f"Evaluation {which}: held-out loss {loss(get('loss'))}{accuracy}", "info"
    if kind == "checkpoint":
        files = get("files")
        number = len(files) if isinstance(files, list) else files
        name = "Final model" if get("final") else "Checkpoint"
        detail = f"{number} {'file' if number == 1 else 'files'}, {size(get('bytes'))}, sha256 {short_hash(get('sha256'))}"
        return f"{name} at step {get('step')} written ({detail})", "info"
    if kind == "estimate":
        return f"Rehearsal finished: peak memory {memory(get('peak_memory'))}", "info"
    if kind == "resumed":
        how = "exactly" if get("exact") else f"not exactly: {get('why') or 'the state differs'}"
        return f"Resumed at step {get('step')}, {how}", "info" if get("exact") else "warn"
    if kind == "failed":
        reason = REASONS.get(str(get("reason")))
        return str(get("message") or (reason.sentence if reason else "The trainer failed")), "error"
    if kind == "done":
        return f"Training finished{': ' if kept_step(event) else ''}{kept_step(event)}", "info"
    if kind == "end":
        reason = str(get("message") or "")
        return (
            f"{END_WORDS.get(str(get('status')), 'Ended')}{': ' if reason else ''}{reason}",
            END_LEVELS.get(str(get("status")), "info"),
        )
    return str(get("message") or ""), level


def kept_step(done: dict[str, Any]) -> str:
    """Which step's weights the model has, if not those of the last planned one. `done` is the trainer's last event or
    a job's result; those from before the kept step was recorded give an empty text."""
    step, kept = done.get("step"), done.get("kept_step")
    if kept is None or (kept == step and not done.get("early")):
        return ""
    return f"{f'stopped early at step {count(step)}; ' if done.get('early') else ''}kept step {count(kept)}"


def chart(history: JobHistory) -> dict[str, Any]:
    """The columns that static/js/job.js draws, with no more points than a screen can show."""
    steps = thin(sorted(history.metrics), KEPT_POINTS)
    rows = [history.metrics[step] for step in steps]
    columns = {
        name: [_finite(row.get(name)) for row in rows]
        for name in ("loss", "tokens", "time", "lr", "grad_norm", "tokens_per_s", "memory")
    }
    evals = [
        {"step": s, "loss": _finite(e.get("loss")), "time": e.get("time")}
        for s, e in sorted(history.evals.items())
    ]
    return {
        "step": steps,
        **columns,
        "evals": evals,
        "total": history.plan.get("total_steps"),
        "kept": history.kept_eval.get("step"),
    }


def thin(steps: list[int], most: int) -> list[int]:
    """At most about `most` of the steps, evenly spaced. The last one is always kept."""
    if len(steps) <= most:
        return steps
    stride = math.ceil(len(steps) / most)
    kept = steps[::stride]
    return kept if kept[-1] == steps[-1] else [*kept, steps[-1]]


def summary(history: JobHistory) -> str:
    """A text alternative to the chart."""
    if not history.metrics:
        return "No step has been trained yet."
    first, latest = history.metrics[min(history.metrics)], history.latest
    text = (
        f"Training loss is {loss(latest.get('loss'))} at step {latest.get('step')}, the only step so far."
        if first is latest
        else f"Training loss fell from {loss(first.get('loss'))} at step {first.get('step')} to "
        f"{loss(latest.get('loss'))} at step {latest.get('step')}."
        if (latest.get("loss") or 0) < (first.get("loss") or 0)
        else f"Training loss is {loss(latest.get('loss'))} at step {latest.get('step')}; "
        f"it was {loss(first.get('loss'))} at step {first.get('step')}."
    )
    if history.evals:
        kept = history.kept_eval
        text += f" Held-out loss is {loss((kept or history.latest_eval).get('loss'))}"
        text += f" at step {kept['step']}, which is kept" if kept else ""
        before = history.base_eval
        text += f"; before training it was {loss(before.get('loss'))}." if before else "."
    return text


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
