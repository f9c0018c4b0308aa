"""Stores objects in a bucket of S3, or of a server with the same API."""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from jobs.store.blobs.common import HashingReader, Missing, StorageError

PART_LINK_S = 3600  # lifetime of a presigned link for one part


@dataclass(frozen=True)
class S3Store:
    storage: Any  # an object of django-storages, which has no types
    part_bytes: int  # size of a part of our own multipart uploads, and so the memory that an upload needs

    @property
    def bucket(self) -> str:
        return str(self.storage.bucket_name)

    @property
    def client(self) -> Any:
        """The client of django-storages, which has the same settings. There is one per thread."""
        return self.storage.connection.meta.client

    def put(self, key: str, reader: HashingReader) -> None:
        """Stores an object in parts, each with a checksum that the server verifies."""
        first = reader.read(self.part_bytes)
        try:
            if len(first) < self.part_bytes:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=first, ContentMD5=_md5(first))
            else:
                self._put_parts(key, first, reader)
        except (BotoCoreError, ClientError) as error:
            raise StorageError(f"{key}: {error}") from error

    def _put_parts(self, key: str, first: bytes, reader: HashingReader) -> None:
        upload = self.client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        target = {"Bucket": self.bucket, "Key": key, "UploadId": upload}
        try:
            parts, block, number = [], first, 1
            while block:
                response = self.client.upload_part(
                    **target, PartNumber=number, Body=block, ContentMD5=_md5(block)
                )
                parts.append({"PartNumber": number, "ETag": response["ETag"]})
                block, number = reader.read(self.part_bytes), number + 1
            self.client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except BaseException:
            with suppress(BotoCoreError, ClientError):
                self.client.abort_multipart_upload(**target)
            raise

    def open(self, key: str, start: int) -> IO[bytes]:
        options = {"Range": f"bytes={start}-"} if start else {}
        try:
            response = self._call("get_object", key, **options)
        except OSError as error:
            raise StorageError(f"{key}: {error}") from error
        return cast(IO[bytes], response["Body"])

    def size(self, key: str) -> int | None:
        try:
            return int(self._call("head_object", key)["ContentLength"])
        except Missing:
            return None

    def list_keys(self, prefix: str) -> list[str]:
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return sorted(item["Key"] for page in pages for item in page.get("Contents", []))
        except (BotoCoreError, ClientError) as error:
            raise StorageError(f"{prefix}: {error}") from error

    def delete(self, key: str) -> None:
        try:
            self.client.delete_object(Bucket=self.bucket, Key=key)
        except (OSError, BotoCoreError, ClientError) as error:
            raise StorageError(f"{key}: {error}") from error

    def delete_folder(self, prefix: str) -> None:
        """Does nothing: S3 has no folders."""

    def sweep_unfinished(self) -> int:
        """Does nothing: S3 shows no unfinished objects, and a lifecycle rule of the bucket aborts multipart uploads."""
        return 0

    def signed_url(self, key: str, filename: str, expires_s: int) -> str:
        disposition = f"attachment; filename*=UTF-8''{quote(filename)}"
        params = {"Bucket": self.bucket, "Key": key, "ResponseContentDisposition": disposition}
        return str(self.client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def upload_origin(self) -> str:
        params = {"Bucket": self.bucket, "Key": "x"}
        url = urlsplit(str(self.client.generate_presigned_url("put_object", Params=params)))
        return f"{url.scheme}://{url.netloc}"

    # ---- multipart uploads whose parts a browser sends -----------------------------------------------------------------

    def begin_parts(self, key: str) -> str:
        return str(self._call("create_multipart_upload", key)["UploadId"])

    def part_link(self, key: str, upload: str, number: int, size: int) -> str:
        params = {
            "Bucket": self.bucket,
            "Key": key,
            "UploadId": upload,
            "PartNumber": number,
            "ContentLength": size,
        }
        return str(self.client.generate_presigned_url("upload_part", Params=params, ExpiresIn=PART_LINK_S))

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> None:
        self._call("upload_part", key, UploadId=upload, PartNumber=number, Body=data, ContentMD5=_md5(data))

    def parts_of(self, key: str, upload: str) -> dict[int, int]:
        return {part["PartNumber"]: part["Size"] for part in self._list_parts(key, upload)}

    def _list_parts(self, key: str, upload: str) -> list[dict[str, Any]]:
        try:
            paginator = self.client.get_paginator("list_parts")
            pages = paginator.paginate(Bucket=self.bucket, Key=key, UploadId=upload)
            parts = [part for page in pages for part in page.get("Parts", [])]
        except (BotoCoreError, ClientError) as error:
            raise StorageError(f"{key}: {error}") from error
        return sorted(parts, key=lambda part: int(part["PartNumber"]))

    def finish_parts(self, key: str, upload: str) -> None:
        parts = [
            {"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in self._list_parts(key, upload)
        ]
        self._call("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts})

    def drop_parts(self, key: str, upload: str) -> None:
        with suppress(Missing):
            self._call("abort_multipart_upload", key, UploadId=upload)

    def _call(self, operation: str, key: str, **options: Any) -> dict[str, Any]:
        try:
            response = getattr(self.client, operation)(Bucket=self.bucket, Key=key, **options)
        except ClientError as error:
            raise (Missing if _is_missing(error) else StorageError)(f"{key}: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"{key}: {error}") from error
        return cast(dict[str, Any], response)


def _md5(block: bytes) -> str:
    """The Content-MD5 header. It detects damage in transit, but does not protect against tampering."""
    return base64.b64encode(hashlib.md5(block, usedforsecurity=False).digest()).decode()


def _is_missing(error: ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}
