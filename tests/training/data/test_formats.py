"""Every upload becomes rows, or an error with its line, the reason and a fix."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import pytest

from training.data.formats import BadFile, BadRow, Format, Limits, Row, detect, rows

GOOD = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]
}


def put(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(folder: Path, content: str | bytes, name: str = "data.jsonl") -> list[Row]:
    return list(rows(put(folder, content, name)))


def error_of(folder: Path, content: str | bytes, name: str = "data.jsonl") -> BadRow:
    with pytest.raises(BadRow) as caught:
        read(folder, content, name)
    assert caught.value.reason
    assert caught.value.fix, "every error has a fix"
    return caught.value


# --- accepted files --------------------------------------------------------------------------------


def test_it_reads_chat_with_weights(tmp_path: Path) -> None:
    (row,) = read(tmp_path, jsonl(CHAT))
    assert (row.kind, row.line, row.messages[1]["weight"]) == ("chat", 1, 1)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (GOOD, "completion"),
        ({"question": "2 + 2?", "answer": "4"}, "completion"),
        ({"text": "A whole document."}, "text"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "chat"),
        ({"instruction": "Say hi.", "output": "Hi"}, "chat"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "chat"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "assistant", "content": "Yo"},
                ]
            },
            "chat",
        ),
    ],
)
def test_it_recognizes_the_shape(tmp_path: Path, record: dict[str, object], kind: str) -> None:
    assert [row.kind for row in read(tmp_path, jsonl(record, record))] == [kind, kind]


def test_instruction_and_input_become_one_question(tmp_path: Path) -> None:
    (row,) = read(tmp_path, jsonl({"instruction": "Add.", "input": "2 2", "output": "4"}))
    assert row.messages == ({"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_it_reads_all_encodings_and_line_endings(tmp_path: Path, encoding: str, end: str) -> None:
    record = {"prompt": "naïve — 東京 😀", "completion": " ça"}
    text = end.join(json.dumps(record, ensure_ascii=False) for _ in range(3)) + end
    read_rows = read(tmp_path, text.encode(encoding))
    assert [row.prompt for row in read_rows] == [record["prompt"]] * 3
    assert [row.line for row in read_rows] == [1, 2, 3]


def test_it_skips_blank_lines_but_counts_them(tmp_path: Path) -> None:
    assert [row.line for row in read(tmp_path, f"\n{jsonl(GOOD)}\n  \n{jsonl(GOOD)}")] == [2, 5]


def test_it_reads_a_json_array_in_pieces(tmp_path: Path) -> None:
    records = [{"prompt": f"{i} " + "x" * 700, "completion": "ü😀"} for i in range(500)]
    for indent in (None, 2):
        read_rows = read(
            tmp_path, json.dumps(records, indent=indent, ensure_ascii=indent is None), "data.json"
        )
        assert [row.prompt for row in read_rows] == [record["prompt"] for record in records]
    assert read_rows[1].line == 6  # each record takes four lines


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_it_reads_tables_and_detects_their_columns(tmp_path: Path, delimiter: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["id", "Question", "Answer"], [1, 'a "b"\nc', "d"], [2, "e", "f"]])
    read_rows = read(tmp_path, text.getvalue(), "data.csv")
    assert [(row.line, row.prompt, row.completion) for row in read_rows] == [
        (2, 'a "b"\nc', "d"),
        (4, "e", "f"),
    ]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    path = put(tmp_path, "frage,antwort\n1+1,2\n", "data.csv")
    chosen = Format("csv", "completion", columns={"prompt": "frage", "completion": "antwort"})
    assert [(row.prompt, row.completion) for row in rows(path, chosen.as_dict())] == [("1+1", "2")]


def test_it_reads_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2]}), tmp_path / "x.parquet"
    )
    assert [(row.line, row.prompt, row.completion) for row in rows(tmp_path / "x.parquet")] == [
        (1, "a", "c"),
        (2, "b", "d"),
    ]


def test_it_reads_chat_from_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([CHAT]), tmp_path / "x.parquet")
    (row,) = rows(tmp_path / "x.parquet")
    assert [m["content"] for m in row.messages] == ["Hi", "Hello"]


def test_plain_text_is_split_at_rules_and_markdown_at_headings(tmp_path: Path) -> None:
    assert [row.text for row in read(tmp_path, "one\n\nstill one\n---\ntwo\n", "a.txt")] == [
        "one\n\nstill one",
        "two",
    ]
    assert [row.line for row in read(tmp_path, "# A\ntext\n# B\n## C\n", "a.md")] == [1, 3]


def test_detect_returns_the_format(tmp_path: Path) -> None:
    assert detect(put(tmp_path, jsonl(CHAT))) == Format("jsonl", "chat", columns={"messages": "messages"})
    assert detect(put(tmp_path, "prompt;completion\na;b\n", "x.txt.csv")).delimiter == ";"


def test_a_bad_row_does_not_hide_the_others(tmp_path: Path) -> None:
    bad: list[BadRow] = []
    path = put(tmp_path, jsonl(GOOD) + "{oops\n" + jsonl(GOOD, {"prompt": 1, "completion": "x"}))
    assert [row.line for row in rows(path, on_bad=bad.append)] == [1, 3]
    assert [b.line for b in bad] == [2, 4]


# --- rejected files and their lines ---------------------------------------------------------------

LINE = jsonl(GOOD)
BROKEN_LINES: dict[str, tuple[str | bytes, str]] = {
    "trailing comma": ('{"prompt": "a", "completion": "b",}', "comma"),
    "single quotes": ("{'prompt': 'a', 'completion': 'b'}", "single quotes"),
    "comment": ('{"prompt": "a", "completion": "b"} // yes', "comments"),
    "unquoted key": ('{prompt: "a", "completion": "b"}', "double quotes"),
    "missing colon": ('{"prompt" "a", "completion": "b"}', "delimiter"),
    "missing brace": ('{"prompt": "a", "completion": "b"', "end"),
    "two objects": (LINE.strip() * 2, "two objects"),
    "array root": ('["a", "b"]', "a list"),
    "text root": ('"a"', "text, not an object"),
    "number root": ("42", "a number"),
    "null root": ("null", "null"),
    "pretty-printed": ('{\n  "prompt": "a"\n}', "does not end on this line"),
    "NaN": ('{"prompt": "a", "completion": "b", "x": NaN}', "NaN"),
    "infinity": ('{"prompt": "a", "completion": "b", "x": -Infinity}', "Infinity"),
    "1e999": ('{"prompt": "a", "completion": "b", "x": 1e999}', "too large"),
    "5000 digits": ('{"prompt": "a", "completion": "b", "x": %s}' % ("9" * 5000), "digits"),
    "leading zero": ('{"prompt": "a", "completion": "b", "x": 01}', "invalid JSON"),
    "duplicate key": ('{"prompt": "a", "prompt": "c", "completion": "b"}', "twice"),
    "lone surrogate": ('{"prompt": "a\\ud800", "completion": "b"}', "surrogate"),
    "raw control": ('{"prompt": "a\tb", "completion": "b"}', "control character"),
    "bad escape": ('{"prompt": "a\\x41", "completion": "b"}', "backslash"),
    "unterminated": ('{"prompt": "a, "completion": "b"}', "delimiter"),
    "depth 64": ('{{"prompt": "a", "completion": "b", "x": {}1{}}}'.format("[" * 64, "]" * 64), "deep"),
    "depth 100000": (
        '{"prompt": "a", "completion": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "deep",
    ),
    "plain words": ("hello", "JSON cannot begin"),
    "CR only": (LINE.strip() + "\r" + LINE.strip(), "CR"),
    "empty object": ("{}", "missing"),
    "missing field": ('{"prompt": "a"}', "missing"),
    "other shape": ('{"text": "a"}', "this row has the shape text"),
    "number as text": ('{"prompt": 1, "completion": "b"}', "a number, not text"),
    "bool as text": ('{"prompt": true, "completion": "b"}', "true or false"),
    "null as text": ('{"prompt": null, "completion": "b"}', "null"),
    "list as text": ('{"prompt": ["a"], "completion": "b"}', "a list"),
    "both empty": ('{"prompt": "", "completion": " "}', "both empty"),
    "wrong case": ('{"Prompt": "a", "Completion": "b"}', "missing"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "completion": "b"}', "UTF-8"),
    "overlong UTF-8": (b'{"prompt": "\xc0\xaf", "completion": "b"}', "UTF-8"),
}


@pytest.mark.parametrize("place", [2, 26, 50])
@pytest.mark.parametrize("case", BROKEN_LINES)
def test_the_error_names_a_broken_line(tmp_path: Path, case: str, place: int) -> None:
    broken, expected = BROKEN_LINES[case]
    lines = [LINE.strip().encode()] * 50
    lines[place - 1] = broken.encode() if isinstance(broken, str) else broken
    error = error_of(tmp_path, b"\n".join(lines))
    assert (error.line, expected in error.reason) == (place, True), error


def test_a_line_in_another_encoding_says_how_to_fix_it(tmp_path: Path) -> None:
    accented = '{"prompt": "café", "completion": "b"}\n'
    error = error_of(tmp_path, accented.encode() * 5 + accented.encode("latin-1"))
    assert str(error) == "line 6: byte 16 of the line (0xe9) is not UTF-8"
    assert error.fix == "Save the file as UTF-8. Part of it seems to have another encoding."


def message(**changes: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"} | changes]}


BAD_CHATS = {
    "no list": ({"messages": {"role": "user"}}, "not a list"),
    "empty list": ({"messages": []}, "empty list"),
    "text message": ({"messages": ["hi"]}, "message 1 is text"),
    "no role": ({"messages": [{"content": "hi"}]}, "no role"),
    "unknown role": (message(role="wizard"), "'wizard'"),
    "null content": (message(content=None), "no content"),
    "tool call": (message(content=None, tool_calls=[{}]), "no function name"),
    "number content": (message(content=5), "a number"),
    "picture": (message(content=[{"type": "image_url", "image_url": "x"}]), "image_url"),
    "negative weight": (message(weight=-1), "weight"),
    "half weight": (message(weight=0.5), "weight"),
    "true weight": (message(weight=True), "weight"),
    "weight on user": ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "not an assistant"),
    "far too many": ({"messages": [{"role": "user", "content": "a"}] * 2001}, "2001 messages"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_the_error_names_a_broken_conversation(tmp_path: Path, case: str) -> None:
    record, expected = BAD_CHATS[case]
    error = error_of(tmp_path, jsonl(CHAT, record))
    assert (error.line, expected in error.reason) == (2, True), error


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", LINE)
    return buffer.getvalue()


WHOLE_FILES = {
    "empty": (b"", "empty"),
    "white space": (b" \n\t\n", "white space"),
    "one byte": (b"x", "JSON cannot begin"),
    "zip": (zipped(), "ZIP"),
    "gzip": (gzip.compress(LINE.encode()), "gzip"),
    "bzip2": (bz2.compress(LINE.encode()), "bzip2"),
    "xz": (lzma.compress(LINE.encode()), "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "Zstandard"),
    "7z": (b"7z\xbc\xaf\x27\x1c....", "7-Zip"),
    "tar": (b"data.jsonl".ljust(257, b"\0") + b"ustar  \0".ljust(255, b"\0"), "tar"),
    "pickle": (pickle.dumps(GOOD), "pickle"),
    "PDF": (b"%PDF-1.7\n", "PDF"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "PNG"),
    "Arrow": (b"ARROW1\0\0", "Arrow"),
    "HTML": (b"<!DOCTYPE html><html>", "HTML"),
    "binary": (bytes(range(256)) * 4, "binary"),
    "UTF-32": (LINE.encode("utf-32"), "UTF-32"),
    "UTF-32 without mark": (LINE.encode("utf-32-le"), "UTF-32"),
    "Shift JIS": ('{"text": "これは日本語の文章です。とても良い。"}\n'.encode("shift_jis"), "Shift JIS"),
    "Windows-1252": ('{"text": "é è ü ß ç ñ – “ ”"}\n'.encode("cp1252"), "Windows-1252"),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_other_files_are_refused_with_the_name_of_their_format(tmp_path: Path, case: str) -> None:
    content, expected = WHOLE_FILES[case]
    assert expected in error_of(tmp_path, content).reason


TABLES = {
    "unclosed quote": ('prompt,completion\na,b\n"a,b\nc,d\n', 3, "CSV"),
    "ragged": ("prompt,completion\na,b\na,b,c\n", 3, "3 cells"),
    "short": ("prompt,completion\na,b\na\n", 3, "1 cell"),
    "no known column": ("id,value\n1,2\n", 1, "none is a known"),
    "both empty": ("prompt,completion\n, \n", 2, "both empty"),
    "huge cell": ("prompt,completion\n" + '"' + "x" * (5 << 20) + '",b\n', 2, "CSV"),
}


@pytest.mark.parametrize("case", TABLES)
def test_the_error_names_the_line_of_a_broken_table(tmp_path: Path, case: str) -> None:
    text, line, expected = TABLES[case]
    error = error_of(tmp_path, text, "data.csv")
    assert (error.line, expected in error.reason) == (line, True), error


ARRAYS = {
    "cut off": ('[{"prompt": "a", "completion": "b"},\n{"prompt": "a", ', 2),
    "not closed": ('[{"prompt": "a", "completion": "b"}\n', 2),
    "after the end": ('[{"prompt": "a", "completion": "b"}]\n7', 2),
    "scalar inside": ('[{"prompt": "a", "completion": "b"},\n7]', 2),
    "deep": ("[" * 100_000, 1),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_the_error_names_the_line_of_a_broken_array(tmp_path: Path, case: str) -> None:
    text, line = ARRAYS[case]
    assert error_of(tmp_path, text, "data.json").line == line


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["abc" * 100] * 1000}), path)
    whole = path.read_bytes()
    for cut in (4, 8, len(whole) // 2, len(whole) - 1):
        error_of(tmp_path, whole[:cut], "y.parquet")


def test_a_parquet_bomb_is_stopped_while_it_decodes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "bomb.parquet"
    pq.write_table(
        pa.table({"text": pa.array(["x" * 100_000] * 2000).dictionary_encode()}), path, compression="zstd"
    )
    assert path.stat().st_size < 200_000
    with pytest.raises(BadFile, match="decompresses to more than"):
        list(rows(path, limits=Limits(decoded_bytes=20 << 20)))


def test_a_line_without_an_end_is_stopped_at_the_limit(tmp_path: Path) -> None:
    path = put(tmp_path, '{"prompt": "' + "x" * 3_000_000)
    with pytest.raises(BadFile, match="longer than 1 MB"):
        list(rows(path, limits=Limits(line_bytes=1 << 20)))


@pytest.mark.parametrize(
    ("content", "reason", "fix"),
    [
        ('[["a", "b"], ["c", "d"]]', "this is a list, not an object", "Each example is an object"),
        ('[[{"prompt": "a", "completion": "b"}]]', "this is a list, not an object", "Each example"),
        ('[{"prompt": "a", "completion": "b"},\n{"prompt": "c', "unterminated string", "cut off"),
        ('{"version": 1, "data": [{"prompt": "a"}]}', "keys: version, data", "the list in 'data'"),
        ('{"prompt": "a", "completion": "b"},\n', "a comma after the object", "Remove the comma"),
        ('messages\n" "\n', "messages is an empty list", "Give it"),
    ],
)
def test_the_advice_follows_from_what_the_file_has(
    tmp_path: Path, content: str, reason: str, fix: str
) -> None:
    name = "data.csv" if content.startswith("messages") else "data.json"
    error = error_of(tmp_path, content, name)
    assert reason in error.reason
    assert fix in error.fix
