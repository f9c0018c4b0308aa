"""`python -m training fix FILE --to NEW`: a new version of a dataset. By default without the rows that have
findings; or with rows edited, added and excluded, merged with another file, or with some rows held out.

Rows keep everything that their author wrote, used or not. The new file has the old one's format if it is JSON Lines,
a JSON array or a table of text, else it is JSON Lines (`training.data.rewrite`). The old file is not changed."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from training.data.formats import BadRow, Format, Row, detect
from training.data.rewrite import (
    Writer,
    as_json,
    check_record,
    kind_of_rows,
    line_ranges,
    new_format,
    sources,
)
from training.data.row_schemas import one_line, preview_of
from training.report.findings import KINDS
from training.report.report import findings_of, question_and_answer
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer, midnight

MAX_LINES_PRINTED = 10_000  # of each finding: the reader of the output limits the length of a line
SHOWN = 20  # dropped and changed rows to show
DROPPABLE = frozenset(code for code, kind in KINDS.items() if kind.drop)


@dataclass
class Fixed:
    """What happened to the rows. `dropped` has the lines by finding; a row with several findings counts
    for each."""

    rows: int = 0  # in the old file, including unreadable ones
    kept: int = 0
    validation: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    removed: list[dict[str, Any]] = field(default_factory=list)  # the first of them: line and preview
    # the first edited, excluded and added rows: line, previews before and after (None: added or excluded)
    changed: list[dict[str, Any]] = field(default_factory=list)
    format: dict[str, Any] = field(default_factory=dict)  # of the new file


def fix(
    path: str | Path,
    to: str | Path,
    *,
    drop: Collection[str] = DROPPABLE,
    tokenizer: Tokenizer | None = None,
    settings: EncodingOptions | None = None,
    format: Format | None = None,
    validation: str | Path | None = None,
    fraction: float = 0.1,
    seed: int = 0,
    lines: str = "",
) -> Fixed:
    """Writes the remaining rows. Raises BadRow if a row cannot be read and "bad_row" is not in `drop`.

    `validation` gets the rows that begin on these `lines` of the file ("1-100, 205") or, without lines, about
    `fraction` of the rows. Their prompts and the seed decide which, so duplicates and rows with equal prompts, but
    for case, spacing and punctuation, are on the same side. Raises ValueError if either file would be empty."""
    unknown = set(drop) - DROPPABLE
    if unknown:
        raise ValueError(f"these findings have no rows to drop: {', '.join(sorted(unknown))}")
    chosen = format or detect(path)
    row_numbers = findings_of(path, tokenizer, settings or EncodingOptions(), chosen) if drop else {}
    wanted = {
        code: set(row_numbers[code]) for code in sorted(set(row_numbers) & set(drop)) if code != "bad_row"
    }
    result = Fixed(format=new_format(chosen).as_dict())

    def bad(row: BadRow) -> None:
        if "bad_row" not in drop:
            raise row
        result.rows += 1
        result.dropped.setdefault("bad_row", []).append(row.line)

    held_out: Callable[[Row], bool] = lambda row: False  # noqa: E731  replaced below
    if validation and lines:
        ranges = line_ranges(lines)
        held_out = lambda row: any(first <= row.line <= last for first, last in ranges)  # noqa: E731
    elif validation:
        held_out = _by_prompt(path, chosen, set().union(*wanted.values()), fraction, seed)
    with ExitStack() as files:
        out = files.enter_context(Writer(to, new_format(chosen), path))
        aside = files.enter_context(Writer(validation, new_format(chosen), path)) if validation else out
        for number, row, source in sources(path, chosen, bad):
            result.rows += 1
            if codes := [code for code, numbers in wanted.items() if number in numbers]:
                if len(result.removed) < SHOWN:
                    result.removed.append({"line": row.line, "preview": preview_of(row)})
                for code in codes:
                    result.dropped.setdefault(code, []).append(row.line)
            elif held_out(row):
                result.validation += 1
                aside.write(source.record, source.text)
            else:
                result.kept += 1
                out.write(source.record, source.text)
    if validation and not (result.kept and result.validation):
        raise ValueError(_empty_side(result, lines))
    return result


def _by_prompt(
    path: str | Path, format: Format, dropped: Collection[int], fraction: float, seed: int
) -> Callable[[Row], bool]:
    """Which rows are held out: those with the smallest hashes of prompt and seed, as many as `fraction` says, and
    all that have the same prompt as one of them. Like the trainer's own split (`packing.hold_out`)."""
    keys = array("Q")
    for number, row, _ in sources(path, format, lambda bad: None):
        if number not in dropped:
            keys.append(_key(row, seed))
    count = round(len(keys) * fraction)
    threshold = sorted(keys)[count - 1] if count else -1
    return lambda row: _key(row, seed) <= threshold


