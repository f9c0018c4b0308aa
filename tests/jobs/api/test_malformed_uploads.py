"""The malformed-input grammar, families G8 (names and forms) and G9 (sizes): raw bytes sent to the running web process.
None causes a server error, no file is written at the path in a name, and a rejected upload leaves nothing behind.

G1 to G7 are for the parser: tests/training/data/test_grammar.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from jobs.datasets import datasets
from jobs.store import access, blobs, quotas, tables
from jobs.store.tables import Upload
from llmtuner import body_limit
from tests.jobs.api.conftest import ApiUser, make_api_user
from tests.jobs.makers import make_owner

VALID = b'{"prompt": "a", "completion": " b"}\n' * 3
BOUNDARY = "grammar0123"
FILE_NAMES = [
    "../../canary.txt", "..\\..\\canary.txt", "%2e%2e%2fcanary.txt", "%252e%252e%252fcanary.txt", "..%c0%afcanary.txt",
    "/etc/passwd", "C:\\canary.txt", "\\\\host\\share\\canary.txt", "~root/canary.txt", "file:///etc/passwd", "rows.jsonl.",
    "rows.jsonl ", "CON", "a" * 300, "a" + "\u0301" * 10_000, "a%0d%0aSet-Cookie: a=b", "<script>alert(1)</script>.jsonl",
    "\u202elnosj.exe", "rows.jsonl;x=y", "'; DROP TABLE datasets; --",
]  # fmt: skip
assert len(FILE_NAMES) == 20


@dataclass
class UploadClient:
    """Sends raw uploads as a user that only this file uses."""

    port: int
    user: ApiUser
    canary: Path

    def send(
        self,
        body: bytes,
        *,
        headers: dict[str, str] | None = None,
        disconnect: bool = False,
        path: str = "/v1/files",
    ) -> tuple[int, Any]:
        """Send exactly these bytes and return (status, JSON); status 0 if the connection closed without a response."""
        all_headers = {
            "Authorization": f"Bearer {self.user.key}",
            "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
            "Content-Length": str(len(body)),
        } | (headers or {})
        header_lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items() if value)
        with socket.create_connection(("localhost", self.port), timeout=20) as connection:
            with contextlib.suppress(ConnectionError):  # the server may close while we still send
                connection.sendall(
                    f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header_lines}\r\n".encode()
                    + body
                )
            if disconnect:
                connection.shutdown(socket.SHUT_RDWR)
                return 0, None
            response = b""
            with contextlib.suppress(ConnectionError):
                while chunk := connection.recv(1 << 16):
                    response += chunk
        match = re.match(rb"HTTP/1\.1 (\d+)", response)
        text = response.partition(b"\r\n\r\n")[2]
        return int(match[1]) if match else 0, json.loads(text) if text.startswith(b"{") else text

    def upload(self, name: str, content: bytes = VALID) -> tuple[int, Any]:
        return self.send(form(part(f'name="file"; filename="{name}"', content)))

    def dataset_count(self) -> int:
        return len(access.list_datasets(self.user.owner, 100))


def part(disposition: str, content: bytes, *options: str) -> bytes:
    headers = [f"Content-Disposition: form-data; {disposition}", *options]
    return f"--{BOUNDARY}\r\n".encode() + "\r\n".join(headers).encode() + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return part('name="purpose"', b"fine-tune") + b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@pytest.fixture
def upload_client(web: Any, transactional_db: None, folder: Path) -> Iterator[UploadClient]:
    user = make_api_user("dora")
    canary = folder / "canary.txt"
    canary.write_text("untouched")
    canaries = sorted(path.name for path in folder.iterdir() if path.name.startswith("canary"))
    yield UploadClient(int(web.url.rsplit(":", 1)[1]), user, canary)
    assert canary.read_text() == "untouched"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("canary")) == canaries
    assert web.processes["web"].poll() is None
    for dataset in access.list_datasets(user.owner, 100):
        datasets.delete(user.owner, dataset.dataset_id)


# --- G8 names and forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_file_name_is_never_used_as_a_path(upload_client: UploadClient, name: str) -> None:
    status, payload = upload_client.upload(name)
    if len(name) > 1000:  # longer than the headers of a form part may be
        assert (status, upload_client.dataset_count()) == (400, 0)
        return
    assert status == 200, payload
    dataset = access.get_dataset_for(upload_client.user.owner, payload["id"])
    assert dataset.key == f"datasets/{upload_client.user.owner}/{payload['id']}/data"
    assert blobs.open_file(dataset.key).read() == VALID
    assert not set(dataset.name) & set("/\\\r\n\0\u202e")
    assert len(dataset.name) <= 200


FORMS: dict[str, tuple[bytes, str, bool]] = {
    "two Content-Disposition headers": (form(part('name="file"; filename="a.jsonl"', VALID, 'Content-Disposition: form-data; name="other"')), BOUNDARY, False),
    "an extended file name (RFC 5987)": (form(part("name=\"file\"; filename*=UTF-8''%E2%82%AC.jsonl", VALID)), BOUNDARY, True),
    "no file name": (form(part('name="file"', VALID)), BOUNDARY, False),
    "two files": (form(part('name="file"; filename="a.jsonl"', VALID), part('name="file"; filename="b.jsonl"', VALID)), BOUNDARY, True),
    "another boundary": (form(part('name="file"; filename="a.jsonl"', VALID)), "another", False),
    "a boundary of 300 characters": (form(part('name="file"; filename="a.jsonl"', VALID)).replace(BOUNDARY.encode(), b"b" * 300), "b" * 300, False),
    "a part without headers": (form(f"--{BOUNDARY}\r\n\r\n".encode() + VALID + b"\r\n"), BOUNDARY, False),
    "an incorrect content type": (form(part('name="file"; filename="a.jsonl"', VALID, "Content-Type: text/html")), BOUNDARY, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_an_unusual_form_is_accepted_or_cleanly_rejected(upload_client: UploadClient, name: str) -> None:
    body, boundary, accepted = FORMS[name]
    status, payload = upload_client.send(
        body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    assert (status == 200) == accepted, payload
    assert status == 200 or 400 <= status < 500
    assert upload_client.dataset_count() == int(accepted)


# --- G9 sizes --------------------------------------------------------------------------------------

VALID_FORM = form(part('name="file"; filename="a.jsonl"', VALID))


@dataclass(frozen=True)
class RawUpload:
    """A body, the headers that describe it, and the expected statuses."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    expected: tuple[int, ...] = (400, 413, 422)
    disconnect: bool = False


