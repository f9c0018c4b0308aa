"""A new version of a dataset: without the rows that findings name, or with some rows held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from training.__main__ import main
from training.data.formats import BadRow, rows
from training.plan.catalog import STARTER_FOLDER
from training.report.fix import fix
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

ROWS = [{"prompt": f"Number {i}?\n", "completion": f" It is {i * i}."} for i in range(200)]


def put(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_duplicate_and_empty_rows_are_dropped_in_order(tmp_path: Path) -> None:
    path = put(tmp_path, [*ROWS[:20], ROWS[3], {"prompt": "And?\n", "completion": ""}, *ROWS[20:40]])
    done = fix(path, tmp_path / "new.jsonl")
    assert done.dropped == {"duplicate": [21], "empty_answer": [22]}
    assert [row.prompt for row in rows(tmp_path / "new.jsonl")] == [row["prompt"] for row in ROWS[:40]]
    assert report(tmp_path / "new.jsonl", None)["findings"] == []


def test_only_the_chosen_findings_are_dropped(tmp_path: Path) -> None:
    path = put(tmp_path, [*ROWS[:20], ROWS[3], {"prompt": "And?\n", "completion": ""}])
    assert fix(path, tmp_path / "new.jsonl", drop=["duplicate"]).kept == 21


def test_all_rows_are_dropped_not_only_those_the_report_lists(tmp_path: Path) -> None:
    path = put(tmp_path, [*ROWS, *ROWS])
    assert fix(path, tmp_path / "new.jsonl").kept == len(ROWS)


def test_bad_rows_are_dropped_or_raise_an_error(tmp_path: Path) -> None:
    path = put(tmp_path, ROWS[:20])
    path.write_text(path.read_text() + "{oops\n")
    assert fix(path, tmp_path / "new.jsonl").dropped == {"bad_row": [21]}
    with pytest.raises(BadRow, match="line 21"):
        fix(path, tmp_path / "new.jsonl", drop=["duplicate"])


def test_rows_too_long_for_the_model_are_detected_with_its_tokenizer(tmp_path: Path) -> None:
    path = put(tmp_path, [*ROWS[:20], {"prompt": "Go on\n", "completion": " and on" * 600}])
    tokenizer = Tokenizer.load(STARTER_FOLDER)
    assert fix(path, tmp_path / "new.jsonl", tokenizer=tokenizer, settings=EncodingOptions(512)).dropped == {
        "truncated": [21]
    }


def test_held_out_rows_are_never_trained_on_and_depend_on_the_seed(tmp_path: Path) -> None:
    path = put(tmp_path, ROWS)

    def split(seed: int) -> tuple[set[str], set[str]]:
        new, aside = tmp_path / f"{seed}.jsonl", tmp_path / f"{seed}-aside.jsonl"
        done = fix(path, new, validation=aside, fraction=0.2, seed=seed)
        assert done.kept + done.validation == len(ROWS)
        return {row.prompt for row in rows(new)}, {row.prompt for row in rows(aside)}

    trained, held = split(1)
    assert not trained & held
    assert 20 <= len(held) <= 60
    assert split(1) == (trained, held)
    assert split(2) != (trained, held)


def test_rows_of_an_array_on_one_line_are_distinguished(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*ROWS[:20], ROWS[3]]))
    done = fix(path, tmp_path / "new.jsonl")
    assert (done.rows, done.kept, done.dropped) == (21, 20, {"duplicate": [1]})


def test_holding_out_rows_alone_drops_nothing(tmp_path: Path) -> None:
    path = put(tmp_path, [*ROWS, ROWS[3]])
    new, aside = tmp_path / "new.jsonl", tmp_path / "aside.jsonl"
    written = json.dumps({"container": "jsonl", "shape": "completion", "encoding": "utf-8"})
    command = [
        "fix",
        str(path),
        "--to",
        str(new),
        "--validation",
        str(aside),
        "--drop",
        "",
        "--format",
        written,
    ]
    assert main(command) == 0
    assert len(list(rows(new))) + len(list(rows(aside))) == len(ROWS) + 1


def test_the_command_prints_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, [*ROWS[:20], ROWS[3]])
    assert main(["fix", str(path), "--to", str(tmp_path / "new.jsonl")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("format")["container"] == "jsonl"
    assert printed == {
        "t": "fixed",
        "rows": 21,
        "kept": 20,
        "validation": 0,
        "dropped": {"duplicate": [21]},
        "removed": [{"line": 21, "preview": "Number 3? It is 9."}],
        "changed": [],
    }
    assert main(["fix", str(path), "--to", str(tmp_path / "new.jsonl"), "--drop", "few"]) == 10
    assert json.loads(capsys.readouterr().out)["error"] == "these findings have no rows to drop: few"


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def talk(i: int, system: bool, answer: str = "") -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"Number {i}?"},
        {"role": "assistant", "content": answer or f"It is {i * i}."},
    ]
    return {"messages": [{"role": "system", "content": "Count."}, *turns] if system else turns}


@pytest.fixture
def strict(tmp_path: Path) -> Tokenizer:
    """A tokenizer whose template refuses system messages."""
    folder = tmp_path / "strict"
    folder.mkdir()
    for file in STARTER_FOLDER.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    return Tokenizer.load(folder)


def test_rows_that_the_template_cannot_express_are_dropped_and_no_others(
    tmp_path: Path, strict: Tokenizer
) -> None:
    records = [talk(i, i in (2, 5)) for i in range(20)]
    path = put(tmp_path, [*records, records[3]])
    done = fix(path, tmp_path / "new.jsonl", tokenizer=strict, settings=EncodingOptions(512))
    assert done.dropped == {"left_out": [3, 6], "duplicate": [21]}
    assert [row.messages[0]["content"] for row in rows(tmp_path / "new.jsonl")] == [
        f"Number {i}?" for i in range(20) if i not in (2, 5)
    ]


def test_a_file_that_the_template_cannot_express_at_all_says_so(tmp_path: Path, strict: Tokenizer) -> None:
    result = report(put(tmp_path, [talk(i, True) for i in range(20)]), strict, EncodingOptions(512))
    assert (result["ready"], result["error"]) == (True, "")
    assert result["refusal"].startswith(
        "This base model cannot be trained on any of the rows: the model's chat template rejects these "
        "messages: System role not supported. "
    )
    assert not result.get("choose")
