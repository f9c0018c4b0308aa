"""The malformed-input grammar, families G8 (names and forms) and G9 (sizes): files sent byte by byte to the running web
process. Nothing is a server's fault, nothing is written where a name points, and what is refused leaves nothing.

G1 to G7 are the parser's: tests/training/data/test_grammar.py.
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
from tests.jobs.api.conftest import Person, make_person
from tests.jobs.makers import make_owner

GOOD = b'{"prompt": "a", "completion": " b"}\n' * 3
MARK = "grammar0123"
NAMES = [
    "../../canary.txt", "..\\..\\canary.txt", "%2e%2e%2fcanary.txt", "%252e%252e%252fcanary.txt", "..%c0%afcanary.txt",
    "/etc/passwd", "C:\\canary.txt", "\\\\host\\share\\canary.txt", "~root/canary.txt", "file:///etc/passwd", "rows.jsonl.",
    "rows.jsonl ", "CON", "a" * 300, "a" + "\u0301" * 10_000, "a%0d%0aSet-Cookie: a=b", "<script>alert(1)</script>.jsonl",
    "\u202elnosj.exe", "rows.jsonl;x=y", "'; DROP TABLE datasets; --",
]  # fmt: skip
assert len(NAMES) == 20


@dataclass
class UploadClient:
    """Sends uploads byte by byte, as a user of this file alone."""

    port: int
    sender: Person
    canary: Path

    def send(
        self,
        body: bytes,
        *,
        headers: dict[str, str] | None = None,
        close: bool = False,
        path: str = "/v1/files",
    ) -> tuple[int, Any]:
        """(status, JSON) of an upload of exactly these bytes; status 0 if the connection closed without a response."""
        all_headers = {
            "Authorization": f"Bearer {self.sender.key}",
            "Content-Type": f"multipart/form-data; boundary={MARK}",
            "Content-Length": str(len(body)),
        } | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items() if value)
        with socket.create_connection(("localhost", self.port), timeout=20) as connection:
            with contextlib.suppress(ConnectionError):  # it may refuse and hang up while we are still sending
                connection.sendall(
                    f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n".encode()
                    + body
                )
            if close:
                connection.shutdown(socket.SHUT_RDWR)
                return 0, None
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    answer += piece
        match = re.match(rb"HTTP/1\.1 (\d+)", answer)
        text = answer.partition(b"\r\n\r\n")[2]
        return int(match[1]) if match else 0, json.loads(text) if text.startswith(b"{") else text

    def upload(self, name: str, content: bytes = GOOD) -> tuple[int, Any]:
        return self.send(form(part(f'name="file"; filename="{name}"', content)))

    def count(self) -> int:
        return len(access.list_datasets(self.sender.owner, 100))


def part(disposition: str, content: bytes, *more: str) -> bytes:
    heads = [f"Content-Disposition: form-data; {disposition}", *more]
    return f"--{MARK}\r\n".encode() + "\r\n".join(heads).encode() + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return part('name="purpose"', b"fine-tune") + b"".join(parts) + f"--{MARK}--\r\n".encode()


@pytest.fixture
def upload_client(web: Any, transactional_db: None, folder: Path) -> Iterator[UploadClient]:
    sender = make_person("dora")
    canary = folder / "canary.txt"
    canary.write_text("untouched")
    known = sorted(path.name for path in folder.iterdir() if path.name.startswith("canary"))
    yield UploadClient(int(web.url.rsplit(":", 1)[1]), sender, canary)
    assert canary.read_text() == "untouched"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("canary")) == known
    assert web.processes["web"].poll() is None
    for dataset in access.list_datasets(sender.owner, 100):
        datasets.delete(sender.owner, dataset.dataset_id)


# --- G8 names and forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_label_and_never_a_path(upload_client: UploadClient, name: str) -> None:
    status, payload = upload_client.upload(name)
    if len(name) > 1000:  # more than the head of a form's part may hold
        assert (status, upload_client.count()) == (400, 0)
        return
    assert status == 200, payload
    dataset = access.get_dataset_for(upload_client.sender.owner, payload["id"])
    assert dataset.key == f"datasets/{upload_client.sender.owner}/{payload['id']}/data"
    assert blobs.open_file(dataset.key).read() == GOOD
    assert not set(dataset.name) & set("/\\\r\n\0\u202e")
    assert len(dataset.name) <= 200


FORMS: dict[str, tuple[bytes, str, bool]] = {
    "two dispositions": (form(part('name="file"; filename="a.jsonl"', GOOD, 'Content-Disposition: form-data; name="other"')), MARK, False),
    "an extended file name": (form(part("name=\"file\"; filename*=UTF-8''%E2%82%AC.jsonl", GOOD)), MARK, True),
    "no file name": (form(part('name="file"', GOOD)), MARK, False),
    "two files": (form(part('name="file"; filename="a.jsonl"', GOOD), part('name="file"; filename="b.jsonl"', GOOD)), MARK, True),
    "another boundary": (form(part('name="file"; filename="a.jsonl"', GOOD)), "another", False),
    "a boundary of 300 letters": (form(part('name="file"; filename="a.jsonl"', GOOD)).replace(MARK.encode(), b"b" * 300), "b" * 300, False),
    "a part without a head": (form(f"--{MARK}\r\n\r\n".encode() + GOOD + b"\r\n"), MARK, False),
    "a type that lies": (form(part('name="file"; filename="a.jsonl"', GOOD, "Content-Type: text/html")), MARK, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_a_strange_form_is_taken_or_refused_and_breaks_nothing(
    upload_client: UploadClient, kind: str
) -> None:
    body, boundary, accept = FORMS[kind]
    status, payload = upload_client.send(
        body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    assert (status == 200) == accept, payload
    assert status == 200 or 400 <= status < 500
    assert upload_client.count() == int(accept)


# --- G9 sizes --------------------------------------------------------------------------------------

WHOLE = form(part('name="file"; filename="a.jsonl"', GOOD))


@dataclass(frozen=True)
class Sent:
    """A body, what its head says of it, and the answers that are right."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    right: tuple[int, ...] = (400, 413, 422)
    close: bool = False