def _key(row: Row, seed: int) -> int:
    prompt, answer = question_and_answer(row)
    digest = hashlib.sha256(f"{seed}:{prompt or answer}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


def _empty_side(result: Fixed, lines: str) -> str:
    if lines and not result.validation:
        return f"No row begins on these lines: {lines[:100]}. Choose lines of the file."
    if lines:
        return "All rows begin on these lines, so none would be left for training. Choose fewer lines."
    if result.validation:
        return "All rows that remain have the same prompt, so they cannot be split."
    return "The share is too small: it is less than one row. Choose a larger one."


def edit(
    path: str | Path, to: str | Path, changes: Mapping[str, Any], *, format: Format | None = None
) -> Fixed:
    """Writes the rows with `changes`: {"rows": {number: the new record, or None to exclude it}, "added":
    [records]}. Rows are numbered among the readable ones, from 1. Raises BadRow for a record that cannot be
    trained on, and ValueError for a number that no row has."""
    chosen = format or detect(path)
    result = Fixed(format=new_format(chosen).as_dict())
    left = dict(changes.get("rows") or {})

    def note(line: int, before: str | None, after: str | None) -> None:
        if len(result.changed) < SHOWN:
            result.changed.append({"line": line, "before": before, "after": after})

    with Writer(to, new_format(chosen), path) as out:
        for number, row, source in sources(path, chosen, _raise):
            result.rows += 1
            if str(number) not in left:
                out.write(source.record, source.text)
                continue
            record = left.pop(str(number))
            if record is None:
                note(row.line, preview_of(row), None)
                continue
            edited = check_record(row.line, record, chosen, out.names)
            texts = (row.preview, edited.preview)
            if texts[0] == texts[1]:  # only other fields differ
                texts = (as_json(source.record), as_json(record))
            note(row.line, *_where_they_differ(*texts))
            out.write(record)
        if left:
            raise ValueError(f"There is no row {next(iter(left))}: the file has {result.rows:,} rows.")
        for record in changes.get("added") or []:
            note(0, None, preview_of(check_record(0, record, chosen, out.names)))
            out.write(record)
        result.kept = out.count
    return result


def _where_they_differ(before: str, after: str) -> tuple[str, str]:
    """Both texts on one line, from shortly before the first difference."""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), min(len(before), len(after)))
    start = same - 40 if same > 80 else 0
    return one_line("…" * bool(start) + before[start:]), one_line("…" * bool(start) + after[start:])


def _raise(bad: BadRow) -> None:
    raise bad


