"""`python -m training fix FILE --to NEW.jsonl`: a new version of a dataset without the rows that have
findings and, optionally, with some rows held out for validation. The old file is not changed."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from training.data.formats import BadRow, Format, Row, detect, rows
from training.report.findings import KINDS
from training.report.report import findings_of, preview_of
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer, midnight

MAX_LINES_PRINTED = 10_000  # of each finding: the reader of the output limits the length of a line
SHOWN = 20  # dropped rows to show
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
) -> Fixed:
    """Writes the remaining rows as JSON Lines. Raises BadRow if a row cannot be read and "bad_row" is not in
    `drop`.

    A row's content and the seed decide whether it goes to `validation`, so duplicates are always on the
    same side."""
    unknown = set(drop) - DROPPABLE
    if unknown:
        raise ValueError(f"these findings have no rows to drop: {', '.join(sorted(unknown))}")
    chosen = format or detect(path)
    row_numbers = findings_of(path, tokenizer, settings or EncodingOptions(), chosen)
    wanted = {
        code: set(row_numbers[code]) for code in sorted(set(row_numbers) & set(drop)) if code != "bad_row"
    }
    result = Fixed()

    def bad(row: BadRow) -> None:
        if "bad_row" not in drop:
            raise row
        result.rows += 1
        result.dropped.setdefault("bad_row", []).append(row.line)

    with ExitStack() as files:
        out = files.enter_context(Path(to).open("w", encoding="utf-8"))
        held_out = files.enter_context(Path(validation).open("w", encoding="utf-8")) if validation else None
        for number, row in enumerate(rows(path, chosen, on_bad=bad), 1):
            result.rows += 1
            if codes := [code for code, numbers in wanted.items() if number in numbers]:
                if len(result.removed) < SHOWN:
                    result.removed.append({"line": row.line, "preview": preview_of(row)})
                for code in codes:
                    result.dropped.setdefault(code, []).append(row.line)
            elif held_out is not None and _share(row, seed) < fraction:
                result.validation += 1
                _write(held_out, row)
            else:
                result.kept += 1
                _write(out, row)
    return result


def _share(row: Row, seed: int) -> float:
    """A number in [0, 1), determined by the row's text and the seed."""
    digest = hashlib.sha256(f"{seed}:{row.preview}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _write(file: Any, row: Row) -> None:
    file.write(json.dumps(_record(row), ensure_ascii=False) + "\n")


def _record(row: Row) -> dict[str, Any]:
    """The row as it is read again, with all that it is trained on."""
    tools = {"tools": list(row.tools)} if row.tools else {}
    if row.kind == "text":
        return {"text": row.text}
    if row.kind == "segments":
        return {"segments": [{"label": label, "text": text} for text, label in row.segments]}
    if row.kind == "completion" and row.rejected:
        return {"prompt": row.prompt, "chosen": row.completion, "rejected": row.rejected}
    if row.kind == "completion":
        return {"prompt": row.prompt, "completion": row.completion}
    if not row.rejected:
        return {"messages": list(row.messages)} | tools
    at = next(i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight", 1))
    prompt, chosen = list(row.messages[:at]), list(row.messages[at:])
    return {
        "input": {"messages": prompt} | tools,
        "preferred_output": chosen,
        "non_preferred_output": list(row.rejected),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--to", required=True, help="the file to write, JSON Lines")
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


def main(given: argparse.Namespace) -> int:
    """Prints the result as one JSON line. Exit 10 if the file cannot be read."""
    try:
        tokenizer = Tokenizer.load(given.tokenizer) if given.tokenizer else None
        if tokenizer is not None:
            tokenizer.now = given.date or midnight()
        done = fix(
            given.file,
            given.to,
            drop=DROPPABLE if given.drop is None else list(filter(None, given.drop.split(","))),
            tokenizer=tokenizer,
            settings=EncodingOptions(given.sequence_length),
            format=Format.of(json.loads(given.format)) if given.format else None,
            validation=given.validation,
            fraction=given.fraction,
            seed=given.seed,
        )
    except (BadRow, ValueError) as error:
        print(error, file=sys.stderr)
        return 10
    dropped = {code: lines[:MAX_LINES_PRINTED] for code, lines in done.dropped.items()}
    print(json.dumps({"t": "fixed", **asdict(done), "dropped": dropped}))
    return 0
