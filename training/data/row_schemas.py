"""What a record means, by its keys: chat, prompt and completion, instruction, ShareGPT or plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from training.data.bad_row import BadFile, BadRow, check_text, from_json, is_empty, kind_of
from training.data.messages import read_messages, read_tools

__all__ = ["BadFile", "BadRow", "Reader", "Row", "kind_of", "recognize"]

JSON_HINT = "Each line must be one complete JSON object. Check it with any JSON tool."
SHAPE_HINT = 'An example is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}.'
# The accepted column names for each field of a row, best first.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "chat", "dialog", "dialogue"),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "query", "input", "source", "user"),
    "completion": ("completion", "answer", "response", "output", "target", "reply", "label", "assistant"),
    "text": ("text", "document", "content", "body"),
}


# Fields beside these that are used where they are present, by the kind of use.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "context": ("context", "input"),
    "tools": ("tools", "functions"),
}
OPTIONAL_NAMES = frozenset(name for names in OPTIONAL.values() for name in names)
PREVIEW = 150  # characters
VERSION = 2  # of what is read of a row; files reported under 1 are read as then: only their main fields


class Row(NamedTuple):  # faster to create than a frozen dataclass
    """One example as its author wrote it. `kind` says which fields are filled: chat, completion, text or
    segments."""

    line: int
    kind: str
    messages: tuple[dict[str, Any], ...] = ()  # see training.data.messages
    prompt: str = ""
    completion: str = ""
    text: str = ""
    segments: tuple[tuple[str, bool], ...] = ()  # (text, trained on)
    tools: tuple[dict[str, Any], ...] = ()  # definitions of the tools that the assistant may call
    rejected: str | tuple[dict[str, Any], ...] = ()  # the worse answer of a preference pair
    unused: tuple[str, ...] = ()  # names of fields that hold something and are not used

    @property
    def size(self) -> int:
        """Approximate number of characters."""
        if self.kind == "chat":
            return sum([len(m["content"]) for m in self.messages])
        if self.kind == "segments":
            return sum(len(text) for text, _ in self.segments)
        return len(self.prompt) + len(self.completion) + len(self.text)

    @property
    def preview(self) -> str:
        """The row as one string, to show or to compare."""
        if self.kind == "chat":
            turns = "\n".join([preview_of_message(m) for m in self.messages])
            return f"tools: {json.dumps(self.tools)}\n{turns}" if self.tools else turns
        if self.kind == "segments":
            return "".join(text for text, _ in self.segments)
        return self.text if self.kind == "text" else self.prompt + self.completion


def preview_of_message(message: Mapping[str, Any]) -> str:
    """A message as one string, tool calls included."""
    text = f"{message['role']}: {message['content']}"
    if len(message) == 2 or "tool_calls" not in message:
        return text
    calls = [call["function"] for call in message["tool_calls"]]
    return text + "".join(f"{call['name']}({json.dumps(call['arguments'])})" for call in calls)


def preview_of(row: Row) -> str:
    """The row on one line, cut to 150 characters."""
    return one_line(row.preview)


def one_line(text: str) -> str:
    text = " ".join(text[: 4 * PREVIEW].split())
    return text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"


def recognize(record: Mapping[str, Any], forgiving: bool = False) -> tuple[str, dict[str, str]] | None:
    """(shape, columns) by the record's keys, or None. `forgiving` ignores case, as in CSV headers."""
    names = {(key.strip().lower() if forgiving else key): key for key in record}

    def first(need: str) -> str | None:
        return next((names[alias] for alias in ALIASES[need] if alias in names), None)

    for better, worse in (("chosen", "rejected"), ("preferred_output", "non_preferred_output")):
        if better in names and worse in names:
            columns = {"chosen": names[better], "rejected": names[worse]}
            return "preference", columns | ({"prompt": prompt} if (prompt := first("prompt")) else {})
    if column := first("messages"):
        return "chat", {"messages": column}
    if column := first("conversations"):
        return "sharegpt", {"conversations": column}
    if "segments" in names:
        return "segments", {"segments": names["segments"]}
    answer = first("completion")
    prompt = first("prompt")
    if "instruction" in names and answer:
        columns = {"instruction": names["instruction"], "completion": answer}
        return "instruction", columns | (
            {"input": names["input"]} if "input" in names and names["input"] != answer else {}
        )
    if prompt and answer and prompt != answer:
        # With a system prompt or earlier turns it is a conversation.
        if any(alias in names for alias in (*OPTIONAL["system"], *OPTIONAL["history"])):
            return "instruction", {"instruction": prompt, "completion": answer}
        return "completion", {"prompt": prompt, "completion": answer}
    column = first("text")
    if column and answer and column != answer:  # a text and its label
        return "completion", {"prompt": column, "completion": answer}
    return ("text", {"text": column}) if column else None


