"""A job's events in OpenAI's shape: a sentence, a level, and numbers under `data` where there are any."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jobs import access, feed, story
from jobs.api import errors
from jobs.api.caller import give_thread_back
from jobs.api.errors import bad
from jobs.tables import Job

Json = dict[str, Any]
REAUTHORISE_S = 30
STREAMS_PER_OWNER = 100  # in one process
PING_S = 15
_ID = re.compile(r"ftevent-([0-9A-HJKMNP-TV-Z]{26})-(\d{1,12})")
_open: Counter[str] = Counter()  # streams by owner
LEVELS = {"warn": "warn", "warning": "warn", "error": "error"}
ENDS = {
    "succeeded": "The job has succeeded",
    "failed": "The job has failed",
    "cancelled": "The job was cancelled",
}


def newest_first(owner: str, job: Job, limit: int, after: str | None) -> tuple[list[Json], bool]:
    """The page of events before `after`, the latest first. Events are numbered without gaps, so it is one short read."""
    top = (
        _seq(job, after) if after else int(job.last_seq) + (2 if job.ended else 1)
    )  # the end is no stored event
    start = max(0, top - 1 - limit)
    found = [event for event in feed.read(owner, job.job_id, start, limit + 1) if event.seq < top]
    return [show(job.job_id, event) for event in reversed(found)][:limit], start > 0


def _seq(job: Job, event_id: str) -> int:
    found = _ID.fullmatch(event_id)
    if found is None or found[1] != job.job_id.removeprefix("ftjob-"):
        raise bad("This is no event of this job.", "after")
    return int(found[2])


def show(job_id: str, event: feed.Event) -> Json:
    line = event.data
    message, level = story.sentence(line)
    return {
        "id": f"ftevent-{job_id.removeprefix('ftjob-')}-{event.seq:06d}",
        "object": "fine_tuning.job.event",
        "created_at": int(line.get("time") or time.time()),
        "level": LEVELS.get(level, "info"),
        "message": message or _message(line),
        "type": "metrics" if line.get("t") in {"metric", "eval"} else "message",
        "data": _data(line),
    }


def _message(line: Json) -> str:
    kind = line.get("t")
    if kind == "sample":
        return f"Sample at step {line.get('step')}: {line.get('text', '')}"
    if kind == "end":
        return str(line.get("message") or ENDS.get(str(line.get("status")), "The job has ended"))
    return {"verdict": "Compared with the base model on held-out examples"}.get(str(kind), str(kind))


def _data(line: Json) -> Json:
    numbers: Json = {"step": line.get("step")}
    if line.get("t") == "metric":
        numbers |= {"train_loss": line.get("loss"), "train_mean_token_accuracy": line.get("accuracy")}
    elif line.get("t") == "eval":
        numbers |= {"valid_loss": line.get("loss"), "valid_mean_token_accuracy": line.get("accuracy")}
    else:
        return {"llmtuner": line}
    return {name: value for name, value in numbers.items() if value is not None} | {"llmtuner": line}


def check_room(owner: str) -> None:
    """Is there room for one more stream? Raises ApiError."""
    if _open[owner] >= STREAMS_PER_OWNER:
        message = f"You have {STREAMS_PER_OWNER} streams open. Close one first."
        raise errors.ApiError(429, message, code="rate_limit_exceeded", retry_after=5)


async def stream(
    owner: str, job_id: str, still_allowed: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """All events from the first, then each as it comes, until the job ends or the key is revoked."""
    give_thread_back()  # the middlewares have used it again
    _open[owner] += 1
    looked = time.monotonic()
    events = feed.follow(owner, job_id)
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            await asyncio.wait({coming}, timeout=PING_S)
            if time.monotonic() - looked > REAUTHORISE_S:
                looked = time.monotonic()
                if not await still_allowed():
                    return
            if not coming.done():
                yield b": still here\n\n"
                continue
            for event in coming.result():
                yield _line(show(job_id, event))
            coming = asyncio.ensure_future(anext(events))
    except StopAsyncIteration:
        yield b"data: [DONE]\n\n"
    except (access.NotFound, feed.TooSlow) as error:
        told = (
            errors.translate(error)
            if isinstance(error, access.NotFound)
            else errors.ApiError(503, str(error))
        )
        yield _line(errors.body(told.message, told.status, told.param, told.code))
    finally:
        _open[owner] -= 1
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()


def _line(payload: Json) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
