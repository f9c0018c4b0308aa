"""A ZIP archive of plain documents is read as many documents; everything else in one is refused by name."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path

import pytest

from training.data.formats import BadFile, Limits, detect, rows
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions, examples
from training.text.tokenizer import Tokenizer

DOCUMENTS = {
    "a.txt": b"The lamp is on the table.\n\nIt is green.\n",
    "folder/b.md": "# One\nThe first chapter.\n# Two\nThe second, naïve one.\n".encode(),
    "folder/deeper/c.markdown": b"A short note.\n",
    "d.TXT": "\ufeffUtf-16 text.\r\nTwo lines.\r\n".encode("utf-16-le"),
    "e.txt": b"One document.\n---\nAnother one.\n",
}


def write(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def texts(path: Path) -> list[str]:
    return [row.text for row in rows(path)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read_as_its_documents_are(tmp_path: Path, method: int) -> None:
    archive = write(tmp_path / "x.zip", DOCUMENTS, method)
    alone = []
    for name, content in DOCUMENTS.items():
        path = tmp_path / Path(name).name
        path.write_bytes(content)
        alone += texts(path)
    assert texts(archive) == alone
    assert [row.line for row in rows(archive)] == list(range(1, len(alone) + 1))


def test_the_trainer_counts_what_the_report_counted(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.zip", {"long.txt": b"The lamp is green. " * 90, **DOCUMENTS})
    tokenizer, options = Tokenizer.load(STARTER_FOLDER), EncodingOptions(32)
    made = report(archive, tokenizer, options)
    assert (made["ready"], made["kind"], made["format"]["container"]) == (True, "text", "zip")
    trained = list(examples(archive, tokenizer, options, detect(archive)))
    assert made["examples"] == len(trained) > 20
    assert made["tokens"] == sum(len(example.ids) for example in trained)


def test_what_file_managers_add_is_no_document(tmp_path: Path) -> None:
    clutter = {
        "__MACOSX/._a.txt": b"\x00\x05",
        ".DS_Store": b"\x00",
        "b/._c.txt": b"\x00",
        "empty.txt": b"",
        "b/": b"",
    }
    assert texts(write(tmp_path / "x.zip", {"a.txt": b"Text.", **clutter})) == ["Text."]


def link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("link.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def locked() -> bytes:
    """The flag of encryption, set in both headers of the entry."""
    content = bytearray(zipped({"secret.txt": b"Text."}))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def broken() -> bytes:
    content = bytearray(
        zipped({"a.txt": b"Fine.", "torn.txt": bytes(range(32, 127)) * 9}, zipfile.ZIP_STORED)
    )
    content[content.index(b"torn.txt") + 100] ^= 1
    return bytes(content)


JSON = b'{"prompt": "a", "completion": "b"}\n'
REFUSED: dict[str, tuple[bytes, str]] = {
    "a path that climbs": (zipped({"../../x.txt": b"Text."}), r"'../../x.txt' .* leads out of the archive"),
    "an absolute path": (zipped({"/etc/x.txt": b"Text."}), r"'/etc/x.txt' .* leads out of the archive"),
    "a drive": (zipped({"C:/x.txt": b"Text."}), r"'C:/x.txt' .* leads out of the archive"),
    "a password": (locked(), "'secret.txt' .* protected by a password"),
    "a link": (link(), "'link.txt' .* is a link"),
    "an unusual compression": (zipped({"a.txt": b"Text."}, zipfile.ZIP_LZMA), "'a.txt' .* unusual way"),
    "an archive inside": (zipped({"a.txt": b"T", "b.zip": zipped({})}), "mixes documents .* 'b.zip'"),
    "an archive by another name": (zipped({"b.txt": zipped({"a.txt": b"T"})}), "'b.txt': this is a ZIP archive"),
    "a PDF by another name": (zipped({"b.txt": b"%PDF-1.7"}), "'b.txt': this is a PDF"),
    "examples": (zipped({"a.jsonl": JSON}), "files that are not documents: 'a.jsonl'"),
    "a mix of kinds": (zipped({"a.txt": b"Text.", "b.csv": b"a,b"}), "mixes documents .* 'b.csv'"),
    "another encoding": (zipped({"a.txt": "é è ü ß ç ñ".encode("cp1252")}), "'a.txt': .* looks like Windows-1252"),
    "binary data": (zipped({"a.txt": bytes(range(256)) * 4}), "'a.txt': the file is binary"),
    "an Excel file": (zipped({"[Content_Types].xml": b"<x/>", "xl/a.xml": b"<x/>"}), "Excel, Word"),
    "no files": (zipped({"folder/": b""}), "no documents"),
    "a damaged entry": (broken(), "damaged: .*'torn.txt'"),
    "a cut archive": (zipped(DOCUMENTS)[:-60], "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, words = REFUSED[case]
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=words):
        texts(path)
    made = report(path, None)
    assert (made["ready"], made["rows"] in (0, 1)) == (False, True)


def test_a_bomb_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    bomb = write(tmp_path / "x.zip", {f"{n}.txt": b"0" * (20 << 20) for n in range(5)})
    assert bomb.stat().st_size < 200_000
    with pytest.raises(BadFile, match="decompresses to more than"):
        detect(bomb)


def test_an_entry_that_understates_its_size_gives_no_more_than_that(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.txt": b"word " * 100_000}))
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = (1000).to_bytes(4, "little")
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"damaged: .*'a.txt'"):
        texts(path)


def test_a_line_that_cannot_be_read_names_its_entry(tmp_path: Path) -> None:
    content = "Ça été très français.\n".encode() + b"Bad \xff here.\n"
    path = write(tmp_path / "x.zip", {"a.txt": b"Fine.\n", "b.txt": content})
    bad: list[str] = []
    read = [row.text for row in rows(path, on_bad=lambda row: bad.append(str(row)))]
    assert bad == ["line 2: b.txt, line 2: byte 5 of the line (0xff) is not UTF-8"]
    assert read == ["Fine.", "Ça été très français."]


def test_a_long_document_stays_whole(tmp_path: Path) -> None:
    """It used to be cut every 64,000 characters, with an end token at each cut."""
    text = "\n\n".join(f"Paragraph {n} of a book. " + "word " * 40 for n in range(1000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    assert texts(path) == [text.strip()]
    assert (
        len(list(rows(path, {"container": "text", "shape": "text", "columns": {"text": "text"}}))) > 1
    )  # stored before
    assert len(list(rows(path, limits=Limits(document_chars=10_000)))) > 10
