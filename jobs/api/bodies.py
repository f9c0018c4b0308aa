"""Strict JSON parsing: input that another parser might read differently is refused.

Python's own parser accepts NaN, keeps the last of two duplicate keys, recurses until it fails, and accepts lone
surrogates, which then fail when the response is encoded.
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
# Also matches if the closing quote is missing: otherwise the search would start again at every quote and take hours.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(raw: bytes) -> Any:
    if len(raw) > MAX_JSON:
        raise too_large(MAX_JSON)
    if _is_too_deep(raw):
        raise bad(f"The JSON is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if _SURROGATES.search(raw):
            json.dumps(data, ensure_ascii=False).encode()  # fails on a lone surrogate
        return data
    except ValueError as error:
        raise bad(f"The body is not valid JSON: {error}", code="invalid_json") from error


def _is_too_deep(raw: bytes) -> bool:
    """Counts brackets before parsing, because the parser recurses."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for byte in _STRING.sub(b"", raw).translate(None, _NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("duplicate key in an object")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


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
