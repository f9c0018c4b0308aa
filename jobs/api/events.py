"""A job's events in OpenAI's format: a message, a level, and any numbers under `data`."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jobs.api import errors
from jobs.api.caller import release_thread
from jobs.api.errors import bad
from jobs.events import event_log, history
from jobs.store import access
from jobs.store.states import JobStatus
from jobs.store.tables import Job

Json = dict[str, Any]
REAUTHORIZE_S = 30
STREAMS_PER_OWNER = 100  # per process
PING_S = 15
_ID = re.compile(r"ftevent-([0-9A-HJKMNP-TV-Z]{26})-(\d{1,12})")
_open: Counter[str] = Counter()  # streams by owner
LEVELS = {"warn": "warn", "warning": "warn", "error": "error"}
# Scripts look for OpenAI's messages, so these differ from the text on the pages.
PHASES = {
    "preparing": "Fine-tuning job started",
    "training": "Training",
    "evaluating": "Evaluating on held-out examples",
}
COMPLETED = "The job has successfully completed"


def newest_first(owner: str, job: Job, limit: int, after: str | None) -> tuple[list[Json], bool]:
    """The page of events before `after`, newest first. Events are numbered without gaps, so this is one short read."""
    last = int(job.last_seq)
    ends = (
        (2 if job.status == JobStatus.SUCCEEDED else 1) if job.ended else 0
    )  # the final events are not stored
    top = _number(job, after) if after is not None else last + ends + 1
    start = max(0, top - 1 - limit)
    numbered = [
        (number, payload)
        for event in event_log.read(owner, job.job_id, min(start, last), limit + 1)
        for number, payload in _numbered(job, event, (job.plan or {}).get("total_steps"))
        if start < number < top
    ]
    return [payload for _, payload in reversed(numbered)], start > 0


def _number(job: Job, event_id: str) -> int:
    match = _ID.fullmatch(event_id)
    number = int(match[2]) if match and match[1] == job.job_id.removeprefix("ftjob-") else 0
    if not 0 < number <= job.last_seq + (2 if job.ended else 0):
        raise bad(f"This job has no event with the ID '{event_id[:100]}'.", "after")
    return number


def show(job: Job, event: event_log.Event, total_steps: int | None) -> list[Json]:
    """One event, or two for a success: the model's name, and that the job is complete."""
    return [payload for _, payload in _numbered(job, event, total_steps)]


def _numbered(job: Job, event: event_log.Event, total_steps: int | None) -> list[tuple[int, Json]]:
    line = event.data
    if line.get("t") == "end" and line.get("status") == JobStatus.SUCCEEDED:
        messages = [f"New fine-tuned model created: {line.get('model')}", COMPLETED]
    else:
        messages = [_message(job, line, total_steps)]
    return [
        (number, _payload(job, number, line, message, total_steps))
        for number, message in enumerate(messages, event.seq)
    ]


def _payload(job: Job, number: int, line: Json, message: str, total_steps: int | None) -> Json:
    return {
        "id": f"ftevent-{job.job_id.removeprefix('ftjob-')}-{number:06d}",
        "object": "fine_tuning.job.event",
        "created_at": int(line.get("time") or time.time()),
        "level": LEVELS.get(history.sentence(line)[1], "info"),
        "message": message,
        "type": "metrics" if line.get("t") in {"metric", "eval"} else "message",
        "data": _data(line, total_steps),
    }


def _message(job: Job, line: Json, total_steps: int | None) -> str:
    kind, step = line.get("t"), line.get("step")
    if kind in {"metric", "eval"}:
        split = "training" if kind == "metric" else "validation"
        return f"Step {step}/{total_steps or '?'}: {split} loss={float(line.get('loss') or 0):.2f}"
    if kind == "checkpoint" and not line.get("final"):
        return f"Checkpoint created at step {step} with Snapshot ID: {job.model_id}:ckpt-step-{step}"
    if kind == "phase" and line.get("phase") in PHASES:
        return PHASES[line["phase"]]
    if kind == "sample":
        return f"Sample at step {step}: {line.get('text', '')}"
    if kind == "verdict":
        return "Compared with the base model on held-out examples"
    if kind == "end":
        outcome = "The job was cancelled" if line.get("status") == JobStatus.CANCELLED else "The job failed"
        return ": ".join(part for part in (outcome, str(line.get("message") or "")) if part)
    return history.sentence(line)[0] or "No message"


def _data(line: Json, total_steps: int | None) -> Json:
    loss, accuracy = line.get("loss"), line.get("accuracy")
    if line.get("t") == "metric":
        numbers = {"train_loss": loss, "train_mean_token_accuracy": accuracy}
    elif line.get("t") == "eval":  # always computed over all held-out examples
        numbers = {
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        }
    else:
        return {"llmtuner": line}
    numbers = {"step": line.get("step"), "total_steps": total_steps, **numbers}
    return {name: value for name, value in numbers.items() if value is not None} | {"llmtuner": line}


def check_stream_quota(owner: str) -> None:
    """Raises ApiError if the user may not open another stream."""
    if _open[owner] >= STREAMS_PER_OWNER:
        message = f"You have {STREAMS_PER_OWNER} open streams. Close one first."
        raise errors.ApiError(429, message, code="rate_limit_exceeded", retry_after=5)


async def stream(job: Job, still_allowed: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """Streams all events from the first one on, until the job ends or the key is revoked."""
    release_thread()  # the middleware has occupied a thread again
    owner, total_steps = job.owner, None
    _open[owner] += 1
    checked_at = time.monotonic()
    events = event_log.follow(owner, job.job_id)
    pending = asyncio.ensure_future(anext(events))
    try:
        while True:
            await asyncio.wait({pending}, timeout=PING_S)
            if time.monotonic() - checked_at > REAUTHORIZE_S:
                checked_at = time.monotonic()
                if not await still_allowed():
                    return
            if not pending.done():
                yield b": keep-alive\n\n"
                continue
            for event in pending.result():
                if event.data.get("t") == "plan":  # sent before the first step
                    total_steps = event.data.get("total_steps")
                for payload in show(job, event, total_steps):
                    yield _line(payload)
            pending = asyncio.ensure_future(anext(events))
    except StopAsyncIteration:
        yield b"data: [DONE]\n\n"
    except (access.NotFound, event_log.TooSlow) as error:
        refusal = (
            errors.translate(error)
            if isinstance(error, access.NotFound)
            else errors.ApiError(503, str(error))
        )
        yield _line(errors.body(refusal.message, refusal.status, refusal.param, refusal.code))
    finally:
        _open[owner] -= 1
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await events.aclose()


def _line(payload: Json) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
