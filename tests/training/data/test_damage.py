"""Files with random damage: always a verdict, never a crash, never too slow."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from training.data.formats import BadRow, Format, detect, rows
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

RECORDS = [{"prompt": f"Question {i}, naïve?\n", "completion": f" Answer “{i}”, 東京"} for i in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}]}
    for i in range(30)
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
CSV = ("prompt,completion\n" + "".join(f'"q {i}, ""x""",a {i}\n' for i in range(30))).encode()
FILES: dict[str, bytes] = {
    "a.jsonl": JSONL,
    "b.jsonl": "".join(json.dumps(chat) + "\n" for chat in CHATS).encode(),
    "c.json": json.dumps(RECORDS, ensure_ascii=False, indent=1).encode(),
    "d.csv": CSV,
    "e.tsv": CSV.replace(b",", b"\t"),
    "f.txt": ("One document.\n---\nAnother — naïve.\n" * 20).encode(),
    "g.md": b"# One\ntext\n# Two\nmore\n" * 20,
    "h.jsonl": JSONL.decode().encode("utf-16"),
}
BITS = (
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"]",
    b"}",
    b"\n",
    b"\r",
    b",",
    b"\xc3",
    b"\xed\xa0\x80",
    b"null",
    b"NaN",
    b"-",
    b"1e999",
    b"\\ud800",
    b"<|endoftext|>",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"9" * 5000,
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Applies a few random cuts, insertions, replacements and repetitions."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randint(0, len(content)) for _ in range(2))
        match rng.randint(0, 4):
            case 0:
                content = content[:at] + rng.choice(BITS) + content[at:]
            case 1:
                content = content[:at] + content[min(to, at + rng.randint(1, 30)) :]
            case 2:
                content = content[:at]
            case 3:
                content = content[:at] + bytes(rng.randint(0, 255) for _ in range(3)) + content[at + 3 :]
            case _:
                content = content[:to] + content[at:]
    return content


@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_gets_a_verdict(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    tokenizer = Tokenizer.load(STARTER_FOLDER)
    for _ in range(150):
        path = tmp_path / name
        path.write_bytes(damaged(FILES[name], rng))
        result = report(path, tokenizer, EncodingOptions(64))
        assert result["verdict"]
        assert result["ready"] == (not result["error"])
        json.dumps(result, allow_nan=False)
        if not result["ready"] and result["findings"]:
            assert all(isinstance(line, int) and line >= 1 for line in result["findings"][0]["lines"])


def test_every_damaged_parquet_file_gets_a_verdict(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "good.parquet")
    good, rng = (tmp_path / "good.parquet").read_bytes(), random.Random(3)
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path = tmp_path / "x.parquet"
        path.write_bytes(content[: rng.randint(1, len(content))] if rng.random() < 0.2 else content)
        assert report(path, None)["verdict"]


@pytest.mark.parametrize("name", FILES)
def test_undamaged_files_are_ready(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    result = report(tmp_path / name, None)
    assert result["ready"], result["error"]


@pytest.mark.parametrize(
    "format",
    [
        {"container": "zip"},
        {
            "container": "csv",
            "delimiter": ";",
            "shape": "completion",
            "columns": {"prompt": "no", "completion": "such"},
        },
        {},
    ],
)
def test_a_chosen_format_that_does_not_fit_is_reported(tmp_path: Path, format: dict[str, object]) -> None:
    (tmp_path / "x.csv").write_bytes(CSV)
    assert not report(tmp_path / "x.csv", None, format=Format.of(format))["ready"]


OVERSIZED = {
    "a line of 200 MB": lambda f: [f.write(b'{"prompt": "'), [f.write(b"x" * (1 << 20)) for _ in range(200)]],
    "two million empty lines": lambda f: f.write(b"\n" * 2_000_000),
    "a cell of 200 MB": lambda f: [
        f.write(b'prompt,completion\n"'),
        [f.write(b"x" * (1 << 20)) for _ in range(200)],
    ],
    "an unclosed array of 200 MB": lambda f: [
        f.write(b"["),
        [f.write(b'"' + b"x" * (1 << 20)) for _ in range(200)],
    ],
    "a hundred thousand columns": lambda f: f.write(b",".join(b"c%d" % i for i in range(100_000)) + b"\n1\n"),
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_oversized_files_are_stopped_within_a_memory_limit(tmp_path: Path, kind: str) -> None:
    """In a child process whose address space is limited to 1 GiB, about 400 MB more than Python and its libraries map."""
    path = tmp_path / (
        "x.csv" if "cell" in kind or "columns" in kind else "x.json" if "array" in kind else "x.jsonl"
    )
    with path.open("wb") as file:
        OVERSIZED[kind](file)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    done = subprocess.run(
        [sys.executable, "-m", "training", "check", str(path)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert not json.loads(done.stdout.splitlines()[-1])["ready"]


def test_detect_never_raises_anything_but_bad_row(tmp_path: Path) -> None:
    rng = random.Random(9)
    for _ in range(300):
        (tmp_path / "x").write_bytes(bytes(rng.randrange(256) for _ in range(rng.randint(1, 60))))
        with contextlib.suppress(BadRow):
            list(rows(tmp_path / "x", detect(tmp_path / "x"), on_bad=lambda bad: None))
