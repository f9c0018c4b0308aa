"""What a row says is used or named: messages, tools, flags, and the fields beside them."""

from __future__ import annotations

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from training.data.bad_row import BadRow
from training.data.formats import Format, rows
from training.data.row_schemas import Reader, Row
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions, examples
from training.text.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def read(record: dict[str, Any]) -> Row:
    return Reader("", {})(1, record)


def turns(row: Row) -> list[tuple[str, str, int]]:
    return [(m["role"], m["content"], m.get("weight", 1)) for m in row.messages]


def test_a_system_field_becomes_the_first_message() -> None:
    for record in (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"messages": [USER, ANSWER]},
        {"instruction": "Who?", "output": "Me."},
        {"user": "Who?", "assistant": "Me."},
    ):
        row = read({"system": "Be short.", **record})
        assert turns(row) == [("system", "Be short.", 1), ("user", "Who?", 1), ("assistant", "Me.", 1)]
        assert row.unused == ()


def test_history_comes_before_the_question_and_is_not_trained() -> None:
    row = read({"instruction": "And now?", "input": "", "output": "Yes.", "history": [["Hi?", "Hello."]]})
    assert turns(row) == [
        ("user", "Hi?", 1),
        ("assistant", "Hello.", 0),
        ("user", "And now?", 1),
        ("assistant", "Yes.", 1),
    ]


def test_context_is_part_of_the_prompt() -> None:
    row = read({"instruction": "Who?", "context": "I did.", "response": "Me."})
    assert row.messages[0]["content"] == "Who?\n\nI did."
    pair = read({"question": "Who?", "context": "I did.", "answer": "Me."})
    assert pair.prompt == "I did.\n\nWho?"


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, 1),
        ({"train": False}, 0),
        ({"train": True}, 1),
        ({"weight": 0}, 0),
        ({"weight": 1, "train": False}, 0),
    ],
)
def test_a_flag_that_says_not_to_train_is_obeyed(fields: dict[str, Any], weight: int) -> None:
    assert turns(read({"messages": [USER, ANSWER | fields]}))[1][2] == weight


def test_segments_are_trained_by_their_labels() -> None:
    row = read({"segments": [{"label": False, "text": "Who? "}, {"label": True, "text": "Me."}]})
    assert row.segments == (("Who? ", False), ("Me.", True))


def test_tool_calls_of_every_dialect_become_one_form() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    text = json.dumps({"name": "look", "arguments": {"x": 1}})
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": '{"x": 1}'}}],
        },
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": text},
        {"from": "tool_call", "value": f"[{text}]"},
    ):
        row = read({"messages": [USER, message, {"role": "tool", "content": "3"}, ANSWER], "tools": [TOOL]})
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert row.tools == (TOOL,)
        assert row.unused == ()
    assert read({"messages": [USER, ANSWER], "functions": [TOOL["function"]]}).tools == (TOOL,)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{x"}}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "no function name"),
        ({"role": "user", "content": "", "tool_calls": [{"function": {"name": "a"}}]}, "not an assistant"),
        ({"role": "assistant", "content": "a", "train": "no"}, "train flag"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "image_url"),
    ],
)
def test_a_message_that_cannot_be_read_says_why(message: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        read({"messages": [message]})


def test_preference_pairs_are_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    for record in (
        {"prompt": "Who?", "chosen": "Me.", "rejected": "no"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
        {
            "input": {"messages": [USER], "tools": [TOOL]},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "no"}],
        },
    ):
        path.write_text(12 * (json.dumps(record) + "\n"))
        result = report(path, Tokenizer.load(STARTER_FOLDER), EncodingOptions())
        assert (result["kind"], result["ready"]) == ("preference", True), result["verdict"]
        assert result["trained_tokens"] > 0