class Reader:
    """Turns records into rows. All rows of a file have the shape of the first."""

    def __init__(self, shape: str, columns: Mapping[str, str], version: int = VERSION) -> None:
        self.shape, self.columns, self.extended = shape, dict(columns), version >= 2
        self._more: dict[tuple[str, ...], dict[str, list[str]]] = {}  # by the keys of a record

    def __call__(self, line: int, record: Mapping[str, Any]) -> Row:
        if not self.shape or not self.columns:
            recognized = recognize(record)
            if recognized is None:
                _refuse_shape(line, record)
            self.shape, self.columns = recognized
        for need, name in self.columns.items():
            if name not in record and need != "input":
                missing = [
                    name for need, name in self.columns.items() if need != "input" and name not in record
                ]
                _refuse_missing(line, record, missing, self.shape)
        more = self._fields_beside(record)
        unused: dict[str, None] = {}
        if more:
            unused = {name: None for name in more.get("unused", ()) if not is_empty(record[name])}
        row = self._row(line, record, more, unused)
        return row._replace(unused=tuple(unused)) if unused else row

    def _fields_beside(self, record: Mapping[str, Any]) -> dict[str, list[str]]:
        """{use: fields}, for the fields that `columns` does not name."""
        if not self.extended or len(record) == len(self.columns):
            return {}
        keys = tuple(record)
        if keys not in self._more:
            uses = {alias: use for use, aliases in OPTIONAL.items() for alias in aliases}
            if self.shape not in USED:
                uses = {}
            result: dict[str, list[str]] = {}
            for key in keys:
                if key in self.columns.values():
                    continue
                use = uses.get(key.strip().lower(), "unused")
                result.setdefault(use if use in USED.get(self.shape, ()) else "unused", []).append(key)
            if len(self._more) > 1000:
                self._more.clear()
            self._more[keys] = result
        return self._more[keys]

    def _row(
        self, line: int, record: Mapping[str, Any], more: Mapping[str, list[str]], unused: dict[str, None]
    ) -> Row:
        if self.shape in ("chat", "sharegpt"):
            messages = read_messages(
                line, record[next(iter(self.columns.values()))], unused, extended=self.extended
            )
            if not more:
                return Row(line, "chat", messages)
            tools = tuple(tool for name in more.get("tools", ()) for tool in read_tools(line, record[name]))
            return Row(line, "chat", (*self._system(line, record, more), *messages), tools=tools)
        if self.shape == "text":
            text = _string(line, record, self.columns["text"])
            if not text.strip():
                raise BadRow(line, f"{self.columns['text']!r} is empty", "Fill it in or drop the row.")
            return Row(line, "text", text=text)
        if self.shape == "segments":
            return _segments(line, record[self.columns["segments"]], unused)
        if self.shape == "preference":
            return self._preference(line, record, unused)
        if self.shape == "completion" and _is_conversation(record[self.columns["prompt"]]):
            unused |= {name: None for name in more.get("context", ()) if not is_empty(record[name])}
            return self._conversational_pair(line, record, unused)
        answer = _string(line, record, self.columns["completion"])
        context = [text for name in more.get("context", ()) if (text := self._optional(line, record, name))]
        if self.shape == "instruction":
            return Row(line, "chat", self._instruction(line, record, more, context, answer))
        prompt = _string(line, record, self.columns["prompt"])
        if not prompt.strip() and not answer.strip():
            raise BadRow(line, "prompt and completion are both empty", "Fill them in or drop the row.")
        return Row(line, "completion", prompt="\n\n".join([*context, prompt]), completion=answer)

    def _optional(self, line: int, record: Mapping[str, Any], name: str) -> str:
        return "" if is_empty(record[name]) else _string(line, record, name)

    def _system(
        self, line: int, record: Mapping[str, Any], more: Mapping[str, list[str]]
    ) -> list[dict[str, Any]]:
        texts = [self._optional(line, record, name) for name in more.get("system", ())]
        return [{"role": "system", "content": text} for text in texts if text]

    def _instruction(
        self,
        line: int,
        record: Mapping[str, Any],
        more: Mapping[str, list[str]],
        context: list[str],
        answer: str,
    ) -> tuple[dict[str, Any], ...]:
        question = _string(line, record, self.columns["instruction"])
        if "input" in self.columns and record.get(self.columns["input"]):
            context = [_string(line, record, self.columns["input"]), *context]
        if not (question + "".join(context)).strip() and not answer.strip():
            raise BadRow(line, "instruction and output are both empty", "Fill them in or drop the row.")
        turns = self._system(line, record, more)
        for name in more.get("history", ()):
            turns += _history(line, record[name])
        return (
            *turns,
            {"role": "user", "content": "\n\n".join([question, *context])},
            {"role": "assistant", "content": answer},
        )

    def _conversational_pair(self, line: int, record: Mapping[str, Any], unused: dict[str, None]) -> Row:
        """TRL's conversational prompt and completion: only the completion's answers are trained on."""
        prompt = read_messages(line, record[self.columns["prompt"]], unused, extended=True)
        completion = read_messages(line, record[self.columns["completion"]], unused, extended=True)
        return Row(line, "chat", (*map(_untrained, prompt), *completion))

    def _preference(self, line: int, record: Mapping[str, Any], unused: dict[str, None]) -> Row:
        """A prompt with a better and a worse answer, as TRL and OpenAI write them."""
        chosen, rejected = (record[self.columns[name]] for name in ("chosen", "rejected"))
        prompt = record[self.columns["prompt"]] if "prompt" in self.columns else []
        if isinstance(chosen, str):
            prompt = check_text(line, "the prompt", prompt) if prompt else ""
            worse = check_text(line, repr(self.columns["rejected"]), rejected)
            return Row(line, "completion", prompt=prompt, completion=chosen, rejected=worse)
        tools: tuple[dict[str, Any], ...] = ()
        if isinstance(prompt, dict):  # OpenAI: {"messages", "tools"}
            tools = read_tools(line, prompt.get("tools"))
            unused |= {
                f"{self.columns['prompt']}.{key}": None
                for key, value in prompt.items()
                if key not in ("messages", "tools") and not is_empty(value)
            }
            prompt = prompt.get("messages")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        before = read_messages(line, prompt, unused, extended=True) if prompt else ()
        better = read_messages(line, chosen, unused, extended=True)
        worse_turns = read_messages(line, rejected, unused, extended=True)
        return Row(line, "chat", (*map(_untrained, before), *better), tools=tools, rejected=worse_turns)


