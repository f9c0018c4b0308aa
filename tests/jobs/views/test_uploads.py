"""Uploads in parts, as the page's script sends them: gone on with, cancelled, recognised, within the quota."""

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


def mark_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def begin(client: Client, data: bytes, name: str = "rows.jsonl", **more: str) -> Any:
    fields = {"name": name, "bytes": str(len(data)), "mark": mark_of(data), **more}
    return client.post(reverse("jobs:begin_upload"), fields)


def put(client: Client, told: dict[str, Any], data: bytes, *numbers: int, **headers: str) -> list[int]:
    codes = []
    for number in numbers:
        part = data[(number - 1) * 1000 : number * 1000]
        address = f"{told['url']}{number}/"
        answer = client.put(address, part, content_type="application/octet-stream", headers=headers)
        codes.append(answer.status_code)
    return codes


def content_of(dataset: Dataset) -> bytes:
    with blobs.open_file(dataset.key) as file:
        return file.read()


def test_a_file_comes_in_parts_of_any_order(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    assert told["have"] == []
    assert put(alices, told, data, 3, 1, 2, 4) == [200] * 4
    answer = alices.post(told["complete"]).json()
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert answer["url"] == reverse("jobs:dataset", args=[dataset.dataset_id])
    assert (dataset.status, dataset.sha256, dataset.bytes) == ("checking", hashlib.sha256(data).hexdigest(), len(data))  # fmt: skip
    assert content_of(dataset) == data
    assert alices.post(told["complete"]).json() == answer  # the first answer got lost
    assert not blobs.list_keys("uploads/" + told["url"].split("/")[3])
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_the_same_file_chosen_again_goes_on_where_it_was(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1, 3)
    again = begin(alices, data).json()
    assert again["url"] == told["url"]
    assert again["have"] == [1, 3]
    assert begin(alices, data + LINE).json()["url"] != told["url"]
    assert "Unfinished uploads" in alices.get(reverse("jobs:datasets")).content.decode()
    put(alices, again, data, 2, 4)
    assert alices.post(told["complete"]).status_code == 200


def test_what_is_missing_or_damaged_is_told(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1, 2, 4)
    assert "Part 3 is missing" in alices.post(told["complete"]).json()["error"]
    wrong = {"X-Part-Sha256": "0" * 64}
    assert put(alices, told, data, 3, **wrong) == [422]
    assert put(alices, told, data[:-10], 4) == [422]
    assert put(alices, told, data, 0, 5, 99999) == [422] * 3
    assert not len(access.list_datasets(alice.owner_id))


def test_a_file_that_changed_on_its_way_is_not_put_together(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1, 2, 3, 4)
    put(alices, told, b"x" * len(data), 2)
    assert "changed during the upload" in alices.post(told["complete"]).json()["error"]
    assert not len(access.list_datasets(alice.owner_id))


def test_stop_keeps_nothing(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1)
    assert quotas._reservations(alice.owner_id)[1]
    alices.post(told["cancel"])
    assert not blobs.list_keys("uploads/" + told["url"].split("/")[3])
    assert quotas._reservations(alice.owner_id)[1] == {}
    assert put(alices, told, data, 2) == [422]
    assert alices.post(told["complete"]).status_code == 422
    assert "Unfinished uploads" not in alices.get(reverse("jobs:datasets")).content.decode()


def test_an_upload_nobody_comes_back_to_leaves_nothing(alices: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1)
    id = told["url"].split("/")[3]
    assert not outbox.delete_bytes(alice.owner_id, id)
    long_ago = time.time() - 2 * multipart.COMBINE_S
    Upload(alice.owner_id, id).update(actions=[Upload.expires_at.set(long_ago)])
    assert outbox.delete_bytes(alice.owner_id, id)
    assert not blobs.list_keys(f"uploads/{id}")
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_a_file_one_has_already_is_recognised_before_it_is_sent(
    alices: Client, alice: User, bobs: Client
) -> None:
    data = LINE * 60
    first = datasets.receive(alice.owner_id, "first.jsonl", iter([data]))
    same = begin(alices, data, "other-name.jsonl").json()["same"]
    assert (same["name"], same["url"]) == ("first.jsonl", reverse("jobs:dataset", args=[first.dataset_id]))
    assert "url" in begin(alices, data, again="1").json()
    assert "url" in begin(bobs, data).json()  # what others have is nobody's business


def test_bytes_are_set_aside_so_that_two_together_cannot_pass_the_quota(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setitem(settings.JOBS, "max_stored_bytes_per_owner", 5000)
    data = LINE * 60  # 3,300 bytes
    told = begin(alices, data).json()
    refused = begin(alices, data[:-1], "other.jsonl")
    assert refused.status_code == 422
    assert "1,700 of your 5,000 are free" in refused.json()["error"]
    with pytest.raises(quotas.OverQuota):
        datasets.receive(alice.owner_id, "form.jsonl", _sized(data))
    alices.post(told["cancel"])
    datasets.receive(alice.owner_id, "form.jsonl", _sized(data))
    assert quotas._reservations(alice.owner_id)[1] == {}
    assert begin(alices, data[:-1], "other.jsonl").status_code == 422


def _sized(data: bytes) -> Any:
    from django.core.files.uploadedfile import SimpleUploadedFile

    return SimpleUploadedFile("form.jsonl", data)


@pytest.mark.parametrize("size", ["", "-1", "x", "9" * 30, "²"])
def test_a_size_that_is_none_is_refused(alices: Client, size: str) -> None:
    answer = alices.post(reverse("jobs:begin_upload"), {"name": "a", "bytes": size})
    assert answer.status_code == 422


def test_too_large_a_file_is_refused_before_a_byte_is_sent(alices: Client, settings: Any) -> None:
    size = settings.JOBS["max_upload_bytes"] + 1
    answer = alices.post(reverse("jobs:begin_upload"), {"name": "a", "bytes": str(size)})
    assert "the limit is" in answer.json()["error"]


def test_somebody_elses_upload_does_not_exist(alices: Client, bobs: Client, alice: User) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    assert put(bobs, told, data, 1) == [404]
    for name in ("complete", "cancel"):
        assert bobs.post(told[name]).status_code == 404
    assert tables.get(Upload, alice.owner_id, told["url"].split("/")[3]).status == "pending"


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
    monkeypatch.setattr(multipart, "PART", 5 << 20)  # S3 takes no smaller ones but the last
    return backend


def test_parts_go_straight_to_the_bucket_and_some_through_us(
    alices: Client, alice: User, bucket: Any
) -> None:
    data = LINE * (11 * (1 << 20) // len(LINE))
    data += LINE * 3
    part = 5 << 20
    told = begin(alices, data).json()
    assert told["links"]
    links = alices.post(told["links"], {"numbers": "1,3"}).json()["links"]
    assert set(links) == {"1", "3"}
    assert not requests.put(links["1"], data[: part + 1], timeout=30).ok  # longer than was announced
    assert requests.put(links["1"], data[:part], timeout=30).ok
    assert begin(alices, data).json()["have"] == [1]
    address = f"{told['url']}2/"
    middle = alices.put(address, data[part : 2 * part], content_type="application/octet-stream")
    assert middle.status_code == 200
    assert not requests.put(links["3"].replace("partNumber=3", "partNumber=4"), b"x", timeout=30).ok
    assert requests.put(links["3"], data[2 * part :], timeout=30).ok
    alices.post(told["complete"])
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert (dataset.status, dataset.sha256, dataset.bytes) == ("checking", "", len(data))
    checks.check(alice.owner_id, dataset.dataset_id)
    dataset = access.get_dataset_for(alice.owner_id, dataset.dataset_id)
    assert (dataset.status, dataset.sha256) == ("ready", hashlib.sha256(data).hexdigest())


def test_a_stopped_upload_leaves_no_parts_in_the_bucket(alices: Client, alice: User, bucket: Any) -> None:
    data = LINE * 100
    told = begin(alices, data).json()
    links = alices.post(told["links"], {"numbers": "1"}).json()["links"]
    assert requests.put(links["1"], data, timeout=30).ok
    alices.post(told["cancel"])
    assert not requests.put(links["1"], data, timeout=30).ok
    assert not len(access.list_datasets(alice.owner_id))


def test_a_failure_while_it_is_put_together_may_be_tried_again(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LINE * 60
    told = begin(alices, data).json()
    put(alices, told, data, 1, 2, 3, 4)
    with monkeypatch.context() as broken:
        broken.setattr(blobs, "blocks", lambda key: (_ for _ in ()).throw(blobs.StorageError("away")))
        assert alices.post(told["complete"]).status_code == 503
    assert not len(access.list_datasets(alice.owner_id))
    assert alices.post(told["complete"]).status_code == 200
    assert content_of(access.list_datasets(alice.owner_id).rows[0]) == data


def test_what_was_set_aside_for_an_upload_that_never_came_to_be_is_given_back(alice: User) -> None:
    quotas.reserve(alice.owner_id, "upload-1", 1000)
    assert outbox.delete_bytes(alice.owner_id, "upload-1")
    assert quotas._reservations(alice.owner_id)[1] == {}


def test_only_the_page_that_sends_them_may_speak_to_the_bucket(alices: Client, bucket: Any) -> None:
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


def test_a_part_passes_the_outer_door_and_needs_the_pages_token(alice: User) -> None:
    from llmtuner.body_limit import MAX_BODY, limit_of

    assert limit_of("/datasets/uploads/upload-1/parts/3/", "application/octet-stream") == 5 << 20
    assert limit_of("/datasets/uploads/upload-1/complete/", "application/octet-stream") == MAX_BODY
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = strict.get(reverse("jobs:datasets")).content.decode()
    found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert found
    data, token = LINE * 10, {"X-CSRFToken": found[1]}
    fields = {"name": "a.jsonl", "bytes": str(len(data)), "mark": ""}
    assert strict.post(reverse("jobs:begin_upload"), fields).status_code == 403
    told = strict.post(reverse("jobs:begin_upload"), fields, headers=token).json()
    assert put(strict, told, data, 1) == [403]
    assert put(strict, told, data, 1, **token) == [200]
