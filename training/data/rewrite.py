"""Rows as their author wrote them, and the writers of new files with such rows.

A new version of a file keeps every field of a row, used or not. JSON Lines stays JSON Lines, a JSON array stays one,
and a table of text keeps its columns; Parquet and documents become JSON Lines.
"""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from pathlib import Path
from types import TracebackType
from typing import Any

from training.data import readers, row_schemas
from training.data.bad_row import SURROGATE, BadFile, BadRow, check_text, deeper_than, kind_of
from training.data.formats import DEFAULT_LIMITS, OnBad
from training.data.readers import Format, Limits
from training.data.row_schemas import Row

KEPT = ("jsonl", "json", "csv")  # containers that a new version keeps


@dataclass(frozen=True, slots=True)
class Source:
    """A row as written: all of its fields, in their order. `text` is its line if the file is JSON Lines."""

    line: int
    record: dict[str, Any]
    text: str = ""


def new_format(format: Format) -> Format:
    """The format of a new version of a file with this one."""
    if format.container == "csv":
        return format
    container = format.container if format.container in KEPT else "jsonl"
    return replace(format, container=container, encoding="utf-8", delimiter=",", header=True)


def kind_of_rows(format: Format) -> str:
    """What the rows are, in words. Files of one kind can be merged."""
    return {
        "chat": "conversations",
        "sharegpt": "conversations",
        "completion": "prompt and answer pairs",
        "instruction": "instructions with answers",
        "preference": "preference pairs",
        "segments": "segments",
        "text": "plain texts",
    }.get(format.shape, "rows of an unknown kind")


def sources(
    path: str | Path, format: Format, on_bad: OnBad, limits: Limits = DEFAULT_LIMITS
) -> Iterator[tuple[int, Row, Source]]:
    """(number among the readable rows, the row as it is trained on, the row as written). Bad rows go to
    `on_bad`. Raises BadFile."""
    read = row_schemas.Reader(format.shape, format.columns, format.version)
    number = 0
    for source in _sources(Path(path), format, limits):
        try:
            if isinstance(source, BadRow):
                raise source
            row = read(source.line, source.record)
        except BadFile:
            raise
        except BadRow as bad:
            on_bad(bad)
            continue
        number += 1
        yield number, row, source


def _sources(path: Path, format: Format, limits: Limits) -> Iterator[Source | BadRow]:
    if format.container == "jsonl":
        with path.open("rb") as file:
            for line, text in readers.lines(file, format, limits):
                if isinstance(text, BadRow):
                    yield text
                elif text and not text.isspace():
                    record = readers.parse(line, text, limits)
                    yield (
                        record
                        if isinstance(record, BadRow)
                        else Source(line, record, text.strip("\ufeff\r\n"))
                    )
        return
    every_column = replace(format, columns={}) if format.container == "parquet" else format
    for line, record in readers.records(path, every_column, limits, all_columns=True):
        if isinstance(record, BadRow):
            yield record
        else:
            yield Source(line, _plain(record) if format.container == "parquet" else record)


