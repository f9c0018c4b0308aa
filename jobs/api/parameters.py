"""What the two endpoints for text do with each parameter: one table, which refuses, and which docs/api.md shows.

What changes the answer is honoured or refused by its name; what changes nothing is ignored. A name that stands in no
row is refused as OpenAI refuses it, since nobody knows what it was meant to change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.api.errors import ApiError, bad

Place = Literal["both", "chat", "completions", "message"]
Treatment = Literal["honoured", "refused", "ignored"]


@dataclass(frozen=True)
class Parameter:
    names: str  # one or several, separated by spaces
    place: Place
    treatment: Treatment
    note: str = ""
    neutral: tuple[Any, ...] = ()  # what a refused one may be, because it asks for nothing; None always may


TABLE = [
    Parameter("model", "both", "honoured"),
    Parameter("messages", "chat", "honoured", "`content` as text or as parts of the type `text`"),
    Parameter("prompt", "completions", "honoured", "a text, up to 128 texts, token ids, up to 128 lists of token ids"),
    Parameter("max_tokens", "both", "honoured", "at most to the end of the context; 0 together with `echo` only scores the prompt"),
    Parameter("max_completion_tokens", "chat", "honoured", "goes before `max_tokens`"),
    Parameter("temperature", "both", "honoured", "0 to 2"),
    Parameter("top_p", "both", "honoured", "0 to 1; 0 takes the likeliest token"),
    Parameter("top_k", "both", "honoured", "0 or -1: all tokens"),
    Parameter("min_p", "both", "honoured", "0 to 1: least probability of a token, as a part of the likeliest one's"),
    Parameter("repetition_penalty", "both", "honoured", "above 0, to 2; 1: none"),
    Parameter("n", "both", "honoured", "1 to 8"),
    Parameter("best_of", "completions", "honoured", "only the value of `n`"),
    Parameter("stop", "both", "honoured", "up to 16 texts; an empty one stops nothing"),
    Parameter("seed", "both", "honoured"),
    Parameter("stream stream_options", "both", "honoured"),
    Parameter("logprobs", "both", "honoured", "chat: true or false; completions: 0 to 20"),
    Parameter("top_logprobs", "chat", "honoured", "0 to 20; above 0 only with `logprobs`"),
    Parameter("echo", "completions", "honoured"),
    Parameter("llmtuner", "both", "honoured", "`top_k`, as above"),
    Parameter("presence_penalty frequency_penalty", "both", "refused", "", (0,)),
    Parameter("logit_bias", "both", "refused", "", ({},)),
    Parameter("suffix", "completions", "refused", "", ("",)),
    Parameter("response_format", "both", "refused", "but for `text`", ({"type": "text"}, {})),
    Parameter("tools functions", "both", "refused", "", ([],)),
    Parameter("tool_choice function_call", "both", "refused", "", ("none", "auto")),
    Parameter("modalities", "both", "refused", "but for `text`", (["text"], [])),
    Parameter("audio prediction web_search_options", "both", "refused"),
    Parameter("reasoning_effort", "both", "refused", "", ("none",)),
    Parameter("verbosity", "both", "refused", "", ("medium",)),
    Parameter(
        "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend structured_outputs",
        "both",
        "refused",
    ),
    Parameter("user safety_identifier store metadata service_tier", "both", "ignored"),
    Parameter("prompt_cache_key prompt_cache_retention parallel_tool_calls", "both", "ignored"),
    Parameter("role content", "message", "honoured", "system, developer, user, assistant; `content` is never null"),
    Parameter("name", "message", "refused", "", ("",)),
    Parameter("tool_calls", "message", "refused", "", ([],)),
    Parameter("function_call tool_call_id audio", "message", "refused"),
    Parameter("refusal annotations weight", "message", "ignored", "a model's answer or a training row can be sent back"),
]  # fmt: skip
ROWS: dict[tuple[str, str], Parameter] = {
    (place, name): row
    for row in TABLE
    for place in (["chat", "completions"] if row.place == "both" else [row.place])
    for name in row.names.split()
}
TOOLS_ARE_NOT = "Tools are not supported: leave out what they answered and the messages that called them."


def check(place: Literal["chat", "completions"], data: Any) -> None:
    """Raises ApiError naming the first parameter that cannot be honoured, of a request as it came."""
    data = getattr(data, "_obj", data)  # ninja wraps what it has validated
    if not isinstance(data, Mapping):
        return
    _check(place, data, "")
    messages = data.get("messages")
    for i, message in enumerate(messages if place == "chat" and isinstance(messages, list) else ()):
        if isinstance(message, Mapping):
            _check_message(message, f"messages.{i}")


def _check_message(message: Mapping[str, Any], where: str) -> None:
    if message.get("role") in ("tool", "function"):
        raise bad(f"{where} has the role '{message['role']}'. {TOOLS_ARE_NOT}", f"{where}.role")
    if "content" in message and message["content"] is None:
        raise bad(
            f"{where}.content is null: a message without text, as one that calls a tool. {TOOLS_ARE_NOT}",
            f"{where}.content",
        )
    _check("message", message, f"{where}.")


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
    return {name for (where, name), row in ROWS.items() if where == place and row.treatment == treatment}


def as_markdown() -> str:
    """The section of docs/api.md."""
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
        note = row.note or (f"but for {', '.join(allowed)}" if allowed else "")
        lines.append(f"| {places[row.place]}{shown} | {row.treatment} | {note} |")
    return "\n".join(lines)
