"""Tables as spreadsheet programs and pandas write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.columns import first_row_is_data, guess
from training.data.formats import Format, Row, detect, rows
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

TABLE = "Prompt{0}Answer\r\nWho waters the rööf?{0}The second shift.\r\nWhen?{0}At dusk.\r\n"
PAIRS = [("Who waters the rööf?", "The second shift."), ("When?", "At dusk.")]


def put(folder: Path, text: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def pairs(read: list[Row]) -> list[tuple[str, str]]:
    return [(row.prompt, row.completion) for row in read]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("named", [False, True])
def test_every_form_of_excels_tables_is_read(
    tmp_path: Path, encoding: str, bom: str, delimiter: str, named: bool
) -> None:
    if bom and encoding in ("utf-8-sig", "utf-16"):
        pytest.skip("these codecs write the byte order mark themselves")
    text = bom + (f"sep={delimiter}\r\n" if named else "") + TABLE.format(delimiter)
    read = list(rows(put(tmp_path, text.encode(encoding))))
    assert pairs(read) == PAIRS
    assert [row.line for row in read] == ([3, 4] if named else [2, 3])


def test_a_separator_line_may_name_another_sign(tmp_path: Path) -> None:
    assert pairs(list(rows(put(tmp_path, '"sep=:"\n' + TABLE.format(":"))))) == PAIRS


def test_a_text_file_is_a_table_only_if_all_its_lines_are(tmp_path: Path) -> None:
    table = TABLE.format("\t")
    assert detect(put(tmp_path, table, "a.txt")).container == "csv"
    for prose in ("Text, body\nNo comma here.\n", "Question\n", "text\nand more\n", table + "A note.\n"):
        assert detect(put(tmp_path, prose, "a.txt")).container == "text"
    assert detect(put(tmp_path, table, "a.md")).container == "text"


def test_a_table_stored_before_is_read_as_then(tmp_path: Path) -> None:
    path = put(tmp_path, ("\ufeff" + TABLE.format(",")).encode("utf-16-le"))
    stored = {"container": "csv", "shape": "completion", "encoding": "utf-16-le"}
    columns = {"prompt": "\ufeffPrompt", "completion": "Answer"}
    assert pairs(list(rows(path, {**stored, "columns": columns}))) == PAIRS


def unused(folder: Path, text: str) -> list[str]:
    result = report(put(folder, text), Tokenizer.load(STARTER_FOLDER), EncodingOptions(512))
    assert result["ready"], result["verdict"]
    return [
        d for finding in result["findings"] if finding["code"] == "unused_field" for d in finding["details"]
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt,completion,,\na,b,,\nc,d,,\n", []),
        ("prompt,completion,,\na,b\nc,d,,,,\n,,,\n\n", []),
        ("prompt,completion,\na,b,\nc,d,note\n", ["column 3 (1 row)"]),
        (",prompt,completion\n0,a,b\n1,c,d\n", []),
        ("Unnamed: 0,prompt,completion\n0,a,b\n1,c,d\n", []),
        (",prompt,completion\n0,a,b\n7,c,d\n", ["column 1 (1 row)"]),
        ("prompt,completion,prompt\na,b,x\nc,d,y\n", ["prompt (2) (2 rows)"]),
        ("prompt,completion,n,n,n (2)\na,b,x,,y\nc,d,x,,y\n", ["n (2 rows)", "n (2) (2 rows)"]),
    ],
)
def test_columns_without_a_name_of_their_own_are_dropped_if_empty_else_named(
    tmp_path: Path, text: str, named: list[str]
) -> None:
    assert unused(tmp_path, text) == named


def test_cells_may_be_missing_only_where_nothing_is_read_from_them(tmp_path: Path) -> None:
    text = "prompt,completion,note\na,b\nc\nd,e,f,g\nh,i,j, \n"
    bad: list[str] = []
    read = list(rows(put(tmp_path, text), on_bad=lambda row: bad.append(str(row))))
    assert pairs(read) == [("a", "b"), ("h", "i")]
    assert bad == ["line 3: the row has 1 cell, the header 3", "line 4: the row has 4 cells, the header 3"]


NOTES = "A long note about the valve, the barrel and the roof."


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"id": "0", "review": NOTES, "sentiment": "pos"},
            ("completion", {"prompt": "review", "completion": "sentiment"}),
        ),
        (
            {"sentiment": "pos", "id": "7", "review": NOTES},
            ("completion", {"prompt": "review", "completion": "sentiment"}),
        ),
        ({"kind": "pos", "note": NOTES}, ("completion", {"prompt": "note", "completion": "kind"})),
        (
            {"uuid": "ab-cd", "frage": "Was?", "antwort": "Das."},
            ("completion", {"prompt": "frage", "completion": "antwort"}),
        ),
        ({"antwort": "Das.", "was": "Was?"}, ("completion", {"prompt": "was", "completion": "antwort"})),
        ({"id": 3, "note": NOTES, "n": 1.5}, ("text", {"text": "note"})),
        ({"id": 3, "talk": [{"role": "user", "content": "Hi"}]}, ("chat", {"messages": "talk"})),
        ({"talk": [{"from": "human", "value": "Hi"}]}, ("sharegpt", {"conversations": "talk"})),
        ({"parts": [{"label": True, "text": "Hi"}]}, ("segments", {"segments": "parts"})),
        ({"a": 1, "b": 2}, ("completion", {"prompt": "a", "completion": "b"})),
    ],
)
def test_columns_are_suggested_by_name_and_length_never_by_order_alone(
    record: dict[str, object], expected: tuple[str, dict[str, str]]
) -> None:
    assert guess(list(record), [record]) == expected


def test_a_table_without_a_header_goes_by_the_numbers_of_its_columns(tmp_path: Path) -> None:
    path = put(tmp_path, "When?,At dusk.\nWho?,The second shift.\n")
    columns = {"prompt": "column 1", "completion": "column 2"}
    stored = Format("csv", "completion", columns=columns, header=False).as_dict()
    read = list(rows(path, stored))
    assert [(row.line, row.prompt, row.completion) for row in read] == [
        (1, "When?", "At dusk."),
        (2, "Who?", "The second shift."),
    ]
    assert Format.of({"container": "csv"}).header  # formats stored before have one


@pytest.mark.parametrize(
    ("names", "below", "is_data"),
    [
        (["id", "review", "sentiment"], ["1", "Good.", "pos"], False),
        (["0", "Good valve", "pos"], ["1", "Bad valve", "neg"], True),
        (["Where is it?", "There"], ["Who?", "He"], True),
        (["good valve", "pos"], ["bad valve", "pos"], True),
        (["prompt", "completion"], ["prompt", "completion"], False),
    ],
)
def test_the_first_row_is_taken_for_data_when_it_looks_like_the_rows_below(
    names: list[str], below: list[str], is_data: bool
) -> None:
    assert first_row_is_data(names, [dict(zip(names, below, strict=True))]) is is_data
