"""How a job looks to a person: words, colours and figures of its page, from the Job item alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from jobs.events.history import JobHistory, ResumeResult
from jobs.formatting import (
    UNKNOWN,
    compact,
    count,
    duration,
    finite,
    from_now,
    loss,
    memory,
    money,
    rate,
    span,
)
from jobs.forms import CHOICE_WORDS
from jobs.lifecycle import transitions
from jobs.lifecycle.submission import settings_of
from jobs.registry import base_models
from jobs.store import queue
from jobs.store.reasons import REASONS
from jobs.store.tables import Job
from training.plan.config import FIELDS, current_names

ALIVE, GOOD, BAD, QUIET, WAITING = "bg-primary", "bg-success", "bg-error", "bg-base-content/40", "bg-warning"
STATUS_WORDS = {
    "validating": ("Checking the data", WAITING),
    "queued": ("In the queue", WAITING),
    "running": ("Running", ALIVE),
    "retrying": ("Trying again soon", WAITING),
    "paused": ("Paused", QUIET),
    "succeeded": ("Done", GOOD),
    "failed": ("Failed", BAD),
    "cancelled": ("Cancelled", QUIET),
    "void": ("Never started", QUIET),
}
PHASE_WORDS = {
    "preparing": "Preparing",
    "rehearsing": "Rehearsing",
    "training": "Training",
    "evaluating": "Evaluating",
    "exporting": "Exporting",
}
WAITING_LINES = {
    "validating": "The data is being checked. The job joins the queue as soon as it is ready.",
    "queued": "Nothing yet. The first line comes when a worker takes the job.",
    "running": "The worker is starting.",
}


@dataclass(frozen=True)
class Figure:
    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Trouble:
    """Why it failed, or what it does about it: cause, what was done, what to press."""

    title: str
    sentence: str
    done: str = ""
    advice: str = ""
    border: str = ""


@dataclass(frozen=True)
class State:
    label: str
    dot: str
    note: str
    ended: bool
    percent: int
    figures: list[Figure] = field(default_factory=list)
    trouble: Trouble | None = None
    silence: str = ""
    base: str = ""
    dataset: str = ""
    started_at: float | None = None
    submitted_at: float | None = None
    waiting: str = ""
    can_edit: bool = False
    can_pause: bool = False
    can_resume: bool = False
    can_cancel: bool = False
    can_retry: bool = False
    can_delete: bool = False
    retry_label: str = "Retry"
    model_id: str = ""


def state(job: Job) -> State:
    word, dot = STATUS_WORDS.get(job.status, (job.status.capitalize(), QUIET))
    if job.status == "running":
        word = PHASE_WORDS.get(job.phase, "Starting")
    ended, wanted = job.ended, job.desired
    done = _fraction(job)
    return State(
        label=word,
        dot=dot,
        note=_note(job),
        ended=ended,
        percent=100 if job.status == "succeeded" else int(100 * done),
        figures=_figures(job, done),
        trouble=_trouble(job),
        silence=_silence(job),
        base=_base(job),
        dataset=job.dataset_name or "the data",  # of before names were kept
        started_at=job.started_at,
        submitted_at=job.created_at,
        waiting=WAITING_LINES.get(job.status, "No line was written."),
        can_edit=transitions.can_edit(job),
        can_pause=not ended and job.status != "paused" and wanted == "run",
        can_resume=not ended and (job.status == "paused" or wanted == "pause"),
        can_cancel=not ended and wanted != "cancel",
        can_retry=job.status in ("failed", "cancelled"),
        can_delete=ended,
        retry_label=f"Go on from step {job.checkpoint_step:.0f}" if job.checkpoint_step else "Try again",
        model_id=job.model_id if job.status == "succeeded" else "",
    )


def _fraction(job: Job) -> float:
    step, total = finite(job.progress.get("step")), finite(job.progress.get("total_steps"))
    return min(1.0, (step or 0) / total) if total else 0.0


def _note(job: Job) -> str:
    if not job.ended and job.desired == "cancel":
        return "· cancelling"
    if job.status == "running" and job.desired == "pause":
        return "· pausing after a checkpoint"
    if job.attempts > 0 and not job.ended:
        return f"· attempt {job.attempts + 1:.0f}"
    return ""


def _base(job: Job) -> str:
    known = base_models.of_job(job)
    if known is None:
        return job.base
    own = job.base.startswith("ft:") and known.name
    return f"{f'“{known.name}”' if own else job.base} · {compact(known.parameters)}"


def seconds_run(job: Job) -> float | None:
    """All attempts together, without the waits between them where the worker has told."""
    if not job.started_at:
        return None
    if (told := finite(job.progress.get("seconds"))) is not None:
        return told
    return float(max(0.0, (job.ended_at or time.time()) - job.started_at))


def cost(seconds: float | None) -> float | None:
    """What so many seconds of a worker cost; None where the operator set no price."""
    price = settings.JOBS["price_per_hour"]
    return seconds * price / 3600 if price and seconds is not None else None


def _figures(job: Job, done: float) -> list[Figure]:
    step, total = job.progress.get("step"), job.progress.get("total_steps")
    progress = Figure(
        "Progress",
        f"{100 * done:.0f}\u202f%" if job.status != "succeeded" else "100\u202f%",
        f"· step {count(step)} of {count(total)}" if total else "",
    )
    return [progress, _left(job), _spent(job), _held_out(job)]


def _left(job: Job) -> Figure:
    if job.ended or job.status == "paused":
        took = seconds_run(job)
        return Figure("Took" if job.ended else "Ran so far", duration(took))
    if job.status == "running" and job.progress.get("silent_s"):
        return Figure("Left", UNKNOWN, "· no progress")
    eta = finite(job.progress.get("eta_s"))
    if eta is not None and job.status == "running":
        # The trainer's own estimate: a tenth more covers what its recent pace doesn't know of.
        return Figure("Left", span(eta, eta * 1.1), f"· {from_now(eta * 1.05)}")
    estimate = job.estimate if isinstance(job.estimate, dict) else {}
    low, high = estimate.get("seconds_p50"), estimate.get("seconds_p90")
    return Figure("Left", span(low, high), "· estimated" if low else "")


def _silence(job: Job) -> str:
    """What a worker tells of a trainer that has told nothing for long."""
    silent, limit = finite(job.progress.get("silent_s")), finite(job.progress.get("silent_limit_s"))
    if job.status != "running" or silent is None or limit is None:
        return ""
    start = (
        f"resumes from the checkpoint of step {job.checkpoint_step:,.0f}"
        if job.checkpoint_step
        else "starts again from the beginning"
    )
    return (
        f"The trainer has reported nothing for {duration(silent)}. "
        f"After {duration(limit)} it is stopped, and training {start}."
    )


def _spent(job: Job) -> Figure:
    spent = cost(seconds_run(job))
    if spent is not None:
        estimate = job.estimate if isinstance(job.estimate, dict) else {}
        ahead = finite(job.progress.get("eta_s"))
        # What the trainer sees before it is worth more than what was thought before the start.
        seconds = (
            (seconds_run(job) or 0) + ahead if ahead is not None else finite(estimate.get("seconds_p50"))
        )
        whole = cost(seconds)
        return Figure(
            "Cost so far" if not job.ended else "Cost",
            money(spent),
            f"of {money(whole)}" if whole and not job.ended else "",
        )
    tokens = job.metrics.get("tokens", job.progress.get("tokens"))
    speed = job.metrics.get("tokens_per_s")
    return Figure("Tokens", compact(tokens), f"· {count(speed)} a second" if speed and not job.ended else "")


def _held_out(job: Job) -> Figure:
    now = job.metrics.get("eval_loss", job.metrics.get("held_out_loss"))
    first = job.metrics.get("base_eval_loss", job.metrics.get("held_out_loss_base"))
    if now is None and job.metrics.get("loss") is not None:
        return Figure("Training loss", loss(job.metrics["loss"]))
    return Figure(
        "Held-out loss",
        loss(now),
        f"· from {loss(first)}" if first is not None else "",
        "text-secondary" if now is not None else "",
    )


def _trouble(job: Job) -> Trouble | None:
    if job.status not in ("failed", "retrying", "cancelled", "paused") or not (job.reason or job.message):
        return None
    known = REASONS.get(job.reason)
    sentence = job.message or (known.sentence if known else "")
    advice = job.advice or (known.advice if known else "")
    if job.status == "failed":
        return Trouble("Why it failed", sentence, _kept(job), advice, "border-error/40")
    if job.status == "retrying":
        return Trouble(
            "A try was lost; the next one follows by itself", sentence, _kept(job), "", "border-warning/40"
        )
    return (
        Trouble("Why it stopped", sentence, _kept(job), advice if job.status == "paused" else "")
        if sentence
        else None
    )


def _kept(job: Job) -> str:
    tried = f"It was tried {job.attempts:.0f} times. " if job.attempts > 1 else ""
    if job.checkpoint_step:
        return f"{tried}Everything up to step {job.checkpoint_step:,.0f} is kept in a verified checkpoint."
    return tried.strip()


# ---- the column beside the curve -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    label: str
    value: str
    changed: bool = False
    reason: str = ""


def aside(job: Job, history: JobHistory) -> dict[str, Any]:
    first, more = settings_rows(job, history)
    return {
        "job": job,
        "state": state(job),
        "proofs": [_resume(resume) for resume in history.resumes[-3:]],
        "samples": _samples(history),
        "place": queue.position(job),
        "verdict": _verdict(history),
        "settings_rows": first,
        "more_rows": more,
    }


def _resume(resume: ResumeResult) -> dict[str, Any]:
    again = resume.steps
    if not resume.exact:
        text = f"Went on at step {resume.resumed_from:,} at {resume.at}, not exactly as before: {resume.why or 'the machine differs'}."
        return {
            "title": "Resumed, not to the bit",
            "text": text,
            "good": False,
            "border": "border-warning/40",
        }
    if again and resume.equal == again:
        text = (
            f"Training was interrupted and went on at {resume.at}. Steps {resume.first:,} to {resume.last:,} were run again: "
            f"{'all ' if again > 1 else ''}{again:,} loss{'es' if again > 1 else ''} equal to the bit."
        )
        return {"title": "Resume verified", "text": text, "good": True, "border": "border-success/40"}
    if again:
        text = f"{resume.equal:,} of {again:,} steps that were run again gave the same loss to the bit; the machine or its libraries differ."
        return {
            "title": "Resumed, not to the bit",
            "text": text,
            "good": False,
            "border": "border-warning/40",
        }
    text = f"Training was interrupted and went on from the checkpoint of step {resume.resumed_from:,} at {resume.at}. No logged step had to be run again."
    return {"title": "Resumed", "text": text, "good": True, "border": "border-success/40"}


def _samples(history: JobHistory) -> list[dict[str, Any]]:
    """For each pinned prompt the base's answer, the first after it, one from the middle and the newest."""
    prompts = []
    for prompt, by_step in list(history.samples.items())[:3]:
        steps = sorted(by_step)
        shown = steps if len(steps) <= 4 else [*steps[:2], steps[len(steps) // 2], steps[-1]]
        rows = [
            {"step": s, "name": "Base" if s == 0 else f"Step {s:,}", "text": by_step[s].strip()}
            for s in shown
        ]
        prompts.append({"prompt": prompt.strip(), "asked": prompt, "rows": rows})
    return prompts


def _verdict(history: JobHistory) -> dict[str, Any]:
    verdict = history.verdict
    text = verdict.get("sentence") or verdict.get("text") or verdict.get("message")
    return {"text": text} if text else {}


def settings_rows(job: Job, history: JobHistory) -> tuple[list[Row], list[Row]]:
    """What it trains with: the words of a few settings together, then every other one."""
    plan = history.plan or (job.plan if isinstance(job.plan, dict) else {}) or {}
    chosen = current_names(settings_of(job))
    values = {name: field.default for name, field in FIELDS.items()}
    values |= chosen | current_names(plan.get("settings") or {})
    reasons = plan.get("reasons") or {}

    def changed(*names: str) -> bool:
        return any(chosen.get(n) not in (None, "", "auto") and chosen[n] != FIELDS[n].default for n in names)

    def row(label: str, value: str, *names: str) -> Row:
        return Row(label, value, changed(*names), next((reasons[n] for n in names if n in reasons), ""))

    lora = f"LoRA, rank {values['lora_rank']}, alpha {values['lora_alpha']:g}"
    batch = (
        f"{count(values['batch_tokens'])} tokens"
        if values["batch_tokens"]
        else _auto(values["batch_size"], " examples")
    )
    length = f"{_auto(values['max_steps'], ' steps')}" if values["max_steps"] else _auto(values["epochs"])
    first = [
        row(
            "Fine-tuning",
            lora if values["adapter"] == "lora" else "full",
            "adapter",
            "lora_rank",
            "lora_alpha",
        ),
        row("Steps" if values["max_steps"] else "Epochs", length, "epochs", "max_steps"),
        row("Batch", batch, "batch_size", "batch_tokens"),
        row(
            "Learning rate",
            f"{_rate(values['learning_rate'])}, {values['schedule']}",
            "learning_rate",
            "schedule",
        ),
        row("Sequence", _auto(values["sequence_length"], " tokens, packed"), "sequence_length"),
        row(
            "Held out",
            _share(values["validation_fraction"]) if not job.validation_dataset_id else "a file of its own",
            "validation_fraction",
        ),
        row("Seed", str(values["seed"]), "seed"),
    ]
    told = {
        "objective",
        "adapter",
        "lora_rank",
        "lora_alpha",
        "epochs",
        "max_steps",
        "batch_size",
        "batch_tokens",
        "learning_rate",
    }
    told |= {"schedule", "sequence_length", "validation_fraction", "seed"}
    more = [row(FIELDS[n].label, _plain(values[n]), n) for n in FIELDS if n not in told]
    return first, more


def _auto(value: Any, unit: str = "") -> str:
    return "automatic" if value is None else f"{float(value):,g}{unit}"


def _rate(value: Any) -> str:
    return "automatic" if value is None else rate(value)


def _share(value: Any) -> str:
    return (
        "automatic"
        if value is None
        else f"{100 * float(value):.3g}\u202f% of the examples"
        if value
        else "nothing"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else CHOICE_WORDS.get(str(value), str(value))


def sparks(history: JobHistory, chart: dict[str, Any]) -> list[dict[str, Any]]:
    latest = history.latest
    return [
        {
            "name": name,
            "label": label,
            "value": shape(latest.get(name)) if latest else UNKNOWN,
            "values": chart[name][-200:],
        }
        for name, label, shape in (
            ("lr", "Learning rate", rate),
            ("grad_norm", "Gradient norm", _three),
            ("tokens_per_s", "Tokens / s", count),
            ("memory", "Memory", memory),
        )
    ]


def _three(value: Any) -> str:
    number = finite(value)
    return UNKNOWN if number is None else f"{number:.3g}"
