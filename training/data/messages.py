"""Chat messages as people write them: those of OpenAI, ShareGPT and their relatives, in one form.

A message here is {"role", "content"} with, where given: `weight` (0 = not trained on), `name`,
`reasoning_content`, `tool_calls` ([{"type": "function", "id"?, "function": {"name", "arguments": an object}}])
and `tool_call_id`. Whether a model's chat template can express the last five is up to the template
(`training.text.tokenizer`); fields that are none of these are reported as unused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from training.data.bad_row import BadRow, check_json, check_text, from_json, is_empty, kind_of

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the value is the call, as JSON
MAX_MESSAGES = 2000
PLAIN_ROLES = ROLES[:3]
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields of a message that are read here, or that the template may express.
KNOWN = {"role", "from", "content", "value", "weight", "train", "name", "tool_calls", "function_call"} | {
    "tool_call_id",
    *REASONING,
}


def read_messages(
    line: int, value: Any, unused: dict[str, None], *, extended: bool
) -> tuple[dict[str, Any], ...]:
    """The messages of a row. Names of fields that are not used are added to `unused`. `extended` is False
    for files whose report was made when only role, content and weight were read. Raises BadRow."""
    if isinstance(value, str):  # a CSV cell or Parquet column may contain them as JSON
        value = _json(line, value)
    if not isinstance(value, list):
        raise BadRow(
            line,
            f"messages is {kind_of(value)}, not a list",
            'Write "messages": [{"role": ..., "content": ...}, ...].',
        )
    if not value:
        raise BadRow(
            line,
            "messages is an empty list",
            "Give it at least a user and an assistant message, or drop the row.",
        )
    if len(value) > MAX_MESSAGES:
        raise BadRow(line, f"{len(value)} messages; the limit is {MAX_MESSAGES}", "Split the conversation.")
    return tuple(
        [
            message if is_plain(message) else _message(line, number, message, unused, extended)
            for number, message in enumerate(value, 1)
        ]
    )


def is_plain(message: Any) -> bool:
    """Whether a message is already in the final form, as most are: a fast path."""
    if not isinstance(message, dict) or len(message) != 2:
        return False
    content = message.get("content")
    return isinstance(content, str) and content.isascii() and message.get("role") in PLAIN_ROLES


def read_tools(line: int, value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list, or the same as JSON. OpenAI's older `functions` have no wrapper."""
    value = from_json(line, value, "the tools are", "Write a list of tool definitions.", blank=True)
    if is_empty(value):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(
            line,
            f"tools is {kind_of(value)}, not a list of objects",
            'Write "tools": [{"type": "function", "function": {"name": ..., "parameters": {...}}}].',
        )
    tools = tuple(tool if "function" in tool else _wrapped(tool) for tool in value)
    for number, tool in enumerate(tools, 1):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(line, f"tool {number} has no name", 'Write {"name": ..., "parameters": {...}}.')
    check_json(line, "the tools", list(tools))
    return tools


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A definition of OpenAI's older `functions`, or of its Responses API, which has the type beside the name."""
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def tools_from_text(text: str) -> list[dict[str, Any]]:
    """Tool definitions as someone has typed them: a JSON list. Raises BadRow, with the place of the error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise BadRow(0, f"the tools are not JSON: {reason}", "Correct the text there.") from error
    except RecursionError as error:
        raise BadRow(0, "the tools are nested too deeply", "Write a list of tool definitions.") from error
    return list(read_tools(0, value))


def _json(line: int, text: str) -> Any:
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("[{'", "[{\\'")):
            raise BadRow(
                line,
                "the messages are a Python list in single quotes, not JSON",
                "Write the column with json.dumps before saving the file.",
            ) from error
        raise BadRow(
            line, "the messages are text that is not JSON", 'Write [{"role": ..., "content": ...}, ...].'
        ) from error


def _message(line: int, number: int, message: Any, unused: dict[str, None], extended: bool) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRow(
            line, f"{where} is {kind_of(message)}, not an object", 'Write {"role": ..., "content": ...}.'
        )
    given = message.get("role", message.get("from"))
    call = extended and given in CALL_ROLES
    role = "assistant" if call else ROLE_ALIASES.get(given, given) if isinstance(given, str) else given
    if role is None:
        raise BadRow(line, f"{where} has no role", "Give it the role system, user, assistant or tool.")
    if role not in (ROLES if extended else ROLES[:3]):
        raise BadRow(
            line,
            f"{where} has the role {str(given)[:40]!r}",
            "The roles are system, user, assistant and tool.",
        )
    content = message.get("content", message.get("value"))
    calls = _calls(line, where, message, content if call else None, unused) if extended else []
    if call or (content is None and calls):
        content = ""
    if content is None:
        raise BadRow(line, f"{where} has no content", "Give it text as its content, or drop the row.")
    if isinstance(content, list):
        content = _parts(line, where, content, unused)
    result: dict[str, Any] = {
        "role": role,
        "content": check_text(line, f"the content of {where}", content),
    }
    if calls:
        if role != "assistant":
            raise BadRow(
                line,
                f"{where} has tool calls, but is not an assistant message",
                "Only the assistant calls tools.",
            )
        result["tool_calls"] = calls
    weight = _weight(line, where, role, message, extended)
    if weight is not None:
        result["weight"] = weight
    if extended:
        _optional(line, where, message, result)
        unused |= {
            f"messages[].{key}": None
            for key, value in message.items()
            if (key not in KNOWN or _is_beside(key, message, call)) and not is_empty(value)
        }
    return result


def _is_beside(key: str, message: Mapping[str, Any], call: bool) -> bool:
    """Whether this field is not used because the message has another of the same meaning, which comes first."""
    if key == "tool_calls":
        return call and message.get("content", message.get("value")) is not None
    firsts = {"from": ("role",), "value": ("content",)}.get(key, ())
    if key == "function_call":
        return call or not is_empty(message.get("tool_calls"))
    if key in REASONING:
        return any(not is_empty(message.get(first)) for first in REASONING[: REASONING.index(key)])
    return any(first in message for first in firsts)


def _optional(line: int, where: str, message: Mapping[str, Any], result: dict[str, Any]) -> None:
    """What only some chat templates can express: the name, the tool call that is answered, the reasoning."""
    for key in ("name", "tool_call_id"):
        if not is_empty(message.get(key)):
            result[key] = check_text(line, f"the {key} of {where}", message[key])
    reasoning = next((message[key] for key in REASONING if not is_empty(message.get(key))), None)
    if reasoning is not None:
        result["reasoning_content"] = check_text(line, f"the reasoning of {where}", reasoning)


def _weight(line: int, where: str, role: str, message: Mapping[str, Any], extended: bool) -> int | None:
    """0 or 1 by `weight` (OpenAI) or `train` (axolotl), None if neither is given."""
    flag = message.get("train") if extended else None
    if flag is not None and not isinstance(flag, bool):
        raise BadRow(line, f"the train flag of {where} is {flag!r}"[:120], "It is true or false.")
    weight = message.get("weight")  # Parquet fills missing fields with null
    if weight is None:
        return int(flag) if flag is not None and role == "assistant" else None
    if role != "assistant":
        raise BadRow(
            line,
            f"{where} has a weight, but is not an assistant message",
            "Only assistant messages can have a weight.",
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(
            line, f"the weight of {where} is {weight!r}"[:120], "A weight is 0 (not trained on) or 1."
        )
    return int(weight) if flag is None else int(weight) & int(flag)


def _parts(line: int, where: str, parts: list[Any], unused: dict[str, None]) -> str:
    """OpenAI's content parts: text only."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "image", "input_image", "input_audio", "audio", "video", "file"):
            raise BadRow(
                line,
                f"{where} has a part of type {kind}",
                "Only text can be trained on here. Remove images, sound and files, or drop the row.",
            )
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise BadRow(
                line,
                f"{where} has a part that is not text",
                'Write each part as {"type": "text", "text": ...}.',
            )
        texts.append(part["text"])
        unused |= {
            f"messages[].content[].{key}": None
            for key, value in part.items()
            if key not in ("type", "text") and not is_empty(value)
        }
    return "".join(texts)


