"""Object storage on local disk and on S3: the same promises, the same tests."""

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
    """The default storage is one of the two for the length of a test."""
    if request.param == "local":
        backend = storages.create_storage(
            {
                "BACKEND": "django.core.files.storage.FileSystemStorage",
                "OPTIONS": {"location": tmp_path / "objects"},
            }
        )
    else:
        port = request.getfixturevalue("s3").port
        options = {
            "bucket_name": "bucket",
            "endpoint_url": f"http://127.0.0.1:{port}",
            "access_key": KEY,
            "secret_key": SECRET,
            "region_name": "us-east-1",
        }
        backend = storages.create_storage({"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options})
    monkeypatch.setattr(blobs, "_storage", lambda: backend)
    return request.param


def key(name: str = "data") -> str:
    return f"jobs/{secrets.token_hex(6)}/e1/{name}"


def test_what_is_put_comes_back_with_its_hash(store, tmp_path):
    data, where = secrets.token_bytes(100_000), key()
    stored = blobs.put_file(where, io.BytesIO(data))
    assert (stored.bytes, stored.sha256) == (100_000, hashlib.sha256(data).hexdigest())
    assert blobs.size_of(where) == 100_000
    blobs.fetch(where, tmp_path / "x" / "copy", stored.sha256)
    assert (tmp_path / "x" / "copy").read_bytes() == data
    with blobs.open_file(where, 99_990) as file:
        assert file.read() == data[99_990:]


def test_a_large_file_goes_in_parts(store, monkeypatch):
    monkeypatch.setattr(blobs, "PART", 5 << 20)
    block, where = secrets.token_bytes(1 << 20), key()
    stored = blobs.put_file(where, (block for _ in range(12)))
    assert stored.bytes == 12 << 20
    assert hashlib.sha256(b"".join(blobs.blocks(where))).hexdigest() == stored.sha256


def test_too_much_is_refused_and_leaves_nothing(store):
    where = key()
    with pytest.raises(blobs.TooLarge):
        blobs.put_file(where, io.BytesIO(bytes(2 << 20)), max_bytes=1 << 20)
    assert blobs.size_of(where) is None
    assert blobs.list_keys(where.rpartition("/")[0] + "/") == []


def test_a_source_that_breaks_off_leaves_nothing(store):
    def source():
        yield b"begun"
        raise ConnectionResetError

    where = key()
    with pytest.raises((ConnectionResetError, blobs.StorageError)):
        blobs.put_file(where, source())
    assert blobs.size_of(where) is None


def test_damage_is_found_when_it_is_fetched(store, tmp_path):
    where = key()
    noted = blobs.put_file(where, io.BytesIO(b"good")).sha256
    blobs.put_file(where, io.BytesIO(b"evil"))
    with pytest.raises(blobs.StorageError):
        blobs.fetch(where, tmp_path / "copy", noted)
    assert list(tmp_path.glob("*copy*")) == []


def test_what_is_missing_is_told_from_what_cannot_be_reached(store, tmp_path):
    with pytest.raises(blobs.Missing):
        blobs.open_file(key())
    with pytest.raises(blobs.Missing):
        blobs.fetch(key(), tmp_path / "copy")
    blobs.delete_file(key())


def test_folders_go_there_and_back_and_away(store, tmp_path):
    source, prefix = tmp_path / "a", key("final")
    (source / "deep").mkdir(parents=True)
    for name in ("manifest.json", "weights", "deep/file"):
        (source / name).write_bytes(name.encode())
    files = blobs.put_folder(prefix, source)
    assert [entry.name for entry in files] == ["deep/file", "weights", "manifest.json"]
    noted = [entry.as_dict() for entry in files]
    assert blobs.verify_folder(prefix, noted)
    blobs.fetch_folder(prefix, noted, tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "file").read_bytes() == b"deep/file"
    assert blobs.list_keys(prefix + "/") == sorted(f"{prefix}/{entry.name}" for entry in files)
    assert blobs.delete_prefix(prefix + "/") == 3
    assert not blobs.verify_folder(prefix, noted)
    assert blobs.list_keys(prefix + "/") == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", ""])
def test_no_name_leads_out_of_its_folder(name):
    with pytest.raises(ValueError, match="not a key"):
        blobs.join("jobs/1", name)


def test_an_s3_link_gives_the_bytes_until_it_is_changed(s3, monkeypatch):
    options = {
        "bucket_name": "bucket",
        "endpoint_url": f"http://127.0.0.1:{s3.port}",
        "access_key": KEY,
        "secret_key": SECRET,
    }
    backend = storages.create_storage(
        {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options | {"region_name": "us-east-1"}}
    )
    monkeypatch.setattr(blobs, "_storage", lambda: backend)
    where = key()
    blobs.put_file(where, io.BytesIO(b"bytes"))
    link = blobs.signed_url(where, "größe.zip", 60)
    assert urllib.request.urlopen(link, timeout=10).read() == b"bytes"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(link.replace("/data", "/other"), timeout=10)


async def get(link, **headers):
    response = await AsyncClient().get(link, headers=headers)
    parts = [part async for part in response.streaming_content] if response.streaming else [response.content]
    return response, b"".join(parts)


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_what_a_killed_process_was_storing_is_swept(store):
    """The process is really killed in the middle, which no clean-up of its own survives."""
    where = key()
    blobs.put_file(where, io.BytesIO(b"whole"))
    folder = blobs.local_path(where).parent

    def blocks():
        yield b"half of it"
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            blobs.put_file(f"{where.rpartition('/')[0]}/other", blocks())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = set(folder.iterdir()) - {blobs.local_path(where)}
    assert blobs.sweep_unfinished() == 0  # it may still be written
    os.utime(left, (time.time() - 7200,) * 2)
    assert blobs.sweep_unfinished() == 1
    assert list(folder.iterdir()) == [blobs.local_path(where)]


def test_where_there_is_nothing_to_sweep_nothing_is_swept(store):
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
async def test_a_local_link_gives_the_bytes_and_ranges_of_them(store):
    where = key()
    blobs.put_file(where, io.BytesIO(b"0123456789"))
    link = blobs.signed_url(where, "größe.zip")
    response, data = await get(link)
    assert (response.status_code, data, response["Content-Length"]) == (200, b"0123456789", "10")
    assert "attachment" in response["Content-Disposition"]
    response, data = await get(link, range="bytes=2-4")
    assert (response.status_code, data, response["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    response, _ = await get(link, range="bytes=20-")
    assert response.status_code == 416


@pytest.mark.parametrize("store", ["local"], indirect=True)
async def test_a_forged_or_old_local_link_is_refused(store):
    where = key()
    blobs.put_file(where, io.BytesIO(b"secret"))
    token = blobs.signed_url(where, "f").split("/")[2]
    for bad in (token[:-1] + ("A" if token[-1] != "A" else "B"), "x", "a:b:c"):
        response, data = await get(f"/objects/{bad}/f")
        assert response.status_code == 403
        assert b"secret" not in data
    response, _ = await get(blobs.signed_url(where, "f", -1))
    assert response.status_code == 403
    response, _ = await get(blobs.signed_url(key(), "f"))
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("header", "wanted"),
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
def test_ranges(header, wanted):
    assert byte_range(header, 10) == wanted
