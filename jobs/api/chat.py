"""`/completions` and `/chat/completions`: OpenAI's words for what `jobs.inference` streams.

Both are async and hold no thread while text is made; when the caller leaves, Django cancels the view, which closes
the stream and with it the request in the worker.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from django.http import HttpResponseBase, StreamingHttpResponse
from ninja import Router

from jobs.api import errors, models
from jobs.api.caller import INFERENCE, CallerRequest, give_thread_back
from jobs.api.errors import bad
from jobs.api.schemas import ChatCompletion, ChatCreate, Completion, CompletionCreate, Error, Generation
from jobs.inference import generation
from jobs.store import access

router = Router(auth=INFERENCE)
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own
MAX_CHOICES = 1024  # of one request: its prompts times n
MAX_KEPT = 400_000  # tokens and likeliest tokens of an answer that is gathered in memory
DEFAULT_CHAT_TOKENS = 512  # or to the end of the context, whichever comes first
STREAMED: dict[str, Any] = {
    "responses": {200: {"content": {"text/event-stream": {}}}},
}
# The server's words for what asking again would not mend, and OpenAI's.
FINAL = {
    "bad_request": "invalid_value",
    "prompt_too_long": "context_length_exceeded",
    "prompt_failed": "prompt_failed",
    "model_unusable": "model_unusable",
    "model_damaged": "model_damaged",
}
OF_THE_PROMPT = {"context_length_exceeded", "prompt_failed"}
Line = dict[str, Any]


@router.post(
    "/completions",
    response={200: Completion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Continue a text",
)
async def create_completion(request: CallerRequest, body: CompletionCreate) -> Any:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad("best_of is not supported; leave it out or give n.", "best_of", "unsupported_parameter")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens may be 0 only together with echo.", "max_tokens")
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts: Any = [body.prompt] if one else body.prompt
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise bad(f"At most {MAX_CHOICES} choices in one request: give fewer prompts or a smaller n.", "n")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    asked = _ask(body, max_tokens, prompts=prompts, logprobs=body.logprobs, echo=bool(body.echo))
    return await _answer(request, body, asked, TEXT)


@router.post(
    "/chat/completions",
    response={200: ChatCompletion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Answer a conversation",
)
async def create_chat(request: CallerRequest, body: ChatCreate) -> Any:
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    messages = [message.plain() for message in body.messages]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = _ask(body, max_tokens, messages=messages, logprobs=logprobs)
    return await _answer(request, body, asked, CHAT)


# ---- asking ------------------------------------------------------------------------------------


def _ask(body: Generation, max_tokens: int, **what: Any) -> generation.GenerateRequest:
    if body.stream_options and not body.stream:
        raise bad("stream_options is only for streams.", "stream_options")
    extras = body.llmtuner or {}
    if set(extras) - {"top_k"}:
        raise bad("For generation llmtuner takes only top_k.", "llmtuner")
    top_k = extras.get("top_k", 0)
    if type(top_k) is not int or not 0 <= top_k <= 1_000_000:
        raise bad("top_k must be a whole number from 0 (all tokens).", "llmtuner.top_k")
    if body.top_k is not None:
        top_k = max(body.top_k, 0)
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    return generation.GenerateRequest(
        model=models.local_name(body.model),
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=top_k,
        min_p=float(body.min_p or 0),
        repetition_penalty=1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
        stop=[text for text in stop if text],
        seed=body.seed,
        n=body.n or 1,
        **what,
    )


async def _lines_of(owner: str, asked: generation.GenerateRequest) -> AsyncIterator[Line]:
    """What the model says, with the failures in the API's words."""
    lines = generation.stream(owner, asked)
    try:
        async for line in lines:
            yield line
    except access.NotFound as missing:
        raise errors.not_found("model") from missing
    except generation.Failed as failed:
        raise _failure(failed, "prompt" if asked.messages is None else "messages") from failed
    finally:
        await lines.aclose()


# ---- answering ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How one of the two endpoints says what both say."""

    prefix: str  # of ids
    whole: str  # `object` of an answer
    part: str  # `object` of a line of a stream
    choice: Callable[[int, list[Line], str], Line]
    chunk: Callable[[int, Line | None, str | None, int], Line]
    opening: Callable[[int], Line] | None = None  # what a choice says before its first text


