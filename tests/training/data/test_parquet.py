"""Rows in Parquet have the report of the same rows in JSON Lines, whatever types their columns have."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.formats import BadRow, detect_lenient, head, rows
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome"}}}
OTHER_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"street": "Via Appia"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs with lists, numbers and blanks beside them": [
        {"prompt": "a?", "completion": "b", "id": 1, "tags": ["x"], "note": " ", "empty": None, "also": []},
        {"prompt": "c?", "completion": "d", "id": 2, "tags": [], "note": "[]", "empty": None, "also": []},
        {"prompt": "e?", "completion": "f", "id": 3, "tags": None, "note": "seen", "empty": None, "also": None},
    ],
    "conversations": [{"messages": [USER, ANSWER], "source": "web"}, {"messages": [USER, ANSWER, USER, ANSWER]}],
    "messages with different fields": [
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        {"messages": [{**USER, "name": "kim"}, {**ANSWER, "mood": "calm"}]},
    ],
    "tools": [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [OTHER_CALL]}], "tools": [TOOL]},
    ],
    "ShareGPT": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
        {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Yes?"}], "system": ""},
    ],
    "another name of conversations": [{"conversation": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]}],
    "dialogues": [{"dialogue": [USER, ANSWER]}],
    "conversational pairs": [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}],
    "segments": [{"segments": [{"label": False, "text": "2+2="}, {"label": True, "text": "4"}], "score": 0.5}],
    "instructions": [
        {"instruction": "Add", "input": "2 3", "output": "5", "history": [["Hi", "Hello"]]},
        {"instruction": "Stop", "input": None, "output": "ok", "history": []},
    ],
    "texts": [{"text": "A lamp.", "url": "https://a.example"}, {"text": "A door.", "url": ""}],
    "preferences": [{"prompt": "a?", "chosen": "b", "rejected": "c"}],
    "unreadable rows": [{"prompt": "a?", "completion": None}, {"prompt": "c?", "completion": "d"}],
}  # fmt: skip
KEPT = (
    "rows",
    "examples",
    "tokens",
    "trained_tokens",
    "kind",
    "ready",
    "error",
    "verdict",
    "findings",
    "samples",
)


@pytest.fixture(scope="module")
def starter() -> Tokenizer:
    return Tokenizer.load(STARTER_FOLDER)


def read(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    return report(path, tokenizer, EncodingOptions(512))


def unused(made: dict[str, Any]) -> list[str]:
    return next((f["details"] for f in made["findings"] if f["code"] == "unused_field"), [])


@pytest.mark.parametrize("statistics", [True, False], ids=["with statistics", "without statistics"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_have_the_report_of_the_same_rows_as_json_lines(
    tmp_path: Path, starter: Tokenizer, name: str, statistics: bool
) -> None:
    lines, table = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    pq.write_table(pa.Table.from_pylist(ROWS[name]), table, write_statistics=statistics, row_group_size=2)
    one, other = read(lines, starter), read(table, starter)
    assert {key: other.get(key) for key in KEPT} == {key: one.get(key) for key in KEPT}


TEXTS = ["one?", "two?", "three?"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:10],
)
def test_text_may_have_any_type_of_text(tmp_path: Path, column: Any) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": column, "completion": ["a", "b", "c"]}), path)
    assert [row.prompt for row in rows(path)] == TEXTS


WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5)
UNUSED: dict[str, tuple[Any, int]] = {
    "day": (pa.array([WHEN.date(), None, WHEN.date()]), 2),
    "at": (pa.array([1_000_000_001, 2, None], pa.timestamp("ns")), 2),
    "price": (pa.array([decimal.Decimal("1.50"), None, None]), 1),
    "attributes": (pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())), 1),
    "category": (pa.array(["x", "", None]).dictionary_encode(), 1),
    "large": (pa.array(["x", "y", " "], pa.large_string()), 2),
    "view": (pa.array(["x", "{}", "null"], pa.string_view()), 1),
    "vector": (pa.array([[0.5, 1.0], [0.5, 2.0], [1.0, 1.0]], pa.list_(pa.float32(), 2)), 3),
    "flag": (pa.array([False, False, None]), 2),
    "bytes": (pa.array([b"x", None, None]), 1),
    "nothing": (pa.nulls(3), 0),
    "nested": (pa.array([{"a": {"b": None}}, {"a": {"b": 1}}, None]), 2),
}


@pytest.mark.parametrize("statistics", [True, False], ids=["with statistics", "without statistics"])
def test_columns_that_are_not_used_are_named_with_their_rows(
    tmp_path: Path, starter: Tokenizer, statistics: bool
) -> None:
    path = tmp_path / "x.parquet"
    columns = {name: column for name, (column, _) in UNUSED.items()}
    table = pa.table({"prompt": TEXTS, **columns, "completion": ["a", "b", "c"]})
    pq.write_table(table, path, write_statistics=statistics, row_group_size=2)
    expected = [f"{name} ({n} {'row' if n == 1 else 'rows'})" for name, (_, n) in UNUSED.items() if n]
    assert sorted(unused(read(path, starter))) == sorted(expected)


def test_the_first_rows_show_every_type(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({name: column for name, (column, _) in UNUSED.items()}), path)
    shown = head(path, detect_lenient(path))
    assert len(shown["rows"]) == 3
    json.dumps(shown)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (WHEN, "is a date and time, not text"),
        (WHEN.date(), "is a date, not text"),
        (decimal.Decimal("1.5"), "is a number, not text"),
        (b"x", "is binary data, not text"),
        ([("a", "b")], "is an object, not text"),
        (1.5, "is a number, not text"),
    ],
)
def test_other_types_in_the_place_of_text_are_refused_by_name(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "x.parquet"
    kind = pa.map_(pa.string(), pa.string()) if isinstance(value, list) else None
    pq.write_table(pa.table({"prompt": pa.array([value], kind), "completion": ["b"]}), path)
    with pytest.raises(BadRow, match=words):
        list(rows(path))
