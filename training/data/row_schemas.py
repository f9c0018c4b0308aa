"""What a record means, by its keys: chat, prompt and completion, instruction, ShareGPT or plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

JSON_HINT = "Each line must be one complete JSON object. Check it with any JSON tool."
SHAPE_HINT = 'An example is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}.'
ROLES = ("system", "user", "assistant")
ROLE_ALIASES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
MAX_MESSAGES = 2000

# The accepted column names for each field of a row, best first.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "query", "input", "source", "user"),
    "completion": ("completion", "answer", "response", "output", "target", "reply", "label", "assistant"),
    "text": ("text", "document", "content", "body"),
}


class BadRow(ValueError):
    """A row that cannot be trained on: its line (0 = the whole file), the reason, and how to fix it."""

    def __init__(self, line: int, reason: str, fix: str = "") -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line, self.reason, self.fix = line, reason, fix


class BadFile(BadRow):
    """Nothing after this point of the file can be read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as its author wrote it. `kind` says which fields are filled: chat, completion or text."""

    line: int
    kind: str
    messages: tuple[dict[str, Any], ...] = ()  # {"role", "content", "weight"?}
    prompt: str = ""
    completion: str = ""
    text: str = ""

    @property
    def size(self) -> int:
        """Approximate number of characters."""
        return (
            len(self.prompt)
            + len(self.completion)
            + len(self.text)
            + sum(len(m["content"]) for m in self.messages)
        )

    @property
    def preview(self) -> str:
        """The row as one string, to show or to compare."""
        if self.kind == "chat":
            return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)
        return self.text if self.kind == "text" else self.prompt + self.completion


def recognize(record: Mapping[str, Any], forgiving: bool = False) -> tuple[str, dict[str, str]] | None:
    """(shape, columns) by the record's keys, or None. `forgiving` ignores case, as in CSV headers."""
    names = {(key.strip().lower() if forgiving else key): key for key in record}

    def first(need: str) -> str | None:
        return next((names[alias] for alias in ALIASES[need] if alias in names), None)

    if column := first("messages"):
        return "chat", {"messages": column}
    if column := first("conversations"):
        return "sharegpt", {"conversations": column}
    answer = first("completion")
    if "instruction" in names and answer:
        columns = {"instruction": names["instruction"], "completion": answer}
        return "instruction", columns | (
            {"input": names["input"]} if "input" in names and names["input"] != answer else {}
        )
    if (prompt := first("prompt")) and answer and prompt != answer:
        return "completion", {"prompt": prompt, "completion": answer}
    if column := first("text"):
        return "text", {"text": column}
    return None


class Reader:
    """Turns records into rows. All rows of a file have the shape of the first."""

    def __init__(self, shape: str, columns: Mapping[str, str]) -> None:
        self.shape, self.columns = shape, dict(columns)

    def __call__(self, line: int, record: Mapping[str, Any]) -> Row:
        if not self.shape or not self.columns:
            recognized = recognize(record)
            if recognized is None:
                _refuse_shape(line, record)
            self.shape, self.columns = recognized
        missing = [name for need, name in self.columns.items() if need != "input" and name not in record]
        if missing:
            _refuse_missing(line, record, missing, self.shape)
        if self.shape in ("chat", "sharegpt"):
            return Row(line, "chat", _messages(line, record[next(iter(self.columns.values()))]))
        if self.shape == "text":
            text = _string(line, record, self.columns["text"])
            if not text.strip():
                raise BadRow(line, f"{self.columns['text']!r} is empty", "Fill it in or drop the row.")
            return Row(line, "text", text=text)
        answer = _string(line, record, self.columns["completion"])
        if self.shape == "instruction":
            return Row(line, "chat", _instruction(line, record, self.columns, answer))
        prompt = _string(line, record, self.columns["prompt"])
        if not prompt.strip() and not answer.strip():
            raise BadRow(line, "prompt and completion are both empty", "Fill them in or drop the row.")
        return Row(line, "completion", prompt=prompt, completion=answer)


def _instruction(
    line: int, record: Mapping[str, Any], columns: Mapping[str, str], answer: str
) -> tuple[dict[str, Any], ...]:
    question = _string(line, record, columns["instruction"])
    more = _string(line, record, columns["input"]) if record.get(columns.get("input", "")) else ""
    if not (question + more).strip() and not answer.strip():
        raise BadRow(line, "instruction and output are both empty", "Fill them in or drop the row.")
    prompt = f"{question}\n\n{more}" if more else question
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def _messages(line: int, value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):  # a CSV cell or Parquet column may contain them as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                line, "the messages are text that is not JSON", 'Write [{"role": ..., "content": ...}, ...].'
            ) from error
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
        message if _is_plain(message) else _message(line, number, message)
        for number, message in enumerate(value, 1)
    )


PLAIN_KEYS = {"role", "content"}


def _is_plain(message: Any) -> bool:
    """Whether a message is already in the final form, as most are: a fast path."""
    if not isinstance(message, dict) or message.keys() != PLAIN_KEYS or message["role"] not in ROLES:
        return False
    content = message["content"]
    return isinstance(content, str) and content.isascii()


