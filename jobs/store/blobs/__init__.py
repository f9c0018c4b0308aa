"""Object storage: bytes by key, on local disk or in S3, depending on Django's default storage.

Objects are hashed while they are sent and verified after they are stored; fetched objects are compared with the recorded
hash. We make all keys (`datasets/<owner>/<id>`, `jobs/<id>/e<fencing token>/…`): no name that a user chose becomes a path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from botocore.exceptions import BotoCoreError
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage, default_storage

from jobs.store.blobs import local
from jobs.store.blobs.common import (
    BLOCK,
    Damaged,
    FileEntry,
    HashingReader,
    Missing,
    StorageError,
    Stored,
    TooLarge,
    safe_name,
)
from jobs.store.blobs.local import LINK_SALT, UNFINISHED, LocalStore
from jobs.store.blobs.s3 import S3Store

__all__ = [
    "LINK_SALT",
    "PART",
    "UNFINISHED",
    "Damaged",
    "FileEntry",
    "Missing",
    "StorageError",
    "Stored",
    "TooLarge",
    "begin_parts",
    "blocks",
    "delete_file",
    "delete_prefix",
    "direct_origin",
    "drop_parts",
    "fetch",
    "fetch_folder",
    "finish_parts",
    "is_local",
    "join",
    "list_keys",
    "local_path",
    "open_file",
    "part_link",
    "parts_of",
    "put_file",
    "put_folder",
    "put_part",
    "read_link",
    "safe_name",
    "sha256_of",
    "signed_url",
    "size_of",
    "sweep_unfinished",
    "takes_parts",
    "verify_folder",
]

PART = 16 << 20  # size of a part of a multipart upload, and so the memory needed to store a file


class Backend(Protocol):
    """What a backend must do. Its methods raise Missing and StorageError."""

    def put(self, key: str, reader: HashingReader) -> None: ...
    def open(self, key: str, start: int) -> IO[bytes]: ...
    def size(self, key: str) -> int | None: ...
    def list_keys(self, prefix: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_folder(self, prefix: str) -> None: ...
    def sweep_unfinished(self) -> int: ...
    def signed_url(self, key: str, filename: str, expires_s: int) -> str: ...
    def upload_origin(self) -> str: ...


@runtime_checkable
class PartsBackend(Backend, Protocol):
    """A backend that combines the parts of a file itself, so that browsers can send them to it directly.

    For the others, `jobs.datasets.multipart` stores each part as an object and combines them.
    """

    def begin_parts(self, key: str) -> str: ...
    def part_link(self, key: str, upload: str, number: int, size: int) -> str: ...
    def put_part(self, key: str, upload: str, number: int, data: bytes) -> None: ...
    def parts_of(self, key: str, upload: str) -> dict[int, int]: ...
    def finish_parts(self, key: str, upload: str) -> None: ...
    def drop_parts(self, key: str, upload: str) -> None: ...


def _storage() -> Any:
    default_storage.exists  # noqa: B018  the lazy object is created at the first access
    return default_storage._wrapped


def _backend() -> Backend:
    storage = _storage()
    if isinstance(storage, FileSystemStorage):
        return LocalStore(Path(storage.location))
    from storages.backends.s3 import S3Storage  # late: it imports boto3, which local disk does not need

    if isinstance(storage, S3Storage):
        return S3Store(storage, PART)
    raise ImproperlyConfigured(
        f"jobs/store/blobs has no backend for {type(storage).__name__}: use FileSystemStorage or S3Storage."
    )


def is_local() -> bool:
    return isinstance(_backend(), LocalStore)


def takes_parts() -> bool:
    """Whether the functions below that begin, receive and combine parts may be called."""
    return isinstance(_backend(), PartsBackend)


def _parts_backend() -> PartsBackend:
    backend = _backend()
    if not isinstance(backend, PartsBackend):
        raise ImproperlyConfigured(f"{type(backend).__name__} does not combine the parts of an upload.")
    return backend


# ---- put -----------------------------------------------------------------------------------------------------------


def put_file(key: str, file: IO[bytes] | Iterable[bytes], *, max_bytes: int | None = None) -> Stored:
    """Stores a file or an iterable of blocks, using at most PART bytes of memory. Raises TooLarge, StorageError."""
    reader = HashingReader(file, max_bytes)
    _backend().put(key, reader)
    stored = Stored(key, reader.bytes, reader.sha256.hexdigest())
    if size_of(key) != stored.bytes:
        raise StorageError(f"{key}: the stored size does not match the number of bytes sent")
    return stored


def put_folder(prefix: str, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> list[FileEntry]:
    """Stores every file in `folder`. The manifest is stored last, so a folder that has one is complete."""
    names = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    names.sort(key=lambda name: name == "manifest.json")
    entries = []
    for name in names:
        if should_stop():
            raise StorageError("stopped")
        with (Path(folder) / name).open("rb") as file:
            stored = put_file(join(prefix, name), file)
        entries.append(FileEntry(name, stored.bytes, stored.sha256))
    return entries


# ---- multipart uploads, where the backend takes parts ----------------------------------------------------------------


def begin_parts(key: str) -> str:
    """Begins a multipart upload and returns the storage's ID for it."""
    return _parts_backend().begin_parts(key)


