"""What a job's events tell a person: its curve, its log, its samples and the proof of its resumes.

The page folds all events once; the live stream tells each new one with the same sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jobs.formatting import clock, count, loss, memory, rate, short_hash, size
from training.plan.events import REASONS

KEPT_LOG_LINES = 300  # of a long log the page shows the end; the whole is a download
KEPT_POINTS = 1500  # more than a screen has pixels
# Training and evaluating tell of themselves by their numbers.
PHASE_SENTENCES = {
    "preparing": "Preparing: reading the model and the data",
    "rehearsing": "Rehearsing the worst batch, an evaluation and a checkpoint",
    "exporting": "Exporting the model and comparing it with the trained one",
}

END_WORDS = {"succeeded": "The model is ready", "failed": "Failed", "cancelled": "Cancelled"}
END_LEVELS = {"failed": "error", "cancelled": "warn"}


@dataclass(frozen=True)
class LogLine:
    """`kind` "metric": such lines, one after the other, are told by the newest alone."""

    seq: int
    at: str  # 10:42:07
    level: str  # info, warn, error
    text: str
    kind: str = ""


@dataclass
class Proof:
    """Steps that were run again after a resume, and how many of their losses came out equal to the bit."""

    at: str = ""
    resumed_from: int = 0
    first: int | None = None
    last: int = 0
    steps: int = 0
    equal: int = 0
    exact: bool = True
    why: str = ""


@dataclass
class Story:
    seq: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)  # by step; a later attempt's wins
    evals: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[int, str]] = field(default_factory=dict)  # prompt → step → text
    log: list[LogLine] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

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
    def shown_log(self) -> list[LogLine]:
        return self.log[-KEPT_LOG_LINES:]


def fold(events: Iterable[Any]) -> Story:
    """The story of events in their order; each has `.seq` and `.data`."""
    story = Story()
    for event in events:
        tell(story, event.seq, event.data)
    return story


def tell(story: Story, seq: int, event: dict[str, Any]) -> None:
    story.seq = max(story.seq, seq)
    kind, step = event.get("t"), int(event.get("step") or 0)
    if kind == "metric":
        _compare(story, step, event)
        story.metrics[step] = event
    elif kind == "eval":
        story.evals[step] = event
    elif kind == "sample":
        story.samples.setdefault(str(event.get("prompt", "")), {})[step] = str(event.get("text", ""))
    elif kind == "resumed":
        proof = Proof(
            clock(event.get("time")), step, exact=bool(event.get("exact")), why=str(event.get("why") or "")
        )
        story.proofs.append(proof)
    elif kind == "checkpoint":
        story.checkpoints.append(event)
    elif kind in ("plan", "estimate", "verdict", "failed", "done"):
        setattr(story, kind, event)
    line = log_line(seq, event)
    if line and line.kind == "metric" and story.log and story.log[-1].kind == "metric":
        story.log[-1] = line
    elif line:
        story.log.append(line)


def _compare(story: Story, step: int, event: dict[str, Any]) -> None:
    before = story.metrics.get(step)
    if not story.proofs or before is None or "loss_hex" not in before or "loss_hex" not in event:
        return
    proof = story.proofs[-1]
    if step <= proof.resumed_from:
        return
    proof.first = step if proof.first is None else min(proof.first, step)
    proof.last = max(proof.last, step)
    proof.steps += 1
    proof.equal += before["loss_hex"] == event["loss_hex"]


def log_line(seq: int, event: dict[str, Any]) -> LogLine | None:
    text, level = sentence(event)
    return LogLine(seq, clock(event.get("time")), level, text, str(event.get("t"))) if text else None


def sentence(event: dict[str, Any]) -> tuple[str, str]:
    """(what a person reads, its level); an empty sentence for events the log leaves out."""
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
            f"{count(get('tokens'))} tokens, {count(get('trained_tokens'))} of them trained",
            "info",
        )
    if kind == "metric":
        parts = [f"Step {get('step')}", f"loss {loss(get('loss'))}", f"lr {rate(get('lr'))}"]
        return "  ".join([*parts, f"{count(get('tokens_per_s'))} tokens/s"]), "info"
    if kind == "eval":
        what = "of the base model" if get("step") == 0 else f"at step {get('step')}"
        accuracy = f", token accuracy {loss(get('accuracy'))}" if get("accuracy") is not None else ""
        return f"Evaluation {what}: held-out loss {loss(get('loss'))}{accuracy}", "info"
    if kind == "checkpoint":
        files = get("files")
        number = len(files) if isinstance(files, list) else files
        what = "Final model" if get("final") else "Checkpoint"
        detail = f"{number} files, {size(get('bytes'))}, sha256 {short_hash(get('sha256'))}"
        return f"{what} at step {get('step')} written ({detail})", "info"
    if kind == "estimate":
        return f"Rehearsed: peak memory {memory(get('peak_memory'))}", "info"
    if kind == "resumed":
        how = "with nothing lost" if get("exact") else f"not exactly: {get('why') or 'the state differs'}"
        return f"Resumed at step {get('step')}, {how}", "info" if get("exact") else "warn"
    if kind == "failed":
        reason = REASONS.get(str(get("reason")))
        return str(get("message") or (reason.sentence if reason else "The trainer failed")), "error"
    if kind == "done":
        return "Training done", "info"
    if kind == "end":
        reason = str(get("message") or "")
        return (
            f"{END_WORDS.get(str(get('status')), 'Ended')}{': ' if reason else ''}{reason}",
            END_LEVELS.get(str(get("status")), "info"),
        )
    return str(get("message") or ""), level


def chart(story: Story) -> dict[str, Any]:
    """The curve as static/js/job.js draws it: columns, thinned to what a screen can show."""
    steps = thin(sorted(story.metrics), KEPT_POINTS)
    rows = [story.metrics[step] for step in steps]
    columns = {
        name: [_finite(row.get(name)) for row in rows]
        for name in ("loss", "tokens", "time", "lr", "grad_norm", "tokens_per_s", "memory")
    }
    evals = [
        {"step": s, "loss": _finite(e.get("loss")), "time": e.get("time")}
        for s, e in sorted(story.evals.items())
    ]
    return {"step": steps, **columns, "evals": evals, "total": story.plan.get("total_steps")}


def thin(steps: list[int], most: int) -> list[int]:
    """Evenly fewer of them, the last one always among them."""
    if len(steps) <= most:
        return steps
    stride = math.ceil(len(steps) / most)
    kept = steps[::stride]
    return kept if kept[-1] == steps[-1] else [*kept, steps[-1]]


def summary(story: Story) -> str:
    """The chart in words, for whoever can't see it."""
    if not story.metrics:
        return "No step has been trained yet."
    first, latest = story.metrics[min(story.metrics)], story.latest
    text = (
        f"Training loss fell from {loss(first.get('loss'))} at step {first.get('step')} to "
        f"{loss(latest.get('loss'))} at step {latest.get('step')}."
        if (latest.get("loss") or 0) < (first.get("loss") or 0)
        else f"Training loss is {loss(latest.get('loss'))} at step {latest.get('step')}, "
        f"{loss(first.get('loss'))} at step {first.get('step')}."
    )
    if story.evals:
        text += f" Held-out loss is {loss(story.latest_eval.get('loss'))}"
        text += f", {loss(story.base_eval.get('loss'))} before training." if story.base_eval else "."
    return text


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
