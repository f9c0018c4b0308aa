"""`/completions` and `/chat/completions`: the stream from `jobs.inference` in OpenAI's format.

Both are async and hold no thread while text is generated. When the client disconnects, Django cancels the view, which
closes the stream and so cancels the request in the worker.
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
from jobs.api.caller import INFERENCE, CallerRequest, release_thread
from jobs.api.errors import bad
from jobs.api.schemas.common import Error
from jobs.api.schemas.generation import ChatCompletion, ChatCreate, Completion, CompletionCreate, Generation
from jobs.inference import generation
from jobs.store import access

router = Router(auth=INFERENCE)
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default
MAX_CHOICES = 1024  # per request: prompts times n
MAX_BUFFERED = 400_000  # tokens, including alternatives, in a response that is collected in memory
DEFAULT_CHAT_TOKENS = 512  # or up to the end of the context, whichever comes first
STREAMED: dict[str, Any] = {
    "responses": {200: {"content": {"text/event-stream": {}}}},
}
# Errors that a retry cannot fix: the inference server's codes and OpenAI's.
PERMANENT = {
    "bad_request": "invalid_value",
    "prompt_too_long": "context_length_exceeded",
    "prompt_failed": "prompt_failed",
    "chat_unsupported": "chat_unsupported",
    "model_unusable": "model_unusable",
    "model_damaged": "model_damaged",
}
PROMPT_ERRORS = {"context_length_exceeded", "prompt_failed", "chat_unsupported"}
Line = dict[str, Any]


@router.post(
    "/completions",
    response={200: Completion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Create a completion",
)
async def create_completion(request: CallerRequest, body: CompletionCreate) -> Any:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad(
            "best_of is supported only if it equals n. Leave it out, or set it to n.",
            "best_of",
            "unsupported_parameter",
        )
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens can be 0 only if echo is true.", "max_tokens")
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts: Any = [body.prompt] if one else body.prompt
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise bad(f"A request can have at most {MAX_CHOICES} choices. Send fewer prompts, or reduce n.", "n")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    generate = _generate_request(
        body, max_tokens, prompts=prompts, logprobs=body.logprobs, echo=bool(body.echo)
    )
    return await _answer(request, body, generate, TEXT)


@router.post(
    "/chat/completions",
    response={200: ChatCompletion, 400: Error},
    exclude_none=False,
    openapi_extra=STREAMED,
    summary="Create a chat completion",
)
async def create_chat(request: CallerRequest, body: ChatCreate) -> Any:
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs requires logprobs to be true.", "top_logprobs")
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    messages = [message.plain() for message in body.messages]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    generate = _generate_request(body, max_tokens, messages=messages, logprobs=logprobs)
    return await _answer(request, body, generate, CHAT)


# ---- requests ----------------------------------------------------------------------------------


def _generate_request(body: Generation, max_tokens: int, **fields: Any) -> generation.GenerateRequest:
    if body.stream_options and not body.stream:
        raise bad("stream_options is allowed only if stream is true.", "stream_options")
    extras = body.llmtuner or {}
    if set(extras) - {"top_k"}:
        raise bad("In a generation request, llmtuner accepts only top_k.", "llmtuner")
    top_k = extras.get("top_k", 0)
    if type(top_k) is not int or not 0 <= top_k <= 1_000_000:
        raise bad("top_k must be an integer from 0 (all tokens) to 1,000,000.", "llmtuner.top_k")
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
        **fields,
    )


async def _lines_of(owner: str, generate: generation.GenerateRequest) -> AsyncIterator[Line]:
    """The lines of the stream. Failures are raised as API errors."""
    lines = generation.stream(owner, generate)
    try:
        async for line in lines:
            yield line
    except access.NotFound as missing:
        raise errors.not_found("model") from missing
    except generation.Failed as failed:
        raise _failure(failed, "prompt" if generate.messages is None else "messages") from failed
    finally:
        await lines.aclose()


# ---- responses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResponseFormat:
    """How one of the two endpoints formats a response."""

    prefix: str  # of ids
    whole: str  # `object` of a complete response
    part: str  # `object` of a chunk of a stream
    choice: Callable[[int, list[Line], str], Line]
    chunk: Callable[[int, Line | None, str | None, int], Line]
    opening: Callable[[int], Line] | None = None  # the first chunk of a choice, before any text


async def _answer(
    request: CallerRequest, body: Generation, generate: generation.GenerateRequest, format: ResponseFormat
) -> Any:
    lines = _lines_of(request.auth.owner, generate)
    head = {
        "id": f"{format.prefix}-{secrets.token_hex(12)}",
        "object": format.part if body.stream else format.whole,
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        return await _streamed(lines, head, body, format)
    return await _whole(lines, head, format)


# ---- complete responses ------------------------------------------------------------------------


async def _whole(lines: AsyncIterator[Line], head: Line, format: ResponseFormat) -> Line:
    tokens: dict[int, list[Line]] = {}
    done: Line = {"choices": [], "usage": {}}
    buffered = 0
    try:
        async for line in lines:
            if line["t"] == "token":
                tokens.setdefault(line["index"], []).append(line)
                buffered += 1 + len(line.get("top") or ())
                if buffered > MAX_BUFFERED:
                    raise bad(
                        "The response is too large. Send fewer prompts at a time, or set stream to true.",
                        code="answer_too_large",
                    )
            elif line["t"] == "done":
                done = line
    finally:
        await lines.aclose()  # type: ignore[attr-defined]  # an async generator, typed as an iterator
    choices = [
        format.choice(choice["index"], tokens.get(choice["index"], []), _reason(choice))
        for choice in done["choices"]
    ]
    return {**head, "choices": sorted(choices, key=lambda choice: choice["index"]), "usage": done["usage"]}


def _failure(failed: generation.Failed, prompt: str) -> errors.ApiError:
    code = PERMANENT.get(failed.code)
    if code is not None:
        return bad(failed.message, prompt if code in PROMPT_ERRORS else None, code)
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
    scored = [token for token in tokens if token.get("logprob") is not None]
    if not scored:
        return None
    return {
        "content": [
            {
                **_token_logprob(token["token"], token["logprob"]),
                "top_logprobs": [_token_logprob(*pair) for pair in token.get("top") or []],
            }
            for token in scored
        ],
        "refusal": None,
    }


def _token_logprob(token: str, logprob: float) -> Line:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


# ---- streams -----------------------------------------------------------------------------------


async def _streamed(
    lines: AsyncIterator[Line], head: Line, body: Generation, format: ResponseFormat
) -> HttpResponseBase:
    """Waits for the first line, so that an early error still gets its own HTTP status. Later errors are sent as data lines."""
    first = await anext(lines)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    chunks = _chunks(first, lines, head, body.n or 1, include_usage, format)
    response = StreamingHttpResponse(chunks, content_type="text/event-stream")
    response["X-Accel-Buffering"] = "no"
    return response


async def _chunks(
    first: Line, rest: AsyncIterator[Line], head: Line, n: int, include_usage: bool, format: ResponseFormat
) -> AsyncIterator[bytes]:
    usage = {"usage": None} if include_usage else {}
    offsets: dict[int, int] = {}
    release_thread()  # the middleware has occupied a thread again
    try:
        if format.opening:
            for index in range(n):
                yield _data({**head, "choices": [format.opening(index)], **usage})
        async for line in _chain(first, rest):
            if line["t"] == "token":
                offset = offsets.get(line["index"], 0)
                offsets[line["index"]] = offset + len(line.get("token", ""))
                yield _data({**head, "choices": [format.chunk(line["index"], line, None, offset)], **usage})
            elif line["t"] == "done":
                for choice in line["choices"]:
                    yield _data(
                        {
                            **head,
                            "choices": [format.chunk(choice["index"], None, _reason(choice), 0)],
                            **usage,
                        }
                    )
                if include_usage:
                    yield _data({**head, "choices": [], "usage": line["usage"]})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status line has been sent, so the stream carries the error
        refusal = errors.translate(error)
        yield _data(errors.body(refusal.message, refusal.status, refusal.param, refusal.code))
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


TEXT = ResponseFormat("cmpl", "text_completion", "text_completion", _text_choice, _text_chunk)
CHAT = ResponseFormat(
    "chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_chunk, _chat_opening
)
