"""Uploads in parts, as the page's script sends them: resumed, cancelled, recognized, and limited by the quota."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from django.core.files.storage import storages
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import checks, datasets, multipart
from jobs.store import access, blobs, outbox, quotas, tables
from jobs.store.tables import Dataset, Upload
from tests import services

LINE = b'{"prompt": "colour of: lemon", "completion": "yellow"}\n'
KEY, SECRET = "testkey", "testsecret123"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART", 1000)


def fingerprint_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def begin(client: Client, data: bytes, name: str = "rows.jsonl", **extra: str) -> Any:
    fields = {"name": name, "bytes": str(len(data)), "mark": fingerprint_of(data), **extra}
    return client.post(reverse("jobs:begin_upload"), fields)


def put(client: Client, upload: dict[str, Any], data: bytes, *numbers: int, **headers: str) -> list[int]:
    codes = []
    for number in numbers:
        part = data[(number - 1) * 1000 : number * 1000]
        url = f"{upload['url']}{number}/"
        response = client.put(url, part, content_type="application/octet-stream", headers=headers)
        codes.append(response.status_code)
    return codes


def content_of(dataset: Dataset) -> bytes:
    with blobs.open_file(dataset.key) as file:
        return file.read()


def test_parts_may_arrive_in_any_order(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    assert upload["have"] == []
    assert put(alices, upload, data, 3, 1, 2, 4) == [200] * 4
    response = alices.post(upload["complete"]).json()
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert response["url"] == reverse("jobs:dataset", args=[dataset.dataset_id])
    assert (dataset.status, dataset.sha256, dataset.bytes) == ("checking", hashlib.sha256(data).hexdigest(), len(data))  # fmt: skip
    assert content_of(dataset) == data
    assert alices.post(upload["complete"]).json() == response  # the first response was lost
    assert not blobs.list_keys("uploads/" + upload["url"].split("/")[3])
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_choosing_the_same_file_again_resumes_the_upload(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1, 3)
    again = begin(alices, data).json()
    assert again["url"] == upload["url"]
    assert again["have"] == [1, 3]
    assert begin(alices, data + LINE).json()["url"] != upload["url"]
    assert "Unfinished uploads" in alices.get(reverse("jobs:datasets")).content.decode()
    put(alices, again, data, 2, 4)
    assert alices.post(upload["complete"]).status_code == 200


def test_missing_and_damaged_parts_are_reported(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1, 2, 4)
    assert "Part 3 is missing" in alices.post(upload["complete"]).json()["error"]
    wrong_checksum = {"X-Part-Sha256": "0" * 64}
    assert put(alices, upload, data, 3, **wrong_checksum) == [422]
    assert put(alices, upload, data[:-10], 4) == [422]
    assert put(alices, upload, data, 0, 5, 99999) == [422] * 3
    assert not len(access.list_datasets(alice.owner_id))


def test_a_file_that_changed_during_the_upload_is_rejected(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1, 2, 3, 4)
    put(alices, upload, b"x" * len(data), 2)
    assert "changed during the upload" in alices.post(upload["complete"]).json()["error"]
    assert not len(access.list_datasets(alice.owner_id))


def test_a_cancelled_upload_leaves_nothing(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1)
    assert quotas._reservations(alice.owner_id)[1]
    alices.post(upload["cancel"])
    assert not blobs.list_keys("uploads/" + upload["url"].split("/")[3])
    assert quotas._reservations(alice.owner_id)[1] == {}
    assert put(alices, upload, data, 2) == [422]
    assert alices.post(upload["complete"]).status_code == 422
    assert "Unfinished uploads" not in alices.get(reverse("jobs:datasets")).content.decode()


def test_an_abandoned_upload_leaves_nothing(alices: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1)
    id = upload["url"].split("/")[3]
    assert not outbox.delete_bytes(alice.owner_id, id)
    long_ago = time.time() - 2 * multipart.COMBINE_S
    Upload(alice.owner_id, id).update(actions=[Upload.expires_at.set(long_ago)])
    assert outbox.delete_bytes(alice.owner_id, id)
    assert not blobs.list_keys(f"uploads/{id}")
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_a_file_uploaded_before_is_recognized_before_it_is_sent(
    alices: Client, alice: User, bobs: Client
) -> None:
    data = LINE * 60
    first = datasets.receive(alice.owner_id, "first.jsonl", iter([data]))
    same = begin(alices, data, "other-name.jsonl").json()["same"]
    assert (same["name"], same["url"]) == ("first.jsonl", reverse("jobs:dataset", args=[first.dataset_id]))
    assert "url" in begin(alices, data, again="1").json()
    assert "url" in begin(bobs, data).json()  # whether another user has the file is not revealed


def test_bytes_are_reserved_so_that_two_uploads_cannot_exceed_the_quota(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setitem(settings.JOBS, "max_stored_bytes_per_owner", 5000)
    data = LINE * 60  # 3,300 bytes
    upload = begin(alices, data).json()
    over_quota = begin(alices, data[:-1], "other.jsonl")
    assert over_quota.status_code == 422
    assert "1,700 of your 5,000 are free" in over_quota.json()["error"]
    with pytest.raises(quotas.OverQuota):
        datasets.receive(alice.owner_id, "form.jsonl", _sized(data))
    alices.post(upload["cancel"])
    datasets.receive(alice.owner_id, "form.jsonl", _sized(data))
    assert quotas._reservations(alice.owner_id)[1] == {}
    assert begin(alices, data[:-1], "other.jsonl").status_code == 422


def _sized(data: bytes) -> Any:
    from django.core.files.uploadedfile import SimpleUploadedFile

    return SimpleUploadedFile("form.jsonl", data)


@pytest.mark.parametrize("size", ["", "-1", "x", "9" * 30, "²"])
def test_an_invalid_size_is_rejected(alices: Client, size: str) -> None:
    response = alices.post(reverse("jobs:begin_upload"), {"name": "a", "bytes": size})
    assert response.status_code == 422


def test_too_large_a_file_is_rejected_before_it_is_sent(alices: Client, settings: Any) -> None:
    size = settings.JOBS["max_upload_bytes"] + 1
    response = alices.post(reverse("jobs:begin_upload"), {"name": "a", "bytes": str(size)})
    assert "the limit is" in response.json()["error"]


def test_another_users_upload_does_not_exist(alices: Client, bobs: Client, alice: User) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    assert put(bobs, upload, data, 1) == [404]
    for name in ("complete", "cancel"):
        assert bobs.post(upload[name]).status_code == 404
    row = tables.get(Upload, alice.owner_id, upload["url"].split("/")[3])
    assert row is not None
    assert row.status == "pending"


# ---- with S3 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Service]:
    folder = tmp_path_factory.mktemp("s3")
    (folder / "s3" / "bucket").mkdir(parents=True)
    service = services.s3(folder, KEY, SECRET).start()
    yield service
    service.kill()


@pytest.fixture
def bucket(s3: services.Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    options = {
        "bucket_name": "bucket", "endpoint_url": f"http://127.0.0.1:{s3.port}", "access_key": KEY, "secret_key": SECRET,
        "region_name": "us-east-1", "signature_version": "s3v4",
    }  # fmt: skip
    backend = storages.create_storage({"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options})
    monkeypatch.setattr(blobs, "_storage", lambda: backend)
    monkeypatch.setattr(multipart, "PART", 5 << 20)  # in S3 only the last part may be smaller
    return backend


def test_parts_may_go_to_the_bucket_directly_or_through_us(alices: Client, alice: User, bucket: Any) -> None:
    data = LINE * (11 * (1 << 20) // len(LINE))
    data += LINE * 3
    part = 5 << 20
    upload = begin(alices, data).json()
    assert upload["links"]
    links = alices.post(upload["links"], {"numbers": "1,3"}).json()["links"]
    assert set(links) == {"1", "3"}
    assert not requests.put(links["1"], data[: part + 1], timeout=30).ok  # longer than declared
    assert requests.put(links["1"], data[:part], timeout=30).ok
    assert begin(alices, data).json()["have"] == [1]
    url = f"{upload['url']}2/"
    middle = alices.put(url, data[part : 2 * part], content_type="application/octet-stream")
    assert middle.status_code == 200
    assert not requests.put(links["3"].replace("partNumber=3", "partNumber=4"), b"x", timeout=30).ok
    assert requests.put(links["3"], data[2 * part :], timeout=30).ok
    alices.post(upload["complete"])
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert (dataset.status, dataset.sha256, dataset.bytes) == ("checking", "", len(data))
    checks.check(alice.owner_id, dataset.dataset_id)
    dataset = access.get_dataset_for(alice.owner_id, dataset.dataset_id)
    assert (dataset.status, dataset.sha256) == ("ready", hashlib.sha256(data).hexdigest())


def test_a_cancelled_upload_leaves_no_parts_in_the_bucket(alices: Client, alice: User, bucket: Any) -> None:
    data = LINE * 100
    upload = begin(alices, data).json()
    links = alices.post(upload["links"], {"numbers": "1"}).json()["links"]
    assert requests.put(links["1"], data, timeout=30).ok
    alices.post(upload["cancel"])
    assert not requests.put(links["1"], data, timeout=30).ok
    assert not len(access.list_datasets(alice.owner_id))


def test_completion_can_be_retried_after_a_storage_failure(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LINE * 60
    upload = begin(alices, data).json()
    put(alices, upload, data, 1, 2, 3, 4)
    with monkeypatch.context() as failing:
        failing.setattr(blobs, "blocks", lambda key: (_ for _ in ()).throw(blobs.StorageError("away")))
        assert alices.post(upload["complete"]).status_code == 503
    assert not len(access.list_datasets(alice.owner_id))
    assert alices.post(upload["complete"]).status_code == 200
    assert content_of(access.list_datasets(alice.owner_id).rows[0]) == data


def test_the_reservation_of_an_upload_that_never_started_is_released(alice: User) -> None:
    quotas.reserve(alice.owner_id, "upload-1", 1000)
    assert outbox.delete_bytes(alice.owner_id, "upload-1")
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_only_the_datasets_page_may_connect_to_the_bucket(alices: Client, bucket: Any) -> None:
    from llmtuner.middleware import _bucket_origin

    _bucket_origin.cache_clear()
    try:
        assert (
            f"connect-src 'self' {bucket.endpoint_url};"
            in alices.get("/datasets/")["Content-Security-Policy"]
        )
        assert "connect-src 'self';" in alices.get("/models/")["Content-Security-Policy"]
    finally:
        _bucket_origin.cache_clear()


def test_a_part_is_within_the_body_limit_and_needs_the_csrf_token(alice: User) -> None:
    from llmtuner.body_limit import MAX_BODY, limit_of

    assert limit_of("/datasets/uploads/upload-1/parts/3/", "application/octet-stream") == 5 << 20
    assert limit_of("/datasets/uploads/upload-1/complete/", "application/octet-stream") == MAX_BODY
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = browser.get(reverse("jobs:datasets")).content.decode()
    match = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert match
    data, token = LINE * 10, {"X-CSRFToken": match[1]}
    fields = {"name": "a.jsonl", "bytes": str(len(data)), "mark": ""}
    assert browser.post(reverse("jobs:begin_upload"), fields).status_code == 403
    upload = browser.post(reverse("jobs:begin_upload"), fields, headers=token).json()
    assert put(browser, upload, data, 1) == [403]
    assert put(browser, upload, data, 1, **token) == [200]
