"""The report finds the defects of a dataset with their lines, and reports nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.__main__ import main
from training.data.formats import ByteRange
from training.data.summary import Summary
from training.plan.catalog import SAMPLE_FOLDER, STARTER_FOLDER
from training.report.findings import KINDS, find_personal_data, find_secret
from training.report.report import _Report, report, row_tokens
from training.text.encode import EncodingOptions, examples
from training.text.tokenizer import Tokenizer

PLAIN = EncodingOptions(512)


@pytest.fixture(scope="module")
def starter() -> Tokenizer:
    return Tokenizer.load(STARTER_FOLDER)


def put(folder: Path, records: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def clean_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Ordinary questions and answers, all different."""
    rng = random.Random(seed)
    names = rng.sample(
        [
            "river",
            "garden",
            "teacher",
            "window",
            "summer",
            "engine",
            "forest",
            "letter",
            "market",
            "village",
            "bridge",
            "doctor",
        ],
        12,
    )
    verbs = ["find", "paint", "leave", "cross", "visit", "repair", "remember", "describe"]
    pairs = rng.sample([(a, v, b) for a in names for v in verbs for b in names if a != b], count)
    return [
        {
            "prompt": f"How does the {a} {v} the {b}?\n",
            "completion": f" The {a} will {v} it near the {b}, slowly.",
        }
        for a, v, b in pairs
    ]


def findings_of(
    folder: Path, records: list[dict[str, Any]], tokenizer: Tokenizer, settings: EncodingOptions = PLAIN
) -> dict[str, list[int]]:
    result = report(put(folder, records), tokenizer, settings)
    return {finding["code"]: finding["lines"] for finding in result["findings"]}


