"""What cannot be trained on: a row or a file, with the reason and how to fix it."""

from __future__ import annotations

import json
import re
from datetime import date, datetime
from decimal import Decimal
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 32  # of nested values


class BadRow(ValueError):
    """A row that cannot be trained on: its line (0 = the whole file), the reason, and how to fix it."""

    def __init__(self, line: int, reason: str, fix: str = "") -> None:
        reason = SURROGATE.sub("\ufffd", reason)  # the name of a field may have half of a character
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line, self.reason, self.fix = line, reason, fix

    @property
    def sentence(self) -> str:
        """The line, the reason and how to fix it, as a page shows them."""
        text = f"{self}. {self.fix}".strip()
        return text[0].upper() + text[1:]


class BadFile(BadRow):
    """Nothing after this point of the file can be read."""


class BadBase(BadFile):
    """No row can be trained on, because of the base model and not of the file."""


class LeftOut(BadRow):
    """A good row that the base's chat template cannot express. It is left out; the other rows are used."""


def check_text(line: int, name: str, value: Any) -> str:
    """The value if it is text. Raises BadRow, with advice that follows from what it is."""
    if not isinstance(value, str):
        raise BadRow(line, f"{name} is {kind_of(value)}, not text", _advice(value))
    # isascii only reads a flag, so it comes before the search
    if not value.isascii() and SURROGATE.search(value):
        raise BadRow(
            line,
            f"{name} contains half of a character (a lone surrogate)",
            "Write the whole character. An emoji takes two \\u escapes.",
        )
    return value


def _advice(value: Any) -> str:
    if value is None:
        return "Fill it in, or drop the row."
    if isinstance(value, bool | int | float | Decimal):
        return f'Write it as text: "{value}".'[:80] if not isinstance(value, bool) else "Write it as text."
    if isinstance(value, bytes):
        return "The column has bytes. Convert it to text (a string column) before saving the file."
    if isinstance(value, dict | list):
        return "Write the text itself, or choose another column."
    return "Convert the column to text before saving the file."


def from_json(line: int, value: Any, what: str, fix: str, *, blank: bool = False) -> Any:
    """The value, parsed if it is JSON text, as in the cell of a table. `blank`: a blank text is an empty
    list. Raises BadRow, which begins with `what` ("the tools are")."""
    if not isinstance(value, str):
        return value
    if blank and not value.strip():
        return []
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(line, f"{what} text that is not JSON", fix) from error


def check_json(line: int, what: str, value: Any) -> None:
    """Raises BadRow unless the value can be written as JSON, because the model is trained on it in that form. A value
    that was text in its row may be nested too deep for that, or hold NaN; one from Parquet may hold dates."""
    reason = ""
    if deeper_than(value, MAX_DEPTH):
        reason = f"values nested more than {MAX_DEPTH} deep"
    else:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            reason = "half of a character (a lone surrogate)"
        except TypeError:
            reason = "a value that JSON has no form for, such as a date"
        except ValueError:
            reason = "NaN or an infinite number"
    if reason:
        raise BadRow(line, f"{what} contain {reason}", "Write values that JSON can hold.")


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


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, an empty or blank text, list or object, also as JSON text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict | tuple) and not value)


def kind_of(value: Any) -> str:
    """The type of a value of JSON or Parquet in plain words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "binary data",
        Decimal: "a number",
        date: "a date",
        datetime: "a date and time",
    }
    return "empty (null)" if value is None else names.get(type(value), type(value).__name__)