# The optional fields that each shape has a use for.
USED: dict[str, tuple[str, ...]] = {
    "chat": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "instruction": ("system", "history", "context"),
    "completion": ("context",),
}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _history(line: int, value: Any) -> list[dict[str, Any]]:
    """Earlier turns as Alpaca's [[question, answer], …]. They are context and not trained on."""
    value = from_json(line, value, "the history is", HISTORY_HINT, blank=True)
    turns: list[dict[str, Any]] = []
    if is_empty(value):
        return turns
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow(line, "the history is not a list of pairs", HISTORY_HINT)
    for pair in value:
        question, answer = (check_text(line, "a turn of the history", text) for text in pair)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer, "weight": 0})
    return turns


HISTORY_HINT = 'Write "history": [["question", "answer"], ...].'


def _segments(line: int, value: Any, unused: dict[str, None]) -> Row:
    """Axolotl's template-free form: pieces of text, `label` says which are trained on."""
    hint = 'Write "segments": [{"label": false, "text": ...}, {"label": true, "text": ...}].'
    value = from_json(line, value, "the segments are", hint)
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise BadRow(line, "segments is not a list of objects", hint)
    segments = []
    for number, part in enumerate(value, 1):
        if not isinstance(part.get("label"), bool):
            raise BadRow(line, f"segment {number} has no label that is true or false", hint)
        segments.append((check_text(line, f"the text of segment {number}", part.get("text")), part["label"]))
        unused |= {
            f"segments[].{key}": None
            for key, given in part.items()
            if key not in ("label", "text") and not is_empty(given)
        }
    return Row(line, "segments", segments=tuple(segments))


def _string(line: int, record: Mapping[str, Any], name: str) -> str:
    return check_text(line, repr(name), record[name])


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
    fix = SHAPE_HINT
    inside = next((key for key, value in record.items() if _is_conversation(value)), None)
    if inside is not None:
        fix = (
            f"If the list in {inside[:60]!r} has the examples, save it as a file of its own. "
            "If it has messages, name the field messages."
        )
    raise BadRow(line, f"no messages, prompt and completion, or text (keys: {_names(record)})", fix)


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
        if rest.rstrip() == ",":
            return where + "a comma after the object", "Remove the comma at the end of the line."
        return (
            where + f"something follows the value ({rest.rstrip()[:20]!r})",
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
