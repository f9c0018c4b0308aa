"""What both backends share: errors, descriptions of objects, key checks and the hashing reader."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import IO, Any

BLOCK = 1 << 20


class StorageError(Exception):
    """The storage is unreachable, or its content is not what was stored."""


class Missing(StorageError):
    """No object has this key."""


class Damaged(StorageError):
    """The bytes differ from those that were stored."""


class TooLarge(Exception):
    """The source has more bytes than allowed."""


@dataclass(frozen=True)
class Stored:
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A file of a stored folder; `name` is relative to the folder."""

    name: str
    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def safe_name(name: str) -> PurePosixPath:
    """Raises ValueError for a name that leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"not a key: {name!r}")
    return path


class HashingReader(io.RawIOBase):
    """Reads from a file or an iterable of blocks, counting and hashing the bytes. Raises TooLarge."""

    def __init__(self, source: IO[bytes] | Iterable[bytes], max_bytes: int | None) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._max_bytes = max_bytes
        self._buffer = b""
        self._blocks: Iterator[bytes]
        if hasattr(source, "chunks"):  # Django's UploadedFile
            self._blocks = iter(source.chunks(BLOCK))
        elif hasattr(source, "read"):
            self._blocks = iter(lambda: source.read(BLOCK), b"")
        else:
            self._blocks = iter(source)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = size if size is not None and size >= 0 else None
        pieces, length = [self._buffer], len(self._buffer)
        while wanted is None or length < wanted:
            block = next(self._blocks, b"")
            if not block:
                break
            self.bytes += len(block)
            if self._max_bytes is not None and self.bytes > self._max_bytes:
                raise TooLarge
            self.sha256.update(block)
            pieces.append(bytes(block))
            length += len(block)
        data = b"".join(pieces)
        self._buffer = data[wanted:] if wanted is not None else b""
        return data[:wanted] if wanted is not None else data