def _plain(value: Any) -> Any:
    """The value of a Parquet column in JSON: dates and numbers without a JSON form as text, bytes in base64."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time) else str(value)


def check_record(line: int, record: Any, format: Format, columns: Sequence[str] = ()) -> Row:
    """The row that an edited or added record becomes. `columns`: the names in a table of text. Raises BadRow."""
    if not isinstance(record, dict):
        raise BadRow(line, f"the row is {kind_of(record)}, not an object", row_schemas.SHAPE_HINT)
    if deeper_than(record, DEFAULT_LIMITS.depth):
        raise BadRow(line, f"values are nested more than {DEFAULT_LIMITS.depth} deep", "Keep examples flat.")
    if format.container == "csv":
        for name, value in record.items():
            if columns and name not in columns:
                raise BadRow(
                    line,
                    f"the table has no column {name[:60]!r}",
                    f"Its columns are {', '.join(columns)[:300]}.",
                )
            check_text(line, repr(name[:60]), value)
        if not any(record.values()):
            raise BadRow(line, "all cells are empty", "Fill them in or drop the row.")
    return row_schemas.Reader(format.shape, format.columns, format.version)(line, record)


def parse_record(text: str, line: int = 1) -> dict[str, Any]:
    """A row typed as JSON. Raises BadRow with the line and the character where it cannot be read."""
    try:
        value = readers.DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason, fix = row_schemas.explain_json(text, error)
        at = f"line {error.lineno}, character {error.colno} of the JSON: "
        raise BadRow(line, at + re.sub(r"^invalid JSON at character \d+: ", "", reason), fix) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(line, readers.reason_of(error), row_schemas.JSON_HINT) from error
    if not isinstance(value, dict):
        raise BadRow(line, f"the row is {kind_of(value)}, not an object", row_schemas.SHAPE_HINT)
    return value


def as_json(record: Any) -> str:
    """On one line, readable, and always possible to store as UTF-8."""
    text = json.dumps(record, ensure_ascii=False)
    return json.dumps(record) if not text.isascii() and SURROGATE.search(text) else text


def line_ranges(text: str) -> list[tuple[int, int]]:
    """`1-100, 205` as [(1, 100), (205, 205)]. Raises ValueError."""
    ranges = []
    for part in text.replace("–", "-").split(","):
        match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < first <= last:
            raise ValueError(f"Lines: {part.strip()[:40]!r} is not a range. Write lines as in 1-100, 205.")
        ranges.append((first, last))
    return ranges


class Writer:
    """Writes rows to a new file. `format` is `new_format` of the file at `like`, whose header a table keeps."""

    def __init__(self, path: str | Path, format: Format, like: str | Path) -> None:
        self.format, self.count = format, 0
        table = format.container == "csv"
        self.file = Path(path).open("w", encoding=format.encoding, newline="" if table else "\n")  # noqa: SIM115  closed by __exit__
        self.names: list[str] = []
        if table:
            self._begin_table(Path(like))

    def _begin_table(self, like: Path) -> None:
        # \r\n makes the writer put cells with either character in quotes
        self.table = csv.writer(self.file, delimiter=self.format.delimiter, lineterminator="\r\n")
        bom, cells = _header(like, self.format)
        self.file.write("\ufeff" * bom)
        self.names = readers.column_names(1, cells, DEFAULT_LIMITS, self.format.header)
        if self.format.header:
            self.table.writerow(cells)

    def write(self, record: Mapping[str, Any], text: str = "") -> None:
        """`text`: the row's line in a JSON Lines file, which is copied unchanged."""
        self.count += 1
        if self.format.container == "csv":
            self.table.writerow([record.get(name, "") for name in self.names])
        elif self.format.container == "json":
            self.file.write(("[\n" if self.count == 1 else ",\n") + as_json(record))
        else:
            self.file.write((text or as_json(record)) + "\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.format.container == "json":
            self.file.write("\n]\n" if self.count else "[]\n")
        self.file.close()


def _header(path: Path, format: Format) -> tuple[bool, list[str]]:
    """(whether a byte order mark is at the start, the cells of the first row)."""
    with path.open("rb") as file:
        bom = file.read(3).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if format.version < 2 and format.encoding != "utf-8":
            bom = False  # then it is part of the first column's name
        file.seek(0)
        stream = io.TextIOWrapper(file, format.encoding, newline="")
        csv.field_size_limit(DEFAULT_LIMITS.line_bytes)
        for number, cells in enumerate(csv.reader(stream, delimiter=format.delimiter), 1):
            if bom and number == 1 and cells:
                cells[0] = cells[0].removeprefix("\ufeff")
            separator = number == 1 and readers.names_separator(format.delimiter.join(cells))
            if any(cells) and not separator:
                return bom, cells
    return bom, []