SIZES = {
    "no byte": Sent(form(part('name="file"; filename="a.jsonl"', b""))),
    "one byte": Sent(form(part('name="file"; filename="a.jsonl"', b"x")), right=(200,)),
    "less said than sent": Sent(WHOLE, {"Content-Length": str(len(WHOLE) - 60)}),
    "more said than sent": Sent(WHOLE[:-40], {"Content-Length": str(len(WHOLE))}, (0,), True),
    "2**63 said": Sent(WHOLE, {"Content-Length": str(2**63)}, (400, 413)),
    "a negative size": Sent(WHOLE, {"Content-Length": "-5"}, (400,)),
    "a chunk of bad size": Sent(b"zz\r\n" + WHOLE, {"Content-Length": "", "Transfer-Encoding": "chunked"}, (400,)),
    "closed early": Sent(WHOLE[:80], {"Content-Length": str(10**6)}, (0,), True),
    "broken off in a chunk": Sent(b"ffff\r\n" + WHOLE, {"Content-Length": "", "Transfer-Encoding": "chunked"}, (0,), True),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_counted_and_not_believed(upload_client: UploadClient, kind: str) -> None:
    sent = SIZES[kind]
    status, payload = upload_client.send(sent.body, headers=sent.headers, close=sent.close)
    assert status in sent.right, payload
    if sent.close:
        time.sleep(1)  # what the server still does with what it has
    assert upload_client.count() == int(status == 200)


CHUNKED = {"Content-Length": "", "Transfer-Encoding": "chunked"}


def in_chunks(body: bytes, size: int = 1 << 16) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("rows", [3, 200_000], ids=["small", "larger than memory may hold"])
def test_a_form_of_unknown_length_is_read(upload_client: UploadClient, rows: int) -> None:
    """Node's client sends a file stream so."""
    content = GOOD[: len(GOOD) // 3] * rows
    status, payload = upload_client.send(
        in_chunks(form(part('name="file"; filename="a.jsonl"', content))), headers=CHUNKED
    )
    assert status == 200, payload
    assert (
        blobs.open_file(access.get_dataset_for(upload_client.sender.owner, payload["id"]).key).read()
        == content
    )


def test_a_part_of_unknown_length_is_read_and_bounded(upload_client: UploadClient) -> None:
    upload = Upload(upload_client.sender.owner, tables.new_id("upload"), filename="a.jsonl", bytes=len(GOOD))
    upload.save()
    path = f"/v1/uploads/{upload.upload_id}/parts"
    data = part('name="data"; filename="part"', GOOD) + f"--{MARK}--\r\n".encode()
    status, payload = upload_client.send(in_chunks(data), headers=CHUNKED, path=path)
    assert status == 200, payload
    kept = tables.get(Upload, upload_client.sender.owner, upload.upload_id)
    assert kept is not None
    assert kept.part_ids == {f"{payload['id']}:{len(GOOD)}"}
    data = part('name="data"; filename="part"', bytes(body_limit.MAX_PART + body_limit.FORM_EXTRA))
    status, payload = upload_client.send(in_chunks(data, 1 << 20), headers=CHUNKED, path=path)
    assert status == 413
    assert b"request_too_large" in payload


def test_a_page_takes_a_form_of_unknown_length(upload_client: UploadClient) -> None:
    page = Client()
    page.force_login(upload_client.sender.user)
    token = str(page.get("/datasets/").context["csrf_token"])
    cookies = {"Cookie": "; ".join(f"{name}={cookie.value}" for name, cookie in page.cookies.items())}
    body = form(
        part('name="csrfmiddlewaretoken"', token.encode()), part('name="file"; filename="a.jsonl"', GOOD)
    )
    status, _ = upload_client.send(
        in_chunks(body), headers=CHUNKED | cookies | {"Authorization": ""}, path="/datasets/upload/"
    )
    assert (status, upload_client.count()) == (302, 1)


@pytest.mark.parametrize(("size", "fits"), [(999, True), (1000, True), (1001, False)])
def test_the_limit_is_exact_to_the_byte(stores: None, settings: Any, size: int, fits: bool) -> None:
    settings.JOBS = settings.JOBS | {"max_upload_bytes": 1000}
    owner = make_owner()
    try:
        datasets.receive(owner, "a.jsonl", io.BytesIO(b"x" * size))
    except datasets.Rejected:
        assert not blobs.list_keys(f"datasets/{owner}/")
    assert len(access.list_datasets(owner)) == int(fits)


@pytest.mark.parametrize(
    "content", [GOOD, GOOD + GOOD], ids=["the same file twice", "another of the same name"]
)
def test_what_is_sent_twice_is_there_twice(upload_client: UploadClient, content: bytes) -> None:
    assert [upload_client.upload("a.jsonl")[0], upload_client.upload("a.jsonl", content)[0]] == [200, 200]
    assert upload_client.count() == 2


def test_thousands_of_files_end_at_the_quota(stores: None, settings: Any) -> None:
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 3}
    owner = make_owner()
    for number in range(3):
        datasets.receive(owner, f"{number}.jsonl", io.BytesIO(GOOD))
    with pytest.raises(quotas.OverQuota):
        datasets.receive(owner, "4.jsonl", io.BytesIO(GOOD))
    assert len(access.list_datasets(owner)) == 3


@pytest.mark.parametrize(("md5", "fits"), [("0" * 32, False), (None, True)], ids=["a wrong checksum", "none"])
def test_a_checksum_is_held_to(client: Any, people: dict[str, Person], md5: str | None, fits: bool) -> None:
    import openai

    upload = client.uploads.create(filename="a.jsonl", purpose="fine-tune", bytes=len(GOOD), mime_type="application/jsonl")  # fmt: skip
    sent = client.uploads.parts.create(upload.id, data=GOOD)
    more = {"md5": md5} if md5 else {}
    if fits:
        done = client.uploads.complete(upload.id, part_ids=[sent.id], **more)
        dataset = access.get_dataset_for(people["alice"].owner, done.file.id)
        assert dataset.sha256 == hashlib.sha256(GOOD).hexdigest()
        datasets.delete(dataset.owner, dataset.dataset_id)
    else:
        with pytest.raises(openai.BadRequestError):
            client.uploads.complete(upload.id, part_ids=[sent.id], **more)


def test_the_two_families_have_all_their_cases() -> None:
    others = 3 + 2 + 1 + 2  # limits, twice, quota, checksums
    assert (len(NAMES) + len(FORMS), len(SIZES) + others) == (
        28,
        17,
    )  # one more than the list: two ways to break off
