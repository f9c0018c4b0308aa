"""JSON is read strictly: whatever two parsers could read differently is refused, quickly and with a sentence."""

from __future__ import annotations

import json

import pytest

from jobs.api import bodies
from jobs.api.errors import ApiError

REFUSED = {
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflowing float": b'{"a": 1e400}',
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice inside": b'{"b": {"a": 1, "a": 2}}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 1000 + b"1" + b"}" * 1000,
    "a text of quotes that never ends": b'{"a": "' + b"[" * 100 + b'\\"' * 500_000,
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a pair in a list": b'{"a": ["\\udfff"]}',
    "half a pair as a key": b'{"\\ud800": 1}',
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "not utf-8": b'{"a": "\xff"}',
    "cut": b'{"a": [1, 2',
    "two values": b"{} {}",
    "single quotes": b"{'a': 1}",
    "comma at the end": b'{"a": 1,}',
    "comment": b'{"a": 1 /* one */}',
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str):
    with pytest.raises(ApiError) as refusal:
        bodies.loads(REFUSED[name])  # a reader that is not linear would take hours over some of them
    assert refusal.value.status == 400


def test_it_refuses_more_than_four_megabytes_before_parsing():
    with pytest.raises(ApiError) as refusal:
        bodies.loads(b"[" * (bodies.MAX_JSON + 1))
    assert refusal.value.status == 413


def test_it_reads_what_everybody_reads_alike():
    value = {"a": [1, 2.5, -3, True, None, "ü 😀 [{"], "b": {"c": {"d": '"}]'}}}
    assert bodies.loads(json.dumps(value).encode()) == value
    assert bodies.loads(json.dumps(value, ensure_ascii=False).encode()) == value


def test_brackets_inside_strings_are_no_nesting():
    value = {"a": "[" * 10_000, "b": ["\\" * 3 + '"[['] * 50}
    assert bodies.loads(json.dumps(value).encode()) == value


def test_many_flat_items_are_read():
    value = {"messages": [{"role": "user", "content": "x"}] * 20_000}
    assert bodies.loads(json.dumps(value).encode()) == value
