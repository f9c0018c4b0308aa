"""Reading and writing JSON, strictly: what two parsers would read differently is refused.

Python's own reader takes NaN, keeps the last of two equal keys, recurses until it breaks and lets half a surrogate
pair through (which fails later, when it is written).
"""

from __future__ import annotations

import json
import re
from typing import Any

from django.http import HttpRequest
from ninja.parser import Parser
from ninja.renderers import JSONRenderer

from jobs.api.errors import ApiError, bad, too_large

MAX_JSON = 4 * 1024 * 1024
MAX_DEPTH = 64
MAX_DIGITS = 30
# Never fails once begun, also where the closing quote is missing: a search that tried again from each quote would take hours.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_HALF_PAIRS = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(raw: bytes) -> Any:
    if len(raw) > MAX_JSON:
        raise too_large(MAX_JSON)
    if _depth(raw) > MAX_DEPTH:
        raise bad(f"The JSON is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if _HALF_PAIRS.search(raw):
            json.dumps(data, ensure_ascii=False).encode()  # fails if one stands alone
        return data
    except ValueError as error:
        raise bad(f"The body is not valid JSON: {error}", code="invalid_json") from error


def _depth(raw: bytes) -> int:
    """More than MAX_DEPTH if it nests deeper; counted before parsing, because the parser recurses."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return 0
    depth = 0
    for byte in _STRING.sub(b"", raw).translate(None, _NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            break
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


class StrictParser(Parser):
    def parse_body(self, request: HttpRequest) -> Any:
        data = loads(request.body)
        if not isinstance(data, dict):
            raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
        return data


class Renderer(JSONRenderer):
    def render(self, request: HttpRequest, data: Any, *, response_status: int) -> str:
        return json.dumps(data, cls=self.encoder_class, allow_nan=False, ensure_ascii=False)
