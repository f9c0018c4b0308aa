"""Object storage: bytes by key, on local disk or S3, whichever Django's default storage is.

Everything is hashed while it streams and verified after it is stored; what is fetched is compared with the hash that
was noted. Keys are ours (`datasets/<owner>/<id>`, `jobs/<id>/e<epoch>/…`): no name that a person chose becomes a path.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from django.conf import settings
from django.core.files.storage import FileSystemStorage, default_storage
from django.core.signing import BadSignature, SignatureExpired, TimestampSigner

BLOCK = 1 << 20
LINK_S = 3600  # how long a part may be put by its link
UNFINISHED = ".put-"  # begins the name of a file that is being stored on local disk
UNFINISHED_S = 3600  # without a byte more: whoever stored it is gone
PART = 16 << 20  # of a multipart upload: what is held in memory at once


class StorageError(Exception):
    """The storage cannot be reached, or holds something else than was put there."""


class Missing(StorageError):
    """There is no object of this key."""


class Damaged(StorageError):
    """The bytes aren't those that were put there."""


@dataclass(frozen=True)
class Stored:
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A file of a stored folder; `name` is relative to it."""

    name: str
    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- put -----------------------------------------------------------------------------------------------------------


def put_file(key: str, file: IO[bytes] | Iterable[bytes], *, max_bytes: int | None = None) -> Stored:
    """Stores a file or an iterable of blocks; at most PART bytes are in memory. Raises TooLarge, StorageError."""
    reader = _Hashing(file, max_bytes)
    if is_local():
        _put_local(key, reader)
    else:
        _put_s3(key, reader)
    stored = Stored(key, reader.bytes, reader.sha256.hexdigest())
    if size_of(key) != stored.bytes:
        raise StorageError(f"{key}: the stored object has another size than what was sent")
    return stored


class TooLarge(Exception):
    """More bytes came than are allowed."""


class _Hashing(io.RawIOBase):
    """Reads through, counting and hashing."""

    def __init__(self, source: IO[bytes] | Iterable[bytes], max_bytes: int | None) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._max = max_bytes
        self._left = b""
        if hasattr(source, "chunks"):  # Django's uploaded file
            self._blocks = iter(source.chunks(BLOCK))
        elif hasattr(source, "read"):
            self._blocks = iter(lambda: source.read(BLOCK), b"")
        else:
            self._blocks = iter(source)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = size if size is not None and size >= 0 else None
        parts, have = [self._left], len(self._left)
        while wanted is None or have < wanted:
            block = next(self._blocks, b"")
            if not block:
                break
            self.bytes += len(block)
            if self._max is not None and self.bytes > self._max:
                raise TooLarge
            self.sha256.update(block)
            parts.append(bytes(block))
            have += len(block)
        data = b"".join(parts)
        self._left = data[wanted:] if wanted is not None else b""
        return data[:wanted] if wanted is not None else data


def _put_local(key: str, reader: _Hashing) -> None:
    """Beside the place, to disk, then renamed: whole or not at all."""
    path = local_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            while block := reader.read(BLOCK):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).replace(path)
    except BaseException as error:
        with suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise StorageError(f"{key}: {error}") from error
        raise


def _put_s3(key: str, reader: _Hashing) -> None:
    """In parts, each with its checksum, which the server compares."""
    first = reader.read(PART)
    try:
        if len(first) < PART:
            _s3().put_object(Bucket=_bucket(), Key=key, Body=first, ContentMD5=_md5(first))
            return
        upload = _s3().create_multipart_upload(Bucket=_bucket(), Key=key)["UploadId"]
        try:
            parts, block, number = [], first, 1
            while block:
                answer = _s3().upload_part(
                    Bucket=_bucket(),
                    Key=key,
                    UploadId=upload,
                    PartNumber=number,
                    Body=block,
                    ContentMD5=_md5(block),
                )
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                block, number = reader.read(PART), number + 1
            _s3().complete_multipart_upload(
                Bucket=_bucket(), Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            with suppress(BotoCoreError, ClientError):
                _s3().abort_multipart_upload(Bucket=_bucket(), Key=key, UploadId=upload)
            raise
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{key}: {error}") from error


def _md5(block: bytes) -> str:
    """What S3's Content-MD5 wants: a guard against damage on the way, not against people."""
    return base64.b64encode(hashlib.md5(block, usedforsecurity=False).digest()).decode()


