"""What the report and the trainer make of a base's chat template: faults, rewritten turns, dates."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.running import Runner, losses, of
from tests.training.text.families import FAMILIES, write_tokenizer
from tests.training.tiny import write_model
from training.data.formats import Format
from training.data.summary import Summary
from training.engine import inputs
from training.engine.packing import Examples, hold_out
from training.plan.events import Failure
from training.plan.run_file import Run
from training.report.report import report, row_tokens
from training.text.encode import EncodingOptions, Example, examples
from training.text.tokenizer import Tokenizer

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
FAULTS = {
    "an undefined filter": (TURN + "{{ messages | shuffled }}", "shuffled"),
    "a syntax error": (TURN + "{% if %}", "line 1|Expected"),
    "a TypeError": (TURN + "{{ 1 + 'a' }}", "unsupported operand"),
    "an undefined variable": (TURN + "{{ system_prompt.strip() }}", "system_prompt"),
}
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + TURN
)
# writes the date, and answers without the brackets around what was thought once the next question follows
REWRITES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split(']')[-1] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %B %Y') }}.\n" + TURN


def chat(*contents: str, **last: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


def write_base(folder: Path, template: str, context: int = 256) -> Path:
    base = write_model(folder, context=context)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return base


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(base: Path, path: Path, **more: Any) -> Run:
    return Run.parse(
        {"base": str(base), "train_file": str(path), "work_dir": str(path.parent / "work"), **more}
    )


def findings(result: dict[str, Any]) -> dict[str, Any]:
    return {finding["code"]: finding for finding in result["findings"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_template_is_the_base_models(fault: str, tmp_path: Path) -> None:
    template, words = FAULTS[fault]
    base = write_base(tmp_path / "base", template)
    path = write_rows(tmp_path / "rows.jsonl", [chat("Who?", f"Number {i}.") for i in range(40)])
    result = report(path, Tokenizer.load(base), EncodingOptions(256))
    assert not result["ready"]
    assert result["error"].startswith("The base model's chat template cannot be used: ")
    assert any(word in result["error"] for word in words.split("|"))
    assert (findings(result)["chat_template"]["count"], "bad_row" in findings(result)) == (1, False)
    assert "left_out" not in findings(result)
    for expected in (None, {"examples": 40}):
        with pytest.raises(Failure) as failure:
            inputs.read(run_of(base, path, expected=expected))
        assert failure.value.reason == "base_model"
        assert failure.value.message.startswith("The base model's chat template cannot be used: ")


def test_rows_without_messages_train_whatever_the_template_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "{% if %}")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": "Yes."} for i in range(9)])
    assert report(path, Tokenizer.load(base), EncodingOptions(256))["examples"] == 9


def test_a_row_that_the_template_rejects_is_left_out_and_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", ALTERNATE)
    rows = [chat("Who?", f"Number {i}.") for i in range(12)]
    rows[7] = {"messages": [*rows[7]["messages"], {"role": "assistant", "content": "Twice."}]}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = report(path, Tokenizer.load(base), EncodingOptions(256))
    assert (result["ready"], result["examples"]) == (True, 11)
    left_out = findings(result)["left_out"]
    assert (left_out["lines"], "Roles must alternate" in left_out["details"][0]) == ([8], True)
    data = inputs.read(run_of(base, path, expected={"examples": 11, "tokens": result["tokens"]}))
    assert "Roles must alternate" in data.notes[0]


# --- templates that rewrite earlier turns ---------------------------------------------------------

TALKS = [
    chat("Who?", "[a cat] The cat.", "Where?", "[the mat] On the mat."),
    chat("Who?", "[moon] The moon."),
    chat("Who?", "[x] The cat.", "Where?", "[y] On the mat.", "Why?", "[z] To look."),
    chat("Who?", "[x] Nobody.", "Where?", "[y] There.", weight=0),
    chat("Who?", "Nobody.", "Where?", "There."),
]


def test_each_answer_is_trained_as_inference_sees_the_conversation(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", REWRITES)
    tokenizer = Tokenizer.load(base)
    path = write_rows(tmp_path / "rows.jsonl", TALKS)
    result = report(path, tokenizer, EncodingOptions(256))
    finding = findings(result)["several_examples"]
    assert (finding["severity"], finding["count"], finding["lines"]) == ("info", 2, [1, 3])
    assert finding["details"] == ["2 rows become 5 examples", "line 1: 2 examples", "line 3: 3 examples"]
    assert (result["rows"], result["examples"]) == (5, 8)
    trained = list(examples(path, tokenizer, EncodingOptions(256)))
    counted = Summary.of(trained)
    assert (counted.examples, counted.tokens) == (result["examples"], result["tokens"])
    assert counted.trained_tokens == result["trained_tokens"]
    learned = [
        tokenizer.decode([id for id, mask in zip(e.ids, e.mask, strict=True) if mask], False) for e in trained
    ]
    end = tokenizer.eos_text
    assert learned[:2] == [f"[a cat] The cat.{end}", f"[the mat] On the mat.{end}"]
    assert learned[6:] == [f"[x] Nobody.{end}", f"Nobody.{end}There.{end}"]
    for example in trained:
        begin = example.mask.index(1)
        talk = TALKS[example.line - 1]["messages"]
        prompts = [tokenizer.encode_chat(talk[:i], True) for i in range(1, len(talk), 2)]
        assert example.ids[:begin] in prompts
    data = inputs.read(run_of(base, path, expected={"examples": 8, "tokens": result["tokens"]}))
    assert len(data.train) + len(data.held_out) == 8
    shown = row_tokens(path, 3, tokenizer, EncodingOptions(256))
    assert len(shown["tokens"]) == sum(len(e.ids) for e in trained if e.line == 3)


def test_the_two_halves_of_a_large_file_count_examples_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TALKS * 30)
    tokenizer = Tokenizer.load(write_base(tmp_path / "base", REWRITES))
    whole = report(path, tokenizer, EncodingOptions(256))
    monkeypatch.setattr("training.report.report.SPLIT_FROM_BYTES", 1)
    halves = report(path, tokenizer, EncodingOptions(256))
    assert findings(halves)["several_examples"] == findings(whole)["several_examples"]
    assert halves["examples"] == whole["examples"] == 240


def test_examples_of_a_conversation_are_held_out_together(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", REWRITES)
    talks = [chat("Who?", f"[{i}] The cat.", "Where?", f"[{i}] On the mat.") for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", talks)
    data = inputs.read(run_of(base, path, settings={"validation_fraction": 0.2}))
    assert (len(data.train), len(data.held_out)) == (96, 24)

    def numbers(part: Examples) -> list[str]:
        texts = [data.tokenizer.decode(part[i][0].tolist()) for i in range(len(part))]
        return [text[text.rindex("[") : text.rindex("]")] for text in texts]

    assert not {*numbers(data.train)} & {*numbers(data.held_out)}


def test_rows_of_one_example_are_held_out_as_before() -> None:
    rng = np.random.default_rng(0)
    some = Examples.of(
        [Example([int(i) for i in rng.integers(0, 9, 5)], [0, 1, 1, 1, 1], 0, n) for n in range(40)]
    )
    for left, right in zip(hold_out(some, 0.25, 3), hold_out(some, 0.25, 3, list(range(40))), strict=True):
        assert left.hash() == right.hash()


def test_a_file_reported_by_the_first_release_is_trained_as_then(tmp_path: Path) -> None:
    """Its jobs count on one example a row, and on a template that finds no date."""
    template = "{{ strftime_now('%Y') if strftime_now is defined else '1999' }} " + REWRITES
    tokenizer = Tokenizer.load(write_base(tmp_path / "base", template))
    path = write_rows(tmp_path / "rows.jsonl", TALKS[:3])
    early = Format("jsonl", "chat", columns={"messages": "messages"}, version=1)
    result = report(path, tokenizer, EncodingOptions(256), format=early)
    assert (result["examples"], "several_examples" in findings(result)) == (3, False)
    texts = [tokenizer.decode(e.ids) for e in examples(path, tokenizer, EncodingOptions(256), early)]
    assert all(text.startswith("1999 ") for text in texts)
    assert ("[a cat]" in texts[0], "[the mat]" in texts[0]) == (False, True)


# --- dates ----------------------------------------------------------------------------------------


def test_a_report_and_a_run_of_one_date_count_the_same_on_any_day(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", DATED)
    path = write_rows(tmp_path / "rows.jsonl", [chat("Who?", f"Number {i}.") for i in range(12)])
    counts = {}
    for day in ("2024-05-01", "2024-09-30"):
        tokenizer = Tokenizer.load(base)
        tokenizer.now = datetime.fromisoformat(day)
        counts[day] = report(path, tokenizer, EncodingOptions(256))["tokens"]
    assert len({*counts.values()}) == 2, "the dates have different lengths"
    for day, tokens in counts.items():
        data = inputs.read(run_of(base, path, date=day, expected={"examples": 12, "tokens": tokens}))
        assert data.tokenizer.now == datetime.fromisoformat(day)


def test_a_run_resumed_on_another_day_trains_the_same_tokens(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 6)
    write_base(Path(runner.values["base"]), DATED)
    path = write_rows(tmp_path / "rows.jsonl", [chat("Who?", f"Number {i}.") for i in range(12)])
    given: dict[str, Any] = {
        "train_file": str(path),
        "train_format": None,
        "validation_file": None,
        "validation_format": None,
    }
    settings = {"sequence_length": None, "validation_fraction": 0, "batch_size": 2, "max_steps": 6}
    whole = runner.train("whole", date="2001-02-03", settings=settings, **given)
    cut = runner.train("cut", stop_at=3, date="2001-02-03", settings=settings, **given)
    last = of(cut, "checkpoint")[-1]["path"]
    assert json.loads((Path(last) / "manifest.json").read_text())["date"] == "2001-02-03"
    events = runner.train("again", resume_from=last, epoch=2, settings=settings, **given)
    assert {**losses(cut), **losses(events)} == losses(whole)


def test_a_wrong_date_is_named() -> None:
    from training.plan.config import ConfigError

    with pytest.raises(ConfigError, match="date"):
        Run.parse({"base": "a", "train_file": "b", "work_dir": "c", "date": "tomorrow"})


def test_qwen3_is_one_of_those_that_rewrite(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, FAMILIES["Qwen3"]))
    path = write_rows(tmp_path / "rows.jsonl", [chat("Who?", "The cat.", "Where?", "On the mat.")])
    by_code = findings(report(path, tokenizer, EncodingOptions(None)))
    assert by_code["several_examples"]["details"][0] == "1 row becomes 2 examples"