def _calls(
    line: int, where: str, message: Mapping[str, Any], written: Any, unused: dict[str, None]
) -> list[dict[str, Any]]:
    """The tool calls of a message, arguments as objects. `written`: ShareGPT's value, one call or several."""
    calls = message.get("tool_calls")
    if written is not None:
        calls = written
    elif is_empty(calls) and not is_empty(message.get("function_call")):
        calls = [message["function_call"]]
    calls = from_json(line, calls, f"the tool call of {where} is", CALL_HINT)
    if is_empty(calls):
        return []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise BadRow(line, f"the tool calls of {where} are {kind_of(calls)}, not a list", CALL_HINT)
    return [_call(line, where, call, unused) for call in calls]


CALL_HINT = 'Write {"type": "function", "function": {"name": ..., "arguments": {...}}}.'


def _call(line: int, where: str, call: Any, unused: dict[str, None]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(line, f"a tool call of {where} has no function name", CALL_HINT)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise BadRow(
                line,
                f"the arguments of the call of {function['name'][:40]!r} in {where} are not JSON",
                "Write them as a JSON object, or as text that holds one.",
            ) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRow(
            line,
            f"the arguments of the call of {function['name'][:40]!r} in {where} are {kind_of(arguments)}",
            "Write them as a JSON object.",
        )
    result: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str) and call["id"]:
        result["id"] = call["id"]
    check_json(line, f"the calls of {where}", result)
    _name_unused_of_call(call, function, "id" in result, unused)
    return result


def _name_unused_of_call(
    call: Mapping[str, Any], function: Mapping[str, Any], has_id: bool, unused: dict[str, None]
) -> None:
    used = {"name", "arguments"} if "arguments" in function else {"name", "parameters"}
    outer = {"type", "function", *(["id"] if has_id else [])}
    fields = (
        [("", call, used | outer)] if function is call else [("", call, outer), ("function.", function, used)]
    )
    unused |= {
        f"messages[].tool_calls[].{path}{key}": None
        for path, given, known in fields
        for key, value in given.items()
        if key not in known and not is_empty(value)
    }