def put_folder(prefix: str, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> list[FileEntry]:
    """Stores every file below `folder`, the manifest last, so that a folder with a manifest is whole."""
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


# ---- parts that go straight to S3 ----------------------------------------------------------------------------------


def begin_parts(key: str) -> str:
    """Begins a multipart upload and returns S3's name for it."""
    return str(_s3_does("create_multipart_upload", key)["UploadId"])


def part_link(key: str, upload: str, number: int, size: int) -> str:
    """Where this part, and nothing longer, may be put without our credentials."""
    params = {
        "Bucket": _bucket(),
        "Key": key,
        "UploadId": upload,
        "PartNumber": number,
        "ContentLength": size,
    }
    return str(_s3().generate_presigned_url("upload_part", Params=params, ExpiresIn=LINK_S))


def direct_origin() -> str:
    """The origin that pages send parts to; empty where they send them to us."""
    if is_local():
        return ""
    place = urlsplit(
        str(_s3().generate_presigned_url("put_object", Params={"Bucket": _bucket(), "Key": "x"}))
    )
    return f"{place.scheme}://{place.netloc}"


def put_part(key: str, upload: str, number: int, data: bytes) -> None:
    _s3_does("upload_part", key, UploadId=upload, PartNumber=number, Body=data, ContentMD5=_md5(data))


def parts_of(key: str, upload: str) -> dict[int, int]:
    """Bytes of each part that came."""
    return {part["PartNumber"]: part["Size"] for part in _parts(key, upload)}


def finish_parts(key: str, upload: str) -> None:
    """Makes the parts one object."""
    found = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in _parts(key, upload)]
    _s3_does("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": found})


def drop_parts(key: str, upload: str) -> None:
    """Again is harmless, also when they were made an object."""
    with suppress(Missing):
        _s3_does("abort_multipart_upload", key, UploadId=upload)


def _parts(key: str, upload: str) -> list[dict[str, Any]]:
    try:
        pages = _s3().get_paginator("list_parts").paginate(Bucket=_bucket(), Key=key, UploadId=upload)
        found = [part for page in pages for part in page.get("Parts", [])]
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{key}: {error}") from error
    return sorted(found, key=lambda part: int(part["PartNumber"]))


def _s3_does(what: str, key: str, **options: Any) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], getattr(_s3(), what)(Bucket=_bucket(), Key=key, **options))
    except ClientError as error:
        raise (Missing if _is_missing(error) else StorageError)(f"{key}: {error}") from error
    except BotoCoreError as error:
        raise StorageError(f"{key}: {error}") from error


# ---- get -----------------------------------------------------------------------------------------------------------


def open_file(key: str, start: int = 0) -> IO[bytes]:
    """The object from byte `start` on, to be read in blocks and closed. Raises Missing, StorageError."""
    try:
        if is_local():
            file = local_path(key).open("rb")
            file.seek(start)
            return file
        options = {"Range": f"bytes={start}-"} if start else {}
        return cast(IO[bytes], _s3().get_object(Bucket=_bucket(), Key=key, **options)["Body"])
    except FileNotFoundError as error:
        raise Missing(key) from error
    except ClientError as error:
        raise (Missing if _is_missing(error) else StorageError)(f"{key}: {error}") from error
    except (OSError, BotoCoreError) as error:
        raise StorageError(f"{key}: {error}") from error


def blocks(key: str, size: int = BLOCK) -> Iterator[bytes]:
    with open_file(key) as file:
        try:
            while block := file.read(size):
                yield block
        except (OSError, BotoCoreError) as error:  # cut off on the way
            raise StorageError(f"{key}: {error}") from error


def fetch(key: str, path: Path, sha256: str | None = None) -> Stored:
    """Copies an object to `path`, whole or not at all. Raises Missing, and StorageError when the hash differs."""
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
            raise Damaged(f"{key}: damaged: its sha256 is not the one that was noted")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Stored(key, count, digest.hexdigest())


def fetch_folder(prefix: str, files: Iterable[FileEntry | Mapping[str, Any]], to: Path) -> None:
    """Copies the files of a folder, each verified. Those that are there already are verified instead of fetched."""
    for entry in files:
        one = (
            entry
            if isinstance(entry, FileEntry)
            else FileEntry(entry["name"], entry["bytes"], entry["sha256"])
        )
        path = Path(to) / safe_name(one.name)
        if not (path.is_file() and path.stat().st_size == one.bytes and sha256_of(path) == one.sha256):
            fetch(join(prefix, one.name), path, one.sha256)


def verify_folder(prefix: str, files: Iterable[Mapping[str, Any]]) -> bool:
    """Does every file stand there in its size? (Hashes are compared when they are fetched.)"""
    return all(size_of(join(prefix, entry["name"])) == entry["bytes"] for entry in files)


