"""Mending data from its report: each button makes a new version, and the old one stays as it is."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import checks, datasets, versions
from jobs.store import access, blobs, outbox, quotas, tables
from jobs.store.tables import Dataset, DatasetReport
from tests.jobs.views.makers import make_dataset
from training.plan.catalog import STARTER_FOLDER
from training.report.fix import DROPPABLE
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

ROWS = [{"prompt": f"Number {i}?\n", "completion": f" It is {i * i}."} for i in range(60)]
EMPTY = {"prompt": "And?\n", "completion": ""}
TWINS = {
    "code": "duplicate", "severity": "warning", "title": "Duplicate rows", "count": 3, "lines": [4, 5, 6],
    "why": "They count twice.", "fix": "Keep one copy of each.", "drop": True,
}  # fmt: skip


def upload(owner: str, rows: list[dict[str, str]], name: str = "support.jsonl") -> Dataset:
    """A dataset that has come through its check."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return come_through(datasets.receive(owner, name, io.BytesIO(text.encode())))


def come_through(dataset: Dataset) -> Dataset:
    """What the checks worker does when the bell rings, or the reconciler rings again."""
    outbox.run("check", dataset.owner, dataset.dataset_id, "")
    return access.get_dataset_for(dataset.owner, dataset.dataset_id)


def press(client: Client, dataset: Dataset, what: str, **options: Any) -> Any:
    return client.post(reverse("jobs:fix_dataset", args=[dataset.dataset_id]), {"what": what}, **options)


def page_of(client: Client, dataset: Dataset) -> str:
    return " ".join(client.get(reverse("jobs:dataset", args=[dataset.dataset_id])).content.decode().split())


def pressed(client: Client, dataset: Dataset, what: str) -> Dataset:
    id = press(client, dataset, what)["Location"].split("/")[-2]
    return access.get_dataset_for(dataset.owner, id)


def lines_of(dataset: Dataset) -> list[dict[str, str]]:
    with blobs.open_file(dataset.key) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def test_every_finding_that_names_rows_to_drop_has_its_words() -> None:
    assert set(versions.WITHOUT) == DROPPABLE - {
        "bad_row",
        "leak",
    }  # neither stands in the report of a ready dataset


def test_doubled_rows_go_and_the_page_says_which(alices: Client, alice: User) -> None:
    old = upload(alice.owner_id, [*ROWS, ROWS[3], EMPTY, ROWS[7]])
    before = lines_of(old)
    assert "Keep one copy, remove these 2 rows" in page_of(alices, old)
    new = pressed(alices, old, "duplicate")
    assert (new.name, new.status) == ("support (without duplicates).jsonl", "checking")
    assert "Writing the new version" in page_of(alices, new)
    new = come_through(new)
    assert new.status == "ready"
    assert lines_of(new) == [*ROWS, EMPTY]
    assert new.summary["examples"] == 61
    text = page_of(alices, new)
    for part in (
        "63 rows before, 61 after",
        "Removed: lines 61, 63 of the original file",
        "61</span> <del",  # the difference, row by row
        "Number 3? It is 9.</del>",
        f"/{old.dataset_id}/",
    ):
        assert part in text
    assert "Remove this row" in text  # the empty answer is still there
    again = come_through(pressed(alices, new, "empty_answer"))
    assert again.name == "support (without duplicates, without empty answers).jsonl"
    assert lines_of(again) == ROWS
    assert lines_of(old) == before
    assert access.get_dataset_for(alice.owner_id, old.dataset_id).sha256 == old.sha256


def test_what_is_too_long_for_another_base_goes_by_that_bases_report(alices: Client, alice: User) -> None:
    long = {"prompt": "Tell me all of it.\n", "completion": " and then" * 40}
    old = upload(alice.owner_id, [*ROWS, long])
    assert "too long" not in page_of(alices, old)
    reading = DatasetReport(
        old.dataset_id, "short", owner=alice.owner_id, base_snapshot={"id": "starter"}, status="ready"
    )
    found = report(blobs.local_path(old.key), Tokenizer.load(STARTER_FOLDER), EncodingOptions(24))
    stored = blobs.put_file(f"datasets/{alice.owner_id}/short.json", io.BytesIO(json.dumps(found).encode()))
    reading.summary, reading.report_key = {"sequence_length": 24}, stored.key
    reading.save()
    address = reverse("jobs:dataset", args=[old.dataset_id])
    text = alices.get(address, {"as": "short"}).content.decode()
    assert "Remove this row" in text
    assert '<input type="hidden" name="as" value="short">' in text
    answer = alices.post(
        reverse("jobs:fix_dataset", args=[old.dataset_id]), {"what": "truncated", "as": "short"}
    )
    new = come_through(access.get_dataset_for(alice.owner_id, answer["Location"].split("/")[-2]))
    assert new.name == "support (without rows that are too long for starter).jsonl"
    assert lines_of(new) == ROWS
    assert press(alices, old, "truncated").status_code == 400  # its own report names none


