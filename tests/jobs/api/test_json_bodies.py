"""JSON is parsed strictly: whatever two parsers might read differently is rejected, quickly and with a message."""

from __future__ import annotations

import json

import pytest

from jobs.api import bodies
from jobs.api.errors import ApiError

INVALID = {
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflowing float": b'{"a": 1e400}',
    "number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "duplicate key": b'{"a": 1, "a": 2}',
    "nested duplicate key": b'{"b": {"a": 1, "a": 2}}',
    "deeply nested arrays": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeply nested objects": b'{"a":' * 1000 + b"1" + b"}" * 1000,
    "unterminated string of escaped quotes": b'{"a": "' + b"[" * 100 + b'\\"' * 500_000,
    "lone surrogate": b'{"a": "\\ud800"}',
    "lone surrogate in a list": b'{"a": ["\\udfff"]}',
    "lone surrogate as a key": b'{"\\ud800": 1}',
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "not utf-8": b'{"a": "\xff"}',
    "truncated": b'{"a": [1, 2',
    "two values": b"{} {}",
    "single quotes": b"{'a': 1}",
    "trailing comma": b'{"a": 1,}',
    "comment": b'{"a": 1 /* one */}',
}


@pytest.mark.parametrize("name", INVALID)
def test_ambiguous_or_invalid_json_is_rejected(name: str) -> None:
    with pytest.raises(ApiError) as excinfo:
        bodies.loads(INVALID[name])  # a parser slower than linear would take hours for some of these
    assert excinfo.value.status == 400


def test_more_than_four_megabytes_are_rejected_before_parsing() -> None:
    with pytest.raises(ApiError) as excinfo:
        bodies.loads(b"[" * (bodies.MAX_JSON + 1))
    assert excinfo.value.status == 413


def test_standard_json_is_parsed() -> None:
    value = {"a": [1, 2.5, -3, True, None, "ü 😀 [{"], "b": {"c": {"d": '"}]'}}}
    assert bodies.loads(json.dumps(value).encode()) == value
    assert bodies.loads(json.dumps(value, ensure_ascii=False).encode()) == value


def test_brackets_inside_strings_do_not_count_as_nesting() -> None:
    value = {"a": "[" * 10_000, "b": ["\\" * 3 + '"[['] * 50}
    assert bodies.loads(json.dumps(value).encode()) == value


def test_many_flat_items_are_parsed() -> None:
    value = {"messages": [{"role": "user", "content": "x"}] * 20_000}
    assert bodies.loads(json.dumps(value).encode()) == value