def test_files_that_were_reported_before_are_read_as_then() -> None:
    record = {
        "messages": [{**USER, "name": "ann"}, {**ANSWER, "train": False, "tool_calls": [TOOL]}],
        "system": "Be short.",
        "tools": [TOOL],
    }
    row = Reader("chat", {"messages": "messages"}, Format.of({"shape": "chat"}).version)(1, record)
    assert row.messages == (USER, ANSWER)
    assert (row.tools, row.unused) == ((), ())


# ---- what is not used is named ----------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER, ANSWER], "system": "Be short.", "tools": [TOOL]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}],
        "system": "Be short.",
    },
    "instruction": {"instruction": "Who?", "input": "I did.", "output": "Me.", "history": [["a", "b"]]},
    "completion": {"prompt": "Who? ", "completion": "Me.", "context": "I did."},
    "text": {"text": "Me."},
    "segments": {"segments": [{"label": True, "text": "Me."}]},
}
EMPTY: list[Any] = [None, "", " ", [], {}, "[]"]
FULL: list[Any] = ["x", 0, 1.5, False, ["a"], {"a": 1}]
NAMES = ["id", "category", "score", "metadata", "source", "Notes", "parallel_tool_calls", "response_format"]


def generated(shape: str, seed: int) -> tuple[dict[str, Any], set[str]]:
    """A record with fields that nothing uses, and the names that the report must give."""
    rng = random.Random(seed)
    record, expected = json.loads(json.dumps(SHAPES[shape])), set()
    for name in rng.sample(NAMES, rng.randint(0, 4)):
        full = rng.random() < 0.6
        record[name] = rng.choice(FULL if full else EMPTY)
        expected |= {name} if full else set()
    for message in record.get("messages", []) + record.get("conversations", []):
        for name in rng.sample(["refusal", "id", "audio", "annotations"], rng.randint(0, 2)):
            full = rng.random() < 0.6
            message[name] = rng.choice(FULL if full else EMPTY)
            expected |= {f"messages[].{name}"} if full else set()
    items = list(record.items())
    rng.shuffle(items)
    return dict(items), expected


