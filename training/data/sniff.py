"""What a file is, by its first bytes: unsupported formats and the text encoding."""

from __future__ import annotations

import codecs
import re

from training.data.bad_row import BadFile

# (offset, bytes, name, how to fix it). Archives and pickles are never opened: they can be bombs or run code.
UNPACK = "Unpack it and upload the file inside."
CONVERT = "Save the examples as JSONL, CSV or Parquet."
MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a ZIP archive", UNPACK),
    (0, b"PK\x05\x06", "an empty ZIP archive", UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (0, b"Rar!", "a RAR archive", UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"ARROW1", "an Arrow (Feather) file", CONVERT),
    (0, b"FEA1", "a Feather file", CONVERT),
    (0, b"ORC", "an ORC file", CONVERT),
    (0, b"PARE", "an encrypted Parquet file", CONVERT),
    (0, b"Obj\x01", "an Avro file", CONVERT),
    (0, b"SQLite format 3", "an SQLite database", CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", CONVERT),
    (0, b"\x89HDF", "an HDF5 file", CONVERT),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel or Word file", CONVERT),
    (0, b"%PDF", "a PDF", CONVERT),
    (0, b"{\\rtf", "an RTF document", CONVERT),
    (0, b"\x89PNG", "a PNG image", CONVERT),
    (0, b"\xff\xd8\xff", "a JPEG image", CONVERT),
    (0, b"GIF8", "a GIF image", CONVERT),
    (0, b"\x7fELF", "a program", CONVERT),
    (0, b"MZ\x90", "a Windows program", CONVERT),
)
PICKLE = re.compile(rb"\x80[\x02-\x05]")
HTML = re.compile(rb"\s*<(!doctype\s+html|html|\?xml)", re.IGNORECASE)


def refuse_other_formats(head: bytes) -> None:
    """Raises BadFile, naming what the file is, for every format that is not supported."""
    for offset, magic, name, advice in MAGIC:
        if head.startswith(magic, offset):
            raise BadFile(0, f"this is {name}", advice)
    if PICKLE.match(head):
        raise BadFile(0, "this is a Python pickle, which can run code when it is opened", CONVERT)
    if re.match(rb".{8}\{\"", head, re.DOTALL) and head[7:8] == b"\x00":
        raise BadFile(0, "this is a safetensors file: weights, not examples", "Upload the training examples.")
    if HTML.match(head):
        raise BadFile(1, "this is an HTML or XML page, perhaps an error page saved as a file", CONVERT)


def encoding_of(head: bytes) -> str:
    """utf-8, utf-16-le or utf-16-be. Raises BadFile for any other encoding, with the most likely one."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise BadFile(1, "the text is UTF-32", "Save the file as UTF-8.")
    if head.startswith(codecs.BOM_UTF16_LE):
        return "utf-16-le"
    if head.startswith(codecs.BOM_UTF16_BE):
        return "utf-16-be"
    if b"\x00" in head[:4096]:
        return _without_bom(head[:4096])
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        if error.start < 4 or _mostly_broken(head):
            line = head.count(b"\n", 0, error.start) + 1
            raise BadFile(
                line, f"the text is not UTF-8; it looks like {_guess(head)}", "Save the file as UTF-8."
            ) from error
    return "utf-8"  # single bad lines are reported one by one


def _without_bom(head: bytes) -> str:
    """Encoding of text with zero bytes but no byte order mark: UTF-16 has a zero in every second byte of
    ASCII text, UTF-32 three in four."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    half = max(1, len(head) // 2)
    if (even > half * 0.4 and odd > half * 0.8) or (odd > half * 0.4 and even > half * 0.8):
        raise BadFile(1, "the text is UTF-32", "Save the file as UTF-8.")
    if odd > half * 0.4 and even < half * 0.05:
        return "utf-16-le"
    if even > half * 0.4 and odd < half * 0.05:
        return "utf-16-be"
    raise BadFile(head.count(b"\n", 0, head.index(0)) + 1, "the file is binary, not text", CONVERT)


def _mostly_broken(head: bytes) -> bool:
    """Whether most non-ASCII bytes are invalid UTF-8: then it is another encoding, not one damaged row."""
    beyond = sum(byte > 127 for byte in head)
    damaged = head.decode("utf-8", "replace").count("\ufffd")
    return damaged * 3 > beyond


def _guess(head: bytes) -> str:
    if len(re.findall(rb"[\x00-\x08\x0e-\x1f]", head)) > len(head) // 50:
        return "binary data"
    for name, label in (("shift_jis", "Shift JIS"), ("gb18030", "GB 18030")):
        text = head[: len(head) // 2 * 2].decode(name, "replace")
        wide = len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]", text))
        if wide > 4 and text.count("\ufffd") <= 1 and wide > sum(byte > 127 for byte in head) // 3:
            return label
    return "Windows-1252 or Latin-1"
