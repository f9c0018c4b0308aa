"""The structure of a value, as lines: `Job.progress.step: number`. Ids, hashes, times and counts are masked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

ULID = "[0-9A-HJKMNP-TV-Z]{26}"
MASKS = [
    (re.compile(r"ft:[^\s/]+(?:/[^\s/:]+)?:[a-z0-9-]+:[^:\s]*:[a-z0-9]{8}"), "<model>"),
    (re.compile(rf"\b([a-z]+)-{ULID}\b"), r"<\1 id>"),
    (re.compile(rf"\b{ULID}\b"), "<id>"),
    (re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{12,}\b"), "<hex>"),
    (re.compile(r"\b20\d\d-\d\d\b"), "<month>"),
    (re.compile(r"(?<![\w<])e\d+-s\d+(?![\w>])"), "e<n>-s<n>"),
    (re.compile(r"(?<![\w<])e\d+(?![\w>])"), "e<n>"),
    (re.compile(r"(?<![A-Za-z\d_])\d+(?:\.\d+)?"), "<n>"),
]
# Keys whose values come from a fixed list, so the value itself is recorded.
CLOSED = frozenset(
    [
        "t",
        "status",
        "phase",
        "desired",
        "reason",
        "method",
        "kind",
        "purpose",
        "event",
        "level",
        "object",
        "type",
        "role",
        "finish_reason",
        "code",
        "action",
        "op",
        "format",
        "anchor",
        "scopes",
        "adapter",
        "objective",
        "severity",
        "container",
        "encoding",
        "shape",
        "schedule",
        "train_on",
    ]
)

CLOSED_VALUE = re.compile(r"[a-z][a-z0-9_.\- ]{0,40}")


def mask(text: str) -> str:
    for pattern, placeholder in MASKS:
        text = pattern.sub(placeholder, text)
    return text


def shape(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, type) of everything in a value, including JSON inside texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from shape(inner, f"{path}.{mask(str(key))}")
        if not value:
            yield path, "empty"
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from shape(inner, f"{path}[]")
        if not value:
            yield path, "empty"
    elif isinstance(value, bool):
        yield path, "boolean"
    elif value is None or value == "":
        yield path, "empty"
    elif isinstance(value, str):
        inner = _inside(value)
        if inner is not None:
            yield from shape(inner, f"{path}(JSON)")
        elif path.rpartition(".")[2].removesuffix("[]") in CLOSED and CLOSED_VALUE.fullmatch(value):
            yield path, f"“{value}”"
        else:
            yield path, "text"
    else:
        yield path, "number"


def _inside(text: str) -> Any:
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def lines(shapes: Iterable[tuple[str, str]]) -> set[str]:
    """`path: type` for each. If a value is empty in one place and filled elsewhere, only the filled one is listed."""
    pairs = {*shapes}
    filled = {path for path, kind in pairs if kind != "empty"}
    parents = {path[: match.start()] for path in filled for match in re.finditer(r"\.|\[\]|\(JSON\)", path)}
    return {f"{path}: {kind}" for path, kind in pairs if kind != "empty" or path not in filled | parents}


def flat(value: Any, path: str = "", without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Each leaf of a JSON value with its content, for documents that must not change."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key not in without or not isinstance(inner, str):
                yield from flat(inner, f"{path}.{key}" if path else str(key), without)
    elif isinstance(value, (list, tuple)) and value:
        if all(isinstance(inner, (str, int, float)) for inner in value):
            yield f"{path} = {json.dumps(list(value), ensure_ascii=False)}"
        else:
            for number, inner in enumerate(value):
                yield from flat(inner, f"{path}[{number}]", without)
    else:
        yield f"{path} = {json.dumps(value, ensure_ascii=False, default=list)}"
