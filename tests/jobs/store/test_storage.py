"""Object storage on local disk and on S3: both backends pass the same tests."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import signal
import time
import urllib.error
import urllib.request

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import InMemoryStorage, storages
from django.test import AsyncClient

from jobs.store import blobs
from jobs.views.objects import byte_range
from tests import services
from tests.jobs.makers import make_s3_storage

KEY, SECRET = "testkey", "testsecret123"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    (folder / "s3" / "bucket").mkdir(parents=True)
    service = services.s3(folder, KEY, SECRET).start()
    yield service
    service.kill()


@pytest.fixture(params=["local", "s3"])
def store(request, settings, tmp_path, monkeypatch):
    """Sets the default storage to one of the two backends for this test."""
    if request.param == "local":
        backend = storages.create_storage(
            {
                "BACKEND": "django.core.files.storage.FileSystemStorage",
                "OPTIONS": {"location": tmp_path / "objects"},
            }
        )
    else:
        backend = make_s3_storage(request.getfixturevalue("s3").port, KEY, SECRET)
    monkeypatch.setattr(blobs, "_storage", lambda: backend)
    return request.param


def key(name: str = "data") -> str:
    return f"jobs/{secrets.token_hex(6)}/e1/{name}"


def test_a_stored_file_is_returned_with_its_hash(store, tmp_path):
    data, path = secrets.token_bytes(100_000), key()
    stored = blobs.put_file(path, io.BytesIO(data))
    assert (stored.bytes, stored.sha256) == (100_000, hashlib.sha256(data).hexdigest())
    assert blobs.size_of(path) == 100_000
    blobs.fetch(path, tmp_path / "x" / "copy", stored.sha256)
    assert (tmp_path / "x" / "copy").read_bytes() == data
    with blobs.open_file(path, 99_990) as file:
        assert file.read() == data[99_990:]


def test_a_large_file_is_stored_in_parts(store, monkeypatch):
    monkeypatch.setattr(blobs, "PART", 5 << 20)
    block, path = secrets.token_bytes(1 << 20), key()
    stored = blobs.put_file(path, (block for _ in range(12)))
    assert stored.bytes == 12 << 20
    assert hashlib.sha256(b"".join(blobs.blocks(path))).hexdigest() == stored.sha256


def test_an_oversized_file_is_refused_and_leaves_nothing(store):
    path = key()
    with pytest.raises(blobs.TooLarge):
        blobs.put_file(path, io.BytesIO(bytes(2 << 20)), max_bytes=1 << 20)
    assert blobs.size_of(path) is None
    assert blobs.list_keys(path.rpartition("/")[0] + "/") == []


def test_an_interrupted_source_leaves_nothing(store):
    def source():
        yield b"begin"
        raise ConnectionResetError

    path = key()
    with pytest.raises((ConnectionResetError, blobs.StorageError)):
        blobs.put_file(path, source())
    assert blobs.size_of(path) is None


def test_damage_is_detected_when_fetching(store, tmp_path):
    path = key()
    checksum = blobs.put_file(path, io.BytesIO(b"good")).sha256
    blobs.put_file(path, io.BytesIO(b"evil"))
    with pytest.raises(blobs.StorageError):
        blobs.fetch(path, tmp_path / "copy", checksum)
    assert list(tmp_path.glob("*copy*")) == []


def test_a_missing_object_raises_missing(store, tmp_path):
    with pytest.raises(blobs.Missing):
        blobs.open_file(key())
    with pytest.raises(blobs.Missing):
        blobs.fetch(key(), tmp_path / "copy")
    blobs.delete_file(key())


def test_folders_are_stored_fetched_and_deleted(store, tmp_path):
    source, prefix = tmp_path / "a", key("final")
    (source / "deep").mkdir(parents=True)
    for name in ("manifest.json", "weights", "deep/file"):
        (source / name).write_bytes(name.encode())
    files = blobs.put_folder(prefix, source)
    assert [entry.name for entry in files] == ["deep/file", "weights", "manifest.json"]
    manifest = [entry.as_dict() for entry in files]
    assert blobs.verify_folder(prefix, manifest)
    blobs.fetch_folder(prefix, manifest, tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "file").read_bytes() == b"deep/file"
    assert blobs.list_keys(prefix + "/") == sorted(f"{prefix}/{entry.name}" for entry in files)
    assert blobs.delete_prefix(prefix + "/") == 3
    assert not blobs.verify_folder(prefix, manifest)
    assert blobs.list_keys(prefix + "/") == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", ""])
def test_no_name_escapes_its_folder(name):
    with pytest.raises(ValueError, match="not a key"):
        blobs.join("jobs/1", name)


def test_an_s3_link_works_unless_it_is_altered(s3, monkeypatch):
    backend = make_s3_storage(s3.port, KEY, SECRET)
    monkeypatch.setattr(blobs, "_storage", lambda: backend)
    path = key()
    blobs.put_file(path, io.BytesIO(b"bytes"))
    link = blobs.signed_url(path, "größe.zip", 60)
    assert urllib.request.urlopen(link, timeout=10).read() == b"bytes"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(link.replace("/data", "/other"), timeout=10)


async def get(link, **headers):
    response = await AsyncClient().get(link, headers=headers)
    parts = [part async for part in response.streaming_content] if response.streaming else [response.content]
    return response, b"".join(parts)


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_unfinished_files_of_a_killed_process_are_deleted(store):
    """The process is killed in the middle, so no clean-up of its own runs."""
    path = key()
    blobs.put_file(path, io.BytesIO(b"whole"))
    folder = blobs.local_path(path).parent

    def blocks():
        yield b"half of it"
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            blobs.put_file(f"{path.rpartition('/')[0]}/other", blocks())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (unfinished,) = set(folder.iterdir()) - {blobs.local_path(path)}
    assert blobs.sweep_unfinished() == 0  # it may still be written
    os.utime(unfinished, (time.time() - 7200,) * 2)
    assert blobs.sweep_unfinished() == 1
    assert list(folder.iterdir()) == [blobs.local_path(path)]


def test_finished_files_are_not_swept(store):
    blobs.put_file(key(), io.BytesIO(b"whole"))
    assert blobs.sweep_unfinished() == 0


def test_parts_are_combined_by_the_storages_that_take_them(store):
    where = key()
    assert blobs.takes_parts() == (store == "s3")
    if not blobs.takes_parts():
        with pytest.raises(ImproperlyConfigured, match="LocalStore"):
            blobs.begin_parts(where)
        return
    upload = blobs.begin_parts(where)
    blobs.put_part(where, upload, 2, b"end")
    blobs.put_part(where, upload, 1, b"a" * (5 << 20))
    assert blobs.parts_of(where, upload) == {1: 5 << 20, 2: 3}
    blobs.finish_parts(where, upload)
    assert blobs.size_of(where) == (5 << 20) + 3


def test_an_unknown_storage_is_refused(monkeypatch):
    monkeypatch.setattr(blobs, "_storage", InMemoryStorage)
    with pytest.raises(ImproperlyConfigured, match="InMemoryStorage"):
        blobs.size_of(key())


@pytest.mark.parametrize("store", ["local"], indirect=True)
async def test_a_local_link_returns_the_file_and_byte_ranges(store):
    path = key()
    blobs.put_file(path, io.BytesIO(b"0123456789"))
    link = blobs.signed_url(path, "größe.zip")
    response, data = await get(link)
    assert (response.status_code, data, response["Content-Length"]) == (200, b"0123456789", "10")
    assert "attachment" in response["Content-Disposition"]
    response, data = await get(link, range="bytes=2-4")
    assert (response.status_code, data, response["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    response, _ = await get(link, range="bytes=20-")
    assert response.status_code == 416


@pytest.mark.parametrize("store", ["local"], indirect=True)
async def test_a_forged_or_expired_local_link_is_refused(store):
    path = key()
    blobs.put_file(path, io.BytesIO(b"secret"))
    token = blobs.signed_url(path, "f").split("/")[2]
    for bad in (token[:-1] + ("A" if token[-1] != "A" else "B"), "x", "a:b:c"):
        response, data = await get(f"/objects/{bad}/f")
        assert response.status_code == 403
        assert b"secret" not in data
    response, _ = await get(blobs.signed_url(path, "f", -1))
    assert response.status_code == 403
    response, _ = await get(blobs.signed_url(key(), "f"))
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", (0, 10)),
        ("bytes=0-", (0, 10)),
        ("bytes=5-", (5, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=-0", None),
        ("bytes=10-", None),
        ("bytes=4-2", None),
        ("bytes=0-1,3-4", (0, 10)),
        ("bytes=-", (0, 10)),
        ("garbage", (0, 10)),
    ],
)
def test_byte_ranges_are_parsed(header, expected):
    assert byte_range(header, 10) == expected
