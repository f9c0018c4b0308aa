"""Reads the rows of an uploaded file one at a time, in bounded memory. Every error names its line and what to do.

Two steps: `detect` reads the beginning of a file and returns its format (container, encoding, columns);
`rows` reads the file in that format. `training.data.row_schemas` decides what a row contains. The format is
detected from the content and not from the file name. Only if the content could be either plain text or CSV, the
extension decides.
A .txt file is a table only if all rows at its beginning have the same number of cells.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.data import archive, row_schemas
from training.data.bad_row import BadFile, BadRow, kind_of
from training.data.columns import first_row_is_data
from training.data.readers import ByteRange, Format, Limits, names_separator, records
from training.data.row_schemas import Row
from training.data.sniff import encoding_of, refuse_other_formats

__all__ = ["BadFile", "BadRow", "ByteRange", "Format", "Limits", "OnBad", "Row", "detect", "rows"]

OnBad = Callable[[BadRow], None]
DEFAULT_LIMITS = Limits()
HEAD_BYTES = 64 * 1024
DELIMITERS = ",;\t|"


def rows(
    path: str | Path,
    format: Format | Mapping[str, Any] | None = None,
    *,
    on_bad: OnBad | None = None,
    limits: Limits = DEFAULT_LIMITS,
    part: ByteRange | None = None,
) -> Iterator[Row]:
    """Every row in order (only those of `part`, if the file is JSON Lines). Raises BadRow at the first bad
    row, or passes each to `on_bad` and continues.

    BadFile (a subclass of BadRow) is always raised: nothing after it can be read."""
    chosen = Format.of(format) if format is not None else detect(path, limits)
    read = row_schemas.Reader(chosen.shape, chosen.columns, chosen.version)
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


def detect(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Format:
    """The format of a file, from its first bytes and first record. Raises BadFile, which says what the
    file is instead."""
    detected = detect_lenient(path, limits)
    if detected.container in ("csv", "parquet") and not detected.shape:
        beginning = head(path, detected, limits)
        names = [name[:60] for name in beginning["columns"]]
        raise BadFile(
            1 if detected.container == "csv" else 0,
            f"its columns are named {', '.join(map(repr, names[:8])) or 'nothing'}, and none is a known name",
            "Choose the columns yourself, or name them prompt and completion (or text, or messages)."
            + (" If the first row is data, choose that too." if beginning.get("first_row_is_data") else ""),
        )
    return detected


def detect_lenient(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Format:
    """The same, but with unknown columns the shape is empty and nothing is raised."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0, 2)
        size = file.tell()
    if size == 0:
        raise BadFile(0, "the file is empty", "Upload a file with at least one example.")
    if head.startswith(b"PAR1"):
        from training.data import parquet

        recognized = row_schemas.recognize(dict.fromkeys(parquet.names(path), ""), forgiving=True)
        return Format("parquet", recognized[0], columns=recognized[1]) if recognized else Format("parquet")
    if head.startswith(archive.MAGIC):
        archive.check(path, limits.decoded_bytes)
        return Format("zip", "text", columns={"text": "text"})
    refuse_other_formats(head)
    encoding = encoding_of(head)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).lstrip("\ufeff")
    start = text.lstrip()[:1]
    suffix = path.suffix.lower()
    if not start:
        raise BadFile(0, "the file contains only white space", "Upload a file with at least one example.")
    if start == "[" and suffix not in (*archive.DOCUMENTS, ".csv", ".tsv"):
        return _with_shape(path, Format("json", encoding=encoding), limits)
    if start == "{" or suffix in (".jsonl", ".ndjson", ".json"):
        return _with_shape(path, Format("jsonl", encoding=encoding), limits)
    table = _table(text, encoding)
    if suffix in (".csv", ".tsv") or (table.shape and suffix not in archive.DOCUMENTS):
        return table
    # A text may have commas in its first line; a table has as many columns in all of its lines.
    # Excel's "Unicode text" is UTF-16 with tabs.
    unicode_text = encoding != "utf-8" and table.delimiter == "\t"
    if suffix not in archive.MARKDOWN and (table.shape or unicode_text) and _is_table(text, table, size):
        return table
    return Format("text", "text", encoding, columns={"text": "text"})


