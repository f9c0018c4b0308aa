"""Rows edited, added, excluded and saved, datasets merged and split, in Chromium, with and without JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.datasets import datasets
from jobs.store import access, blobs
from jobs.store.tables import Dataset
from tests.browser.conftest import wait_until
from tests.factories import browser_of, make_user
from tests.jobs.views.test_escaping import PAYLOADS

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PROMPTS = [*PAYLOADS, *(f"Number {n}?" for n in range(50))]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"Answer {n}"}],
        "id": n,
    }
    for n, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def checks_worker(web: Any) -> Iterator[None]:
    web.start_worker("checks")
    yield
    web.stop("checks")


def upload(owner: str, rows: list[Any], name: str) -> Dataset:
    return datasets.receive(owner, name, ["".join(json.dumps(row) + "\n" for row in rows).encode()])


def rows_of(owner: str, page: Any) -> list[Any]:
    """The rows of the dataset whose page is open, once it is ready."""
    id = page.url.rstrip("/").rpartition("/")[2]
    wait_until(page, lambda: access.get_dataset_for(owner, id).status == "ready")
    with blobs.open_file(access.get_dataset_for(owner, id).key) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def edit_and_save(page: Any, owner: str, dataset: Dataset) -> list[Any]:
    """The same steps with and without JavaScript: edit line 14, add a row, exclude line 15, save."""
    page.goto(f"/datasets/{dataset.dataset_id}/rows/")
    page.locator("#row-14").wait_for()
    page.locator("#row-14").get_by_text("Edit").click()
    page.fill("textarea[name=content-0-1]", "First line\nsecond line")
    page.get_by_role("button", name="Add message").click()
    page.fill("textarea[name=content-0-2]", "And then?")
    page.get_by_role("button", name="Keep changes").click()
    page.locator("#row-14").get_by_text("Edited").wait_for()
    page.locator("#row-15").get_by_role("button", name="Exclude").click()
    page.locator("#row-15").get_by_text("Excluded").wait_for()
    page.get_by_role("link", name="Add row").click()
    page.fill("textarea[name=content-0-0]", "New question?")
    page.fill("textarea[name=content-0-1]", "New answer.")
    page.locator("form#row-form").get_by_role("button", name="Add row").click()
    page.get_by_text("1 row edited, 1 added, 1 excluded").wait_for()
    page.get_by_role("button", name="Save as new version").click()
    page.wait_for_url(lambda url: dataset.dataset_id not in url)
    return rows_of(owner, page)


def expected() -> list[Any]:
    user, assistant = ROWS[13]["messages"]
    edited = [
        user,
        assistant | {"content": "First line\nsecond line"},
        {"role": "user", "content": "And then?"},
    ]
    new = [{"role": "user", "content": "New question?"}, {"role": "assistant", "content": "New answer."}]
    return [*ROWS[:13], ROWS[13] | {"messages": edited}, *ROWS[15:], {"messages": new}]


def test_rows_are_edited_and_saved_datasets_merged_and_split(
    page: Any, owner: str, checks_worker: None, console_errors: list[str]
) -> None:
    dataset = upload(owner, ROWS, "support.jsonl")
    wait_until(page, lambda: access.get_dataset_for(owner, dataset.dataset_id).status == "ready")
    assert edit_and_save(page, owner, dataset) == expected()
    page.reload()
    page.get_by_role("link", name="Merge").click()
    page.select_option("select[name=other]", dataset.dataset_id)
    page.fill("input[name=name]", "everything")
    page.get_by_role("button", name="Merge").click()
    page.get_by_role("heading", name="everything.jsonl").wait_for()
    assert rows_of(owner, page) == [*expected(), *ROWS]
    page.reload()
    page.get_by_text("Split off rows for validation").click()
    page.fill("input[name=percent]", "20")
    page.get_by_role("button", name="Split", exact=True).click()
    page.get_by_role("heading", name="everything (80% for training).jsonl").wait_for()
    train = rows_of(owner, page)
    page.reload()
    page.get_by_role("link", name="other part").click()
    held_out = rows_of(owner, page)
    assert len(held_out) >= 24
    assert not {row["messages"][0]["content"] for row in train} & {
        row["messages"][0]["content"] for row in held_out
    }
    page.get_by_role("link", name="Start a job").wait_for()
    page.goto(page.get_by_role("link", name="Start a job").get_attribute("href"))
    assert page.input_value("select[name=validation_dataset]") in page.url


def test_rows_with_markup_are_inert_and_search_finds_them(
    page: Any, owner: str, checks_worker: None, console_errors: list[str]
) -> None:
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    dataset = upload(owner, ROWS, "markup.jsonl")
    wait_until(page, lambda: access.get_dataset_for(owner, dataset.dataset_id).status == "ready")
    page.goto(f"/datasets/{dataset.dataset_id}/rows/")
    page.locator("#row-1").wait_for()
    assert (
        page.locator("#rows :is(script, img, svg, iframe, [onerror], [onfocus], [data-hx-get])").count() == 0
    )
    page.fill("input[name=q]", "<SCRIPT>alert")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="Rows with “<SCRIPT>alert”").wait_for()
    assert page.locator("[id^=row-]").count() == 2
    page.locator("#row-4").get_by_text("Edit").click()
    assert page.input_value("textarea[name=content-0-0]") == PAYLOADS[3]
    page.get_by_role("button", name="Edit as JSON").click()
    page.fill("textarea[name=json]", '{"messages": "<img src=x onerror=alert(1)>"}')
    page.get_by_role("button", name="Keep changes").click()
    assert "Line 4" in page.get_by_role("alert").inner_text()
    assert "<img" in page.input_value("textarea[name=json]")


def test_rows_are_edited_without_javascript_and_with_the_keyboard(
    chromium: Any, web: Any, transactional_db: None, checks_worker: None
) -> None:
    user = make_user("alice")
    context = chromium.new_context(base_url=web.url, java_script_enabled=False)
    context.set_default_timeout(120_000)
    cookie = browser_of(user).cookies["session"].value
    context.add_cookies([{"name": "session", "value": cookie, "url": web.url}])
    page = context.new_page()
    dataset = upload(user.owner_id, ROWS, "plain.jsonl")
    wait_until(page, lambda: access.get_dataset_for(user.owner_id, dataset.dataset_id).status == "ready")
    assert edit_and_save(page, user.owner_id, dataset) == expected()
    page.goto(f"/datasets/{dataset.dataset_id}/rows/?page=2")
    page.locator("#row-21").wait_for()
    page.locator("#change-21").focus()
    page.keyboard.press("Enter")
    page.locator("#row-21").get_by_text("Excluded").wait_for()
    page.get_by_text("Discard", exact=True).click()
    page.get_by_role("button", name="Discard changes").click()
    page.get_by_text("The changes were discarded.").wait_for()
    context.close()
