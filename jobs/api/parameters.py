"""How the two generation endpoints treat each parameter: a table that is enforced here and shown in docs/api.md.

A parameter that would change the response is either supported or refused by name; one that would not is ignored. Unknown
parameters are refused, as OpenAI does, because we cannot know what they would change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.api.errors import ApiError, bad

Place = Literal["both", "chat", "completions", "message"]
Treatment = Literal["supported", "refused", "ignored"]


@dataclass(frozen=True)
class Parameter:
    names: str  # one or more, separated by spaces
    place: Place
    treatment: Treatment
    note: str = ""
    # Values of a refused parameter that are allowed because, like None, they change nothing.
    neutral: tuple[Any, ...] = ()


TABLE = [
    Parameter("model", "both", "supported"),
    Parameter("messages", "chat", "supported", "`content` as text, or as parts of type `text`"),
    Parameter(
        "tools",
        "chat",
        "supported",
        "up to 128 functions, passed to the model's chat template. Calls that the model writes in its template's form become "
        "`tool_calls`; a malformed call stays text",
    ),
    Parameter(
        "functions",
        "chat",
        "supported",
        "OpenAI's older form of `tools`: the response has `function_call`, with the first call only",
    ),
    Parameter(
        "tool_choice function_call",
        "chat",
        "supported",
        "`auto`, or `none`, which leaves the tools out of the prompt; others are refused, because a call cannot be forced yet",
    ),
    Parameter(
        "prompt",
        "completions",
        "supported",
        "a string, up to 128 strings, token IDs, or up to 128 lists of token IDs",
    ),
    Parameter(
        "max_tokens",
        "both",
        "supported",
        "limited to the end of the context; 0 with `echo` only scores the prompt",
    ),
    Parameter("max_completion_tokens", "chat", "supported", "takes precedence over `max_tokens`"),
    Parameter("temperature", "both", "supported", "0 to 2"),
    Parameter("top_p", "both", "supported", "0 to 1; 0 always selects the most likely token"),
    Parameter("top_k", "both", "supported", "0 or -1 means all tokens"),
    Parameter(
        "min_p",
        "both",
        "supported",
        "0 to 1: minimum probability of a token, relative to the most likely one",
    ),
    Parameter("repetition_penalty", "both", "supported", "0.01 to 2; 1 means no penalty"),
    Parameter("n", "both", "supported", "1 to 8"),
    Parameter("best_of", "completions", "supported", "must equal `n`"),
    Parameter("stop", "both", "supported", "up to 16 strings; empty ones are ignored"),
    Parameter("seed", "both", "supported"),
    Parameter("stream stream_options", "both", "supported"),
    Parameter("logprobs", "both", "supported", "chat: true or false; completions: 0 to 20"),
    Parameter("top_logprobs", "chat", "supported", "0 to 20; above 0 only with `logprobs`"),
    Parameter("echo", "completions", "supported"),
    Parameter("llmtuner", "both", "supported", "`top_k`, as above"),
    Parameter("presence_penalty frequency_penalty", "both", "refused", "", (0,)),
    Parameter("logit_bias", "both", "refused", "", ({},)),
    Parameter("suffix", "completions", "refused", "", ("",)),
    Parameter("response_format", "both", "refused", "except `text`", ({"type": "text"}, {})),
    Parameter("tools functions", "completions", "refused", "", ([],)),
    Parameter("tool_choice function_call", "completions", "refused", "", ("none", "auto")),
    Parameter("modalities", "both", "refused", "except `text`", (["text"], [])),
    Parameter("audio prediction web_search_options", "both", "refused"),
    Parameter("reasoning_effort", "both", "refused", "", ("none",)),
    Parameter("verbosity", "both", "refused", "", ("medium",)),
    Parameter(
        "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend structured_outputs",
        "both",
        "refused",
    ),
    Parameter("user safety_identifier store metadata service_tier", "both", "ignored"),
    Parameter("prompt_cache_key prompt_cache_retention", "both", "ignored"),
    Parameter("parallel_tool_calls", "both", "ignored", "the model decides how many functions it calls"),
    Parameter(
        "role content",
        "message",
        "supported",
        "system, developer, user, assistant, tool, function; `content` may be null if the message calls tools",
    ),
    Parameter(
        "tool_calls function_call",
        "message",
        "supported",
        "of the assistant; `arguments` as a JSON object, in text",
    ),
    Parameter(
        "tool_call_id name", "message", "supported", "of a tool's result; a `name` elsewhere is refused"
    ),
    Parameter("audio", "message", "refused"),
    Parameter(
        "refusal annotations weight",
        "message",
        "ignored",
        "so that you can send back a model's response or a training row unchanged",
    ),
]
ROWS: dict[tuple[str, str], Parameter] = {
    (place, name): row
    for row in TABLE
    for place in (["chat", "completions"] if row.place == "both" else [row.place])
    for name in row.names.split()
}


def check(place: Literal["chat", "completions"], data: Any) -> None:
    """Raises ApiError for the first unsupported parameter of a raw request."""
    data = getattr(data, "_obj", data)  # ninja wraps the data
    if not isinstance(data, Mapping):
        return
    _check(place, data, "")
    for name in ("tool_choice", "function_call"):
        if place == "chat" and data.get(name) not in (None, "auto", "none"):
            raise bad(
                f"{name} can only be 'auto' or 'none'. The model decides whether it calls a function; a call cannot be "
                "forced yet.",
                name,
                "unsupported_parameter",
            )
    messages = data.get("messages")
    for i, message in enumerate(messages if place == "chat" and isinstance(messages, list) else ()):
        if isinstance(message, Mapping):
            _check_message(message, f"messages.{i}")


def _check_message(message: Mapping[str, Any], path: str) -> None:
    _check("message", message, f"{path}.")
    role = message.get("role")
    calls = [name for name in ("tool_calls", "function_call") if message.get(name)]
    if calls and role != "assistant":
        raise bad(f"{path}.{calls[0]} is allowed only in messages of the assistant.", f"{path}.{calls[0]}")
    if "content" in message and message["content"] is None and not calls:
        raise bad(
            f"{path}.content is null, which is allowed only in messages that call tools.", f"{path}.content"
        )
    for name in ("name", "tool_call_id"):
        if message.get(name) and role not in ("tool", "function"):
            raise bad(f"{path}.{name} is supported only in the result of a tool.", f"{path}.{name}")


def _check(place: str, data: Mapping[str, Any], prefix: str) -> None:
    for name, value in data.items():
        row = ROWS.get((place, name))
        if value is None or (row and (row.treatment != "refused" or value in row.neutral)):
            continue
        param = f"{prefix}{name}"[:100]
        if row is None:
            raise ApiError(
                400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
            )
        raise bad(f"{param} is not supported.", param, "unsupported_parameter")


def names(place: str, treatment: Treatment) -> set[str]:
    return {
        name for (row_place, name), row in ROWS.items() if row_place == place and row.treatment == treatment
    }


def as_markdown() -> str:
    """The table in docs/api.md."""
    places = {
        "both": "",
        "chat": "`/chat/completions`: ",
        "completions": "`/completions`: ",
        "message": "in a message: ",
    }
    lines = ["| parameter | | |", "| --- | --- | --- |"]
    for row in TABLE:
        shown = ", ".join(f"`{name}`" for name in row.names.split())
        allowed = [f"`{json.dumps(value)}`" for value in row.neutral] if not row.note else []
        note = row.note or (f"except {', '.join(allowed)}" if allowed else "")
        lines.append(f"| {places[row.place]}{shown} | {row.treatment} | {note} |")
    return "\n".join(lines)
