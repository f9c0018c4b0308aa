"""Uploading in a real browser: in parts, over a lost connection and a closed page, stopping, duplicates, errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.datasets import model_imports, multipart
from jobs.registry import imported_bases
from jobs.store import access, blobs, tables
from tests.browser.conftest import wait_until
from tests.factories import browser_of, make_user
from tests.training import tiny
from training.plan import catalog

pytestmark = pytest.mark.browser
LINE = b'{"prompt": "colour of: lemon", "completion": "yellow"}\n'


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parts. Its fingerprint is made from a sample of them."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    path.write_bytes(LINE * ((4 * multipart.PART + 9_000_000) // len(LINE)))
    return path


def only_dataset(owner: str) -> Any:
    (dataset,) = access.list_datasets(owner).rows
    return dataset


def test_a_large_file_is_uploaded_in_parts(page: Any, owner: str, large: Path) -> None:
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", large)
    page.wait_for_url("**/datasets/file-*/")
    dataset = only_dataset(owner)
    with large.open("rb") as file, blobs.open_file(dataset.key) as stored:
        assert stored.read() == file.read()


def test_an_upload_resumes_after_a_lost_connection_and_a_closed_page(
    page: Any, owner: str, large: Path, console_errors: list[str]
) -> None:
    sent: list[str] = []
    connection = {"broken": True}

    def handle(route: Any) -> None:
        number = route.request.url.rstrip("/").rsplit("/", 1)[1]
        if connection["broken"] and int(number) > 2:
            route.abort()
        else:
            sent.append(number)
            route.continue_()

    page.route("**/parts/*/", handle)
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", large)
    page.get_by_text("Connection lost. Retrying").wait_for()
    wait_until(page, lambda: sorted(multipart.received_parts(multipart.list_open(owner)[0])) == [1, 2])
    page.once("dialog", lambda dialog: dialog.accept())
    page.goto("/datasets/")
    page.get_by_text("Unfinished uploads").wait_for()
    page.get_by_text("Choose the same file again").wait_for()
    connection["broken"] = False
    before = len(sent)
    page.set_input_files("input[type=file]", large)
    page.wait_for_url("**/datasets/file-*/")
    assert sorted(sent[:before]) == ["1", "2"]
    assert sorted(sent[before:]) == ["3", "4", "5", "6"][: len(sent) - before]
    assert only_dataset(owner).bytes == large.stat().st_size
    console_errors[:] = [text for text in console_errors if "ERR_FAILED" not in text]


def test_stopping_an_upload_keeps_nothing(
    page: Any, owner: str, large: Path, console_errors: list[str]
) -> None:
    pending: list[Any] = []
    page.route("**/parts/*/", lambda route: pending.append(route))
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", large)
    wait_until(page, lambda: pending)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped. The upload was discarded.").wait_for()
    wait_until(page, lambda: not multipart.list_open(owner))
    assert not len(access.list_datasets(owner))
    console_errors.clear()


def test_a_duplicate_file_is_recognized_before_it_is_sent(page: Any, owner: str, tmp_path: Path) -> None:
    small = tmp_path / "small.jsonl"
    small.write_bytes(LINE * 20)
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", small)
    page.wait_for_url("**/datasets/file-*/")
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", small)
    page.get_by_text("You already have this file").wait_for()
    assert page.locator("[data-duplicate] a").inner_text() == "small.jsonl"
    page.get_by_role("button", name="Upload anyway").click()
    page.wait_for_url("**/datasets/file-*/")
    assert len(access.list_datasets(owner)) == 2


def test_an_upload_error_is_shown_next_to_the_file_input(
    page: Any, owner: str, tmp_path: Path, console_errors: list[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", empty)
    page.get_by_text("The file is empty.").wait_for()
    console_errors[:] = [text for text in console_errors if "422" not in text]


def test_staff_upload_a_base_model(page: Any, web: Any, tmp_path: Path, console_errors: list[str]) -> None:
    sam = make_user("sam", is_staff=True, is_superuser=True)
    cookie = browser_of(sam).cookies["session"]
    page.context.add_cookies([{"name": "session", "value": cookie.value, "url": web.url}])
    folder = tiny.write_model(tmp_path / "tiny")
    page.goto("/admin/jobs/importedbase/")
    page.set_input_files("#base-file", shutil.make_archive(str(folder), "zip", folder))
    page.get_by_label("Name").fill("gpt2")
    page.get_by_role("button", name="Upload and import").click()
    page.get_by_text("There is already a base model gpt2").wait_for()
    assert all("422" in error for error in console_errors)
    console_errors.clear()
    page.set_input_files("#base-file", f"{folder}.zip")
    page.get_by_label("Name").fill(name := tables.new_id("tiny")[:20])
    page.get_by_role("button", name="Upload and import").click()
    page.get_by_text(f"{name} (tiny.zip): being checked").wait_for()
    (row,) = model_imports.list_uploads(sam.owner_id)
    assert row.base == {"name": name, "license": ""}
    imported_bases.add(name, catalog.describe(folder).as_dict(), folder)
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.goto("/admin/jobs/importedbase/")
        page.get_by_role("button", name=f"Remove {name}").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