def _message(line: int, number: int, message: Any) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRow(
            line, f"{where} is {kind_of(message)}, not an object", 'Write {"role": ..., "content": ...}.'
        )
    given = message.get("role", message.get("from"))
    role = ROLE_ALIASES.get(given, given) if isinstance(given, str) else given
    if role is None:
        raise BadRow(line, f"{where} has no role", "Give it the role system, user or assistant.")
    if role not in ROLES:
        raise BadRow(
            line, f"{where} has the role {str(given)[:40]!r}", "The roles are system, user and assistant."
        )
    content = message.get("content", message.get("value"))
    if content is None:
        extra = (
            "; tool calls are not supported"
            if message.get("tool_calls") or message.get("function_call")
            else ""
        )
        raise BadRow(line, f"{where} has no content{extra}", "Give it text as its content, or drop the row.")
    if isinstance(content, list):
        content = _parts(line, where, content)
    result: dict[str, Any] = {"role": role, "content": _text(line, f"the content of {where}", content)}
    if message.get("weight") is not None:  # Parquet fills missing fields with null
        weight = message["weight"]
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
        result["weight"] = int(weight)
    return result


def _parts(line: int, where: str, parts: list[Any]) -> str:
    """OpenAI's content parts: text only."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                line,
                f"{where} has a part that is not text",
                "Only text is supported. Remove images and files.",
            )
        texts.append(part["text"])
    return "".join(texts)


def _string(line: int, record: Mapping[str, Any], name: str) -> str:
    return _text(line, repr(name), record[name])


SURROGATE = re.compile("[\ud800-\udfff]")


def _text(line: int, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(line, f"{name} is {kind_of(value)}, not text", "Put the value in quotes.")
    # isascii only reads a flag, so it comes before the search
    if not value.isascii() and SURROGATE.search(value):
        raise BadRow(
            line,
            f"{name} contains half of a character (a lone surrogate)",
            "Write the whole character. An emoji takes two \\u escapes.",
        )
    return value


def kind_of(value: Any) -> str:
    """The type of a JSON value in plain words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "empty (null)" if value is None else names.get(type(value), type(value).__name__)


def deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            v
            for item in level
            for v in (item.values() if isinstance(item, dict) else item)
            if isinstance(v, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_shape(line: int, record: Mapping[str, Any]) -> NoReturn:
    if not record:
        raise BadRow(line, "the object is empty", SHAPE_HINT)
    close = next(
        (
            k
            for k in record
            if recognize({k.strip().lower(): ""}) or k.strip().lower() in ("prompt", "completion")
        ),
        None,
    )
    if close is not None and recognize({k.strip().lower(): "" for k in record}):
        raise BadRow(
            line,
            f"the keys are {_names(record)}",
            "Write the keys in lowercase: messages, prompt, completion, text.",
        )
    for need, other in (("prompt", "completion"), ("completion", "prompt")):
        if any(alias in record for alias in ALIASES[need]):
            raise BadRow(line, f"there is a {need} but no {other} (keys: {_names(record)})", SHAPE_HINT)
    raise BadRow(line, f"no messages, prompt and completion, or text (keys: {_names(record)})", SHAPE_HINT)


def _refuse_missing(line: int, record: Mapping[str, Any], missing: list[str], shape: str) -> NoReturn:
    other = recognize(record)
    if other and other[0] != shape:
        raise BadRow(
            line,
            f"this row has the shape {other[0]}, the rows before it {shape}",
            "Use one kind of example per file.",
        )
    raise BadRow(
        line,
        f"{' and '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing (keys: {_names(record)})",
        SHAPE_HINT,
    )


def _names(record: Mapping[str, Any]) -> str:
    shown = [str(key)[:30] for key in list(record)[:6]]
    return ", ".join(shown) + (", …" if len(record) > 6 else "") if shown else "none"


def explain_json(text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    """(reason, how to fix it) for a line that is not JSON, named after the most likely mistake."""
    where = f"invalid JSON at character {error.pos + 1}: "
    stripped = text.strip()
    rest = text[error.pos :].lstrip()
    if error.msg == "Extra data":
        if "\r" in text.strip("\r\n"):
            return where + "lines end with CR alone", "Save the file with LF line endings."
        if rest.startswith("{"):
            return where + "there are two objects on one line", "Put each object on its own line."
        if rest.startswith(("//", "#", "/*")):
            return where + "JSON has no comments", "Remove the comment."
        return (
            where + f"something follows the value ({rest[:20]!r})",
            "Put one object on the line and nothing else.",
        )
    if stripped in ("{", "[") or (
        stripped.startswith("{") and not stripped.endswith("}") and error.pos >= len(text.rstrip())
    ):
        return (
            where + "the object does not end on this line",
            "Put each object on one line (not pretty-printed). The file may also be cut off.",
        )
    if rest.startswith(("//", "#", "/*")):
        return where + "JSON has no comments", "Remove the comment."
    if rest.startswith("'"):
        return where + "single quotes", 'JSON uses double quotes: {"prompt": "…"}.'
    if rest.startswith(("}", "]")) or "trailing comma" in error.msg:
        return where + "a comma before the closing bracket, or a missing value", "Remove the last comma."
    if "property name" in error.msg:
        return where + "a key without double quotes", 'Put keys in double quotes: {"prompt": "…"}.'
    if "control character" in error.msg:
        return (
            where + "a raw line break or control character inside a string",
            "Write it as \\n, \\t or \\u00XX.",
        )
    if "escape" in error.msg:
        return where + "a backslash that does not start a known escape", "Write a backslash as \\\\."
    if "Unterminated" in error.msg:
        return (
            where + "a string is never closed",
            'Close it with a double quote. Write a quote inside a string as \\".',
        )
    if "delimiter" in error.msg:
        return (
            where + error.msg.lower(),
            'A comma, colon or quote is missing here. Write a quote inside a string as \\".',
        )
    return where + f"JSON cannot begin with {rest[:20]!r}", JSON_HINT