def _with_shape(path: Path, format: Format, limits: Limits) -> Format:
    """Adds the shape of the first readable record; the others must have the same."""
    for _, record in records(path, format, limits):
        if isinstance(record, dict) and (recognized := row_schemas.recognize(record)):
            return Format(format.container, recognized[0], format.encoding, columns=recognized[1])
    return format  # no record can be read: `rows` reports why, line by line


def _table(text: str, encoding: str) -> Format:
    """The delimiter that gives the first line the most columns, and what the columns map to."""
    lines = [line for line in text.splitlines() if line.strip("".join((*DELIMITERS, " ")))]
    first = lines[0] if lines else ""
    if best := names_separator(text.partition("\n")[0]):
        first = lines[1] if len(lines) > 1 else ""
    else:
        best = max(DELIMITERS, key=first.count)
    names = [cell.strip() for cell in next(csv.reader([first], delimiter=best), [])]
    recognized = row_schemas.recognize(dict.fromkeys(names, ""), forgiving=True) if first else None
    return Format(
        "csv", recognized[0] if recognized else "", encoding, best, recognized[1] if recognized else {}
    )


def _is_table(text: str, table: Format, size: int) -> bool:
    """Whether the beginning of a file has the same number of cells, two or more, in every row."""
    lines = text.splitlines(keepends=True)
    whole = size <= HEAD_BYTES
    try:
        read = list(csv.reader(lines if whole else lines[:-1], delimiter=table.delimiter, strict=True))
    except csv.Error:
        return False  # or the last cell goes on after the beginning of the file
    counts = {len(cells) for cells in read if any(cells)}
    return len(read) > 1 and len(counts) == 1 and counts.pop() > 1


# --- the beginning of a file, to choose its columns by ---------------------------------------------

HEAD_ROWS, HEAD_COLUMNS, HEAD_CHARS = 5, 40, 2000


def head(path: str | Path, format: Format, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """{"columns": every name, "rows": [{"line", "cells": {name: value}}]} of the first rows, cut to fit on
    a page. "first_row_is_data" is there if a table's first row does not look like names."""
    names: dict[str, None] = {}
    shown: list[dict[str, Any]] = []
    if format.container in ("text", "zip"):
        return {"columns": [], "rows": []}
    if format.container == "parquet":
        from training.data import parquet

        names = dict.fromkeys(parquet.names(Path(path)))
    try:
        for line, record in records(
            Path(path),
            Format(format.container, "", format.encoding, format.delimiter, header=format.header),
            limits,
            all_columns=True,
        ):
            if len(shown) == HEAD_ROWS or isinstance(record, BadFile):
                break
            if isinstance(record, dict):
                names |= dict.fromkeys(record)
                cells = {name: _cell(record[name]) for name in list(record)[:HEAD_COLUMNS]}
                shown.append({"line": line, "cells": cells})
    except BadRow:
        pass  # the report shows it
    columns = list(names)[: limits.columns]
    is_data = (
        format.container == "csv"
        and format.header
        and first_row_is_data(columns, [r["cells"] for r in shown])
    )
    return {"columns": columns, "rows": shown, **({"first_row_is_data": True} if is_data else {})}


def _cell(value: Any) -> Any:
    """The value unless it is too long to show; a value that is neither text nor JSON is replaced by its
    type."""
    if isinstance(value, str):
        return value if len(value) <= HEAD_CHARS else value[: HEAD_CHARS - 1] + "…"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return f"({kind_of(value)})"
    return value if len(text) <= 2 * HEAD_CHARS else f"({kind_of(value)}, too long to show)"


def preview(shape: str, columns: Mapping[str, str], shown: list[dict[str, Any]]) -> list[Row | BadRow]:
    """The rows of a `head` as they would be trained on with these columns."""
    parsed: list[Row | BadRow] = []
    for row in shown:
        try:
            parsed.append(row_schemas.Reader(shape, columns)(int(row["line"]), row["cells"]))
        except BadRow as bad:
            parsed.append(bad)
    return parsed
