"""The rows that `bin/bench tools` trains on and asks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from benchmarks.function_calls import FUNCTIONS, call_of, generate, split, write
from benchmarks.tools import BASE, SETTINGS
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer


def test_the_same_seed_gives_the_same_rows() -> None:
    assert generate(3, 40, 20) == generate(3, 40, 20)
    assert generate(3, 40, 20) != generate(4, 40, 20)


def test_no_entity_is_both_trained_and_held_out() -> None:
    trained, held_out = split(0)
    for pool in fields(trained):
        ours, theirs = set(getattr(trained, pool.name)), set(getattr(held_out, pool.name))
        assert ours
        assert theirs
        assert not ours & theirs, pool.name


def test_every_function_is_called_and_some_prompts_need_none() -> None:
    for rows in generate(0, 240, 120):
        calls = [call_of(row) for row in rows]
        names = {definition["function"]["name"] for definition, _ in FUNCTIONS}
        assert {call[0] for call in calls if call} == names
        assert calls.count(None) == len(rows) // 8
        for row, call in zip(rows, calls, strict=True):
            offered = [tool["function"]["name"] for tool in row["tools"]]
            assert call is None or call[0] in offered


def test_the_report_finds_nothing_wrong_with_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, generate(0, 240, 120)[0])
    result = report(path, Tokenizer.load(BASE), EncodingOptions(SETTINGS["sequence_length"]))
    assert result["findings"] == []
    assert (result["examples"], result["truncated"]) == (240, 0)