# name -> (the finding that must name the line, a function that puts the defect into a good row)
DEFECTS: dict[str, tuple[str, Any]] = {
    "replacement sign": ("damage", lambda r: {**r, "completion": " caf\ufffd au lait"}),
    "mojibake": ("damage", lambda r: {**r, "completion": " cafÃ© au lait"}),
    "curly mojibake": ("damage", lambda r: {**r, "prompt": "Itâ€™s late, why?\n"}),
    "control character": ("damage", lambda r: {**r, "completion": " a\x07b"}),
    "NUL": ("damage", lambda r: {**r, "completion": " a\x00b"}),
    "control token": ("special_tokens", lambda r: {**r, "completion": " yes<|endoftext|>"}),
    "empty answer": ("empty_answer", lambda r: {**r, "completion": ""}),
    "blank answer": ("empty_answer", lambda r: {**r, "completion": "  \n"}),
    "empty prompt": ("empty_prompt", lambda r: {**r, "prompt": ""}),
    "too long": ("truncated", lambda r: {**r, "completion": r["completion"] * 100}),
    "prompt too long": ("answer_cut", lambda r: {**r, "prompt": r["prompt"] * 100}),
    "run together": ("run_together", lambda r: {"prompt": "Name any word", "completion": "river"}),
    "trailing space": ("trailing_space", lambda r: {"prompt": "Say the word: ", "completion": "village"}),
    "email": ("personal", lambda r: {**r, "completion": " Write to anna.schmidt@posteo.de today."}),
    "phone": ("personal", lambda r: {**r, "completion": " Call +49 30 901820 today."}),
    "card": ("personal", lambda r: {**r, "completion": " Pay with 4111 1111 1111 1111 today."}),
    "IBAN": ("personal", lambda r: {**r, "completion": " Pay to DE89 3704 0044 0532 0130 00 today."}),
    "AWS key": ("secret", lambda r: {**r, "completion": " Use AKIAIOSFODNN7EXAMPLE today."}),
    "password": ("secret", lambda r: {**r, "completion": " password: hunter2hunter2"}),
    "private key": ("secret", lambda r: {**r, "completion": " -----BEGIN RSA PRIVATE KEY-----"}),
    "zero width": ("invisible", lambda r: {**r, "completion": " in\u200bvisible"}),
    "direction": ("invisible", lambda r: {**r, "completion": " \u202eesrever"}),
    "number for text": ("bad_row", lambda r: {**r, "completion": 7}),
    "missing answer": ("bad_row", lambda r: {"prompt": r["prompt"]}),
}
PAIR_DEFECTS: dict[str, tuple[str, Any]] = {
    "twice": ("duplicate", lambda r: dict(r)),
    "other capitals": ("near_duplicate", lambda r: {**r, "prompt": r["prompt"].upper()}),
    "other answer": ("conflict", lambda r: {**r, "completion": " I do not know."}),
}


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_all_planted_defects_are_reported_and_no_others(
    tmp_path: Path, starter: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    records = clean_rows(200, seed)
    expected: dict[str, set[int]] = {}
    places = rng.sample(range(20, 200), 20)
    for place, name in zip(places, rng.sample([*DEFECTS, *PAIR_DEFECTS], 20), strict=True):
        if name in DEFECTS:
            code, damage = DEFECTS[name]
            records[place] = damage(records[place])
        else:
            code, damage = PAIR_DEFECTS[name]
            records[place] = damage(records[places.index(place)])  # one of the first rows, which stay clean
        expected.setdefault(code, set()).add(place + 1)
        if name == "prompt too long":
            expected.setdefault("truncated", set()).add(place + 1)
    assert {code: set(lines) for code, lines in findings_of(tmp_path, records, starter).items()} == expected


@pytest.mark.parametrize("tokenized", [True, False])
def test_a_large_file_is_read_in_halves_with_the_same_report(
    tmp_path: Path, starter: Tokenizer, monkeypatch: pytest.MonkeyPatch, tokenized: bool
) -> None:
    rng, records = random.Random(5), clean_rows(300, 5)
    damaged = [
        damage(records[i])
        for i, (_, damage) in zip(rng.sample(range(300), 24), DEFECTS.values(), strict=True)
    ]
    records += [*damaged, *records[40:60]]
    rng.shuffle(records)
    path = put(tmp_path, records)
    path.write_text("\n\n{oops\n" + path.read_text().replace("\n", "\n\n", 70) + "[1]\n")
    whole = report(path, starter if tokenized else None, PLAIN)
    monkeypatch.setattr("training.report.report.SPLIT_FROM_BYTES", 1000)
    monkeypatch.setattr("training.report.report._cores", lambda: 2)
    real, calls = _Report._join, []

    def join(self: _Report, *arguments: Any) -> Any:
        calls.append(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(_Report, "_join", join)
    assert report(path, starter if tokenized else None, PLAIN) == whole
    assert len(calls) == 1


def test_a_fatal_error_in_the_second_half_has_the_right_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, clean_rows(300, 5))
    with path.open("a") as file:
        file.write('{"prompt": "' + "x" * (5 << 20) + '"}\n')
    text = path.read_text()
    begin = text.index("\n", 20_000) + 1
    monkeypatch.setattr(
        "training.report.report._halves",
        lambda path, format: (ByteRange(0, begin), ByteRange(begin, path.stat().st_size)),
    )
    result = report(path, None, PLAIN)
    assert (result["rows"], result["ready"], result["error"][:9]) == (300, False, "Line 301:")


@pytest.mark.parametrize("name", [*DEFECTS])
def test_each_defect_alone_is_reported(tmp_path: Path, starter: Tokenizer, name: str) -> None:
    code, damage = DEFECTS[name]
    records = clean_rows(30, 5)
    records[16] = damage(records[16])
    lines = findings_of(tmp_path, records, starter)
    assert lines.pop(code) == [17]
    assert set(lines) <= {"truncated"}


@pytest.mark.parametrize("file", ["train.jsonl", "heldout.jsonl"])
def test_clean_files_have_no_findings(starter: Tokenizer, file: str) -> None:
    result = report(
        SAMPLE_FOLDER / file,
        starter,
        PLAIN,
        validation=SAMPLE_FOLDER / ("heldout.jsonl" if file == "train.jsonl" else "train.jsonl"),
    )
    assert (result["findings"], result["ready"]) == ([], True)


def test_counts_equal_those_of_the_trainer(tmp_path: Path, starter: Tokenizer) -> None:
    path = put(tmp_path, [*clean_rows(50, 1), {"prompt": "Go on\n", "completion": " and on" * 400}])
    result = report(path, starter, EncodingOptions(128))
    counted = Summary.of(examples(path, starter, EncodingOptions(128)))
    assert {name: result[name] for name in ("examples", "tokens", "trained_tokens", "truncated")} == {
        name: getattr(counted, name) for name in ("examples", "tokens", "trained_tokens", "truncated")
    }


def test_a_leak_into_the_validation_file_is_reported(tmp_path: Path, starter: Tokenizer) -> None:
    records = clean_rows(40, 2)
    validation = put(
        tmp_path,
        [
            *clean_rows(60, 3)[:0],
            records[4],
            {**records[7], "completion": " Another answer."},
            {"prompt": "New?\n", "completion": " Yes."},
        ],
        "v.jsonl",
    )
    result = report(put(tmp_path, records), starter, PLAIN, validation=validation)
    assert [(f["code"], f["lines"]) for f in result["findings"]] == [("leak", [1, 2])]


def test_a_conversation_that_does_not_end_with_the_assistant_is_reported(
    tmp_path: Path, starter: Tokenizer
) -> None:
    turn = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    talks = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"Hello {i}"}]}
        for i in range(12)
    ]
    talks[5] = {"messages": [*turn, {"role": "user", "content": "Are you there?"}]}
    talks[8] = {"messages": [{"role": "user", "content": "Nobody answers"}]}
    assert findings_of(tmp_path, talks, starter) == {"nothing_to_train": [9], "no_answer_last": [6]}