def part_link(key: str, upload: str, number: int, size: int) -> str:
    """A presigned link that accepts this part, of exactly this size."""
    return _parts_backend().part_link(key, upload, number, size)


def direct_origin() -> str:
    """The origin to which browsers send parts; empty if they send them to this server."""
    return _backend().upload_origin()


def put_part(key: str, upload: str, number: int, data: bytes) -> None:
    _parts_backend().put_part(key, upload, number, data)


def parts_of(key: str, upload: str) -> dict[int, int]:
    """Size in bytes of each part received so far."""
    return _parts_backend().parts_of(key, upload)


def finish_parts(key: str, upload: str) -> None:
    """Combines the parts into one object."""
    _parts_backend().finish_parts(key, upload)


def drop_parts(key: str, upload: str) -> None:
    """Aborts the upload. Idempotent, also after the parts were combined."""
    _parts_backend().drop_parts(key, upload)


# ---- get -----------------------------------------------------------------------------------------------------------


def open_file(key: str, start: int = 0) -> IO[bytes]:
    """The object from byte `start` on; the caller closes it. Raises Missing, StorageError."""
    return _backend().open(key, start)


def blocks(key: str, size: int = BLOCK) -> Iterator[bytes]:
    with open_file(key) as file:
        try:
            while block := file.read(size):
                yield block
        except (OSError, BotoCoreError) as error:  # the connection broke
            raise StorageError(f"{key}: {error}") from error


def fetch(key: str, path: Path, sha256: str | None = None) -> Stored:
    """Copies an object to `path`, all or nothing. Raises Missing, and Damaged if the hash differs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    digest, count = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as out:
            for block in blocks(key):
                digest.update(block)
                count += len(block)
                out.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise Damaged(f"{key}: damaged: its SHA-256 does not match the recorded one")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Stored(key, count, digest.hexdigest())


def fetch_folder(prefix: str, files: Iterable[FileEntry | Mapping[str, Any]], to: Path) -> None:
    """Copies the files of a folder and verifies each. A file that is already there is only verified."""
    for entry in files:
        file = (
            entry
            if isinstance(entry, FileEntry)
            else FileEntry(entry["name"], entry["bytes"], entry["sha256"])
        )
        path = Path(to) / safe_name(file.name)
        if not (path.is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256):
            fetch(join(prefix, file.name), path, file.sha256)


def verify_folder(prefix: str, files: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every file is stored with its recorded size. (Hashes are compared when files are fetched.)"""
    return all(size_of(join(prefix, entry["name"])) == entry["bytes"] for entry in files)


def size_of(key: str) -> int | None:
    """Size of the object in bytes; None if there is none."""
    return _backend().size(key)


def list_keys(prefix: str) -> list[str]:
    """Every key that begins with `prefix`, sorted."""
    return _backend().list_keys(prefix)


# ---- delete --------------------------------------------------------------------------------------------------------


def delete_file(key: str) -> None:
    """Idempotent."""
    _backend().delete(key)


def delete_prefix(prefix: str) -> int:
    """Deletes every object whose key begins with `prefix` and returns how many there were. Idempotent."""
    keys = list_keys(prefix)
    for key in keys:
        delete_file(key)
    if prefix.endswith("/"):
        _backend().delete_folder(prefix)
    return len(keys)


def sweep_unfinished() -> int:
    """Deletes partial files that killed processes left behind, and returns how many."""
    return _backend().sweep_unfinished()


# ---- links ---------------------------------------------------------------------------------------------------------


def signed_url(key: str, filename: str, expires_s: int | None = None) -> str:
    """A link to the object that works for a short time without signing in: presigned by S3, or our own `/objects/…`."""
    expires_s = int(settings.JOBS["signed_url_s"]) if expires_s is None else expires_s
    return _backend().signed_url(key, filename, expires_s)


def read_link(token: str) -> tuple[str, str] | None:
    """(key, filename) of an `/objects/…` link; None if it is forged or has expired."""
    return local.read_link(token)


# ---- names and paths -------------------------------------------------------------------------------------------------


def local_path(key: str) -> Path:
    """Path of the object on this machine's disk."""
    backend = _backend()
    assert isinstance(backend, LocalStore), "only objects on local disk have a path"
    return backend.path(key)


def join(prefix: str, name: str) -> str:
    return f"{prefix.rstrip('/')}/{safe_name(name)}"


def sha256_of(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
