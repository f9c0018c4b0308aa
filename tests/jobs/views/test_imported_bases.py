"""Staff import base models on a page, in parts, and remove them. A worker checks what was uploaded."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import model_imports, multipart
from jobs.registry import imported_bases
from jobs.store import blobs, outbox, quotas, tables
from jobs.store.errors import Refused
from jobs.store.tables import Audit, Upload, month_of
from tests import services
from tests.factories import browser_of, make_user
from tests.jobs.makers import make_s3_storage
from tests.jobs.views.makers import make_dataset, page_text
from tests.training import tiny
from training.plan import catalog

LIST, ADD = "admin:jobs_importedbase_changelist", "admin:jobs_importedbase_upload"
PART = 200_000  # the tiny model fits in one, the least that S3 combines


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART", PART)
    monkeypatch.setattr(outbox, "enqueue", lambda *args: None)


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    """A zip file of a tiny model."""
    return Path(
        shutil.make_archive(str(tmp_path / "m"), "zip", tiny.write_model(tmp_path / "m"))
    ).read_bytes()


@pytest.fixture
def name() -> str:
    return tables.new_id("tiny")[:24]


def begin(client: Client, data: bytes, name: str, filename: str = "model.zip") -> Any:
    fields = {"name": filename, "bytes": str(len(data)), "mark": "some:1", "model": name, "license": "MIT"}
    return client.post(reverse(ADD), fields)


def send(client: Client, data: bytes, name: str, filename: str = "model.zip") -> Upload:
    """Uploads a file on the page; its check has not run yet."""
    upload = begin(client, data, name, filename).json()
    for number in range(1, -(-len(data) // PART) + 1):
        part = data[(number - 1) * PART : number * PART]
        url = f"{upload['url']}{number}/"
        assert client.put(url, part, content_type="application/octet-stream").status_code == 200
    assert client.post(upload["complete"]).json() == {"url": reverse(LIST)}
    assert client.post(upload["complete"]).json() == {"url": reverse(LIST)}  # the first response was lost
    rows = model_imports.list_uploads(client.session_owner)  # type: ignore[attr-defined]
    return rows[0]


@pytest.fixture
def staff(sams: Client, sam: User) -> Client:
    sams.session_owner = sam.owner_id  # type: ignore[attr-defined]
    return sams


@pytest.mark.slow
def test_staff_upload_a_base_and_all_users_can_choose_it(
    staff: Client, sam: User, alices: Client, alice: User, model: bytes, name: str
) -> None:
    row = send(staff, model, name)
    assert f"{name}</b> (model.zip): being checked" in page_text(staff.get(reverse(LIST)))
    assert model_imports.run(sam.owner_id, row.upload_id)
    base = imported_bases.find(name)
    assert base
    assert base.snapshot["licence"] == "MIT"
    make_dataset(alice.owner_id)
    text = page_text(alices.get(reverse("jobs:new_job")))
    assert "Imported by the administrator" in text
    assert f'value="{name}"' in text
    assert not blobs.list_keys(f"uploads/{row.upload_id}")
    assert quotas._reservations(sam.owner_id)[1] == {}
    actions = [(a.actor, a.action) for a in tables.rows(Audit, month_of(time.time())) if a.target == name]
    assert actions == [(sam.owner_id, "import base")]
    staff.post(reverse("admin:jobs_importedbase_remove", args=[name]))
    assert imported_bases.find(name) is None


@pytest.mark.slow
def test_an_unsuitable_upload_is_rejected_with_its_reason(
    staff: Client, sam: User, alices: Client, tmp_path: Path, name: str
) -> None:
    folder = tiny.write_model(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    row = send(staff, Path(shutil.make_archive(str(folder), "zip", folder)).read_bytes(), name)
    assert model_imports.run(sam.owner_id, row.upload_id)
    text = page_text(staff.get(reverse(LIST)))
    assert "rejected. There are no safetensors weights, only pytorch_model.bin" in text
    assert imported_bases.find(name) is None
    assert not blobs.list_keys(f"uploads/{row.upload_id}")
    assert "pickled" not in page_text(alices.get(reverse("jobs:datasets")))


def fake_check(source: Path, to: Path) -> dict[str, Any]:
    to.mkdir(parents=True)
    shutil.unpack_archive(source, to)
    return catalog.describe(to).as_dict()


def test_a_check_that_was_interrupted_after_it_added_the_base_is_completed(
    staff: Client, sam: User, model: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = send(staff, model, name)
    monkeypatch.setattr(model_imports, "check", fake_check)
    monkeypatch.setattr(multipart, "discard", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model_imports.run(sam.owner_id, row.upload_id)
    monkeypatch.undo()
    row.update(actions=[Upload.status.set("checking")])
    assert model_imports.run(sam.owner_id, row.upload_id)
    row.refresh()
    assert row.status == "completed"
    assert len([base for base in imported_bases.list_all() if base.name == name]) == 1


def test_parts_sent_to_s3_are_combined_for_the_check(
    staff: Client, sam: User, model: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    server = services.s3(tmp_path, "testkey", "testsecret123").start()
    try:
        storage = make_s3_storage(server.port, "testkey", "testsecret123")
        monkeypatch.setattr(blobs, "_storage", lambda: storage)
        row = send(staff, model, name)
        assert row.multipart
        assert b"".join(multipart.content(row)) == model
        monkeypatch.setattr(model_imports, "check", fake_check)
        assert model_imports.run(sam.owner_id, row.upload_id)
        assert imported_bases.find(name)
        assert not blobs.list_keys(f"uploads/{row.upload_id}")
    finally:
        server.kill()


def test_a_taken_name_is_refused_before_the_upload(staff: Client, model: bytes) -> None:
    response = begin(staff, model, "gpt2")
    assert response.status_code == 422
    assert "already a base model gpt2" in response.json()["error"]


def test_a_missing_part_is_named(staff: Client, model: bytes, name: str) -> None:
    upload = begin(staff, model, name).json()
    response = staff.post(upload["complete"])
    assert response.status_code == 422
    assert "Part 1 is missing" in response.json()["error"]


def test_only_staff_with_the_permission_can_import_and_remove(
    alices: Client, model: bytes, name: str, tmp_path: Path
) -> None:
    folder = tiny.write_model(tmp_path / "base")
    imported_bases.add(name, catalog.describe(folder).as_dict(), folder)
    for client in (alices, browser_of(make_user("sue", is_staff=True))):
        assert client.get(reverse(LIST)).status_code in (302, 403)
        assert begin(client, model, f"{name}x").status_code in (302, 403)
        assert client.post(reverse("admin:jobs_importedbase_remove", args=[name])).status_code in (302, 403)
    assert imported_bases.find(name)
    with pytest.raises(Refused):
        imported_bases.check_name(name)


def test_without_a_script_the_page_names_the_command(staff: Client, name: str) -> None:
    response = staff.post(reverse(ADD), {"model": name}, follow=True)
    assert "manage.py import_base" in page_text(response)
    assert "JavaScript" in page_text(response)
