"""`python -m training rows FILE`: one page of a file's rows as their author wrote them, by number, line or search."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.formats import BadRow, Format, Row, detect
from training.data.rewrite import Source, sources
from training.data.row_schemas import preview_of

PAGE_ROWS = 20
MAX_ROW_BYTES = 200_000  # as JSON in ASCII; longer rows are listed, but not included whole


def read_page(
    path: str | Path,
    format: Format | None = None,
    *,
    page: int = 1,
    line: int = 0,
    search: str = "",
    after: int = 0,
) -> dict[str, Any]:
    """{"rows": [{"row": its number among the readable ones, "line", "preview", "record": None if it is too long}],
    "page", "more": whether rows follow}. There are no rows if the file ends before.

    `line`: the page with the first row that begins on this line or later, instead of `page`. `search`: the first
    rows after row number `after` that have this text in any field, in upper or lower case. Raises BadFile."""
    chosen = format or detect(path)
    held: list[tuple[int, Row, Source]] = []
    if search:
        wanted = search.casefold()
        for item in sources(path, chosen, lambda bad: None):
            if item[0] > after and any(wanted in text.casefold() for text in _texts(item[2].record)):
                if len(held) == PAGE_ROWS:
                    return _page(held, more=True)
                held.append(item)
        return _page(held, more=False)
    is_there = False
    for item in sources(path, chosen, lambda bad: None):
        if len(held) == PAGE_ROWS:
            if is_there:
                return _page(held, more=True)
            held = []
        held.append(item)
        number, row, _ = item
        is_there = is_there or (row.line >= line if line else (number - 1) // PAGE_ROWS + 1 == page)
    return _page(held if is_there else [], more=False)


def _page(held: list[tuple[int, Row, Source]], *, more: bool) -> dict[str, Any]:
    shown = [
        {
            "row": number,
            "line": row.line,
            "preview": preview_of(row),
            "record": source.record if len(json.dumps(source.record)) <= MAX_ROW_BYTES else None,
        }
        for number, row, source in held
    ]
    return {"rows": shown, "page": (held[0][0] - 1) // PAGE_ROWS + 1 if held else 0, "more": more}


def _texts(value: Any) -> Iterator[str]:
    """All texts and numbers in a record."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--format", help="format of the file, as JSON; default: detected")
    parser.add_argument("--page", type=int, default=1, help=f"of {PAGE_ROWS} rows")
    parser.add_argument("--line", type=int, default=0, help="the page with the row on this line instead")
    parser.add_argument("--search", default="", help="rows with this text instead")
    parser.add_argument("--after", type=int, default=0, help="search after this row")


def main(given: argparse.Namespace) -> int:
    """Prints the page as one JSON line. Exit 10 if the file cannot be read."""
    try:
        page = read_page(
            given.file,
            Format.of(json.loads(given.format)) if given.format else None,
            page=given.page,
            line=given.line,
            search=given.search,
            after=given.after,
        )
    except (BadRow, ValueError) as error:
        print(error, file=sys.stderr)
        return 10
    print(json.dumps({"t": "rows", **page}))
    return 0
