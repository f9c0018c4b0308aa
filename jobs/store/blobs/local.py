"""Stores objects as files in a folder of this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import quote

from django.core.signing import BadSignature, SignatureExpired, TimestampSigner

from jobs.store.blobs.common import BLOCK, HashingReader, Missing, StorageError, safe_name

UNFINISHED = ".put-"  # prefix of a file that is still being written
UNFINISHED_S = 3600  # a partial file that did not grow for this long was left behind by a process that died
LINK_SALT = "jobs.storage.link"  # part of every link in use: never change it


@dataclass(frozen=True)
class LocalStore:
    root: Path

    def path(self, key: str) -> Path:
        return self.root / safe_name(key)

    def put(self, key: str, reader: HashingReader) -> None:
        """Writes a temporary file in the same folder, flushes it to disk and renames it: all or nothing."""
        path = self.path(key)
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

    def open(self, key: str, start: int) -> IO[bytes]:
        try:
            file = self.path(key).open("rb")
            file.seek(start)
        except FileNotFoundError as error:
            raise Missing(key) from error
        except OSError as error:
            raise StorageError(f"{key}: {error}") from error
        return file

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def list_keys(self, prefix: str) -> list[str]:
        base = self.root / PurePosixPath(prefix)
        folder = base if prefix.endswith("/") or not prefix else base.parent
        keys = (str(path.relative_to(self.root)) for path in folder.rglob("*") if path.is_file())
        return sorted(key for key in keys if key.startswith(prefix) and f"/{UNFINISHED}" not in key)

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{key}: {error}") from error

    def delete_folder(self, prefix: str) -> None:
        """Removes the folder, which is empty by now."""
        shutil.rmtree(self.root / PurePosixPath(prefix), ignore_errors=True)

    def sweep_unfinished(self) -> int:
        swept = 0
        for path in self.root.rglob(f"{UNFINISHED}*"):
            with suppress(OSError):  # renamed meanwhile, or deleted by another process
                if time.time() - path.stat().st_mtime > UNFINISHED_S:
                    path.unlink()
                    swept += 1
        return swept

    def signed_url(self, key: str, filename: str, expires_s: int) -> str:
        """`/objects/<token>/<filename>`, served by jobs.views.objects."""
        content = {"key": key, "filename": filename, "s": expires_s}
        token = TimestampSigner(salt=LINK_SALT).sign_object(content, compress=True)
        return f"/objects/{token}/{quote(filename, safe='')}"

    def upload_origin(self) -> str:
        return ""


def read_link(token: str) -> tuple[str, str] | None:
    signer = TimestampSigner(salt=LINK_SALT)
    try:
        content = signer.unsign_object(token)
        content = signer.unsign_object(token, max_age=content["s"])
    except (BadSignature, SignatureExpired):
        return None
    return content["key"], content["filename"]