def size_of(key: str) -> int | None:
    """Bytes of the object; None if there is none."""
    try:
        if is_local():
            return local_path(key).stat().st_size
        return int(_s3().head_object(Bucket=_bucket(), Key=key)["ContentLength"])
    except FileNotFoundError:
        return None
    except ClientError as error:
        if _is_missing(error):
            return None
        raise StorageError(f"{key}: {error}") from error
    except BotoCoreError as error:
        raise StorageError(f"{key}: {error}") from error


def list_keys(prefix: str) -> list[str]:
    """Every key that begins with `prefix`, in order."""
    if is_local():
        base = _root() / PurePosixPath(prefix)
        folder = base if prefix.endswith("/") or not prefix else base.parent
        found = (str(path.relative_to(_root())) for path in folder.rglob("*") if path.is_file())
        return sorted(key for key in found if key.startswith(prefix) and f"/{UNFINISHED}" not in key)
    try:
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=_bucket(), Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{prefix}: {error}") from error


# ---- delete --------------------------------------------------------------------------------------------------------


def delete_file(key: str) -> None:
    """Again is harmless."""
    try:
        if is_local():
            local_path(key).unlink(missing_ok=True)
        else:
            _s3().delete_object(Bucket=_bucket(), Key=key)
    except (OSError, BotoCoreError, ClientError) as error:
        raise StorageError(f"{key}: {error}") from error


def delete_prefix(prefix: str) -> int:
    """Deletes every object whose key begins so; returns how many there were. Again is harmless."""
    keys = list_keys(prefix)
    for key in keys:
        delete_file(key)
    if is_local() and prefix.endswith("/"):
        shutil.rmtree(_root() / PurePosixPath(prefix), ignore_errors=True)  # the empty folders
    return len(keys)


def sweep_unfinished() -> int:
    """Deletes what processes that were killed had half stored on local disk; returns how many files. (S3 shows no half
    objects; a rule of the bucket ends uploads that broke off.)"""
    if not is_local():
        return 0
    swept = 0
    for path in _root().rglob(f"{UNFINISHED}*"):
        with suppress(OSError):  # stored meanwhile, or swept by another process
            if time.time() - path.stat().st_mtime > UNFINISHED_S:
                path.unlink()
                swept += 1
    return swept


# ---- links ---------------------------------------------------------------------------------------------------------

_SALT = "jobs.storage.link"


def signed_url(key: str, filename: str, expires_s: int | None = None) -> str:
    """A link to the bytes that works for a short while without signing in: S3's own, or `/objects/…` of ours."""
    expires_s = int(settings.JOBS["signed_url_s"]) if expires_s is None else expires_s
    if not is_local():
        disposition = f"attachment; filename*=UTF-8''{quote(filename)}"
        params = {"Bucket": _bucket(), "Key": key, "ResponseContentDisposition": disposition}
        return str(_s3().generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))
    token = TimestampSigner(salt=_SALT).sign_object(
        {"key": key, "filename": filename, "s": expires_s}, compress=True
    )
    return f"/objects/{token}/{quote(filename, safe='')}"


def read_link(token: str) -> tuple[str, str] | None:
    """(key, filename) of a link of ours; None when it is forged or too old."""
    signer = TimestampSigner(salt=_SALT)
    try:
        told = signer.unsign_object(token)
        told = signer.unsign_object(token, max_age=told["s"])
    except (BadSignature, SignatureExpired):
        return None
    return told["key"], told["filename"]


# ---- where ---------------------------------------------------------------------------------------------------------


def is_local() -> bool:
    return isinstance(_storage(), FileSystemStorage)


def local_path(key: str) -> Path:
    """Where the object lies on this disk."""
    return _root() / safe_name(key)


def safe_name(name: str) -> PurePosixPath:
    """Refuses names that lead out of their folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"not a key: {name!r}")
    return path


def join(prefix: str, name: str) -> str:
    return f"{prefix.rstrip('/')}/{safe_name(name)}"


def sha256_of(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storage() -> Any:
    default_storage.exists  # noqa: B018  the lazy object makes its inside at the first touch
    return default_storage._wrapped


def _root() -> Path:
    return Path(_storage().location)


def _bucket() -> str:
    return str(_storage().bucket_name)


def _s3() -> Any:
    """django-storages' client: configured by the same settings, one for each thread."""
    return _storage().connection.meta.client


def _is_missing(error: ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}
