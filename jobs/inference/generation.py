"""Generates text with a model, token by token. The playground and `/v1` both call `stream`.

The request waits in Redis (`jobs.inference.generation_queue`) until an inference worker (`jobs.inference.inference_worker`)
takes it and passes it to its child process, `python -m training serve`. The output arrives on the Redis stream
`tokens:<request>`, whose entries are numbered without gaps. The reader renews its request. When it disconnects or dies, the
request is dropped and the worker that has it cancels it. All keys in Redis expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import redis.exceptions
from django.conf import settings

from jobs.inference import generation_queue
from jobs.registry import base_models, tuned_models
from jobs.store import redis_client
from jobs.store.tables import TunedModel
from training.plan import catalog

RENEW_S = 5.0  # time between two renewals by the reader
NO_WORKER_S = 20.0  # if no request at all is served for this long, there is no worker
WAIT_S = 600.0  # the longest wait in the queue; OpenAI's clients give up after the same time
REDIS_RETRY_S = 30.0  # how long a waiting request tolerates an unreachable Redis
MAX_TRIES = 3  # for a request that was lost by Redis or its worker
UNAVAILABLE = "The models are temporarily unavailable. Try again in a few seconds."
# Kinds of rows that models are trained on without a chat template.
WITHOUT_CONVERSATIONS = {"completion": "prompts and completions", "text": "plain text"}
SEQUENCES_AT_ONCE = 8  # per user in the inference server: half of what it generates at once


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate and how. Exactly one of `prompt`, `prompts` and `messages` must be set."""

    model: str  # the ID or alias of a tuned model, or the ID of a checkpoint or base model
    prompt: str | None = None
    # Texts or token IDs. Choice i of prompt k has the index k * n + i.
    prompts: list[str] | list[list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = field(
        default_factory=list
    )  # definitions in OpenAI's format, with `messages`
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False

    def payload(self) -> dict[str, Any]:
        """The request as a worker reads it. A conversation with tools, calls or results is sent as `conversation`. Workers of
        an earlier release don't know this field, so they refuse the request. They would ignore `tools`."""
        payload = asdict(self)
        tools, messages = payload.pop("tools"), payload["messages"]
        if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages or ()):
            payload |= {"messages": None, "conversation": {"messages": messages, "tools": tools}}
        return payload


class Busy(Exception):
    """Too many requests are waiting; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int, message: str = "") -> None:
        self.retry_after = retry_after
        super().__init__(message or f"The models are busy. Try again in {retry_after} s.")


class Unavailable(Busy):
    """No worker can respond at the moment, even if few requests are waiting."""


class Failed(Exception):
    """The request was accepted but failed; the message says why. `code` is the server's error code."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