def test_a_tenth_is_set_aside_as_a_dataset_of_its_own(alices: Client, alice: User) -> None:
    old = upload(alice.owner_id, ROWS)
    assert "Split off 10% for validation" in page_of(alices, old)
    train = come_through(pressed(alices, old, "split"))
    held = come_through(access.get_dataset_for(alice.owner_id, train.origin["other"]))
    assert (train.name, held.name) == (
        "support (90% for training).jsonl",
        "support (10% for validation).jsonl",
    )
    assert train.status == held.status == "ready"
    prompts = [{row["prompt"] for row in lines_of(one)} for one in (train, held)]
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {row["prompt"] for row in ROWS}
    text = page_of(alices, held)
    assert f"60 rows before, {len(prompts[1])} after" in text
    form = f"?dataset={train.dataset_id}&amp;validation_dataset={held.dataset_id}"
    assert form in text
    assert form in page_of(alices, train)
    chosen = alices.get(reverse("jobs:new_job") + form.replace("&amp;", "&")).content.decode()
    assert f'<option value="{held.dataset_id}" selected' in chosen


def test_pressing_twice_makes_one_version(alices: Client, alice: User) -> None:
    old = make_dataset(alice.owner_id, report={"findings": [TWINS]})
    new = pressed(alices, old, "duplicate")
    assert pressed(alices, old, "duplicate").dataset_id == new.dataset_id
    assert len(access.list_datasets(alice.owner_id)) == 2
    assert pressed(alices, old, "split").dataset_id == pressed(alices, old, "split").dataset_id
    assert len(access.list_datasets(alice.owner_id)) == 4
    datasets.delete(alice.owner_id, new.dataset_id)
    assert pressed(alices, old, "duplicate").dataset_id != new.dataset_id  # gone: it may be made again


def test_a_crash_after_the_bytes_are_stored_costs_one_more_round(alices: Client, alice: User) -> None:
    old = upload(alice.owner_id, [*ROWS[:10], ROWS[3]])
    new = pressed(alices, old, "duplicate")
    half = versions.make(new)  # and then the worker died: its errand is still in the list
    assert half is not None
    assert (half.status, bool(half.key)) == ("checking", True)
    assert f"check#{new.dataset_id}" in {row.job_id for row in outbox.pending()}
    new = come_through(new)
    assert (new.status, lines_of(new), new.sha256) == ("ready", ROWS[:10], half.sha256)
    assert f"check#{new.dataset_id}" not in {row.job_id for row in outbox.pending()}


def test_a_version_whose_source_was_deleted_says_so(alices: Client, alice: User) -> None:
    old = make_dataset(alice.owner_id, report={"findings": [TWINS]})
    new = pressed(alices, old, "duplicate")
    datasets.delete(alice.owner_id, old.dataset_id)
    new = come_through(new)
    assert new.status == "rejected"
    assert "rows.jsonl was deleted before this version" in page_of(alices, new)


def test_a_version_that_was_deleted_meanwhile_leaves_no_bytes(alices: Client, alice: User) -> None:
    old = upload(alice.owner_id, [*ROWS[:10], ROWS[3]])
    new = pressed(alices, old, "duplicate")
    datasets.delete(alice.owner_id, new.dataset_id)
    assert versions.make(new) is None
    assert not blobs.list_keys(f"datasets/{alice.owner_id}/{new.dataset_id}/")


@pytest.mark.parametrize(
    "what", ["", "duplicate", "few", "bad_row", "leak", "../../x", "split", "\0", "x" * 9999]
)
def test_what_the_report_does_not_name_is_refused_with_a_message(
    alices: Client, alice: User, what: str
) -> None:
    report = {"examples": 12, "findings": [{**TWINS, "code": "few", "drop": False}]}
    old = make_dataset(alice.owner_id, report=report)
    answer = press(alices, old, what)
    assert answer.status_code == 400
    assert 'role="alert"' in answer.content.decode()
    assert len(access.list_datasets(alice.owner_id)) == 1


def test_a_file_still_being_checked_is_not_mended(alices: Client, alice: User) -> None:
    old = make_dataset(alice.owner_id, status="checking", report={"findings": [TWINS]})
    assert press(alices, old, "duplicate").status_code == 400
    assert "Keep one copy" not in page_of(alices, old)


def test_a_full_quota_is_told_and_nothing_is_begun(alices: Client, alice: User, settings: Any) -> None:
    old = make_dataset(alice.owner_id, report={"findings": [TWINS]})
    quotas.take(alice.owner_id, "datasets", old.dataset_id)
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 2}
    answer = press(alices, old, "split", follow=True)  # there is room for one of the two
    assert "You have reached the limit of 2 datasets" in answer.content.decode()
    assert quotas.held(alice.owner_id, "datasets") == {old.dataset_id}
    assert len(access.list_datasets(alice.owner_id)) == 1
    assert pressed(alices, old, "duplicate").status == "checking"


def test_bob_mends_nothing_of_alices(bobs: Client, alice: User) -> None:
    old = make_dataset(alice.owner_id, report={"findings": [TWINS]})
    assert press(bobs, old, "duplicate").status_code == 404
    assert len(access.list_datasets(alice.owner_id)) == 1


def test_a_file_that_cannot_be_read_at_all_rejects_the_version(alice: User) -> None:
    old = make_dataset(alice.owner_id, report={"findings": [TWINS]})
    stored = blobs.put_file(f"datasets/{alice.owner_id}/{old.dataset_id}/data", io.BytesIO(b"{oops\n"))
    tables.update(
        old, [Dataset.key.set(stored.key), Dataset.sha256.set(stored.sha256)], Dataset.owner.exists()
    )
    new = versions.begin(old, "duplicate")
    checks.check(new.owner, new.dataset_id)
    assert access.get_dataset_for(alice.owner_id, new.dataset_id).status == "rejected"
