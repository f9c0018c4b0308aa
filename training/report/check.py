"""`python -m training check FILE --tokenizer DIR`: progress lines and, last, the report, as JSON lines.

This is a separate program so that the caller can limit its memory and time, because files are not trusted.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from training.data.bad_row import SURROGATE
from training.data.formats import BadRow, Format
from training.plan.catalog import describe
from training.report.report import report, row_tokens
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer, midnight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--tokenizer", help="folder of the base model; without it, no tokens are counted")
    parser.add_argument("--format", help="format of the file, as JSON; default: detected")
    parser.add_argument(
        "--sequence-length", type=int, help="maximum tokens of an example; default: the model's context"
    )
    parser.add_argument(
        "--date", type=datetime.fromisoformat, help="the date that chat templates read; default: today"
    )
    parser.add_argument("--train-on", choices=("completion", "all"), default="completion")
    parser.add_argument("--validation", help="a validation file to check for leaks")
    parser.add_argument("--validation-format", help="format of the validation file, as --format")
    parser.add_argument("--row", type=int, help="show the tokens of the row on this line instead of a report")
    parser.add_argument("--limit-bytes", type=int, help="refuse a file larger than this")


def main(given: argparse.Namespace) -> int:
    """Exit 0 if a report was made, whatever its verdict."""
    size = Path(given.file).stat().st_size
    if given.limit_bytes and size > given.limit_bytes:
        message = f"The file has {size:,} bytes. The limit is {given.limit_bytes:,}."
        emit(
            {
                "t": "report",
                "ready": False,
                "error": message,
                "verdict": message,
                "findings": [],
                "samples": [],
            }
        )
        return 0
    tokenizer = Tokenizer.load(given.tokenizer) if given.tokenizer else None
    if tokenizer is not None:
        tokenizer.now = given.date or midnight()
    length = given.sequence_length or (_context(Path(given.tokenizer)) if given.tokenizer else None)
    if given.row is not None:
        emit({"t": "row", "line": given.row, **_row(given, tokenizer, length)})
        return 0
    gc.disable()  # rows and examples have no reference cycles
    result = report(
        given.file,
        tokenizer,
        EncodingOptions(length, given.train_on),
        format=json.loads(given.format) if given.format else None,
        validation=given.validation,
        validation_format=json.loads(given.validation_format) if given.validation_format else None,
        progress=lambda rows, share: emit({"t": "progress", "rows": rows, "share": round(share, 3)}),
    )
    emit({"t": "report", "bytes": size, **result})
    return 0


def _row(given: argparse.Namespace, tokenizer: Tokenizer | None, length: int | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"error": "--tokenizer is required to show tokens."}
    format = Format.of(json.loads(given.format)) if given.format else None
    try:
        return row_tokens(given.file, given.row, tokenizer, EncodingOptions(length, given.train_on), format)
    except KeyError:
        return {"error": f"No row begins on line {given.row:,}."}
    except BadRow as bad:
        return {"error": f"{bad}. {bad.fix}".strip()}


def _context(folder: Path) -> int | None:
    try:
        return describe(folder).context
    except (OSError, ValueError):
        return None  # a folder with only a tokenizer


def emit(line: dict[str, Any]) -> None:
    text = json.dumps(line, ensure_ascii=False)
    if not text.isascii() and SURROGATE.search(text):  # in the name of a field: no page could show it
        line = json.loads(text.encode("utf-8", "replace"))
    sys.stdout.write(json.dumps({**line, "time": time.time()}) + "\n")
    sys.stdout.flush()
