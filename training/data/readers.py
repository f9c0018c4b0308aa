"""Reads the containers of rows: JSON Lines, a JSON array, tables, plain text. Each is read piece by piece and
yields (line, record). A bad record is a BadRow in its place; a file that cannot be read any further raises
BadFile.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from training.data import archive, row_schemas
from training.data.bad_row import MAX_DEPTH, BadFile, BadRow, deeper_than, kind_of


@dataclass(frozen=True)
class Limits:
    """Limits on what a file may demand of the process that reads it."""

    line_bytes: int = 4 << 20
    decoded_bytes: int = 8 << 30
    depth: int = MAX_DEPTH
    columns: int = 1000
    # Plain text: longer documents are split between paragraphs. As much as a row of JSON Lines can have.
    document_chars: int = 4 << 20


@dataclass(frozen=True)
class Format:
    """The format of a file. `columns` maps what a row needs (prompt, completion, text, messages, …) to the
    file's column names."""

    container: str  # jsonl | json | csv | parquet | text | zip (of texts)
    shape: str = ""  # chat | completion | instruction | sharegpt | segments | preference | text
    encoding: str = "utf-8"
    delimiter: str = ","
    columns: dict[str, str] = field(default_factory=dict)
    version: int = row_schemas.VERSION  # of what is read of each row
    header: bool = True  # whether a table's first row has the names of its columns

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Format | Mapping[str, Any]) -> Format:
        """From the report's JSON, or from columns that a user chose."""
        if isinstance(value, Format):
            return value
        known = {
            name: value[name]
            for name in cls.__dataclass_fields__
            if value.get(name) or value.get(name) is False
        }
        return cls(**{"container": "jsonl", "version": 1, **known})


@dataclass(frozen=True)
class ByteRange:
    """A part of a JSON Lines file, from the start of a line to the end of one. Lines are counted from the
    part's first."""

    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


# --- containers: (line, record) -------------------------------------------------------------------

Record = dict[str, Any] | BadRow


def records(
    path: Path,
    format: Format,
    limits: Limits,
    part: ByteRange | None = None,
    *,
    all_columns: bool = False,
) -> Iterator[tuple[int, Record]]:
    """`all_columns`: also those that a table's readers have no use for, such as pandas' index."""
    if format.container == "parquet":
        from training.data import parquet

        yield from parquet.records(path, format.columns, limits.decoded_bytes, _beside(format))
        return
    if format.container == "zip":
        yield from _zip(path, format, limits)
        return
    with path.open("rb") as file:
        if format.container == "jsonl":
            yield from _jsonl(file, format, limits, part)
        elif format.container == "json":
            yield from _json_array(file, format, limits)
        elif format.container == "csv":
            yield from _csv(file, format, limits, all_columns)
        elif format.container == "text":
            yield from _text(file, format, limits, path.suffix.lower() in archive.MARKDOWN)
        else:
            raise BadFile(
                0,
                f"{format.container!r} is not a supported file format",
                "Choose JSONL, JSON, CSV, Parquet or text.",
            )


def unused_columns(path: Path, format: Format, limits: Limits) -> dict[str, int]:
    """{name: rows in which it holds something} of the columns that `records` does not read."""
    if format.container != "parquet" or format.version < 2:
        return {}
    from training.data import parquet

    return parquet.unused(path, format.columns, limits.decoded_bytes, _beside(format))


def _beside(format: Format) -> frozenset[str]:
    """Columns that are read beside the main ones; none in files stored before."""
    return row_schemas.OPTIONAL_NAMES if format.version >= 2 else frozenset()


def _jsonl(
    file: BinaryIO, format: Format, limits: Limits, part: ByteRange | None
) -> Iterator[tuple[int, Record]]:
    for number, text in lines(file, format, limits, part):
        if isinstance(text, BadRow):
            yield number, text
        elif text and not text.isspace():
            yield number, parse(number, text, limits)


def lines(
    file: BinaryIO, format: Format, limits: Limits, part: ByteRange | None = None
) -> Iterator[tuple[int, str | BadRow]]:
    """Decoded lines. A line over the limit raises BadFile: what follows could be the rest of it."""
    if format.encoding != "utf-8":
        file = _transcoded(file, format.encoding)
    if part:
        file.seek(part.begin)
    number, left = 0, part.bytes if part else math.inf
    while left > 0 and (line := file.readline(limits.line_bytes + 1)):
        number += 1
        left -= len(line)
        if len(line) > limits.line_bytes:
            raise BadFile(
                number,
                f"this line is longer than {limits.line_bytes >> 20} MB",
                "Put one example on each line.",
            )
        if number == 1 and line.startswith(codecs.BOM_UTF8) and not (part and part.begin):
            line = line[3:]
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, _undecodable(number, line, error)


def _undecodable(number: int, line: bytes, error: UnicodeDecodeError) -> BadRow:
    return BadRow(
        number,
        f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8",
        "Save the file as UTF-8. Part of it seems to have another encoding.",
    )