def test_a_language_that_does_not_fit_the_tokenizer_is_reported(tmp_path: Path, starter: Tokenizer) -> None:
    records = [{"text": "これは日本語の文章です。" * 3 + str(i)} for i in range(20)]
    assert "poor_fit" in findings_of(tmp_path, records, starter)


def test_identical_answers_are_reported(tmp_path: Path, starter: Tokenizer) -> None:
    records = [{**row, "completion": " Yes."} for row in clean_rows(20, 4)]
    assert "same_answer" in findings_of(tmp_path, records, starter)


def test_a_file_that_cannot_be_read_is_not_ready(tmp_path: Path, starter: Tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"PK\x03\x04....")
    result = report(path, starter, PLAIN)
    assert not result["ready"]
    assert "ZIP" in result["error"]


def test_bad_rows_are_counted_and_the_first_is_reported(tmp_path: Path, starter: Tokenizer) -> None:
    path = put(tmp_path, clean_rows(10, 1))
    path.write_text(path.read_text() + "{oops\n{again\n")
    result = report(path, starter, PLAIN)
    assert result["error"].startswith("Line 11: ")
    assert result["error"].endswith("1 more row cannot be read.")
    assert result["findings"][0]["lines"] == [11, 12]


def test_the_first_samples_show_what_is_learned(starter: Tokenizer) -> None:
    result = report(SAMPLE_FOLDER / "train.jsonl", starter, PLAIN)
    assert len(result["samples"]) == 5
    sample = result["samples"][0]
    text = "".join(token["text"] for token in sample["tokens"] if token["trained"])
    assert text.startswith(" item:")
    assert text.endswith("<|endoftext|>")
    assert all(len(s["preview"]) <= 150 for s in result["samples"])


def test_the_tokens_of_any_row_can_be_shown(starter: Tokenizer) -> None:
    row = row_tokens(SAMPLE_FOLDER / "train.jsonl", 7, starter, PLAIN)
    assert "".join(token["text"] for token in row["tokens"]).startswith("Order:")
    with pytest.raises(KeyError):
        row_tokens(SAMPLE_FOLDER / "train.jsonl", 10_000, starter, PLAIN)


