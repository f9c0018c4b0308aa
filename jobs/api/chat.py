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

from jobs import access, inference
from jobs.api import errors, models
from jobs.api.caller import INFERENCE, CallerRequest, give_thread_back
from jobs.api.errors import bad
from jobs.api.schemas import ChatCompletion, ChatCreate, Completion, CompletionCreate, Error, Generation

router = Router(auth=INFERENCE)
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own
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
}
Line = dict[str, Any]


@router.post(
    "/completions",
    response={200: Completion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Continue a text",
)
async def create_completion(request: CallerRequest, body: CompletionCreate) -> Any:
    _refuse_what_we_lack(body)
    if body.suffix:
        raise bad("Inserting before a suffix is not supported.", "suffix", "unsupported_parameter")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad("best_of is not supported; leave it out or give n.", "best_of", "unsupported_parameter")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens may be 0 only together with echo.", "max_tokens")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) * (body.n or 1) > 16:
        raise bad("At most 16 choices in one request: give fewer prompts or a smaller n.", "n")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    asked = [
        _ask(body, max_tokens, prompt=prompt, logprobs=body.logprobs, echo=bool(body.echo))
        for prompt in prompts
    ]
    return await _answer(request, body, asked, TEXT)


@router.post(
    "/chat/completions",
    response={200: ChatCompletion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Answer a conversation",
)
async def create_chat(request: CallerRequest, body: ChatCreate) -> Any:
    _refuse_what_we_lack(body)
    if body.tools:
        raise bad("Tools are not supported.", "tools", "unsupported_parameter")
    if body.response_format and body.response_format.get("type") != "text":
        raise bad("Only text answers are supported.", "response_format", "unsupported_parameter")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    messages = [message.plain() for message in body.messages]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = _ask(body, max_tokens, messages=messages, logprobs=logprobs)
    return await _answer(request, body, [asked], CHAT)


# ---- asking ------------------------------------------------------------------------------------


def _refuse_what_we_lack(body: Generation) -> None:
    """Rather a clear no than an answer that silently ignored half of the question."""
    for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(body, name):
            raise bad(f"{name} is not supported.", name, "unsupported_parameter")
    if body.stream_options and not body.stream:
        raise bad("stream_options is only for streams.", "stream_options")


def _ask(body: Generation, max_tokens: int, **what: Any) -> inference.GenerateRequest:
    extras = body.llmtuner or {}
    if set(extras) - {"top_k"}:
        raise bad("For generation llmtuner takes only top_k.", "llmtuner")
    top_k = extras.get("top_k", 0)
    if type(top_k) is not int or not 0 <= top_k <= 1_000_000:
        raise bad("top_k must be a whole number from 0 (all tokens).", "llmtuner.top_k")
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    return inference.GenerateRequest(
        model=models.local_name(body.model),
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=top_k,
        stop=stop,
        seed=body.seed,
        n=body.n or 1,
        **what,
    )


async def _one_after_another(owner: str, asked: list[inference.GenerateRequest]) -> AsyncIterator[Line]:
    """The lines of all requests as if they were one: choices numbered through, one usage at the end."""
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    choices: list[Line] = []
    for place, one in enumerate(asked):
        lines = inference.stream(owner, one)
        try:
            async for line in lines:
                if line["t"] == "done":
                    choices += [
                        {**choice, "index": choice["index"] + place * one.n} for choice in line["choices"]
                    ]
                    usage = {name: usage[name] + int(line["usage"].get(name, 0)) for name in usage}
                elif line["t"] == "token":
                    yield {**line, "index": line["index"] + place * one.n}
                elif place == 0:
                    yield line
        except access.NotFound as missing:
            raise errors.not_found("model") from missing
        finally:
            await lines.aclose()
    yield {"t": "done", "choices": choices, "usage": usage}


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
    request: CallerRequest, body: Generation, asked: list[inference.GenerateRequest], shape: Shape
) -> Any:
    lines = _one_after_another(request.auth.owner, asked)
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
    try:
        async for line in lines:
            if line["t"] == "token":
                tokens.setdefault(line["index"], []).append(line)
            elif line["t"] == "done":
                done = line
    except inference.Failed as failed:
        raise _failure(failed) from failed
    choices = [
        shape.choice(choice["index"], tokens.get(choice["index"], []), _reason(choice))
        for choice in done["choices"]
    ]
    return {**head, "choices": sorted(choices, key=lambda choice: choice["index"]), "usage": done["usage"]}


def _failure(failed: inference.Failed) -> errors.ApiError:
    code = FINAL.get(failed.code)
    if code is not None:
        return bad(failed.message, code=code)
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
    try:
        first = await anext(lines)
    except inference.Failed as failed:
        raise _failure(failed) from failed
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
        told = _failure(error) if isinstance(error, inference.Failed) else errors.translate(error)
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