SIZES = {
    "empty file": RawUpload(form(part('name="file"; filename="a.jsonl"', b""))),
    "one byte": RawUpload(form(part('name="file"; filename="a.jsonl"', b"x")), expected=(200,)),
    "declared length too small": RawUpload(VALID_FORM, {"Content-Length": str(len(VALID_FORM) - 60)}),
    "declared length too large": RawUpload(VALID_FORM[:-40], {"Content-Length": str(len(VALID_FORM))}, (0,), True),
    "declared length of 2**63": RawUpload(VALID_FORM, {"Content-Length": str(2**63)}, (400, 413)),
    "negative declared length": RawUpload(VALID_FORM, {"Content-Length": "-5"}, (400,)),
    "invalid chunk size": RawUpload(b"zz\r\n" + VALID_FORM, {"Content-Length": "", "Transfer-Encoding": "chunked"}, (400,)),
    "connection closed early": RawUpload(VALID_FORM[:80], {"Content-Length": str(10**6)}, (0,), True),
    "connection closed inside a chunk": RawUpload(b"ffff\r\n" + VALID_FORM, {"Content-Length": "", "Transfer-Encoding": "chunked"}, (0,), True),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_declared_sizes_are_not_trusted(upload_client: UploadClient, name: str) -> None:
    raw = SIZES[name]
    status, payload = upload_client.send(raw.body, headers=raw.headers, disconnect=raw.disconnect)
    assert status in raw.expected, payload
    if raw.disconnect:
        time.sleep(1)  # the server may still be handling what it received
    assert upload_client.dataset_count() == int(status == 200)


CHUNKED = {"Content-Length": "", "Transfer-Encoding": "chunked"}


def in_chunks(body: bytes, size: int = 1 << 16) -> bytes:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@pytest.mark.parametrize("row_count", [3, 200_000], ids=["small", "larger than may be held in memory"])
def test_a_chunked_form_is_accepted(upload_client: UploadClient, row_count: int) -> None:
    """Node's client sends a file stream this way."""
    content = VALID[: len(VALID) // 3] * row_count
    status, payload = upload_client.send(
        in_chunks(form(part('name="file"; filename="a.jsonl"', content))), headers=CHUNKED
    )
    assert status == 200, payload
    dataset = access.get_dataset_for(upload_client.user.owner, payload["id"])
    assert blobs.open_file(dataset.key).read() == content


def test_a_chunked_part_is_accepted_up_to_the_size_limit(upload_client: UploadClient) -> None:
    upload = Upload(upload_client.user.owner, tables.new_id("upload"), filename="a.jsonl", bytes=len(VALID))
    upload.save()
    path = f"/v1/uploads/{upload.upload_id}/parts"
    data = part('name="data"; filename="part"', VALID) + f"--{BOUNDARY}--\r\n".encode()
    status, payload = upload_client.send(in_chunks(data), headers=CHUNKED, path=path)
    assert status == 200, payload
    stored = tables.get(Upload, upload_client.user.owner, upload.upload_id)
    assert stored is not None
    assert stored.part_ids == {f"{payload['id']}:{len(VALID)}"}
    data = part('name="data"; filename="part"', bytes(body_limit.MAX_PART + body_limit.FORM_EXTRA))
    status, payload = upload_client.send(in_chunks(data, 1 << 20), headers=CHUNKED, path=path)
    assert status == 413
    assert b"request_too_large" in payload


def test_the_upload_page_accepts_a_chunked_form(upload_client: UploadClient) -> None:
    page = Client()
    page.force_login(upload_client.user.user)
    token = str(page.get("/datasets/").context["csrf_token"])
    cookies = {"Cookie": "; ".join(f"{name}={cookie.value}" for name, cookie in page.cookies.items())}
    body = form(
        part('name="csrfmiddlewaretoken"', token.encode()), part('name="file"; filename="a.jsonl"', VALID)
    )
    status, _ = upload_client.send(
        in_chunks(body), headers=CHUNKED | cookies | {"Authorization": ""}, path="/datasets/upload/"
    )
    assert (status, upload_client.dataset_count()) == (302, 1)


@pytest.mark.parametrize(("size", "fits"), [(999, True), (1000, True), (1001, False)])
def test_the_size_limit_is_exact_to_the_byte(stores: None, settings: Any, size: int, fits: bool) -> None:
    settings.JOBS = settings.JOBS | {"max_upload_bytes": 1000}
    owner = make_owner()
    try:
        datasets.receive(owner, "a.jsonl", io.BytesIO(b"x" * size))
    except datasets.Rejected:
        assert not blobs.list_keys(f"datasets/{owner}/")
    assert len(access.list_datasets(owner)) == int(fits)


@pytest.mark.parametrize(
    "content", [VALID, VALID + VALID], ids=["the same file twice", "another file of the same name"]
)
def test_uploading_twice_makes_two_datasets(upload_client: UploadClient, content: bytes) -> None:
    assert [upload_client.upload("a.jsonl")[0], upload_client.upload("a.jsonl", content)[0]] == [200, 200]
    assert upload_client.dataset_count() == 2


def test_uploads_beyond_the_quota_are_rejected(stores: None, settings: Any) -> None:
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 3}
    owner = make_owner()
    for number in range(3):
        datasets.receive(owner, f"{number}.jsonl", io.BytesIO(VALID))
    with pytest.raises(quotas.OverQuota):
        datasets.receive(owner, "4.jsonl", io.BytesIO(VALID))
    assert len(access.list_datasets(owner)) == 3


@pytest.mark.parametrize(
    ("md5", "fits"), [("0" * 32, False), (None, True)], ids=["incorrect checksum", "no checksum"]
)
def test_a_checksum_is_verified(client: Any, users: dict[str, ApiUser], md5: str | None, fits: bool) -> None:
    import openai

    upload = client.uploads.create(filename="a.jsonl", purpose="fine-tune", bytes=len(VALID), mime_type="application/jsonl")  # fmt: skip
    raw = client.uploads.parts.create(upload.id, data=VALID)
    options = {"md5": md5} if md5 else {}
    if fits:
        done = client.uploads.complete(upload.id, part_ids=[raw.id], **options)
        dataset = access.get_dataset_for(users["alice"].owner, done.file.id)
        assert dataset.sha256 == hashlib.sha256(VALID).hexdigest()
        datasets.delete(dataset.owner, dataset.dataset_id)
    else:
        with pytest.raises(openai.BadRequestError):
            client.uploads.complete(upload.id, part_ids=[raw.id], **options)


def test_both_families_have_all_their_cases() -> None:
    names_and_forms = len(FILE_NAMES) + len(FORMS)
    sizes = len(SIZES) + 3 + 2 + 1 + 2  # and the limits, repeated uploads, the quota, the checksums
    assert (names_and_forms, sizes) == (28, 17)  # one more than the grammar lists: two ways to break off