def merge(
    path: str | Path,
    to: str | Path,
    other: str | Path,
    *,
    format: Format | None = None,
    other_format: Format | None = None,
) -> Fixed:
    """Writes the rows of both files as JSON Lines. Fields of the second file that have the same role as one of the
    first get its name. Raises ValueError if the files have rows of different kinds, or if a field would lose its
    place."""
    formats = [format or detect(path), other_format or detect(other)]
    if kind_of_rows(formats[0]) != kind_of_rows(formats[1]):
        raise ValueError(f"One file has {kind_of_rows(formats[0])}, the other {kind_of_rows(formats[1])}.")
    columns = [_roles(one) for one in formats]
    merged = {**columns[1], **columns[0]}
    role_of_messages = "conversations" if formats[0].shape == "sharegpt" else "messages"
    named = {role_of_messages if role == "messages" else role: name for role, name in merged.items()}
    version = max(one.version for one in formats)
    whole = Format("jsonl", formats[0].shape, columns=named, version=version)
    result = Fixed(format=whole.as_dict())
    with Writer(to, whole, path) as out:
        for part, one, roles in zip((path, other), formats, columns, strict=True):
            renamed = {name: merged[role] for role, name in roles.items() if merged[role] != name}
            missing = [merged[role] for role in merged if role not in roles]
            for _, row, source in sources(part, one, _raise):
                result.rows += 1
                taken = [name for name in renamed.values() if name in source.record and name not in renamed]
                if taken:
                    raise ValueError(
                        f"Line {row.line} of the second file has a field {taken[0]!r} of its own. "
                        f"Rename it, because {taken[0]!r} has another meaning in the first file."
                    )
                record = {renamed.get(name, name): value for name, value in source.record.items()}
                record = {**record, **{name: "" for name in missing if name not in record}}
                out.write(record, "" if renamed or missing else source.text)
        result.kept = out.count
    return result


def _roles(format: Format) -> dict[str, str]:
    """{role: column}, with one name for the role of conversations."""
    return {"messages" if role == "conversations" else role: name for role, name in format.columns.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--to", required=True, help="the file to write, in the format of FILE or JSON Lines")
    parser.add_argument(
        "--drop",
        help=f"comma-separated findings whose rows to drop, or an empty string; default: {', '.join(sorted(DROPPABLE))}",
    )
    parser.add_argument("--format", help="format of the file, as JSON; default: detected")
    parser.add_argument(
        "--tokenizer",
        help="folder of the base model; needed to find rows that are truncated or have nothing to train on",
    )
    parser.add_argument(
        "--date", type=datetime.fromisoformat, help="the date that chat templates read; default: today"
    )
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--validation", help="file to write held-out rows to")
    parser.add_argument("--fraction", type=float, default=0.1, help="fraction of the rows to hold out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", default="", help="lines whose rows to hold out instead, as in 1-100, 205")
    parser.add_argument("--changes", help="JSON file with rows to edit, exclude and add; nothing is dropped")
    parser.add_argument("--merge", help="another file whose rows are added; nothing is dropped")
    parser.add_argument("--merge-format", help="its format, as JSON; default: detected")


def main(given: argparse.Namespace) -> int:
    """Prints the result as one JSON line. Exit 10 if the file cannot be read or the rows cannot be written."""
    try:
        done = _run(given)
    except (BadRow, ValueError) as error:
        print(
            json.dumps({"t": "refused", "error": error.sentence if isinstance(error, BadRow) else str(error)})
        )
        print(error, file=sys.stderr)
        return 10
    dropped = {code: lines[:MAX_LINES_PRINTED] for code, lines in done.dropped.items()}
    print(json.dumps({"t": "fixed", **asdict(done), "dropped": dropped}))
    return 0


def _run(given: argparse.Namespace) -> Fixed:
    format = Format.of(json.loads(given.format)) if given.format else None
    if given.changes:
        return edit(given.file, given.to, json.loads(Path(given.changes).read_bytes()), format=format)
    if given.merge:
        other = Format.of(json.loads(given.merge_format)) if given.merge_format else None
        return merge(given.file, given.to, given.merge, format=format, other_format=other)
    tokenizer = Tokenizer.load(given.tokenizer) if given.tokenizer else None
    if tokenizer is not None:
        tokenizer.now = given.date or midnight()
    return fix(
        given.file,
        given.to,
        drop=DROPPABLE if given.drop is None else list(filter(None, given.drop.split(","))),
        tokenizer=tokenizer,
        settings=EncodingOptions(given.sequence_length),
        format=format,
        validation=given.validation,
        fraction=given.fraction,
        seed=given.seed,
        lines=given.lines,
    )