@pytest.mark.parametrize("shape", SHAPES)
def test_every_field_that_is_not_used_is_named_and_no_other(shape: str, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", Tokenizer.load(STARTER_FOLDER)
    cases = [generated(shape, seed) for seed in range(150)]
    for record, expected in cases:
        columns = {key: key for key in SHAPES[shape] if key not in ("system", "tools", "history", "context")}
        if shape == "instruction":
            columns = {"instruction": "instruction", "input": "input", "completion": "output"}
        assert set(Reader(shape, columns)(1, record).unused) == expected, record
    path.write_text("".join(json.dumps(record) + "\n" for record, _ in cases))
    format = Format("jsonl", shape, columns=columns)
    result = report(path, tokenizer, EncodingOptions(), format=format)
    [finding] = [f for f in result["findings"] if f["code"] == "unused_field"]
    counts = {name: sum(name in expected for _, expected in cases) for _, e in cases for name in e}
    assert {
        detail.rpartition(" (")[0]: int(detail.rpartition(" (")[2].split()[0])
        for detail in finding["details"]
    } == counts
    trained = list(examples(path, tokenizer, EncodingOptions(), format))
    assert (len(trained), sum(len(e.ids) for e in trained)) == (result["examples"], result["tokens"])


def test_a_cell_that_says_nan_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,input,output\nWho?,nan,Me.\nWho?,,None\nWho?,it,Me.\n")
    result = report(path, None)
    [finding] = [f for f in result["findings"] if f["code"] == "written_empty"]
    assert finding["lines"] == [2, 3]
    assert len(list(rows(path))) == 3


def test_system_and_tools_columns_of_parquet_are_used(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tools = json.dumps([{"type": "function", "function": {"name": "look_up", "parameters": {}}}])
    record = {"messages": turns, "System": "Be kind.", "tools": tools, "id": 1}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    (row,) = rows(tmp_path / "x.parquet")
    assert [m["content"] for m in row.messages] == ["Be kind.", "Hi", "Hello"]
    assert [tool["function"]["name"] for tool in row.tools] == ["look_up"]
    old = {"container": "parquet", "shape": "chat", "columns": {"messages": "messages"}}
    assert len(next(rows(tmp_path / "x.parquet", old)).messages) == 2


@pytest.mark.parametrize(
    ("name", "fields", "unused"),
    [
        (
            "calls in both forms",
            {"tool_calls": [{"function": {"name": "f"}}], "function_call": {"name": "g"}},
            "messages[].function_call",
        ),
        ("two kinds of reasoning", {"reasoning_content": "x", "thinking": "y"}, "messages[].thinking"),
        ("a sender beside the role", {"from": "gpt"}, "messages[].from"),
        ("a value beside the content", {"value": "other"}, "messages[].value"),
        ("a field of a call", {"tool_calls": [{"name": "f", "why": "z"}]}, "messages[].tool_calls[].why"),
        (
            "a field of a call's function",
            {"tool_calls": [{"function": {"name": "f", "strict": True}}]},
            "messages[].tool_calls[].function.strict",
        ),
        (
            "an id that is not text",
            {"tool_calls": [{"id": 7, "function": {"name": "f"}}]},
            "messages[].tool_calls[].id",
        ),
        (
            "arguments under two names",
            {"tool_calls": [{"name": "f", "arguments": {}, "parameters": {"a": 1}}]},
            "messages[].tool_calls[].parameters",
        ),
    ],
)
def test_what_loses_against_another_field_of_its_meaning_is_named(
    name: str, fields: dict[str, Any], unused: str
) -> None:
    assert read({"messages": [USER, {**ANSWER, **fields}]}).unused == (unused,)


def test_a_call_in_the_value_of_a_message_comes_before_its_tool_calls() -> None:
    call = {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [{"name": "g"}]}
    row = read({"conversations": [{"from": "human", "value": "Who?"}, call]})
    assert [one["function"]["name"] for one in row.messages[1]["tool_calls"]] == ["f"]
    assert row.unused == ("messages[].tool_calls",)


def test_context_beside_a_conversational_prompt_is_named() -> None:
    row = read({"prompt": [USER], "completion": [ANSWER], "context": "I did."})
    assert row.unused == ("context",)


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, "tool_calls": [{"name": name, "arguments": arguments}]}]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (call('{"a": "\\ud83d"}'), "half of a character"),
        (call({}, name="f\ud83d"), "half of a character"),
        (call('{"a": NaN}'), "NaN"),
        (call('{"a": ' + "[" * 200 + "]" * 200 + "}"), "nested more than 32 deep"),
        (call({"a": date(2026, 1, 1)}), "a date"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f", "description": "\ud83d"}]}, "half"),
        (
            {"messages": [USER, ANSWER], "tools": '[{"name": "f", "x": ' + "[" * 700 + "]" * 700 + "}]"},
            "nested more than 32 deep",
        ),
    ],
)
def test_calls_and_tools_that_json_cannot_hold_are_refused_with_their_line(
    record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRow, match=f"line 1: the .* contain .*{reason}"):
        read(record)


@pytest.mark.parametrize("tool", [{}, {"type": "function", "function": "f"}, {"function": None}])
def test_a_tool_without_a_name_is_refused_with_its_line(tool: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="line 1: tool 1 has no name"):
        read({"messages": [USER, ANSWER], "tools": [tool]})


def test_tools_of_the_responses_api_are_read_like_those_of_chat_completions() -> None:
    flat = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    assert read({"messages": [USER, ANSWER], "tools": [flat]}).tools == (TOOL,)


@pytest.mark.parametrize("history", [5, True, {"a": 1}, ["q", "a"]])
def test_a_history_that_is_no_list_of_pairs_is_refused(history: Any) -> None:
    with pytest.raises(BadRow, match="line 1: the history is not a list of pairs"):
        read({"instruction": "Now?", "output": "Yes.", "history": history})
