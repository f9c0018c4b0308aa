"""New versions of a file keep what its author wrote: rows edited, added, excluded, split and merged."""

from __future__ import annotations

import csv
import datetime
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.__main__ import main
from training.data.formats import BadRow, Format, detect, rows
from training.data.pages import read_page
from training.report.fix import edit, fix, merge
from training.report.report import report

# Everything here is a field that nothing uses, or an unusual way to write one.
LINES = [
    '{"id": 1, "prompt":"One?", "completion": "1", "meta": {"score": 1.50, "tags": ["a"]}}',
    '{"prompt": "Two?", "completion": "caf\\u00e9", "note": "\\ud800"}',
    '{"completion": "3", "prompt": "Three?", "weight": null}',
    '{"prompt": "One?", "completion": "1", "again": true}',
]


def put(folder: Path, text: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def change(path: Path, changes: dict[str, Any], name: str | None = None) -> tuple[Path, Format]:
    to = path.with_name(name or "new" + path.suffix)
    return to, Format.of(edit(path, to, changes).format)


def test_dropping_rows_keeps_the_other_lines_byte_for_byte(tmp_path: Path) -> None:
    path = put(tmp_path, "\n".join(LINES) + "\n")
    done = fix(path, tmp_path / "new.jsonl", drop=["duplicate"])
    assert done.dropped == {"duplicate": [4]}
    assert (tmp_path / "new.jsonl").read_text().splitlines() == LINES[:3]


def test_a_file_with_other_line_ends_a_byte_order_mark_and_blank_lines_is_read_row_by_row(
    tmp_path: Path,
) -> None:
    path = put(tmp_path, b"\xef\xbb\xbf" + "\r\n\r\n".join(LINES).encode())
    to, _ = change(path, {"rows": {"3": None}})
    assert to.read_text().splitlines() == [LINES[0], LINES[1], LINES[3]]


def test_rows_are_edited_excluded_and_added_and_the_difference_is_listed(tmp_path: Path) -> None:
    path = put(tmp_path, "\n".join(LINES))
    edited = json.loads(LINES[1]) | {"completion": "2"}
    changes: dict[str, Any] = {
        "rows": {"2": edited, "4": None},
        "added": [{"prompt": "Five?", "completion": "5", "id": "x"}],
    }
    done = edit(path, tmp_path / "new.jsonl", changes)
    written = (tmp_path / "new.jsonl").read_text().splitlines()
    assert written[0] == LINES[0]
    assert [json.loads(line) for line in written[1:]] == [edited, json.loads(LINES[2]), changes["added"][0]]
    assert (done.rows, done.kept) == (4, 4)
    assert done.changed == [
        {"line": 2, "before": "Two?café", "after": "Two?2"},
        {"line": 4, "before": "One?1", "after": None},
        {"line": 0, "before": None, "after": "Five?5"},
    ]


def test_the_difference_of_long_rows_is_shown_where_they_differ(tmp_path: Path) -> None:
    row = {"text": "same " * 100 + "end", "tag": "a"}
    path = put(tmp_path, "\n".join([json.dumps(row)] * 2))
    changes = {"rows": {"1": row | {"text": "same " * 100 + "start"}, "2": row | {"tag": "b"}}}
    done = edit(path, tmp_path / "new.jsonl", changes)
    assert [entry["before"][0] for entry in done.changed] == ["…", "…"]
    assert [entry["before"][-7:] for entry in done.changed] == ["ame end", '": "a"}']
    assert [entry["after"][-7:] for entry in done.changed] == ["e start", '": "b"}']


def test_a_table_stays_one_with_its_columns_delimiter_and_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeff;id;question;answer;;id\r\n0;a;"One; or\r\ntwo?";1;;x\r\n1;b;"He said ""two""";2;;\r\n2;c;Three?;3\r\n'
    path = put(tmp_path, text, "data.csv")
    row = {"column 1": "1", "id": "b", "question": "Two;\nnow?", "answer": "2", "column 5": "", "id (2)": "y"}
    to, format = change(
        path, {"rows": {"2": row, "3": None}, "added": [{"question": "Four?", "answer": "4"}]}
    )
    assert to.read_bytes().startswith(b"\xef\xbb\xbf;id;question;answer;;id\r\n")
    table = list(csv.reader(io.StringIO(to.read_bytes().decode("utf-8-sig"), newline=""), delimiter=";"))
    assert table[1:] == [
        ["0", "a", "One; or\r\ntwo?", "1", "", "x"],
        ["1", "b", "Two;\nnow?", "2", "", "y"],
        ["", "", "Four?", "4", "", ""],
    ]
    assert [row.completion for row in rows(to, format)] == ["1", "2", "4"]
    assert detect(to) == detect(path)


def test_a_table_without_header_or_in_utf_16_stays_as_it_is(tmp_path: Path) -> None:
    bare = put(tmp_path, "One?\t1\nTwo?\t2\n", "bare.tsv")
    format = Format(
        "csv",
        "completion",
        delimiter="\t",
        columns={"prompt": "column 1", "completion": "column 2"},
        header=False,
    )
    edit(bare, tmp_path / "new.tsv", {"rows": {"1": {"column 1": "Uno?", "column 2": "1"}}}, format=format)
    assert (tmp_path / "new.tsv").read_text() == "Uno?\t1\nTwo?\t2\n"
    excel = put(tmp_path, "\ufeffprompt\tcompletion\nÉin?\t1\nTwo?\t2\n".encode("utf-16-le"), "excel.txt")
    to, format = change(excel, {"rows": {"2": None}})
    assert to.read_bytes() == "\ufeffprompt\tcompletion\r\nÉin?\t1\r\n".encode("utf-16-le")
    assert [row.prompt for row in rows(to, format)] == ["Éin?"]


def test_an_array_on_one_line_stays_an_array_and_its_rows_have_numbers(tmp_path: Path) -> None:
    path = put(tmp_path, json.dumps([json.loads(line) for line in LINES]), "data.json")
    to, format = change(path, {"rows": {"1": None, "3": {"prompt": "3?", "completion": "3"}}})
    assert format.container == "json"
    expected = [json.loads(LINES[1]), {"prompt": "3?", "completion": "3"}, json.loads(LINES[3])]
    assert json.loads(to.read_text()) == expected
    assert len(list(rows(to))) == 3


def test_parquet_and_documents_become_json_lines_with_all_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "frage": ["One?", "Two?"],
            "antwort": ["1", "2"],
            "day": [datetime.date(2026, 1, 2), None],
            "list": [[1, 2], []],
            "raw": [b"\x00a", None],
            "share": [0.5, float("nan")],
        }
    )
    path = tmp_path / "data.parquet"
    pq.write_table(table, path)
    format = Format("parquet", "completion", columns={"prompt": "frage", "completion": "antwort"})
    done = edit(path, tmp_path / "new.jsonl", {"rows": {}}, format=format)
    assert [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()] == [
        {"frage": "One?", "antwort": "1", "day": "2026-01-02", "list": [1, 2], "raw": "AGE=", "share": 0.5},
        {"frage": "Two?", "antwort": "2", "day": None, "list": [], "raw": None, "share": None},
    ]
    assert [row.prompt for row in rows(tmp_path / "new.jsonl", Format.of(done.format))] == ["One?", "Two?"]
    text = put(tmp_path, "First.\n---\nSecond.\n", "data.txt")
    to, format = change(text, {"rows": {"2": {"text": "---\nnot a border"}}}, "texts.jsonl")
    assert [row.text for row in rows(to, format)] == ["First.", "---\nnot a border"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"2": {"prompt": "Two?"}}}, "Line 2: 'completion' is missing (keys: prompt)"),
        ({"rows": {"2": {"prompt": 2, "completion": "2"}}}, "Line 2: 'prompt' is a number, not text"),
        ({"rows": {"9": None}}, "There is no row 9: the file has 4 rows."),
        ({"added": [["x"]]}, "The row is a list, not an object"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_in_words(
    tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    path = put(tmp_path, "\n".join(LINES))
    listed = put(tmp_path, json.dumps(changes), "changes.json")
    assert main(["fix", str(path), "--to", str(tmp_path / "new.jsonl"), "--changes", str(listed)]) == 10
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_a_table_refuses_columns_that_it_does_not_have(tmp_path: Path) -> None:
    path = put(tmp_path, "prompt,completion\nOne?,1\n", "data.csv")
    with pytest.raises(BadRow, match="the table has no column 'note'"):
        change(path, {"added": [{"prompt": "a", "completion": "b", "note": "c"}]})


# ---- splitting --------------------------------------------------------------------------------------------------------


def sides(path: Path, **options: Any) -> tuple[list[Any], list[Any]]:
    new, aside = path.with_name("train"), path.with_name("aside")
    done = fix(path, new, drop=(), validation=aside, **options)
    assert (done.kept, done.validation) == (len(list(rows(new))), len(list(rows(aside))))
    return list(rows(new)), list(rows(aside))


def test_rows_with_nearly_equal_prompts_are_on_the_same_side_for_every_seed(tmp_path: Path) -> None:
    prompts = [f"How much is {n}?" for n in range(60)]
    written = [q for n, prompt in enumerate(prompts) for q in (prompt, prompt.upper(), f" how MUCH is {n} ")]
    path = put(
        tmp_path,
        "".join(json.dumps({"prompt": q, "completion": str(i)}) + "\n" for i, q in enumerate(written)),
    )
    seen = set()
    for seed in range(5):
        _, held = sides(path, fraction=0.1, seed=seed)
        assert len(held) == 18
        assert len({int(row.completion) // 3 for row in held}) == 6
        seen.add(tuple(row.prompt for row in held))
        leak = report(path.with_name("train"), None, validation=path.with_name("aside"))["findings"]
        assert "leak" not in {finding["code"] for finding in leak}
    assert len(seen) == 5
    assert sides(path, fraction=0.1, seed=4)[1] == held


def test_a_split_by_lines_takes_the_rows_that_begin_there(tmp_path: Path) -> None:
    path = put(tmp_path, "prompt,completion\n" + "".join(f'"Q\n{n}",{n}\n' for n in range(10)), "data.csv")
    train, held = sides(path, lines="2-5, 8")
    assert [row.completion for row in held] == ["0", "1", "3"]
    assert len(train) == 7
    for lines, message in {"99": "No row begins on these lines", "1-999": "none would be left"}.items():
        with pytest.raises(ValueError, match=message):
            sides(path, lines=lines)
    for lines in ("", "a", "5-2", "0", "1-", "٣"):
        with pytest.raises(ValueError, match="is not a range"):
            fix(path, tmp_path / "x", drop=(), validation=tmp_path / "y", lines=lines or ",")


def test_rows_that_all_have_the_same_prompt_cannot_be_split(tmp_path: Path) -> None:
    path = put(
        tmp_path, "".join(json.dumps({"prompt": "Go", "completion": str(n)}) + "\n" for n in range(60))
    )
    with pytest.raises(ValueError, match="the same prompt"):
        sides(path)


# ---- merging ----------------------------------------------------------------------------------------------------------


def test_files_of_one_kind_are_merged_and_the_seconds_fields_get_the_names_of_the_first(
    tmp_path: Path,
) -> None:
    first = put(tmp_path, "\n".join(LINES), "a.jsonl")
    second = put(tmp_path, "question,answer,source\nSix?,6,web\n", "b.csv")
    done = merge(first, tmp_path / "new.jsonl", second)
    written = (tmp_path / "new.jsonl").read_text().splitlines()
    assert written[:4] == LINES
    assert json.loads(written[4]) == {"prompt": "Six?", "completion": "6", "source": "web"}
    assert (done.rows, done.kept) == (5, 5)
    assert [row.completion for row in rows(tmp_path / "new.jsonl", Format.of(done.format))][-1] == "6"


def test_conversations_in_both_forms_are_merged(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    first = put(tmp_path, json.dumps({"conversations": turns, "id": 7}), "a.jsonl")
    chat = [{"role": "user", "content": "Yo"}, {"role": "assistant", "content": "Hey", "weight": 1}]
    second = put(tmp_path, json.dumps({"messages": chat, "system": "Be brief."}), "b.jsonl")
    for pair in ((first, second), (second, first)):
        done = merge(pair[0], tmp_path / "new.jsonl", pair[1])
        read = list(rows(tmp_path / "new.jsonl", Format.of(done.format)))
        assert sorted(len(row.messages) for row in read) == [2, 3]
        assert read == list(rows(tmp_path / "new.jsonl"))


def test_optional_roles_are_filled_in_where_a_file_has_none(tmp_path: Path) -> None:
    first = put(tmp_path, json.dumps({"instruction": "Say", "output": "x"}), "a.jsonl")
    second = put(tmp_path, json.dumps({"instruction": "Add", "input": "1 2", "response": "3"}), "b.jsonl")
    done = merge(first, tmp_path / "new.jsonl", second)
    read = list(rows(tmp_path / "new.jsonl", Format.of(done.format)))
    assert [row.messages[0]["content"] for row in read] == ["Say", "Add\n\n1 2"]


def test_files_of_different_kinds_are_refused_naming_both(tmp_path: Path) -> None:
    pairs = put(tmp_path, LINES[0], "a.jsonl")
    text = put(tmp_path, "Just text.\n", "b.txt")
    with pytest.raises(ValueError, match="One file has prompt and answer pairs, the other plain texts"):
        merge(pairs, tmp_path / "new.jsonl", text)


def test_a_merge_never_overwrites_a_field(tmp_path: Path) -> None:
    first = put(tmp_path, json.dumps({"prompt": "a", "completion": "b"}), "a.jsonl")
    second = put(tmp_path, json.dumps({"question": "c", "answer": "d", "prompt": "mine"}), "b.jsonl")
    format = Format("jsonl", "completion", columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(ValueError, match="Line 1 of the second file has a field 'prompt' of its own"):
        merge(first, tmp_path / "new.jsonl", second, other_format=format)


# ---- pages of rows ----------------------------------------------------------------------------------------------------


def test_rows_are_read_page_by_page_by_line_and_by_search(tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": f"Q{n}", "completion": "É" if n % 3 else "no", "x": {"y": [n]}})
        for n in range(50)
    ]
    path = put(tmp_path, "\n\n".join(lines))
    second = read_page(path, page=2)
    assert [row["row"] for row in second["rows"]] == list(range(21, 41))
    assert second["rows"][0] == {"row": 21, "line": 41, "preview": "Q20É", "record": json.loads(lines[20])}
    assert (second["page"], second["more"]) == (2, True)
    assert read_page(path, line=42) == second
    last = read_page(path, page=3)
    assert ([row["row"] for row in last["rows"]], last["more"]) == (list(range(41, 51)), False)
    assert read_page(path, page=4)["rows"] == read_page(path, line=1000)["rows"] == []
    matches = read_page(path, search="é")
    assert (len(matches["rows"]), matches["more"]) == (20, True)
    rest = read_page(path, search="é", after=matches["rows"][-1]["row"])
    assert (len(rest["rows"]), rest["more"]) == (13, False)
    assert [row["row"] for row in read_page(path, search="17")["rows"]] == [18]


def test_a_row_that_is_too_long_is_listed_without_its_content(tmp_path: Path) -> None:
    path = put(tmp_path, json.dumps({"text": "long " * 50_000}))
    (row,) = read_page(path)["rows"]
    assert (row["record"], row["preview"][:9]) == (None, "long long")
