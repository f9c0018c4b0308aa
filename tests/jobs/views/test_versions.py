"""Fixing a dataset from its report: each button makes a new version and leaves the original unchanged."""

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
from tests.jobs.views.makers import dataset_page, make_dataset, run_checks, upload_dataset
from training.plan.catalog import STARTER_FOLDER
from training.report.fix import DROPPABLE
from training.report.report import report
from training.text.encode import EncodingOptions
from training.text.tokenizer import Tokenizer

ROWS = [{"prompt": f"Number {i}?\n", "completion": f" It is {i * i}."} for i in range(60)]
EMPTY = {"prompt": "And?\n", "completion": ""}
DUPLICATES = {
    "code": "duplicate", "severity": "warning", "title": "Duplicate rows", "count": 3, "lines": [4, 5, 6],
    "why": "They count twice.", "fix": "Keep one copy of each.", "drop": True,
}  # fmt: skip


def upload_rows(owner: str, rows: list[dict[str, str]], name: str = "support.jsonl") -> Dataset:
    """A dataset with these rows after its checks."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return upload_dataset(owner, text.encode(), name)


def request_fix(client: Client, dataset: Dataset, code: str, **options: Any) -> Any:
    return client.post(reverse("jobs:fix_dataset", args=[dataset.dataset_id]), {"what": code}, **options)


def fix_dataset(client: Client, dataset: Dataset, code: str) -> Dataset:
    id = request_fix(client, dataset, code)["Location"].split("/")[-2]
    return access.get_dataset_for(dataset.owner, id)


def rows_of(dataset: Dataset) -> list[dict[str, str]]:
    with blobs.open_file(dataset.key) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def test_every_finding_with_rows_to_drop_has_a_version_name() -> None:
    not_in_ready_datasets = {"bad_row", "leak"}
    assert set(versions.WITHOUT) == DROPPABLE - not_in_ready_datasets


def test_duplicate_rows_are_removed_and_listed(alices: Client, alice: User) -> None:
    original = upload_rows(alice.owner_id, [*ROWS, ROWS[3], EMPTY, ROWS[7]])
    before = rows_of(original)
    assert "Keep one copy, remove these 2 rows" in dataset_page(alices, original)
    version = fix_dataset(alices, original, "duplicate")
    assert (version.name, version.status) == ("support (without duplicates).jsonl", "checking")
    assert "Writing the new version" in dataset_page(alices, version)
    version = run_checks(version)
    assert version.status == "ready"
    assert rows_of(version) == [*ROWS, EMPTY]
    assert version.summary["examples"] == 61
    text = dataset_page(alices, version)
    for part in (
        "63 rows before, 61 after",
        "Removed: lines 61, 63 of the original file",
        "61</span> <del",  # the row-by-row diff
        "Number 3? It is 9.</del>",
        f"/{original.dataset_id}/",
    ):
        assert part in text
    assert "Remove this row" in text  # the empty answer is still there
    second_version = run_checks(fix_dataset(alices, version, "empty_answer"))
    assert second_version.name == "support (without duplicates, without empty answers).jsonl"
    assert rows_of(second_version) == ROWS
    assert rows_of(original) == before
    assert access.get_dataset_for(alice.owner_id, original.dataset_id).sha256 == original.sha256


def test_rows_too_long_for_another_base_are_removed_by_its_report(alices: Client, alice: User) -> None:
    long_row = {"prompt": "Tell me all of it.\n", "completion": " and then" * 40}
    original = upload_rows(alice.owner_id, [*ROWS, long_row])
    assert "too long" not in dataset_page(alices, original)
    dataset_report = DatasetReport(
        original.dataset_id, "short", owner=alice.owner_id, base_snapshot={"id": "starter"}, status="ready"
    )
    content = report(blobs.local_path(original.key), Tokenizer.load(STARTER_FOLDER), EncodingOptions(24))
    stored = blobs.put_file(f"datasets/{alice.owner_id}/short.json", io.BytesIO(json.dumps(content).encode()))
    dataset_report.summary, dataset_report.report_key = {"sequence_length": 24}, stored.key
    dataset_report.save()
    url = reverse("jobs:dataset", args=[original.dataset_id])
    text = alices.get(url, {"as": "short"}).content.decode()
    assert "Remove this row" in text
    assert '<input type="hidden" name="as" value="short">' in text
    response = alices.post(
        reverse("jobs:fix_dataset", args=[original.dataset_id]), {"what": "truncated", "as": "short"}
    )
    version = run_checks(access.get_dataset_for(alice.owner_id, response["Location"].split("/")[-2]))
    assert version.name == "support (without rows that are too long for starter).jsonl"
    assert rows_of(version) == ROWS
    assert request_fix(alices, original, "truncated").status_code == 400  # its own report lists no such rows


def test_a_tenth_is_split_off_as_a_separate_dataset(alices: Client, alice: User) -> None:
    original = upload_rows(alice.owner_id, ROWS)
    assert "Split off rows for validation" in dataset_page(alices, original)
    train = run_checks(fix_dataset(alices, original, "split"))
    validation = run_checks(access.get_dataset_for(alice.owner_id, train.origin["other"]))
    assert (train.name, validation.name) == (
        "support (90% for training).jsonl",
        "support (10% for validation).jsonl",
    )
    assert train.status == validation.status == "ready"
    prompts = [{row["prompt"] for row in rows_of(dataset)} for dataset in (train, validation)]
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {row["prompt"] for row in ROWS}
    text = dataset_page(alices, validation)
    assert f"60 rows before, {len(prompts[1])} after" in text
    query = f"?dataset={train.dataset_id}&amp;validation_dataset={validation.dataset_id}"
    assert query in text
    assert query in dataset_page(alices, train)
    job_form = alices.get(reverse("jobs:new_job") + query.replace("&amp;", "&")).content.decode()
    assert f'<option value="{validation.dataset_id}" selected' in job_form


def test_clicking_twice_makes_one_version(alices: Client, alice: User) -> None:
    original = make_dataset(alice.owner_id, report={"findings": [DUPLICATES]})
    version = fix_dataset(alices, original, "duplicate")
    assert fix_dataset(alices, original, "duplicate").dataset_id == version.dataset_id
    assert len(access.list_datasets(alice.owner_id)) == 2
    first, second = (fix_dataset(alices, original, "split") for _ in range(2))
    assert first.dataset_id == second.dataset_id
    assert len(access.list_datasets(alice.owner_id)) == 4
    datasets.delete(alice.owner_id, version.dataset_id)
    # After its deletion it can be made again.
    assert fix_dataset(alices, original, "duplicate").dataset_id != version.dataset_id


def test_a_crash_after_storing_the_bytes_is_recovered(alices: Client, alice: User) -> None:
    original = upload_rows(alice.owner_id, [*ROWS[:10], ROWS[3]])
    version = fix_dataset(alices, original, "duplicate")
    interrupted = versions.make(version)  # then the worker died: the task is still in the outbox
    assert interrupted is not None
    assert (interrupted.status, bool(interrupted.key)) == ("checking", True)
    assert f"check#{version.dataset_id}" in {row.job_id for row in outbox.pending()}
    version = run_checks(version)
    assert (version.status, rows_of(version), version.sha256) == ("ready", ROWS[:10], interrupted.sha256)
    assert f"check#{version.dataset_id}" not in {row.job_id for row in outbox.pending()}


def test_a_version_whose_source_was_deleted_is_rejected(alices: Client, alice: User) -> None:
    original = make_dataset(alice.owner_id, report={"findings": [DUPLICATES]})
    version = fix_dataset(alices, original, "duplicate")
    datasets.delete(alice.owner_id, original.dataset_id)
    version = run_checks(version)
    assert version.status == "rejected"
    assert "rows.jsonl was deleted before this version" in dataset_page(alices, version)


def test_a_version_deleted_meanwhile_leaves_no_bytes(alices: Client, alice: User) -> None:
    original = upload_rows(alice.owner_id, [*ROWS[:10], ROWS[3]])
    version = fix_dataset(alices, original, "duplicate")
    datasets.delete(alice.owner_id, version.dataset_id)
    assert versions.make(version) is None
    assert not blobs.list_keys(f"datasets/{alice.owner_id}/{version.dataset_id}/")


@pytest.mark.parametrize(
    "code", ["", "duplicate", "few", "bad_row", "leak", "../../x", "split", "\0", "x" * 9999]
)
def test_a_fix_not_in_the_report_is_rejected_with_a_message(alices: Client, alice: User, code: str) -> None:
    report = {"examples": 12, "findings": [{**DUPLICATES, "code": "few", "drop": False}]}
    original = make_dataset(alice.owner_id, report=report)
    response = request_fix(alices, original, code)
    assert response.status_code == 400
    assert 'role="alert"' in response.content.decode()
    assert len(access.list_datasets(alice.owner_id)) == 1


def test_a_dataset_still_being_checked_cannot_be_fixed(alices: Client, alice: User) -> None:
    original = make_dataset(alice.owner_id, status="checking", report={"findings": [DUPLICATES]})
    assert request_fix(alices, original, "duplicate").status_code == 400
    assert "Keep one copy" not in dataset_page(alices, original)


def test_a_full_quota_is_reported_and_nothing_starts(alices: Client, alice: User, settings: Any) -> None:
    original = make_dataset(alice.owner_id, report={"findings": [DUPLICATES]})
    quotas.take(alice.owner_id, "datasets", original.dataset_id)
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 2}
    response = request_fix(alices, original, "split", follow=True)  # the quota has room for one of the two
    assert "You have reached the limit of 2 datasets" in response.content.decode()
    assert quotas.held(alice.owner_id, "datasets") == {original.dataset_id}
    assert len(access.list_datasets(alice.owner_id)) == 1
    assert fix_dataset(alices, original, "duplicate").status == "checking"


def test_bob_cannot_fix_alices_dataset(bobs: Client, alice: User) -> None:
    original = make_dataset(alice.owner_id, report={"findings": [DUPLICATES]})
    assert request_fix(bobs, original, "duplicate").status_code == 404
    assert len(access.list_datasets(alice.owner_id)) == 1


def test_an_unreadable_file_rejects_the_version(alice: User) -> None:
    original = make_dataset(alice.owner_id, report={"findings": [DUPLICATES]})
    stored = blobs.put_file(f"datasets/{alice.owner_id}/{original.dataset_id}/data", io.BytesIO(b"{oops\n"))
    tables.update(
        original, [Dataset.key.set(stored.key), Dataset.sha256.set(stored.sha256)], Dataset.owner.exists()
    )
    version = versions.begin(original, "duplicate")
    checks.check(version.owner, version.dataset_id)
    assert access.get_dataset_for(alice.owner_id, version.dataset_id).status == "rejected"