async def _answer(
    request: CallerRequest, body: Generation, asked: generation.GenerateRequest, shape: Shape
) -> Any:
    lines = _lines_of(request.auth.owner, asked)
    head = {
        "id": f"{shape.prefix}-{secrets.token_hex(12)}",
        "object": shape.part if body.stream else shape.whole,
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        return await _streamed(lines, head, body, shape)
    return await _whole(lines, head, shape)


# ---- the whole answer --------------------------------------------------------------------------


async def _whole(lines: AsyncIterator[Line], head: Line, shape: Shape) -> Line:
    tokens: dict[int, list[Line]] = {}
    done: Line = {"choices": [], "usage": {}}
    kept = 0
    try:
        async for line in lines:
            if line["t"] == "token":
                tokens.setdefault(line["index"], []).append(line)
                kept += 1 + len(line.get("top") or ())
                if kept > MAX_KEPT:
                    raise bad(
                        "The answer is too large. Ask for fewer prompts at a time, or for a stream.",
                        code="answer_too_large",
                    )
            elif line["t"] == "done":
                done = line
    finally:
        await lines.aclose()  # type: ignore[attr-defined]  # an async generator, typed as an iterator
    choices = [
        shape.choice(choice["index"], tokens.get(choice["index"], []), _reason(choice))
        for choice in done["choices"]
    ]
    return {**head, "choices": sorted(choices, key=lambda choice: choice["index"]), "usage": done["usage"]}


def _failure(failed: generation.Failed, prompt: str) -> errors.ApiError:
    code = FINAL.get(failed.code)
    if code is not None:
        return bad(failed.message, prompt if code in OF_THE_PROMPT else None, code)
    return errors.ApiError(503, failed.message, code=failed.code, retry_after=2)


def _reason(choice: Line) -> str:
    return "length" if choice["finish_reason"] == "length" else "stop"


def _text_choice(index: int, tokens: list[Line], reason: str) -> Line:
    return {
        "index": index,
        "text": "".join(token["text"] for token in tokens),
        "finish_reason": reason,
        "logprobs": _text_logprobs(tokens, 0),
    }


def _chat_choice(index: int, tokens: list[Line], reason: str) -> Line:
    text = "".join(token["text"] for token in tokens)
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": reason,
        "logprobs": _chat_logprobs(tokens),
    }


def _text_logprobs(tokens: list[Line], offset: int) -> Line | None:
    if not any("logprob" in token for token in tokens):
        return None
    names = [token.get("token", "") for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [token.get("logprob") for token in tokens],
        "top_logprobs": [dict(token["top"]) if token.get("top") else None for token in tokens],
        "text_offset": offsets,
    }


def _chat_logprobs(tokens: list[Line]) -> Line | None:
    given = [token for token in tokens if token.get("logprob") is not None]
    if not given:
        return None
    return {
        "content": [
            {
                **_named(token["token"], token["logprob"]),
                "top_logprobs": [_named(*pair) for pair in token.get("top") or []],
            }
            for token in given
        ],
        "refusal": None,
    }


def _named(token: str, logprob: float) -> Line:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


# ---- the stream --------------------------------------------------------------------------------


async def _streamed(
    lines: AsyncIterator[Line], head: Line, body: Generation, shape: Shape
) -> HttpResponseBase:
    """Waits for the first line, so that a refusal still has a status of its own; after that errors are data lines."""
    first = await anext(lines)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    chunks = _chunks(first, lines, head, body.n or 1, include_usage, shape)
    response = StreamingHttpResponse(chunks, content_type="text/event-stream")
    response["X-Accel-Buffering"] = "no"
    return response


async def _chunks(
    first: Line, rest: AsyncIterator[Line], head: Line, n: int, include_usage: bool, shape: Shape
) -> AsyncIterator[bytes]:
    usage = {"usage": None} if include_usage else {}
    offsets: dict[int, int] = {}
    give_thread_back()  # the middlewares have used it again
    try:
        if shape.opening:
            for index in range(n):
                yield _data({**head, "choices": [shape.opening(index)], **usage})
        async for line in _chain(first, rest):
            if line["t"] == "token":
                offset = offsets.get(line["index"], 0)
                offsets[line["index"]] = offset + len(line.get("token", ""))
                yield _data({**head, "choices": [shape.chunk(line["index"], line, None, offset)], **usage})
            elif line["t"] == "done":
                for choice in line["choices"]:
                    yield _data(
                        {**head, "choices": [shape.chunk(choice["index"], None, _reason(choice), 0)], **usage}
                    )
                if include_usage:
                    yield _data({**head, "choices": [], "usage": line["usage"]})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status line is long gone: the stream must carry what happened
        told = errors.translate(error)
        yield _data(errors.body(told.message, told.status, told.param, told.code))
    finally:
        await rest.aclose()  # type: ignore[attr-defined]  # an async generator, typed as an iterator


async def _chain(first: Line, rest: AsyncIterator[Line]) -> AsyncIterator[Line]:
    yield first
    async for line in rest:
        yield line


def _text_chunk(index: int, token: Line | None, reason: str | None, offset: int) -> Line:
    logprobs = _text_logprobs([token], offset) if token else None
    return {
        "index": index,
        "text": token["text"] if token else "",
        "finish_reason": reason,
        "logprobs": logprobs,
    }


def _chat_opening(index: int) -> Line:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def _chat_chunk(index: int, token: Line | None, reason: str | None, offset: int) -> Line:
    delta = {"content": token["text"]} if token else {}
    return {
        "index": index,
        "delta": delta,
        "finish_reason": reason,
        "logprobs": _chat_logprobs([token]) if token else None,
    }


def _data(payload: Line) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


TEXT = Shape("cmpl", "text_completion", "text_completion", _text_choice, _text_chunk)
CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_chunk, _chat_opening)