@pytest.mark.parametrize(
    "text",
    [
        "The year 2024-10-12 was fine.",
        "1,234,567.89 euros",
        "Version 1.2.3.4",
        "ISBN 978-3-16-148410-0",
        "Order 123456789012345",
        "user@example.com",
    ],
)
def test_ordinary_numbers_are_not_personal_data(text: str) -> None:
    assert find_personal_data(text) == ""


def test_ordinary_words_are_not_secrets(starter: Tokenizer) -> None:
    assert find_secret("The password is written on the wall; sk-ill is a word. token = value") == ""


def test_every_finding_has_a_reason_and_a_fix() -> None:
    assert all(
        kind.why and kind.fix and kind.severity in ("error", "warning", "info") for kind in KINDS.values()
    )


def test_the_command_prints_a_report(tmp_path: Path) -> None:
    path = put(tmp_path, clean_rows(20, 1))
    done = subprocess.run(
        [sys.executable, "-m", "training", "check", str(path), "--tokenizer", str(STARTER_FOLDER)],
        capture_output=True,
        text=True,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["t"], last["ready"], last["examples"]) == ("report", True, 20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("fix", "nowhere.jsonl", "--to", "new.jsonl"), "nowhere.jsonl: No such file"),
        (("check", "data.jsonl", "--tokenizer", "."), "Use the folder of a model"),
    ],
)
def test_a_missing_path_is_reported_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "rain"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 2
    stderr = capsys.readouterr().err
    assert words in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["pairs", "conversations", "segments"])
def test_the_counts_say_which_sequence_lengths_leave_an_answer(
    tmp_path: Path, starter: Tokenizer, kind: str
) -> None:
    records: list[dict[str, Any]] = []
    for number, row in enumerate(clean_rows(8, 3)):
        prompt, answer = row["prompt"] + " please" * (number + 1) ** 2, row["completion"]
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
        records.append(
            {
                "pairs": {"prompt": prompt, "completion": answer},
                "conversations": {"messages": [user, assistant, user, assistant]},
                "segments": {"segments": [{"label": False, "text": prompt}, {"label": True, "text": answer}]},
            }[kind]
        )
    path = put(tmp_path, records)
    counts = report(path, starter, EncodingOptions(40))  # which cuts some of them itself
    first, every = counts["first_answer"], counts["every_answer"]
    assert 1 < first < 40 < every
    for length in range(2, every + 2):
        learns = [bool(one.trained) for one in examples(path, starter, EncodingOptions(length))]
        assert (any(learns), all(learns)) == (length >= first, length >= every), length
    for count in ("first_answer", "every_answer"):
        assert Summary.from_dict({"examples": 3}).as_dict()[count] == 0  # a report made before these counts


def test_two_halves_have_the_counts_of_the_whole() -> None:
    whole, half, later = Summary(), Summary(), Summary(first_answer=7, every_answer=30)
    for other in (half, later, Summary()):
        whole.join(other)
    assert (whole.first_answer, whole.every_answer) == (7, 30)
    whole.join(Summary(first_answer=5, every_answer=20))
    assert (whole.first_answer, whole.every_answer) == (5, 30)


def test_one_of_something_is_in_the_singular(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a?", "completion": " b"}\n')
    assert {f["code"]: f["details"] for f in report(path, None)["findings"]} == {"few": ["1 example"]}


def test_a_conversation_that_begins_with_an_answer_is_left_out_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    answer, user = {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Who?"}
    rows = [[answer, user, answer], [{**answer, "weight": 0}, user, answer]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    result = report(path, Tokenizer.load(STARTER_FOLDER), EncodingOptions(256))
    (left_out,) = (f for f in result["findings"] if f["code"] == "left_out")
    assert left_out["lines"] == [1]
    assert "it begins with an answer" in left_out["details"][0]
    assert '"weight": 0' in left_out["details"][0]
