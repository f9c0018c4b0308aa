"""How a job is shown: the labels, colors, and figures of its page, computed only from the Job item."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from jobs.events.history import JobHistory, ResumeResult, kept_step
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
from jobs.forms import CHOICE_LABELS, shown
from jobs.lifecycle import transitions
from jobs.lifecycle.submission import schema_of, settings_of
from jobs.registry import base_models
from jobs.store import queue
from jobs.store.reasons import REASONS
from jobs.store.states import JobStatus
from jobs.store.tables import Job
from jobs.views.job_status import PHASE_LABELS, StatusDisplay, display_of
from training.plan.config import ALL_LINEAR, FIELDS, current_names, defaults
from training.plan.metrics import table as score_table
from training.plan.tasks import describe


@dataclass(frozen=True)
class Figure:
    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Problem:
    """Why a job failed, stopped, or is being retried."""

    title: str
    sentence: str
    kept: str = ""  # attempts so far, and the checkpoint that remains
    advice: str = ""
    border: str = ""


@dataclass(frozen=True)
class JobView:
    label: str
    tone: str
    note: str
    ended: bool
    percent: int
    figures: list[Figure] = field(default_factory=list)
    problem: Problem | None = None
    stall_warning: str = ""
    base: str = ""
    dataset: str = ""
    started_at: float | None = None
    submitted_at: float | None = None
    empty_log: str = ""
    can_edit: bool = False
    can_pause: bool = False
    can_resume: bool = False
    can_cancel: bool = False
    can_retry: bool = False
    can_delete: bool = False
    retry_label: str = "Retry"
    model_id: str = ""


def job_view(job: Job) -> JobView:
    display = display_of(job.status)
    label = display.label
    if job.status == JobStatus.RUNNING:
        label = PHASE_LABELS.get(job.phase, "Starting")
    ended, paused, desired = job.ended, job.status == JobStatus.PAUSED, job.desired
    fraction = _fraction(job)
    return JobView(
        label=label,
        tone=display.tone,
        note=_note(job),
        ended=ended,
        percent=100 if job.status == JobStatus.SUCCEEDED else int(100 * fraction),
        figures=_figures(job, fraction),
        problem=_problem(job, display),
        stall_warning=_stall_warning(job),
        base=_base(job),
        dataset=job.dataset_name or "dataset",  # jobs from before names were stored
        started_at=job.started_at,
        submitted_at=job.created_at,
        empty_log=display.empty_log,
        can_edit=transitions.can_edit(job),
        can_pause=not ended and not paused and desired == "run",
        can_resume=not ended and (paused or desired == "pause"),
        can_cancel=not ended and desired != "cancel",
        can_retry=job.status in (JobStatus.FAILED, JobStatus.CANCELLED),
        can_delete=ended,
        retry_label=f"Resume from step {job.checkpoint_step:.0f}" if job.checkpoint_step else "Try again",
        model_id=job.model_id if job.status == JobStatus.SUCCEEDED else "",
    )


def _fraction(job: Job) -> float:
    step, total = finite(job.progress.get("step")), finite(job.progress.get("total_steps"))
    return min(1.0, (step or 0) / total) if total else 0.0


def _note(job: Job) -> str:
    if not job.ended and job.desired == "cancel":
        return "· cancelling"
    if job.status == JobStatus.RUNNING and job.desired == "pause":
        return "· pausing after a checkpoint"
    if job.attempts > 0 and not job.ended:
        return f"· attempt {job.attempts + 1:.0f}"
    return ""


def _base(job: Job) -> str:
    known = base_models.of_job(job)
    if known is None:
        return job.base
    name = f"“{known.name}”" if job.base.startswith("ft:") and known.name else job.base
    return f"{name} · {compact(known.parameters)}"


def seconds_run(job: Job) -> float | None:
    """The run time of all attempts. If the worker has reported its time, the waits between attempts are left out."""
    if not job.started_at:
        return None
    if (reported := finite(job.progress.get("seconds"))) is not None:
        return reported
    return float(max(0.0, (job.ended_at or time.time()) - job.started_at))


def cost(seconds: float | None) -> float | None:
    """The price of this many worker seconds; None if the administrator set no price."""
    price = settings.JOBS["price_per_hour"]
    return seconds * price / 3600 if price and seconds is not None else None


def _figures(job: Job, fraction: float) -> list[Figure]:
    return [_progress(job, fraction), _time(job), _cost(job), _loss(job)]


def _progress(job: Job, fraction: float) -> Figure:
    step, total, result = job.progress.get("step"), job.progress.get("total_steps"), job.result or {}
    if result.get("early"):
        return Figure("Progress", "Stopped early", kept_step(result).removeprefix("stopped early "))
    kept = f", {kept_step(result)}" if kept_step(result) else ""
    return Figure(
        "Progress",
        f"{100 * fraction:.0f}%" if job.status != JobStatus.SUCCEEDED else "100%",
        f"· step {count(step)} of {count(total)}{kept}" if total else "",
    )


def _time(job: Job) -> Figure:
    if job.ended or job.status == JobStatus.PAUSED:
        return Figure("Run time" if job.ended else "Run time so far", duration(seconds_run(job)))
    if job.status == JobStatus.RUNNING and job.progress.get("silent_s"):
        return Figure("Time left", UNKNOWN, "· no progress")
    eta = finite(job.progress.get("eta_s"))
    if eta is not None and job.status == JobStatus.RUNNING:
        # The trainer's own estimate, plus a tenth for slowdowns that its recent pace does not show.
        return Figure("Time left", span(eta, eta * 1.1), f"· {from_now(eta * 1.05)}")
    estimate = job.estimate if isinstance(job.estimate, dict) else {}
    low, high = estimate.get("seconds_p50"), estimate.get("seconds_p90")
    return Figure("Time left", span(low, high), "· estimated" if low else "")


def _stall_warning(job: Job) -> str:
    """The notice that the trainer makes no progress. The worker reports for how long it has been silent."""
    silent, limit = finite(job.progress.get("silent_s")), finite(job.progress.get("silent_limit_s"))
    if job.status != JobStatus.RUNNING or silent is None or limit is None:
        return ""
    restart = (
        f"resumes from the checkpoint at step {job.checkpoint_step:,.0f}"
        if job.checkpoint_step
        else "restarts from the beginning"
    )
    return (
        f"The trainer has reported no progress for {duration(silent)}. "
        f"After {duration(limit)} it is stopped, and training {restart}."
    )


def _cost(job: Job) -> Figure:
    spent = cost(seconds_run(job))
    if spent is not None:
        estimate = job.estimate if isinstance(job.estimate, dict) else {}
        ahead = finite(job.progress.get("eta_s"))
        # The trainer's time left is more accurate than the estimate from before the start.
        seconds = (
            (seconds_run(job) or 0) + ahead if ahead is not None else finite(estimate.get("seconds_p50"))
        )
        total = cost(seconds)
        return Figure(
            "Cost so far" if not job.ended else "Cost",
            money(spent),
            f"of {money(total)}" if total and not job.ended else "",
        )
    tokens = job.metrics.get("tokens", job.progress.get("tokens"))
    speed = job.metrics.get("tokens_per_s")
    return Figure(
        "Tokens", compact(tokens), f"· {count(speed)} per second" if speed and not job.ended else ""
    )


def _loss(job: Job) -> Figure:
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


def _problem(job: Job, display: StatusDisplay) -> Problem | None:
    reason = REASONS.get(job.reason)
    sentence = job.message or (reason.sentence if reason else job.reason)
    if not sentence or not display.problem_title:
        return None
    advice = job.advice or (reason.advice if reason else "")
    shows_advice = job.status in (JobStatus.FAILED, JobStatus.PAUSED)
    return Problem(
        display.problem_title,
        sentence,
        _kept(job),
        advice if shows_advice else "",
        display.problem_border,
    )


def _kept(job: Job) -> str:
    attempts = f"{job.attempts:.0f} attempts were made. " if job.attempts > 1 else ""
    if job.checkpoint_step:
        return f"{attempts}Progress up to step {job.checkpoint_step:,.0f} is saved in a verified checkpoint."
    return attempts.strip()


# ---- the sidebar, beside the loss curve -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    label: str
    value: str
    changed: bool = False
    reason: str = ""


def sidebar(job: Job, history: JobHistory) -> dict[str, Any]:
    first, more = settings_rows(job, history)
    return {
        "job": job,
        "state": job_view(job),
        "resume_checks": [_resume_check(check) for check in history.resumes[-3:]],
        "samples": _samples(history),
        "queue_position": queue.position(job),
        "verdict": _verdict(history),
        "scores": scores(history.done.get("metrics") or {}),
        "settings_rows": first,
        "more_rows": more,
    }


def _resume_check(check: ResumeResult) -> dict[str, Any]:
    """Whether the steps that were run again after a resume gave the same losses, bit for bit."""
    if not check.exact:
        why = check.why or "the machine is different"
        return _inexact(f"Resumed at step {check.resumed_from:,} at {check.at}, but not exactly: {why}.")
    if not check.steps:
        return _exact(
            "Resumed",
            f"Training was interrupted and resumed from the checkpoint at step {check.resumed_from:,} at "
            f"{check.at}. No logged steps had to be run again.",
        )
    if check.equal < check.steps:
        return _inexact(
            f"{check.equal:,} of {check.steps:,} repeated steps gave bit-identical losses. "
            "The machine or its libraries are different."
        )
    repeated = (
        f"Steps {check.first:,} to {check.last:,} were repeated: all {check.steps:,} losses are"
        if check.steps > 1
        else f"Step {check.last:,} was repeated: its loss is"
    )
    return _exact(
        "Resume verified",
        f"Training was interrupted and resumed at {check.at}. {repeated} bit-identical.",
    )


def _exact(title: str, text: str) -> dict[str, Any]:
    return {"title": title, "text": text, "good": True, "border": "border-success/40"}


def _inexact(text: str) -> dict[str, Any]:
    return {"title": "Resumed, not bit-identical", "text": text, "good": False, "border": "border-warning/40"}


def _samples(history: JobHistory) -> list[dict[str, Any]]:
    """For each sample prompt: the base model's answer, the first one after it, one from the middle, and the newest."""
    prompts = []
    for prompt, by_step in list(history.samples.items())[:3]:
        steps = sorted(by_step)
        shown = steps if len(steps) <= 4 else [*steps[:2], steps[len(steps) // 2], steps[-1]]
        rows = [
            {"step": s, "name": "Base" if s == 0 else f"Step {s:,}", "text": by_step[s].strip()}
            for s in shown
        ]
        prompts.append({"prompt": prompt.strip(), "full_prompt": prompt, "rows": rows})
    return prompts


def _verdict(history: JobHistory) -> dict[str, Any]:
    verdict = history.verdict
    text = verdict.get("sentence") or verdict.get("text") or verdict.get("message")
    return {"text": text} if text else {}


def scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """The scores of held-out answers in a trained model's metrics, with the rows of their table; empty without any."""
    stored = metrics.get("scores") or {}
    table = score_table(stored)
    return {**stored, "rows": table} if table else {}


def settings_rows(job: Job, history: JobHistory) -> tuple[list[Row], list[Row]]:
    """The main settings, some of them combined into one row, and then all others."""
    plan = history.plan or (job.plan if isinstance(job.plan, dict) else {}) or {}
    chosen = current_names(settings_of(job))
    values = defaults(schema_of(job)) | chosen | current_names(plan.get("settings") or {})
    reasons = plan.get("reasons") or {}

    def changed(*names: str) -> bool:
        return any(chosen.get(n) not in (None, "", "auto") and chosen[n] != FIELDS[n].default for n in names)

    def row(label: str, value: str, *names: str) -> Row:
        return Row(label, value, changed(*names), next((reasons[n] for n in names if n in reasons), ""))

    batch = (
        f"{count(values['batch_tokens'])} tokens"
        if values["batch_tokens"]
        else _auto(values["batch_size"], " examples")
    )
    length = f"{_auto(values['max_steps'], ' steps')}" if values["max_steps"] else _auto(values["epochs"])
    task = (plan.get("task") or {}).get("text") or describe(values["task"], {}).get("text", "automatic")
    first = [
        row("Task", task, "task"),
        row(
            "Fine-tuning",
            _lora(values, plan.get("lora") or {}) if values["adapter"] == "lora" else "full",
            "adapter",
            "lora_rank",
            "lora_alpha",
            "use_dora",
            "use_rslora",
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
            _share(values["validation_fraction"]) if not job.validation_dataset_id else "separate dataset",
            "validation_fraction",
        ),
        row("Seed", str(values["seed"]), "seed"),
    ]
    combined = {
        "task",
        "adapter",
        "lora_rank",
        "lora_alpha",
        "use_dora",
        "use_rslora",
        "epochs",
        "max_steps",
        "batch_size",
        "batch_tokens",
        "learning_rate",
    }
    combined |= {"schedule", "sequence_length", "validation_fraction", "seed"}
    # as in the form: a setting with one choice only is not shown
    others = [n for n, field in FIELDS.items() if n not in combined and len(field.choices) != 1]
    more = [row(FIELDS[n].label, _plain(values[n]), n) for n in others]
    return first, more


def _lora(values: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """The adapters in words. `trained` is what the trainer says of them once it has the model: the layers that have
    one, and how many linear layers there are."""
    name = "DoRA" if values["use_dora"] else "LoRA"
    scaled = ", rank-stabilized" if values["use_rslora"] else ""
    text = f"{name}, rank {values['lora_rank']}, alpha {float(values['lora_alpha']):g}{scaled}"
    if not trained.get("of"):
        return text + (", all linear layers" if tuple(values["lora_targets"] or ()) == ALL_LINEAR else "")
    layers, of = count(trained["layers"]), count(trained["of"])
    return f"{text}, {f'all {of}' if layers == of else f'{layers} of {of}'} linear layers"


def _auto(value: Any, unit: str = "") -> str:
    return "automatic" if value is None else f"{float(value):,g}{unit}"


def _rate(value: Any) -> str:
    return "automatic" if value is None else rate(value)


def _share(value: Any) -> str:
    if value is None:
        return "automatic"
    return f"{100 * float(value):.3g}% of the examples" if value else "none"


def _plain(value: Any) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return CHOICE_LABELS.get(str(value), shown(value))


def sparklines(history: JobHistory, chart: dict[str, Any]) -> list[dict[str, Any]]:
    latest = history.latest
    return [
        {
            "name": name,
            "label": label,
            "value": formatted(latest.get(name)) if latest else UNKNOWN,
            "values": chart[name][-200:],
        }
        for name, label, formatted in (
            ("lr", "Learning rate", rate),
            ("grad_norm", "Gradient norm", _three_digits),
            ("tokens_per_s", "Tokens / s", count),
            ("memory", "Memory", memory),
        )
    ]


def _three_digits(value: Any) -> str:
    number = finite(value)
    return UNKNOWN if number is None else f"{number:.3g}"
