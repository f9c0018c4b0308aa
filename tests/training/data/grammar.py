"""A grammar of malformed input, families G1 to G7 of 9. Each case is a valid file of 50 rows, changed by one mutator. For
each it is known in advance whether the file is accepted, and otherwise which line the error must name (0 = no particular
line).

G8 (names) and G9 (sizes) test the upload endpoint instead of the parser: tests/jobs/api/test_malformed_uploads.py.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 264
ROWS = 50
PLACES = {"first": 1, "middle": 25, "last": 50}
WORDS = ("river", "garden", "teacher", "window", "summer", "engine", "forest", "letter", "market", "village")


@dataclass(frozen=True)
class Case:
    name: str
    file: str  # name of the file; its extension selects the format
    content: bytes | Callable[[Path], None]  # bytes, or a function that writes the file
    accept: bool
    line: int = 0  # the line that the error must name
    finding: str = ""  # a finding that the report must contain
    validation: bytes = b""


def cases() -> list[Case]:
    return [*g1(), *g2(), *g3(), *g4(), *g5(), *g6(), *g7()]


def base() -> list[dict[str, Any]]:
    rng = random.Random(SEED)
    triples = [(a, b, rng.choice(WORDS)) for a, b in rng.sample([(a, b) for a in WORDS for b in WORDS], ROWS)]
    return [
        {"prompt": f"How far is the {a} from the {b}?\n", "completion": f" As far as the {c} {n}."}
        for n, (a, b, c) in enumerate(triples)
    ]


def lines() -> list[str]:
    return [json.dumps(row) for row in base()]


def text(rows: list[str], end: str = "\n") -> bytes:
    return "".join(row + end for row in rows).encode("utf-8", "surrogatepass")


def put(row: str | bytes, line: int = 25) -> bytes:
    """The valid file with `row` in this line."""
    rows = [r.encode() for r in lines()]
    rows[line - 1] = row.encode() if isinstance(row, str) else row
    return b"".join(r + b"\n" for r in rows)


def with_fields(line: int = 25, **fields: Any) -> str:
    return json.dumps(base()[line - 1] | fields)


# --- G1 JSON Lines: syntax -------------------------------------------------------------------------


def g1() -> Iterator[Case]:
    mutators: dict[str, Callable[[str], str]] = {
        "trailing comma": lambda row: row[:-1] + ",}",
        "single quotes": lambda row: row.replace('"', "'"),
        "comment": lambda row: row + " // yes",
        "unquoted key": lambda row: row.replace('"prompt"', "prompt"),
        "missing colon": lambda row: row.replace(":", "", 1),
        "missing brace": lambda row: row[:-1],
        "two objects on a line": lambda row: row + " " + row,
        "scalar root": lambda row: "42",
    }
    for place, line in PLACES.items():
        for name, mutate in mutators.items():
            yield Case(f"G1 {name}, {place}", "d.jsonl", put(mutate(lines()[line - 1]), line), False, line)
        # A bracket at the beginning makes the file an array, followed by other rows.
        yield Case(f"G1 array root, {place}", "d.jsonl", put('["a"]', line), False, 2 if line == 1 else line)
        pretty = json.dumps(base()[line - 1], indent=1)
        yield Case(f"G1 pretty-printed, {place}", "d.jsonl", put(pretty, line), False, line)
        rows = lines()
        # Two adjacent rows without a line break between them.
        at = min(line, ROWS - 1) - 1
        joined = [*rows[:at], rows[at] + rows[at + 1], *rows[at + 2 :]]
        yield Case(f"G1 concatenated, {place}", "d.jsonl", text(joined), False, at + 1)
        returns = [*rows[:at], rows[at] + "\r" + rows[at + 1], *rows[at + 2 :]]
        yield Case(f"G1 CR only, {place}", "d.jsonl", text(returns), False, at + 1)
        for name, extra in (
            ("CRLF", rows[line - 1] + "\r"),
            ("blank line", rows[line - 1] + "\n"),
            ("line of spaces", "  \t \n" + rows[line - 1]),
        ):
            yield Case(f"G1 {name}, {place}", "d.jsonl", put(extra, line), True)
        yield Case(f"G1 no line end after the {place}", "d.jsonl", text(rows[:line])[:-1], True)


# --- G2 JSON Lines: values -------------------------------------------------------------------------


def g2() -> Iterator[Case]:
    row = lines()[24]

    def raw(value: str) -> bytes:
        return put(row[:-1] + f', "x": {value}}}')

    for name, value in {
        "NaN": "NaN",
        "Infinity": "Infinity",
        "-Infinity": "-Infinity",
        "1e999": "1e999",
        "5000 digits": "9" * 5000,
        "leading zero": "01",
        "plus sign": "+1",
        "hexadecimal": "0x1F",
        "raw control": '"a\x01b"',
        "\\x": '"\\x41"',
        "bad escape": '"\\q"',
        "depth 64": "[" * 64 + "]" * 64,
        "depth 1000": "[" * 1000 + "]" * 1000,
        "depth 100000": "[" * 100_000 + "]" * 100_000,
    }.items():
        yield Case(f"G2 {name}", "d.jsonl", raw(value), False, 25)
    yield Case("G2 minus zero", "d.jsonl", raw("-0"), True)
    yield Case("G2 key twice", "d.jsonl", put(row[:-1] + ', "prompt": "again"}'), False, 25)
    for name, key in {
        "__proto__": "__proto__",
        "empty key": "",
        "key of a megabyte": "k" * (1 << 20),
    }.items():
        yield Case(f"G2 {name}", "d.jsonl", put(with_fields(**{key: 1})), True)
    yield Case("G2 NUL escape", "d.jsonl", put(with_fields(completion=" a\0b")), True, finding="damage")
    for name, half in {
        "lone high": "\\ud800",
        "lone low": "\\udc00",
        "swapped pair": "\\udc00\\ud800",
    }.items():
        yield Case(f"G2 {name} surrogate", "d.jsonl", put(row.replace("How", half)), False, 25)
    yield Case("G2 100,000 keys", "d.jsonl", put(with_fields(**{f"k{i}": i for i in range(100_000)})), True)
    for name, wrong in {"true": True, "null": None, "number": 7, "list": ["a"], "object": {"a": 1}}.items():
        yield Case(f"G2 {name} for a text", "d.jsonl", put(with_fields(completion=wrong)), False, 25)
    for name, blank in {"empty": "", "only spaces": "  "}.items():
        both = put(json.dumps({"prompt": blank, "completion": blank}))
        yield Case(f"G2 {name}", "d.jsonl", both, False, 25)

    def endless(path: Path) -> None:
        """Writes one line of 900 MB, almost all of it a hole in the sparse file."""
        with path.open("wb") as file:
            file.write(text(lines()[:24]) + b'{"prompt": "' + b"x" * (6 << 20))
            file.truncate(900_000_000)

    yield Case("G2 line of 900 MB", "d.jsonl", endless, False, 25)
    many = "".join(f'{{"text": "row {i}"}}\n' for i in range(100_000)).encode()
    yield Case("G2 100,000 rows", "d.jsonl", many, True)
    yield Case(
        "G2 line separator U+2028",
        "d.jsonl",
        put(json.dumps(base()[24] | {"completion": " a\u2028b"}, ensure_ascii=False)),
        True,
    )
    yield Case(
        "G2 right-to-left override",
        "d.jsonl",
        put(with_fields(completion=" \u202eabc")),
        True,
        finding="invisible",
    )


# --- G3 contents of rows ---------------------------------------------------------------------------


def chat(*messages: tuple[str, Any], **last: Any) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    turns[-1] |= last
    return json.dumps({"messages": turns})


def chats(row: str) -> bytes:
    rows = [chat(("user", r["prompt"]), ("assistant", r["completion"])) for r in base()]
    rows[24] = row
    return text(rows)


def g3() -> Iterator[Case]:
    good = base()[24]
    user, assistant = ("user", "Hello?"), ("assistant", "Good day.")
    for name, record in {
        "missing field": {"prompt": good["prompt"]},
        "wrong case": {"Prompt": "a", "Completion": "b"},
        "lookalike letter in the field": {"\u0440rompt": "a", "completion": "b"},
        "mixed schemas": {"text": "a document"},
        "completion only": {"completion": "b"},
        "both empty": {"prompt": "", "completion": ""},
        "prompt is null": good | {"prompt": None},
    }.items():
        yield Case(f"G3 {name}", "d.jsonl", put(json.dumps(record)), False, 25)
    yield Case("G3 extra field", "d.jsonl", put(with_fields(extra={"a": [1]})), True)
    for name, row in {
        "unknown role": chat(("wizard", "a"), assistant),
        "content null": chat(user, ("assistant", None)),
        "negative weight": chat(user, assistant, weight=-1),
    }.items():
        yield Case(f"G3 {name}", "d.jsonl", chats(row), False, 25)
    for name, row, finding in (
        ("roles out of order", chat(assistant, user, assistant), ""),
        ("no user turn", chat(("system", "Be kind."), assistant), ""),
        ("system last", chat(user, assistant, ("system", "Be kind.")), "no_answer_last"),
        ("1,000 turns", chat(*(user, assistant) * 500), "truncated"),
        ("content in parts", chat(user, ("assistant", [{"type": "text", "text": "Good day."}])), ""),
    ):
        yield Case(f"G3 {name}", "d.jsonl", chats(row), True, finding=finding)
    yield Case(
        "G3 longer than the context",
        "d.jsonl",
        put(with_fields(completion=" river" * 3000)),
        True,
        finding="truncated",
    )
    # " the", the prompt's "A" and the end token are one token each.
    for name, count, finding in (
        ("exactly the context", 510, ""),
        ("one more than the context", 511, "truncated"),
    ):
        row = json.dumps({"prompt": "A", "completion": " the" * count})
        yield Case(f"G3 {name}", "d.jsonl", put(row), True, finding=finding)
    yield Case(
        "G3 control tokens",
        "d.jsonl",
        put(with_fields(completion=" a<|endoftext|>b")),
        True,
        finding="special_tokens",
    )
    only = json.dumps({"prompt": "<|endoftext|>", "completion": "<|endoftext|>"})
    yield Case("G3 only control tokens", "d.jsonl", put(only), True, finding="special_tokens")
    yield Case("G3 no row", "d.jsonl", b"\n\n  \n", False)
    yield Case("G3 one row", "d.jsonl", text(lines()[:1]), True, finding="few")
    yield Case("G3 fewer rows than a batch", "d.jsonl", text(lines()[:3]), True, finding="few")
    yield Case("G3 all the same", "d.jsonl", text(lines()[:1] * ROWS), True, finding="duplicate")
    yield Case(
        "G3 validation rows in the training file",
        "d.jsonl",
        text(lines()),
        True,
        finding="leak",
        validation=text(lines()[:5]),
    )
    strange = [json.dumps({"text": chr(0x12000 + i) * 20}) for i in range(ROWS)]
    yield Case("G3 no character the tokenizer knows", "d.jsonl", text(strange), True, finding="poor_fit")
    yield Case("G3 many languages", "d.jsonl", put(with_fields(completion=" да 是的 ναι はい نعم")), True)
    yield Case("G3 joined emoji", "d.jsonl", put(with_fields(completion=" 👩‍👩‍👧‍👦" * 20)), True)
    yield Case(
        "G3 10,000 combining marks", "d.jsonl", put(with_fields(completion=" a" + "\u0301" * 10_000)), True
    )


# --- G4 encodings ----------------------------------------------------------------------------------


def g4() -> Iterator[Case]:
    def of(words: str, line: int) -> str:
        rows = lines()
        rows[line - 1] = json.dumps(base()[line - 1] | {"completion": words}, ensure_ascii=False)
        return "".join(row + "\n" for row in rows)

    for place, line in (("start", 1), ("middle", 25)):
        utf8 = of(" ça va — 東京", line)
        bom = b"\xef\xbb\xbf"
        whole = utf8.encode()
        at = len("".join(utf8.splitlines(keepends=True)[: line - 1]).encode())
        yield Case(
            f"G4 UTF-8 mark, {place}",
            "d.jsonl",
            whole[:at] + bom + whole[at:],
            line == 1,
            0 if line == 1 else line,
        )
        yield Case(f"G4 UTF-16LE, {place}", "d.jsonl", b"\xff\xfe" + utf8.encode("utf-16-le"), True)
        yield Case(f"G4 UTF-16BE, {place}", "d.jsonl", b"\xfe\xff" + utf8.encode("utf-16-be"), True)
        yield Case(f"G4 UTF-32, {place}", "d.jsonl", utf8.encode("utf-32"), False)
        yield Case(f"G4 Latin-1, {place}", "d.jsonl", of(" déjà vu", line).encode("latin-1"), False, line)
        yield Case(
            f"G4 Windows-1252, {place}", "d.jsonl", of(" “déjà” – vu", line).encode("cp1252"), False, line
        )
        yield Case(
            f"G4 Shift JIS, {place}",
            "d.jsonl",
            of("これは日本語の文章です", line).encode("shift_jis"),
            False,
            line,
        )
        yield Case(
            f"G4 GB 18030, {place}", "d.jsonl", of("这是一个中文句子", line).encode("gb18030"), False, line
        )
        yield Case(
            f"G4 overlong, {place}",
            "d.jsonl",
            put(lines()[line - 1].encode().replace(b"How", b"\xc0\xaf"), line),
            False,
            line,
        )
        yield Case(
            f"G4 cut in a character, {place}",
            "d.jsonl",
            put(lines()[line - 1].encode().replace(b"How", b"\xe6\x9d"), line),
            False,
            line,
        )
        mixed = (
            whole.replace(b"As far", "déjà".encode("latin-1"))
            if line == 1
            else put(lines()[24].encode().replace(b"As", "à".encode("latin-1")))
        )
        yield Case(f"G4 mixed, {place}", "d.jsonl", mixed, False, 2 if line == 1 else 25)
    for name in ("utf-16-le", "utf-16-be"):
        yield Case(f"G4 {name} without a mark", "d.jsonl", of(" ça va", 25).encode(name), True)


# --- G5 tables -------------------------------------------------------------------------------------


def table(delimiter: str = ",", end: str = "\n", rows: list[list[str]] | None = None) -> str:
    out = io.StringIO()
    body = rows if rows is not None else [[row["prompt"].strip(), row["completion"]] for row in base()]
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([["prompt", "completion"], *body])
    return out.getvalue()


def g5() -> Iterator[Case]:
    for sign, delimiter in {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}.items():
        for name, end in {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}.items():
            yield Case(f"G5 {sign}, {name}", "d.csv", table(delimiter, end).encode(), True)
    rows = table().splitlines()

    def at(row: str, line: int = 25) -> bytes:
        return "\n".join([*rows[: line - 1], row, *rows[line:]]).encode() + b"\n"

    good = {
        "quotes doubled": 'a,"b ""c"" d"',
        "line break in quotes": '"a\nb",c',
        "delimiter in quotes": '"a,b",c',
        "quote inside a cell": 'a,b "c" d',
        "formula": "=cmd|' /C calc'!A0,-2+3",
        "thousands": '"1,000","2,000"',
        "field of 131,073 characters": "a," + "x" * 131_073,
        "empty line": "",
    }
    bad = {
        "unclosed quote": '"a,b',
        "text after a quote": '"a"b,c',
        "escaped quote": '"a \\"b\\" c",d',
        "a cell too many": "a,b,c",
        "a cell too few": "a",
        "comment line": "# a comment",
        "NUL": "a\0,b",
    }
    for name, row in good.items():
        yield Case(f"G5 {name}", "d.csv", at(row), True, finding="damage" if name == "NUL" else "")
    for name, row in bad.items():
        yield Case(f"G5 {name}", "d.csv", at(row), False, 25)
    headers = {
        "no header": ("\n".join(rows[1:]), False),
        "header twice": (table().replace("prompt,", "prompt,prompt,", 1), False),
        "nameless column": (table().replace("prompt,", "prompt,,", 1), False),
        "header with a mark": ("\ufeff" + table(), True),
        "header only": ("prompt,completion\n", False),
        "header in quotes": (table().replace("prompt,completion", '"prompt","completion"'), True),
        "spaces around the header": (table().replace("prompt,completion", " prompt , completion "), True),
        "10,000 columns": (
            ",".join(["prompt", "completion", *(f"c{i}" for i in range(9998))])
            + "\n"
            + ",".join(["a"] * 10_000)
            + "\n",
            False,
        ),
        "delimiter at each end": ("".join(row + ",\n" for row in rows), True),
    }
    lines = {"header only": 0, "header twice": 2, "nameless column": 2}  # their rows have a cell too few
    for name, (content, accept) in headers.items():
        yield Case(f"G5 {name}", "d.csv", content.encode(), accept, 0 if accept else lines.get(name, 1))
    # 12 + 8 + 7 + 9


# --- G6 Parquet and its relatives ------------------------------------------------------------------


def g6() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.orc
    import pyarrow.parquet as pq

    def parquet(columns: Any, **options: Any) -> bytes:
        out = io.BytesIO()
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), out, **options)
        return out.getvalue()

    plain = {"prompt": [r["prompt"] for r in base()], "completion": [r["completion"] for r in base()]}
    whole = parquet(plain, compression="none", use_dictionary=False)

    def case(name: str, content: bytes, accept: bool = False, file: str = "d.parquet") -> Case:
        return Case(f"G6 {name}", file, content, accept)

    for part in (4, 8, len(whole) // 4, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        yield case(f"cut after {part} bytes", whole[:part])
    yield case("wrong magic in front", b"PAR2" + whole[4:])
    yield case("wrong magic at the end", whole[:-4] + b"PAR2")
    for length in (0, 1, len(whole) * 2, 2**32 - 1):
        yield case(f"footer of {length} bytes", whole[:-8] + length.to_bytes(4, "little") + b"PAR1")
    # Page headers with wrong sizes, counts and encodings.
    for name, junk in {
        "all ones": b"\xff",
        "all zeros": b"\0",
        "sign bits": b"\x80",
        "sevens": b"\x77",
    }.items():
        yield case(f"page header of {name}", whole[:4] + junk * 24 + whole[28:])
    deep: Any = "x"
    for _ in range(60):
        deep = [deep]
    yield case("deep nesting", parquet({"text": [deep]}))
    yield case(
        "encrypted, with the address of its keys", b"PARE" + b"kms://127.0.0.1:9/key" + whole[4:-4] + b"PARE"
    )
    bomb = pa.table({"text": pa.array(["x" * 100_000] * 20_000).dictionary_encode()})
    yield case("bomb of 2 GB", parquet(bomb, compression="zstd"))
    yield case("no row group", parquet({"text": pa.array([], pa.string())}))
    yield case("no column", parquet(pa.table({})))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    yield case("column twice", parquet(twice))
    yield case("time for text", parquet({"text": pa.array([1, 2], pa.timestamp("s"))}))
    yield case("struct for text", parquet({"text": [{"a": 1}, {"a": 2}]}))
    yield case("NaN for text", parquet({"text": [float("nan"), 1.0]}))
    with pa.ipc.new_file(ipc := io.BytesIO(), pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["a"]}))
    yield case("Arrow file", ipc.getvalue(), file="d.arrow")
    pyarrow.feather.write_feather(pa.table(plain), feather := io.BytesIO(), version=1)  # type: ignore[no-untyped-call]
    yield case("Feather", feather.getvalue(), file="d.feather")
    pyarrow.orc.write_table(pa.table(plain), orc := io.BytesIO())  # type: ignore[no-untyped-call]
    yield case("ORC", orc.getvalue(), file="d.orc")
    old = pa.table(plain | {"when": pa.array([0] * ROWS, pa.timestamp("ns"))})
    yield case("legacy INT96 beside it", parquet(old, use_deprecated_int96_timestamps=True), accept=True)
    field = pa.field(
        "text",
        pa.string(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": "cos\nsystem\n(S'exit 1'\ntR.",
        },
    )
    yield case(
        "extension type with a pickle",
        parquet(pa.table([pa.array(["a b c"] * 3)], schema=pa.schema([field]))),
        accept=True,
    )


# --- G7 archives -----------------------------------------------------------------------------------


def g7() -> Iterator[Case]:
    whole, zeros = text(lines()), bytes(64 << 20)

    def zipped(*members: tuple[str, bytes]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return out.getvalue()

    def tarred(name: str, link: str = "") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
            info.size = 0 if link else len(whole)
            archive.addfile(info, None if link else io.BytesIO(whole))
        return out.getvalue()

    locked = bytearray(zipped(("d.jsonl", whole)))
    locked[6] |= 1
    inner = zipped(("zeros", zeros))
    for name, content in {
        "zip": zipped(("d.jsonl", whole)),
        "gzip": gzip.compress(whole),
        "bzip2": bz2.compress(whole),
        "xz": lzma.compress(whole),
        "zstd": b"\x28\xb5\x2f\xfd" + whole,
        "tar": tarred("d.jsonl"),
        "7z": b"7z\xbc\xaf\x27\x1c" + whole,
        "gzip bomb": gzip.compress(zeros),
        "zip bomb": inner,
        "bzip2 bomb": bz2.compress(zeros),
        "xz bomb": lzma.compress(zeros, preset=0),
        "zip of zips": zipped(*((f"{i}.zip", inner) for i in range(20))),
        "zip with a password": bytes(locked),
        "zip that climbs": zipped(("../../etc/passwd", whole)),
        "tar with a link": tarred("d.jsonl", "/etc/passwd"),
        "tar with an absolute path": tarred("/etc/d.jsonl"),
        "zip of two": zipped(("a.jsonl", whole), ("b.jsonl", whole)),
        "empty zip": zipped(),
        "rows before a zip": text(lines()[:3]) + zipped(("d.jsonl", whole)),
        "page before rows": b"<!doctype html><p>\n" + whole,
    }.items():
        yield Case(f"G7 {name}", "d.jsonl", content, False)
