"""Reads a ZIP archive of plain documents (TXT, Markdown), one after another, without unpacking it to disk.

Archives are not trusted: what is not a plain document is refused by name, and no more is decompressed than the
sizes that were added up before.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from training.data.bad_row import BadFile
from training.data.sniff import encoding_of, refuse_other_formats

MAGIC = b"PK\x03\x04"
MARKDOWN = (".md", ".markdown")
DOCUMENTS = (".txt", *MARKDOWN)
MOST_ENTRIES = 100_000
# Decompressed bytes allowed for any archive, plus this many times its own size. Text shrinks to a tenth at best.
SMALL, MOST_TIMES = 64 << 20, 100
HEAD_BYTES = 64 * 1024
ADVICE = "Keep only text files (TXT, Markdown) in the archive."
OFFICE = ("[Content_Types].xml", "mimetype", "META-INF/MANIFEST.MF")
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error)
CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers, not by people


def check(path: Path, limit: int) -> None:
    """Raises BadFile, naming the entry, unless the archive holds plain documents and nothing else."""
    with _opened(path) as archive:
        _documents(archive, min(limit, SMALL + MOST_TIMES * path.stat().st_size))


def documents(path: Path, limit: int) -> Iterator[tuple[str, str, BinaryIO]]:
    """(name, encoding, stream) of each document, in the order of the archive. Raises BadFile."""
    with _opened(path) as archive:
        for entry in _documents(archive, min(limit, SMALL + MOST_TIMES * path.stat().st_size)):
            with archive.open(entry) as stream:
                head = stream.read(HEAD_BYTES)
            try:
                refuse_other_formats(head)
                encoding = encoding_of(head)
            except BadFile as bad:
                raise BadFile(0, f"{_shown(entry.filename)}: {bad.reason}", bad.fix) from bad
            with archive.open(entry) as stream:
                yield entry.filename, encoding, cast(BinaryIO, stream)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BadFile:
        raise
    except DAMAGE as error:
        raise damaged("this ZIP archive", error) from error


def damaged(what: str, error: BaseException) -> BadFile:
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return BadFile(0, f"{what} is damaged: {reason}", "Create the archive again.")


def _documents(archive: zipfile.ZipFile, limit: int) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise BadFile(
            0,
            f"this ZIP archive has {len(entries):,} files; the limit is {MOST_ENTRIES:,}",
            "Split it into several archives.",
        )
    if any(entry.filename in OFFICE for entry in entries):
        raise BadFile(
            0,
            "this is a ZIP archive of a program (Excel, Word and Java files are ZIP too)",
            "Save the examples as JSONL, CSV or Parquet.",
        )
    files = [entry for entry in entries if not (entry.is_dir() or _is_clutter(entry.filename))]
    for entry in files:
        if reason := _refusal(entry):
            raise BadFile(0, f"{_shown(entry.filename)} in this ZIP archive {reason}", ADVICE)
    other = next((e for e in files if PurePosixPath(e.filename).suffix.lower() not in DOCUMENTS), None)
    if other is not None:
        mixed = any(PurePosixPath(e.filename).suffix.lower() in DOCUMENTS for e in files)
        kinds = "mixes documents with other files" if mixed else "has files that are not documents"
        raise BadFile(
            0,
            f"this ZIP archive {kinds}: {_shown(other.filename)}",
            f"{ADVICE} Upload examples in another format as a file of their own.",
        )
    if not any(entry.file_size for entry in files):
        raise BadFile(0, "this ZIP archive has no documents", "Add text files (TXT, Markdown) to it.")
    # A stream ends at the size that its entry states, so no more than this is ever decompressed.
    if sum(entry.file_size for entry in files) > limit:
        raise BadFile(
            0,
            f"this ZIP archive decompresses to more than {limit >> 20} MB",
            "Split it into smaller archives.",
        )
    return [entry for entry in files if entry.file_size]


def _is_clutter(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and (any(part in CLUTTER for part in parts) or parts[-1].startswith("._"))


def _refusal(entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    if name.startswith("/") or ":" in name.partition("/")[0] or ".." in PurePosixPath(name).parts:
        return "has a path that leads out of the archive"
    if entry.flag_bits & 1:
        return "is protected by a password"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link, not a file"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an unusual way"
    return ""


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"…{name[-79:]}")