def _transcoded(file: BinaryIO, encoding: str) -> BinaryIO:
    """The file as UTF-8 lines, decoded piece by piece."""
    return io.BufferedReader(_Utf8(file, encoding), 1 << 16)


class _Utf8(io.RawIOBase):
    """A raw stream that converts UTF-16 to UTF-8 while it is read. Undecodable bytes become U+FFFD, which
    the report finds as damaged characters."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.decoder, self.left = (
            file,
            codecs.getincrementaldecoder(encoding)(errors="replace"),
            b"",
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            chunk = self.file.read(1 << 16)
            self.left = self.decoder.decode(chunk, final=not chunk).encode("utf-8", "replace")
            if not chunk and not self.left:
                return 0
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


def _json_array(file: BinaryIO, format: Format, limits: Limits) -> Iterator[tuple[int, Record]]:
    """The elements of one big array, each parsed as soon as it is complete."""
    stream = io.TextIOWrapper(
        file if format.encoding == "utf-8" else _transcoded(file, format.encoding), "utf-8"
    )
    buffer, line, opened, ended = "", 1, False, False
    want = 1 << 16
    while True:
        try:
            chunk = stream.read(want)
        except UnicodeDecodeError as error:
            raise BadFile(
                line,
                f"the file is not UTF-8 near byte {error.start + 1} of this chunk",
                "Save the file as UTF-8.",
            ) from error
        buffer += chunk
        while True:
            line, buffer = _skip(line, buffer, "," if opened else "\ufeff")
            if not buffer:
                break
            if not opened:
                opened, buffer = True, buffer.removeprefix("[")
                continue
            if ended:
                raise BadFile(
                    line,
                    "there is more text after the end of the array",
                    "Keep only one array in the file, or use JSON Lines.",
                )
            if buffer[0] == "]":
                ended, buffer = True, buffer[1:]
                continue
            try:
                value, end = DECODER.raw_decode(buffer)
            except json.JSONDecodeError as error:
                if chunk and (error.pos >= len(buffer) - 12 or "Unterminated" in error.msg):
                    break  # the element continues in the next chunk
                raise BadFile(
                    line + buffer.count("\n", 0, error.pos),
                    f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}",
                    "The file may be cut off. Check it with any JSON tool.",
                ) from error
            except (ValueError, RecursionError) as error:
                raise BadFile(line, reason_of(error), "Check the file with any JSON tool.") from error
            yield line, _object(line, value, limits)
            line, buffer, want = line + buffer.count("\n", 0, end), buffer[end:], 1 << 16
        if not chunk:
            break
        if len(buffer) > limits.line_bytes:
            raise BadFile(
                line,
                f"one element is longer than {limits.line_bytes >> 20} MB",
                "Put one example in each element.",
            )
        # double the buffer, so that long elements are parsed at most twice as often
        want = max(want, len(buffer))
    if not ended:
        raise BadFile(
            line, "the array is not closed, so the file seems to be cut off", "Upload the whole file."
        )


def _skip(line: int, text: str, punctuation: str) -> tuple[int, str]:
    """Skips white space and the punctuation between elements, counting lines."""
    rest = text.lstrip(" \t\r\n" + punctuation)
    return line + text.count("\n", 0, len(text) - len(rest)), rest


def _csv(file: BinaryIO, format: Format, limits: Limits, all_columns: bool) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(limits.line_bytes)
    stream = io.TextIOWrapper(
        file, "utf-8-sig" if format.encoding == "utf-8" else format.encoding, newline=""
    )
    lines = _limited_lines(stream, limits, keep_bom=format.version < 2)
    reader = csv.reader(lines, delimiter=format.delimiter, strict=True)
    used = set(format.columns.values())
    header: list[str] | None = None
    index: str | None = None  # the column that pandas adds, as long as it counts the rows
    start, count = 1, -1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise BadFile(
                start,
                f"byte 0x{error.object[error.start]:02x} is not {format.encoding}",
                "Save the file as UTF-8.",
            ) from error
        except csv.Error as error:
            raise BadFile(
                start,
                f"invalid CSV: {error}",
                'A quote opened here is probably never closed; write "" for a quote inside a cell.',
            ) from error
        line, start = start, reader.line_num + 1
        if not any(cells) or (line == 1 and names_separator(format.delimiter.join(cells))):
            continue
        if header is None:
            header = column_names(line, cells, limits, format.header)
            index = None if all_columns or not format.header else _index_column(cells, header, used)
            if format.header:
                continue
        if len(cells) != len(header):
            fitted = _fitted(cells, header, used)
            if fitted is None:
                yield (
                    line,
                    BadRow(
                        line,
                        f"the row has {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, the header {len(header)}",
                        "Put cells that contain the delimiter in quotes.",
                    ),
                )
                continue
            cells = fitted
        count += 1
        record = dict(zip(header, cells, strict=True))
        if index is not None:
            if record[index] == str(count):
                del record[index]
            else:
                index = None
        yield line, record


def _limited_lines(stream: TextIO, limits: Limits, *, keep_bom: bool) -> Iterator[str]:
    """Lines without the byte order mark (`keep_bom`: unless the columns of an old format are named with
    it)."""
    first = True
    while line := stream.readline(limits.line_bytes):
        yield line.removeprefix("\ufeff") if first and not keep_bom else line
        first = False


def names_separator(line: str) -> str:
    """The delimiter that Excel's first line `sep=;` names, or an empty string."""
    # only spaces are stripped: a tab may be the delimiter
    match = re.fullmatch(r"sep=([^\w\s\"]|\t)", line.strip(' "\r\n'), re.IGNORECASE)
    return match[1] if match else ""


