"""From an uploaded file to rows, one at a time, in bounded memory; every complaint names its line and what to do.

Two steps: `detect` looks at the beginning of a file and says how it is written (container, encoding, columns);
`rows` reads it so. What a row holds is decided in `training.data.row_schemas`. Content decides, never the file's name, except
that plain text and CSV are told apart by their ending when the content could be both.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.data import row_schemas
from training.data.readers import Format, Limits, Part, records
from training.data.row_schemas import BadFile, BadRow, Row
from training.data.sniff import encoding_of, refuse_other_formats

__all__ = ["BadFile", "BadRow", "Format", "Limits", "OnBad", "Part", "Row", "detect", "rows"]

OnBad = Callable[[BadRow], None]
USUAL = Limits()
HEAD_BYTES = 64 * 1024
DELIMITERS = ",;\t|"


def rows(
    path: str | Path,
    format: Format | Mapping[str, Any] | None = None,
    *,
    on_bad: OnBad | None = None,
    limits: Limits = USUAL,
    part: Part | None = None,
) -> Iterator[Row]:
    """Every row in order (of `part`, where the file is JSON Lines). Raises BadRow at the first bad one, or hands each to `on_bad` and goes on.

    BadFile (a BadRow too) always raises: behind it nothing can be read."""
    chosen = Format.of(format) if format is not None else detect(path, limits)
    read = row_schemas.Reader(chosen.shape, chosen.columns)
    for line, record in records(Path(path), chosen, limits, part):
        try:
            if isinstance(record, BadRow):
                raise record
            row = read(line, record)
        except BadFile:
            raise
        except BadRow as bad:
            if on_bad is None:
                raise
            on_bad(bad)
            continue
        yield row


def detect(path: str | Path, limits: Limits = USUAL) -> Format:
    """How the file is written, from its first bytes and first record. Raises BadFile naming what it is instead."""
    found = look(path, limits)
    if found.container in ("csv", "parquet") and not found.shape:
        names = head(path, found, limits)["columns"]
        raise BadFile(
            1 if found.container == "csv" else 0,
            f"its columns are named {', '.join(map(repr, names[:8])) or 'nothing'}, and none is a known name",
            "Choose the columns yourself, or name them prompt and completion (or text, or messages).",
        )
    return found


def look(path: str | Path, limits: Limits = USUAL) -> Format:
    """The same without a word about columns we don't know: the shape is empty then."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0, 2)
        size = file.tell()
    if size == 0:
        raise BadFile(0, "the file is empty", "Upload a file with at least one example.")
    if head.startswith(b"PAR1"):
        from training.data import parquet

        found = row_schemas.recognise(dict.fromkeys(parquet.names(path), ""), forgiving=True)
        return Format("parquet", found[0], columns=found[1]) if found else Format("parquet")
    refuse_other_formats(head)
    encoding = encoding_of(head)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).lstrip("\ufeff")
    start = text.lstrip()[:1]
    suffix = path.suffix.lower()
    if not start:
        raise BadFile(0, "the file has nothing but white space", "Upload a file with at least one example.")
    if start == "[" and suffix not in (".txt", ".md", ".markdown", ".csv", ".tsv"):
        return _with_shape(path, Format("json", encoding=encoding), limits)
    if start == "{" or suffix in (".jsonl", ".ndjson", ".json"):
        return _with_shape(path, Format("jsonl", encoding=encoding), limits)
    table = _table(text, encoding)
    if suffix in (".csv", ".tsv") or (table.shape and suffix not in (".txt", ".md", ".markdown")):
        return table
    return Format("text", "text", encoding, columns={"text": "text"})


def _with_shape(path: Path, format: Format, limits: Limits) -> Format:
    """The shape of the first record that can be read; the others must be like it."""
    for _, record in records(path, format, limits):
        if isinstance(record, dict) and (found := row_schemas.recognise(record)):
            return Format(format.container, found[0], format.encoding, columns=found[1])
    return format  # no record can be read: `rows` tells why, line by line


def _table(text: str, encoding: str) -> Format:
    """The delimiter under which the first line names the most columns, and what they map to."""
    first = text.splitlines()[0] if text.splitlines() else ""
    best = max(DELIMITERS, key=first.count)
    names = [cell.strip() for cell in next(csv.reader([first], delimiter=best), [])]
    found = row_schemas.recognise(dict.fromkeys(names, ""), forgiving=True) if first else None
    return Format("csv", found[0] if found else "", encoding, best, found[1] if found else {})


# --- the beginning of a file, to choose its columns by ---------------------------------------------

HEAD_ROWS, HEAD_COLUMNS, HEAD_CHARS = 5, 40, 2000


def head(path: str | Path, format: Format, limits: Limits = USUAL) -> dict[str, Any]:
    """{"columns": every name, "rows": [{"line", "cells": {name: value}}]} of the first rows, cut to what a page can show."""
    names: dict[str, None] = {}
    shown: list[dict[str, Any]] = []
    if format.container == "text":
        return {"columns": [], "rows": []}
    if format.container == "parquet":
        from training.data import parquet

        names = dict.fromkeys(parquet.names(Path(path)))
    try:
        for line, record in records(
            Path(path), Format(format.container, "", format.encoding, format.delimiter), limits
        ):
            if len(shown) == HEAD_ROWS or isinstance(record, BadFile):
                break
            if isinstance(record, dict):
                names |= dict.fromkeys(record)
                cells = {name: _cell(record[name]) for name in list(record)[:HEAD_COLUMNS]}
                shown.append({"line": line, "cells": cells})
    except BadRow:
        pass  # the report tells of it
    return {"columns": list(names)[: limits.columns], "rows": shown}


def _cell(value: Any) -> Any:
    """As it stands, unless it is too long to show; what is neither text nor JSON is named by its kind."""
    if isinstance(value, str):
        return value if len(value) <= HEAD_CHARS else value[: HEAD_CHARS - 1] + "…"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return f"({row_schemas.kind_of(value)})"
    return value if len(text) <= 2 * HEAD_CHARS else f"({row_schemas.kind_of(value)}, too long to show)"


def preview(shape: str, columns: Mapping[str, str], shown: list[dict[str, Any]]) -> list[Row | BadRow]:
    """What the rows of a `head` would be trained as, were these the columns."""
    found: list[Row | BadRow] = []
    for row in shown:
        try:
            found.append(row_schemas.Reader(shape, columns)(int(row["line"]), row["cells"]))
        except BadRow as bad:
            found.append(bad)
    return found
