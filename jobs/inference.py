"""Text from a model, token by token: the playground and /v1 both call `stream`.

The request goes as a Celery message to an inference worker, which relays it (`jobs.relay`) to its one
`python -m training serve` child. What that says comes back on the Redis stream `tokens:<request>`. The reader keeps
`reading:<request>` alive; when it leaves or dies the key goes, and the worker cancels. Nothing is kept: all expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from typing import Any

import redis.exceptions
from django.conf import settings

from jobs import bases, bells, tuned_models
from training import catalog

MAX_WAITING = 64  # requests in all, running ones included; more are told to come back
PATIENCE_S = 5.0  # how long an owner's request waits for another of the same owner to end
TAKEN_S = 20.0  # a worker must take the request within this
READING_S = 15  # without a sign of the reader for so long, the worker stops
EXPIRES_S = 120

# One place for a request, unless all are taken or the owner has its share. Places of the dead run out by themselves.
TAKE_PLACE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 'full' end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[3]) then return 'share' end
redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 'ok'
"""


@dataclass(frozen=True)
class GenerateRequest:
    """What to write and how. Exactly one of `prompt` and `messages`."""

    model: str  # a tuned model's id or alias, a checkpoint's model id, or a base model's id
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False


class Busy(Exception):
    """Too many requests are waiting; ask again in `retry_after` seconds."""

    def __init__(self, retry_after: int, message: str = "") -> None:
        self.retry_after = retry_after
        super().__init__(message or f"The models are busy. Try again in {retry_after} s.")


class Failed(Exception):
    """The request was taken but could not be answered; the message says why. `code` is the server's word for it."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


async def stream(owner: str, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the serve protocol's lines: {"t": "start", "prompt_tokens"}, {"t": "token", "index", "text", …} … and last
    {"t": "done", "choices", "usage"}. Closing the generator cancels the request within 2 s.

    Raises, before the first line, access.NotFound for a model that isn't the owner's and Busy when the queue is full
    or the owner has its share running; Failed at any time."""
    await asyncio.to_thread(check_model, owner, request.model)
    rid = secrets.token_hex(16)
    redis_client = bells.own_client(socket_timeout=8)
    try:
        await _take_place(redis_client, owner, rid)
        await redis_client.set(f"reading:{rid}", 1, ex=READING_S)
        await asyncio.to_thread(_send, owner, rid, request)
        async for line in _lines(redis_client, owner, rid):
            yield line
    except redis.exceptions.RedisError as error:
        raise Busy(5, "The models cannot be reached just now. Try again in a few seconds.") from error
    finally:
        # Shielded: this must be done also when the reader was cancelled, and a cancelled command spoils its connection.
        await asyncio.shield(_leave(redis_client, owner, rid))


def check_model(owner: str, model_id: str) -> None:
    """Raises access.NotFound unless `owner` may generate with it: a model of the catalogue, one of the Hub that they
    added, or their own."""
    if not catalog.find(model_id) and not bases.added(owner, model_id):
        tuned_models.get_for(owner, model_id)


async def _take_place(redis_client: Any, owner: str, rid: str) -> None:
    share = settings.JOBS["max_generations_per_owner"]
    until = time.monotonic() + PATIENCE_S
    while True:
        answer = await redis_client.eval(
            TAKE_PLACE, 2, "generating", f"generating:{owner}", rid, MAX_WAITING, share, EXPIRES_S
        )
        if answer == "ok":
            return
        if answer == "full":
            raise Busy(5)
        if time.monotonic() > until:
            raise Busy(2, f"You have {share} requests running. Try again when one of them has ended.")
        await asyncio.sleep(0.1)


def _send(owner: str, rid: str, request: GenerateRequest) -> None:
    from jobs.tasks import generate

    try:
        generate.apply_async(args=[owner, rid, asdict(request)], expires=TAKEN_S)
    except Exception as error:  # kombu wraps what its transport raises in several ways; all mean the same
        raise Busy(5, "The models cannot be reached just now. Try again in a few seconds.") from error


async def _lines(redis_client: Any, owner: str, rid: str) -> AsyncGenerator[dict[str, Any], None]:
    """What comes on the request's stream, up to its end."""
    last, taken, beaten = "0", False, time.monotonic()
    started = time.monotonic()
    while True:
        found = await redis_client.xread({f"tokens:{rid}": last}, block=2000, count=256)
        now = time.monotonic()
        if now - beaten > READING_S / 3:
            beaten = now
            await _still_here(redis_client, owner, rid)
        for number, entry in found[0][1] if found else ():
            last = number
            line = json.loads(entry["line"])
            if line["t"] == "taken":
                taken = True
            elif line["t"] == "error":
                raise Failed(line.get("code", "failed"), line.get("message", "The model could not answer."))
            else:
                yield line
            if line["t"] == "done":
                return
        if not taken and now - started > TAKEN_S:
            raise Busy(10, "No inference worker took the request. Try again in a moment.")
        if now - started > settings.JOBS["generation_timeout_s"]:
            raise Failed("timeout", "The answer took too long and was stopped.")


async def _still_here(redis_client: Any, owner: str, rid: str) -> None:
    """Renews the reader's sign and the request's place."""
    pipe = redis_client.pipeline(transaction=False)
    pipe.set(f"reading:{rid}", 1, ex=READING_S)
    seconds = (await redis_client.time())[0]
    for key in ("generating", f"generating:{owner}"):
        pipe.zadd(key, {rid: seconds + EXPIRES_S}, xx=True)
    pipe.expire(f"generating:{owner}", EXPIRES_S)
    await pipe.execute()


async def _leave(redis_client: Any, owner: str, rid: str) -> None:
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        await (
            redis_client.aclose()
        )  # a fresh connection: the old one may hold the reply of a cancelled command
    redis_client = bells.own_client()
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        pipe = redis_client.pipeline(transaction=False)
        pipe.delete(f"reading:{rid}", f"tokens:{rid}")
        pipe.zrem("generating", rid)
        pipe.zrem(f"generating:{owner}", rid)
        await pipe.execute()
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        await redis_client.aclose()


@dataclass(frozen=True)
class Completion:
    """The whole answer: `texts[i]` of choice i, its finish reasons, tokens (as the serve protocol has them) and usage."""

    texts: list[str]
    finish_reasons: list[str]
    tokens: list[list[dict[str, Any]]]
    usage: dict[str, int]


async def complete(owner: str, request: GenerateRequest) -> Completion:
    """All of `stream`, gathered."""
    tokens: list[list[dict[str, Any]]] = [[] for _ in range(request.n)]
    reasons, usage = ["stop"] * request.n, {}
    async with contextlib.aclosing(stream(owner, request)) as lines:
        async for line in lines:
            if line["t"] == "token":
                tokens[line["index"]].append(line)
            elif line["t"] == "done":
                usage = line["usage"]
                for choice in line["choices"]:
                    reasons[choice["index"]] = choice["finish_reason"]
    return Completion(["".join(t["text"] for t in row) for row in tokens], reasons, tokens, usage)