def column_names(line: int, cells: list[str], limits: Limits, header: bool = True) -> list[str]:
    """One name for each column. Those without a name, or all if the first row is data, are numbered; a name
    that appears again gets a number."""
    if len(cells) > limits.columns:
        raise BadFile(
            line,
            f"{len(cells)} columns; the limit is {limits.columns}",
            "Keep only the columns to train on.",
        )
    given = [cell.strip() if header else "" for cell in cells]
    names: list[str] = []
    for number, name in enumerate(given, 1):
        name = name or f"column {number}"
        unique, again = name, 1
        while unique in names or (again > 1 and unique in given):
            again += 1
            unique = f"{name} ({again})"
        names.append(unique)
    return names


def _index_column(cells: list[str], header: list[str], used: set[str]) -> str | None:
    """The first column if pandas may have written its index there."""
    if cells[0].strip() in ("", "Unnamed: 0") and header[0] not in used:
        return header[0]
    return None


def _fitted(cells: list[str], header: list[str], used: set[str]) -> list[str] | None:
    """The cells of a row with more or fewer than the header, if only empty or unused ones differ: Excel
    writes such rows at the edges of a sheet."""
    if len(cells) > len(header):
        return None if any(cell.strip() for cell in cells[len(header) :]) else cells[: len(header)]
    missing = header[len(cells) :]
    return None if used.intersection(missing) else cells + [""] * len(missing)


def _text(file: BinaryIO, format: Format, limits: Limits, markdown: bool) -> Iterator[tuple[int, Record]]:
    """Documents, separated by a line of dashes or `<|endoftext|>`, and in Markdown also before each
    top-level heading."""
    held: list[str] = []
    start, size = 1, 0
    longest = limits.document_chars if format.version >= 2 else 64 * 1024
    for number, line in lines(file, format, limits):
        if isinstance(line, BadRow):
            yield number, line
            continue
        line = line.replace("\r\n", "\n")
        ends = re.fullmatch(r"(-{3,}|\*{3,}|={3,}|<\|endoftext\|>)\s*", line) is not None
        heading = markdown and line.startswith("# ")
        if held and (ends or heading or (size > longest and line.isspace())):
            yield from _document(start, held)
            held, size = [], 0
        if not ends:
            start = start if held else number
            held.append(line)
            size += len(line)
    yield from _document(start, held)


def _zip(path: Path, format: Format, limits: Limits) -> Iterator[tuple[int, Record]]:
    """The documents of each file in the archive, numbered through all of them."""
    number = 0
    for name, encoding, file in archive.documents(path, limits.decoded_bytes):
        markdown = name.lower().endswith(archive.MARKDOWN)
        try:
            for _, record in _text(file, replace(format, encoding=encoding), limits, markdown):
                number += 1
                if isinstance(record, BadRow):
                    record = BadRow(number, f"{name[-80:]}, line {record.line}: {record.reason}", record.fix)
                yield number, record
        except BadFile as bad:
            raise BadFile(number + 1, f"{name[-80:]}, line {bad.line}: {bad.reason}", bad.fix) from bad
        except archive.DAMAGE as error:
            raise archive.damaged(repr(name[-80:]), error) from error


def _document(line: int, held: list[str]) -> Iterator[tuple[int, Record]]:
    text = "".join(held).strip()
    if text:
        yield line, {"text": text}


# --- one JSON value, strict ------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {name!r} appears twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)


def parse(number: int, text: str, limits: Limits) -> Record:
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        return BadRow(number, *row_schemas.explain_json(text, error))
    except (ValueError, RecursionError) as error:
        return BadRow(number, reason_of(error), row_schemas.JSON_HINT)
    return _object(number, value, limits, text.count("{") + text.count("["))


def _object(number: int, value: Any, limits: Limits, brackets: float = math.inf) -> Record:
    """`brackets`: how many brackets the text opens, an upper bound of its depth."""
    if not isinstance(value, dict):
        return BadRow(
            number,
            f"this is {kind_of(value)}, not an object",
            'Each example is an object: {"messages": [...]} or {"prompt": ..., "completion": ...}.',
        )
    if brackets > limits.depth and deeper_than(value, limits.depth):
        return BadRow(number, f"values are nested more than {limits.depth} deep", "Keep examples flat.")
    return value


def reason_of(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "values are nested far too deep"
    return (
        "a number has thousands of digits"
        if "int_max_str_digits" in str(error) or "integer string" in str(error)
        else str(error)
    )