def timeout_s(choices: int) -> float:
    """How long a response with this many choices may take once a worker has taken the request."""
    return float(settings.JOBS["generation_timeout_s"] * -(-choices // SEQUENCES_AT_ONCE))


class _Lost(Exception):
    """Redis or the worker lost the request."""


async def stream(owner: str, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the lines of the serve protocol: {"t": "start", "prompt_tokens"}, {"t": "token", "index", "text", …} …, and
    finally {"t": "done", "choices", "usage"}. A choice that calls tools has `tool_calls`. Closing the generator removes the request from the queue, or cancels it within
    2 s.

    Before the first line it may raise access.NotFound (the owner may not use the model), Busy (the queue is full, for this
    user or overall) and Unavailable; at any time, Failed. If Redis or the worker loses the request before its first token,
    it is queued again in its old place."""
    request = as_trained(await asyncio.to_thread(check_model, owner, request.model), request)
    queued = _QueuedRequest(owner, request)
    started = begun = False
    for _ in range(MAX_TRIES):
        lines = queued.lines()
        try:
            async for line in lines:
                begun = begun or line["t"] != "start"
                if line["t"] != "start" or not started:
                    yield line
                started = True
            return
        except (redis.exceptions.RedisError, _Lost) as error:
            if begun:
                raise Failed(
                    "server_died", "The model server stopped in the middle of the response. Try again."
                ) from error
            if not queued.arrival:
                raise Unavailable(5, UNAVAILABLE) from error
        finally:
            await lines.aclose()
    raise Failed("server_died", "The model server stopped several times before it could respond. Try again.")


class _QueuedRequest:
    """A request in the queue, as the reader sees it."""

    def __init__(self, owner: str, request: GenerateRequest) -> None:
        self.owner, self.payload = owner, json.dumps(request.payload())
        self.arrival = ""  # assigned by the queue, and used again if the request has to be queued again
        self.since = time.monotonic()
        self.most_s = timeout_s(len(request.prompts or [1]) * request.n)

    async def lines(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the lines of the request's stream. Raises RedisError and _Lost."""
        rid = secrets.token_hex(16)
        client = redis_client.own_client(socket_timeout=8)
        try:
            await self._enter(client, rid)
            await asyncio.to_thread(_notify_workers)
            async for line in self._read(client, rid):
                yield line
        finally:
            # Shielded: this must run even if the reader was cancelled, and a cancelled command breaks its connection.
            await asyncio.shield(_leave(client, self.owner, rid))

    async def _enter(self, client: Any, rid: str) -> None:
        share = settings.JOBS["max_generations_per_owner"]
        until = time.monotonic() + REDIS_RETRY_S
        while True:
            try:
                self.arrival = await generation_queue.enter(
                    client, self.owner, rid, self.payload, self.arrival, share
                )
                return
            except generation_queue.Full as full:
                whose = "You have" if full.whose == "yours" else "All users together have"
                message = f"{whose} too many waiting requests. Try again in {full.retry_after} s."
                raise Busy(full.retry_after, message) from full
            except redis.exceptions.RedisError:
                if not self.arrival or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.5)  # the request was queued before, so Redis is probably restarting

    async def _read(self, client: Any, rid: str) -> AsyncGenerator[dict[str, Any], None]:
        last, renewed = 0, time.monotonic()
        taken: float | None = None
        while True:
            entries = await client.xread({f"tokens:{rid}": f"{last}-0"}, block=2000, count=256)
            now = time.monotonic()
            for number, entry in entries[0][1] if entries else ():
                if number != f"{last + 1}-0":
                    raise Failed("server_died", "Part of the response was lost. Try again.")
                last += 1
                line = json.loads(entry["line"])
                if line["t"] == "taken":
                    taken = now
                elif line["t"] == "error":
                    raise Failed(
                        line.get("code", "failed"), line.get("message", "The model could not respond.")
                    )
                else:
                    yield line
                if line["t"] == "done":
                    return
            if now - renewed > RENEW_S:
                renewed = now
                await self._renew(client, rid, last)
            if taken is not None and now - taken > self.most_s:
                raise Failed("timeout", "The response took too long and was stopped.")

    async def _renew(self, client: Any, rid: str, last: int) -> None:
        state = await generation_queue.renew(client, self.owner, rid)
        waited = time.monotonic() - self.since
        if state.word == "waiting":
            if not state.served and waited > NO_WORKER_S:
                raise Unavailable(10, "No inference worker is available. Try again in a moment.")
            if waited > WAIT_S:
                raise Unavailable(30, "The request waited too long. Try again later.")
            if not state.notifications:
                await asyncio.to_thread(_notify_workers)
        elif state.word == "lost" and not await client.xread({f"tokens:{rid}": f"{last}-0"}):
            raise _Lost  # there are no unread lines, so the request has not just finished
        if last:
            await client.xtrim(f"tokens:{rid}", minid=f"{last}-0", approximate=False)


def check_model(owner: str, model_id: str) -> TunedModel | None:
    """Raises access.NotFound unless `owner` may generate with this model: one from the catalog, one that was imported, one that
    they added from the Hub, or one of their own, which is returned."""
    if catalog.find(model_id) or base_models.get_added(owner, model_id):
        return None
    return tuned_models.get_for(owner, model_id)


def as_trained(model: TunedModel | None, request: GenerateRequest) -> GenerateRequest:
    """The request in the form that the model was trained on. A model trained on pairs or text has not seen the chat template,
    so a single question is its prompt; it cannot say anything else of a conversation. Raises Failed."""
    if request.messages is None or model is None or model.trained_on not in WITHOUT_CONVERSATIONS:
        return request
    messages = request.messages
    if (
        len(messages) != 1
        or request.tools
        or messages[0].get("role") != "user"
        or not isinstance(messages[0].get("content"), str)
    ):
        raise Failed(
            "chat_unsupported",
            f"This model was trained on {WITHOUT_CONVERSATIONS[model.trained_on]}, not on conversations, so it accepts a "
            "single user message, no system message and no tools. Send the text as the prompt of /v1/completions instead.",
        )
    return replace(request, messages=None, prompt=messages[0]["content"])


def _notify_workers() -> None:
    """Notifies the workers that a request is waiting. Best effort: readers repeat it, and a worker checks the queue after each
    request."""
    redis_client.enqueue("generate", expires=20)


async def _leave(client: Any, owner: str, rid: str) -> None:
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        await client.aclose()  # use a new connection: the old one may hold the reply of a cancelled command
    client = redis_client.own_client()
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        await generation_queue.leave(client, owner, rid)
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        await client.aclose()


@dataclass(frozen=True)
class Completion:
    """The complete response. `texts[i]` is the text of choice i; the tokens are those of the serve protocol."""

    texts: list[str]
    tokens: list[list[dict[str, Any]]]
    usage: dict[str, int]
    choices: list[dict[str, Any]]  # as in the last line of the protocol


async def complete(owner: str, request: GenerateRequest) -> Completion:
    """Collects all of `stream`."""
    choices = request.n * len(request.prompts or [1])
    tokens: list[list[dict[str, Any]]] = [[] for _ in range(choices)]
    done: dict[str, Any] = {"usage": {}, "choices": []}
    async with contextlib.aclosing(stream(owner, request)) as lines:
        async for line in lines:
            if line["t"] == "token":
                tokens[line["index"]].append(line)
            elif line["t"] == "done":
                done = line
    texts = ["".join(t["text"] for t in row) for row in tokens]
    return Completion(texts, tokens, done["usage"], done["choices"])
