"""The form that edits one row: a field for each text, one for each message of a conversation, and JSON for everything else.

The form carries the row as it was, so that fields it has no control for are kept, and so that what is typed needs no state on
the server until it is saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.data.bad_row import SURROGATE
from training.data.formats import Format
from training.data.rewrite import as_json

MAX_FIELDS = 200  # rows with more are edited as JSON: Django accepts 1,000 fields in a form
MAX_MESSAGES = 100  # longer conversations are edited as JSON
ROLES = {"role": ("system", "user", "assistant", "tool"), "from": ("system", "human", "gpt")}
# Characters that a form does not send back as they were: control characters, and carriage returns alone.
NOT_TYPABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]|\r(?!\n)")
Record = dict[str, Any]


class Typable:
    """Something with a text area, unless its text is None."""

    text: str | None

    @property
    def lines(self) -> int:
        return lines_for(self.text or "")

    @property
    def shown(self) -> str:
        return in_area(self.text or "")


@dataclass(frozen=True)
class Message(Typable):
    index: int  # in the row as it was
    role: str
    roles: list[str]
    text: str | None  # None if its content is not text
    other: str  # as JSON: the fields that only the JSON form can change


@dataclass(frozen=True)
class RowField(Typable):
    number: int
    name: str
    text: str | None = None
    messages: list[Message] = field(default_factory=list)
    other: str = ""  # as JSON, for a value that only the JSON form can change

    @property
    def label(self) -> str:
        """The name, which no page could show with half of a character in it."""
        return SURROGATE.sub("\ufffd", self.name)


def in_area(text: str) -> str:
    """A text for a text area. Browsers drop a line break at its start, so there is one more."""
    return f"\n{text}"


def lines_for(text: str) -> int:
    """The height of a text area, in lines."""
    return min(16, max(2, sum(1 + len(line) // 80 for line in text.split("\n"))))


def fields_of(record: Record) -> list[RowField]:
    fields = []
    for number, (name, value) in enumerate(record.items()):
        messages = _messages_in(value)
        if messages:
            fields.append(RowField(number, name, messages=[_message(i, m) for i, m in enumerate(messages)]))
        elif _is_typable(value):
            fields.append(RowField(number, name, text=value))
        else:
            fields.append(RowField(number, name, other=as_json(value)))
    return fields


def record_from(post: Mapping[str, Any], record: Record) -> Record:
    """The record with what was typed into the form of `fields_of`."""
    result: Record = {}
    for row_field in fields_of(record):
        value = record[row_field.name]
        if row_field.messages:
            value = _typed_messages(post, row_field, value)
        elif row_field.text is not None:
            value = _typed(post, f"text-{row_field.number}", value)
        result[row_field.name] = value
    return result


def with_message(record: Record, number: int) -> Record:
    """The record with an empty message at the end of a conversation."""
    name, messages = _conversation(record, number)
    if messages is None or len(messages) >= MAX_MESSAGES:
        return record
    role, content = ("from", "value") if "from" in messages[-1] else ("role", "content")
    user, assistant = ("human", "gpt") if role == "from" else ("user", "assistant")
    new = {role: assistant if messages[-1].get(role) == user else user, content: ""}
    return record | {name: _like(record[name], [*messages, new])}


def without_message(record: Record, number: int, index: int) -> Record:
    """The record without a message, unless it is the only one."""
    name, messages = _conversation(record, number)
    if messages is None or len(messages) < 2 or index >= len(messages):
        return record
    return record | {name: _like(record[name], [*messages[:index], *messages[index + 1 :]])}


def blank_record(format: Format, columns: list[str]) -> Record:
    """A new row for a file in this format, whose table has these columns."""
    roles = dict(format.columns)
    if format.container == "csv":
        blank: Record = dict.fromkeys(columns, "")
    else:
        blank = {name: "" for role, name in roles.items()}
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    for shape, role, value in (
        ("chat", "messages", chat),
        ("sharegpt", "conversations", [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]),
        ("segments", "segments", [{"label": False, "text": ""}, {"label": True, "text": ""}]),
    ):
        if format.shape == shape and role in roles:
            blank[roles[role]] = as_json(value) if format.container == "csv" else value
    return blank


def hidden(record: Record) -> str:
    """For the form's hidden field: in ASCII, so that no browser changes it."""
    return json.dumps(record)


def pretty(record: Record) -> str:
    """For the JSON form."""
    text = json.dumps(record, ensure_ascii=False, indent=2)
    return text if text.isascii() or not SURROGATE.search(text) else json.dumps(record, indent=2)


def _messages_in(value: Any) -> list[dict[str, Any]] | None:
    """The messages if the value is a conversation, also as JSON text in a table."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        return None
    is_conversation = all(
        isinstance(message, dict) and isinstance(message.get("role", message.get("from")), str)
        for message in value
    )
    return value if is_conversation else None


def _conversation(record: Record, number: int) -> tuple[str, list[dict[str, Any]] | None]:
    names = list(record)
    if number >= len(names):
        return "", None
    return names[number], _messages_in(record[names[number]])


def _like(value: Any, messages: list[dict[str, Any]]) -> Any:
    return as_json(messages) if isinstance(value, str) else messages


def _keys(message: Mapping[str, Any]) -> tuple[str, str]:
    """The names of a message's role and content."""
    return "role" if "role" in message else "from", "value" if "value" in message else "content"


def _message(index: int, message: dict[str, Any]) -> Message:
    role, content = _keys(message)
    text = message.get(content)
    text = text if _is_typable(text) else None
    shown = (role, content) if text is not None else (role,)
    other = {name: value for name, value in message.items() if name not in shown}
    current = str(message[role])
    roles = list(ROLES[role])
    return Message(
        index,
        current,
        roles if current in roles else [current, *roles],
        text,
        as_json(other) if other else "",
    )


def _typed_messages(post: Mapping[str, Any], row_field: RowField, value: Any) -> Any:
    before = _messages_in(value) or []
    messages = []
    for message, original in zip(row_field.messages, before, strict=True):
        role, content = _keys(original)
        name = f"{row_field.number}-{message.index}"
        typed = dict(original)
        chosen = str(post.get(f"role-{name}", message.role))
        typed[role] = chosen if chosen in message.roles else message.role
        if message.text is not None:
            typed[content] = _typed(post, f"content-{name}", message.text)
        messages.append(typed)
    return value if messages == before else _like(value, messages)


def _typed(post: Mapping[str, Any], name: str, before: str) -> str:
    """What was typed. Browsers send line ends as CR LF, so a text that was not touched is kept as it was."""
    typed = str(post.get(name, before)).replace("\r\n", "\n")
    return before if typed == before.replace("\r\n", "\n") else typed


def _is_typable(value: Any) -> bool:
    return isinstance(value, str) and not NOT_TYPABLE.search(value) and not SURROGATE.search(value)
