"""New versions of a dataset: without the rows that a finding lists, or split in two. The original is not changed.

The version's row is written first, with its `origin`. Its check makes the file in a child process with limits, and then
validates it like any upload. After a crash, the same check simply runs again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from django.conf import settings

from jobs.datasets import datasets, sandbox
from jobs.registry import base_models
from jobs.store import access, blobs, tables
from jobs.store.errors import Refused
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset, DatasetReport, Usage, new_id
from training.plan import catalog
from training.plan.events import Failure

SPLIT = "split"
FRACTION = 0.1  # of the rows, set aside for validation
MIN_ROWS_TO_SPLIT = 50  # with fewer rows, the validation part could be empty
LINES_KEPT = 1000  # the number of removed rows whose lines are kept in the dataset's row
# Part of each version's name. `bad_row` is missing because a file with unreadable rows is not kept.
WITHOUT = {
    "left_out": "without rows that cannot be expressed",
    "written_empty": "without cells that say nan or None",
    "nothing_to_train": "without rows that have nothing to learn",
    "answer_cut": "without rows whose answer is cut off",
    "truncated": "without rows that are too long",
    "special_tokens": "without control tokens",
    "empty_answer": "without empty answers",
    "duplicate": "without duplicates",
    "near_duplicate": "without near duplicates",
    "damage": "without damaged rows",
    "secret": "without secrets",
    "personal": "without personal data",
}
PARTS = {"train": "90% for training", "validation": "10% for validation"}


def check(source: Dataset, what: str, findings: Sequence[dict[str, Any]]) -> None:
    """Raises Refused unless `what` (a finding's code, or SPLIT) can be applied to the dataset."""
    if source.status != DatasetStatus.READY:
        raise Refused(
            "Only a dataset that passed its check can be changed. Wait for the check, or upload another file."
        )
    if what == SPLIT:
        if not can_split(source):
            raise Refused(f"A dataset needs at least {MIN_ROWS_TO_SPLIT} rows to be split. Upload more rows.")
    elif what not in WITHOUT or what not in {finding.get("code") for finding in findings}:
        raise Refused("The report has no finding with such rows. Use a button next to one of its findings.")


def can_split(source: Dataset) -> bool:
    summary = source.summary or {}
    return int(summary.get("rows") or summary.get("examples") or 0) >= MIN_ROWS_TO_SPLIT


def begin(source: Dataset, what: str, report: DatasetReport | None = None) -> Dataset:
    """Creates the new dataset (for a split, returns the one to train on). Its check is pending. `report` is the report for
    another base, whose tokenizer decides which rows to remove. Idempotent, unless the result was rejected or deleted.
    Raises OverQuota."""
    parts = list(PARTS) if what == SPLIT else [""]
    ids, known = _ids(source, f"{what}@{report.base}" if report else what, len(parts))
    if not known:
        new = [_version(source, what, report, *pair, ids) for pair in zip(ids, parts, strict=True)]
        datasets.create_pending(source.owner, new)
    return access.get_dataset_for(source.owner, ids[0])


def _ids(source: Dataset, name: str, many: int) -> tuple[list[str], bool]:
    """The IDs of these versions, which are the same for every request, and whether all of them exist."""
    mine = [new_id("file") for _ in range(many)]
    row = Usage(source.owner, f"version#{source.dataset_id}#{name}", data=mine)
    while True:
        current = tables.put_new(row, lambda current: current.data == mine) or tables.get(
            Usage, *tables.keys_of(row)
        )
        if current is None:
            continue
        there = [tables.get(Dataset, source.owner, id) for id in current.data]
        if not any(
            one is not None and (one.deleted or one.status == DatasetStatus.REJECTED) for one in there
        ):
            return list(current.data), all(there)
        fresh = [Usage.data.set(mine), Usage.version.add(1)]
        if tables.update(row, fresh, Usage.version == current.version, lambda current: current.data == mine):
            return mine, False


def _version(
    source: Dataset, what: str, report: DatasetReport | None, id: str, part: str, ids: list[str]
) -> Dataset:
    base: dict[str, Any] = {}
    if report:
        length = (report.summary or {}).get("sequence_length")
        base = {"facts": report.base_snapshot, "sequence_length": length}
    name = name_of(source, describe({"what": what, "part": part, **base}))
    dataset = Dataset(source.owner, id, name=name, purpose=source.purpose, status=DatasetStatus.CHECKING)
    other = next((one for one in ids if one != id), "")
    dataset.origin = {
        "dataset_id": source.dataset_id,
        "name": source.name,
        "what": what,
        "part": part,
        "other": other,
        **base,
    }
    return dataset


def describe(origin: dict[str, Any]) -> str:
    """How a version differs from the original, for example `without rows that are too long for gpt2`."""
    words = PARTS[origin["part"]] if origin["part"] else WITHOUT[origin["what"]]
    return f"{words} for {origin['facts']['id']}" if origin.get("facts") else words


def name_of(source: Dataset, words: str) -> str:
    """A version's name, for example `support (without duplicates).jsonl`. A version of a version names both changes."""
    stem = PurePath(source.name).stem[:150] or "dataset"
    if source.origin and stem.endswith(")"):
        return datasets.display_name(f"{stem[:-1]}, {words}).jsonl")
    return datasets.display_name(f"{stem} ({words}).jsonl")


# ---- in the checks worker ------------------------------------------------------------------------------------------


def make(dataset: Dataset) -> Dataset | None:
    """Makes and stores the file of a version. Returns None if it was rejected, with the reason recorded, or deleted."""
    max_bytes = int(settings.JOBS["max_upload_bytes"])
    try:
        return _made(dataset, max_bytes)
    except Refused as error:
        message = str(error)
    except blobs.Missing:
        message = f"{dataset.origin['name']} was deleted before this version of it was made."
    except blobs.TooLarge:
        message = f"This version would be larger than {max_bytes:,} bytes. Split the file first."
    datasets.finish_check(dataset.owner, dataset.dataset_id, DatasetStatus.REJECTED, error=message)
    return None


def _made(dataset: Dataset, max_bytes: int) -> Dataset | None:
    origin = dict(dataset.origin)
    source = tables.get(Dataset, dataset.owner, str(origin["dataset_id"]))
    if source is None or source.deleted:
        raise blobs.Missing
    with sandbox.temporary_folder("fix-") as folder:
        path = folder / ("data" + PurePath(source.name).suffix.lower()[:10])
        blobs.fetch(source.key, path, sha256=source.sha256)
        result = sandbox.run(_arguments(source, origin, path, folder), "fixed", file_bytes=max_bytes)
        if result is None:
            raise Refused("Creating this version exceeded the time or memory limit. Split the file first.")
        origin |= _difference(origin, result)
        if not origin["kept"]:
            raise Refused(f"This version would have no rows: all rows of {origin['name']} would be removed.")
        with (folder / _file(origin)).open("rb") as file:
            return datasets.store_content(dataset, file, origin)


def _arguments(source: Dataset, origin: dict[str, Any], path: Path, folder: Path) -> list[str]:
    """The same settings as the check of the source, so that the rows match its report."""
    splits = origin["what"] == SPLIT
    current = [
        "fix",
        str(path),
        "--to",
        str(folder / "new.jsonl"),
        "--drop",
        "" if splits else str(origin["what"]),
    ]
    if source.format:
        current += ["--format", json.dumps(source.format)]
    if splits:
        return [*current, "--validation", str(folder / "aside.jsonl"), "--fraction", str(FRACTION)]
    snapshot = origin.get("facts") or {"id": catalog.STARTER}
    try:
        current += ["--date", source.date]
        current += ["--tokenizer", str(base_models.folder(str(snapshot["id"]), snapshot, only="tokenizer"))]
    except Failure as failure:
        raise Refused(f"{failure.message} {failure.advice}".strip()) from failure
    length = origin.get("sequence_length") or (source.summary or {}).get("sequence_length")
    return [*current, "--sequence-length", str(int(length))] if length else current


def _file(origin: dict[str, Any]) -> str:
    return "aside.jsonl" if origin["part"] == "validation" else "new.jsonl"


def _difference(origin: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    lines = list(result["dropped"].get(origin["what"], []))[:LINES_KEPT]
    kept = result["validation"] if origin["part"] == "validation" else result["kept"]
    return {
        "rows": result["rows"],
        "kept": kept,
        "lines": lines,
        "removed": list(result.get("removed") or []),
    }
