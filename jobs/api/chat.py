"""`/completions` and `/chat/completions`: the stream from `jobs.inference` in OpenAI's format.

Both are async and hold no thread while text is generated. When the client disconnects, Django cancels the view, which
closes the stream and so cancels the request in the worker.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
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
    exclude_unset=True,  # a message without calls has no field for them, as at OpenAI
    openapi_extra=STREAMED,
    summary="Create a chat completion",
)
async def create_chat(request: CallerRequest, body: ChatCreate) -> Any:
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs requires logprobs to be true.", "top_logprobs")
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    messages = [message.plain() for message in body.messages]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tools = body.definitions()
    generate = _generate_request(body, max_tokens, messages=messages, tools=tools, logprobs=logprobs)
    format = CHAT if not tools else CHAT_WITH_TOOLS if body.tools else CHAT_WITH_FUNCTIONS
    return await _answer(request, body, generate, format)


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
    choice: Callable[[int, list[Line], str, Line], Line]
    chunk: Callable[[int, Line | None, str | None, int], Line]
    opening: Callable[[int], Line] | None = None  # the first chunk of a choice, before any text
    functions: bool = False  # calls are written as `function_call`, in OpenAI's older form


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
        format.choice(
            choice["index"], tokens.get(choice["index"], []), _reason(choice, format), _calls(choice, format)
        )
        for choice in done["choices"]
    ]
    return {**head, "choices": sorted(choices, key=lambda choice: choice["index"]), "usage": done["usage"]}


def _failure(failed: generation.Failed, prompt: str) -> errors.ApiError:
    code = PERMANENT.get(failed.code)
    if code is not None:
        return bad(failed.message, prompt if code in PROMPT_ERRORS else None, code)
    return errors.ApiError(503, failed.message, code=failed.code, retry_after=2)


def _reason(choice: Line, format: ResponseFormat) -> str:
    if choice["finish_reason"] == "tool_calls":
        return "function_call" if format.functions else "tool_calls"
    return "length" if choice["finish_reason"] == "length" else "stop"


def _calls(choice: Line, format: ResponseFormat) -> Line:
    """The fields of a message that calls tools."""
    calls = choice.get("tool_calls")
    if not calls:
        return {}
    if format.functions:  # which has only one call
        return {"function_call": calls[0]}
    return {
        "tool_calls": [
            # Nine letters and digits: Mistral's chat templates take no other ids back.
            {"id": secrets.token_hex(5)[:9], "type": "function", "function": call}
            for call in calls
        ]
    }


def _text_choice(index: int, tokens: list[Line], reason: str, calls: Line) -> Line:
    return {
        "index": index,
        "text": "".join(token["text"] for token in tokens),
        "finish_reason": reason,
        "logprobs": _text_logprobs(tokens, 0),
    }


def _chat_choice(index: int, tokens: list[Line], reason: str, calls: Line) -> Line:
    text = "".join(token["text"] for token in tokens)
    content = None if calls and not text else text
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None, **calls},
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
                    last = format.chunk(choice["index"], None, _reason(choice, format), 0)
                    for chunk in [*_call_chunks(choice, format), last]:
                        yield _data({**head, "choices": [chunk], **usage})
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


def _chat_opening(index: int, content: str | None = "") -> Line:
    return _delta(index, {"role": "assistant", "content": content})


def _delta(index: int, delta: Line) -> Line:
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def _call_chunks(choice: Line, format: ResponseFormat) -> list[Line]:
    """Each call as OpenAI streams it: first its name, then its arguments."""
    fields, index = _calls(choice, format), choice["index"]
    chunks = []
    if function := fields.get("function_call"):
        chunks = [{"name": function["name"], "arguments": ""}, {"arguments": function["arguments"]}]
        return [_delta(index, {"function_call": chunk}) for chunk in chunks]
    for number, call in enumerate(fields.get("tool_calls", ())):
        function = call["function"]
        begun = {**call, "index": number, "function": {"name": function["name"], "arguments": ""}}
        chunks += [begun, {"index": number, "function": {"arguments": function["arguments"]}}]
    return [_delta(index, {"tool_calls": [chunk]}) for chunk in chunks]


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
CHAT_WITH_TOOLS = replace(CHAT, opening=partial(_chat_opening, content=None))
CHAT_WITH_FUNCTIONS = replace(CHAT_WITH_TOOLS, functions=True)
