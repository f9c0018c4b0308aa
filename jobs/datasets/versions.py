"""New versions of a dataset: without the rows that a finding lists, with rows edited, added and excluded, merged with
another dataset, or split in two. The original is not changed.

The version's row is written first, with its `origin`. Its check makes the file in a child process with limits, and then
validates it like any upload. After a crash, the same check simply runs again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from django.conf import settings

from jobs.datasets import datasets, drafts, sandbox
from jobs.registry import base_models
from jobs.store import access, blobs, tables
from jobs.store.errors import Refused
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset, DatasetReport, Usage, new_id
from training.data.bad_row import BadRow
from training.data.formats import Format
from training.data.rewrite import KEPT, check_record, kind_of_rows, line_ranges
from training.plan import catalog
from training.plan.events import Failure

SPLIT, EDIT, MERGE = "split", "edit", "merge"
FRACTION = 0.1  # of the rows, set aside for validation by default
MIN_ROWS_TO_SPLIT = 50  # with fewer rows, the validation part could be empty
MAX_CHANGES_BYTES = 4 << 20  # a request to the API has no more either
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


@dataclass(frozen=True)
class Split:
    """Which rows are held out: a percentage, chosen by their prompts and the seed, or those on these lines."""

    percent: float = 100 * FRACTION
    seed: int = 0
    lines: str = ""

    def check(self, source: Dataset) -> None:
        """Raises Refused."""
        check_ready(source)
        if self.lines:
            try:
                line_ranges(self.lines)
            except ValueError as error:
                raise Refused(str(error)) from error
            return
        if not 0 < self.percent <= 90:
            raise Refused("Share: enter a percentage above 0, up to 90.")
        if rows_of(source) < MIN_ROWS_TO_SPLIT:
            raise Refused(
                f"A dataset needs at least {MIN_ROWS_TO_SPLIT} rows to be split by a share. Enter lines, or upload more rows."
            )

    @property
    def origin(self) -> dict[str, Any]:
        return {"percent": self.percent, "seed": self.seed, "by_lines": self.lines}


def is_ready(source: Dataset) -> bool:
    """Whether its rows can be shown and changed."""
    return source.status == DatasetStatus.READY and source.purpose == "fine-tune"


def check_ready(source: Dataset) -> None:
    """Raises Refused."""
    if not is_ready(source):
        raise Refused(
            "Only a dataset that passed its check can be changed. Wait for the check, or upload another file."
        )


def check(source: Dataset, what: str, findings: Sequence[dict[str, Any]]) -> None:
    """Raises Refused unless the rows of the finding with the code `what` can be removed from the dataset."""
    check_ready(source)
    if what not in WITHOUT or what not in {finding.get("code") for finding in findings}:
        raise Refused("The report has no finding with such rows. Use a button next to one of its findings.")


def rows_of(source: Dataset) -> int:
    summary = source.summary or {}
    return int(summary.get("rows") or summary.get("examples") or 0)


def keeps_format(source: Dataset) -> bool:
    """Whether a new version has the file format of the dataset. Otherwise it is saved as JSONL."""
    return Format.of(source.format or {}).container in KEPT


def begin(source: Dataset, what: str, report: DatasetReport | None = None) -> Dataset:
    """A version without the rows of a finding. `report` is the report for another base, whose tokenizer decides which
    rows to remove. Raises OverQuota.

    Like the three functions below it creates datasets whose checks are pending, and is idempotent unless the result was
    rejected or deleted."""
    base: dict[str, Any] = {}
    if report:
        length = (report.summary or {}).get("sequence_length")
        base = {"facts": report.base_snapshot, "sequence_length": length}
    return _begin(source, f"{what}@{report.base}" if report else what, {"what": what, **base})[0]


def begin_split(source: Dataset, split: Split) -> tuple[Dataset, Dataset]:
    """(the part for training, the part for validation). Raises Refused, OverQuota."""
    split.check(source)
    name = hashlib.sha256(json.dumps(split.origin).encode()).hexdigest()
    train, held_out = _begin(source, f"{SPLIT}@{name}", {"what": SPLIT, **split.origin}, list(PARTS))
    return train, held_out


def begin_merge(source: Dataset, other: Dataset, name: str = "") -> Dataset:
    """A dataset with the rows of both. Raises Refused, OverQuota."""
    check_merge(source, other)
    name = datasets.display_name(
        name or f"{PurePath(source.name).stem[:90]} + {PurePath(other.name).stem[:90]}"
    )
    name = name if name.endswith(".jsonl") else f"{name[:190]}.jsonl"
    origin = {"what": MERGE, "merged_with": other.dataset_id, "merged_name": other.name}
    key = hashlib.sha256(name.encode()).hexdigest()
    return _begin(source, f"{MERGE}@{other.dataset_id}@{key}", origin, name=name)[0]


def check_merge(source: Dataset, other: Dataset) -> None:
    """Raises Refused unless the rows of both are of the same kind."""
    for one in (source, other):
        check_ready(one)
    if source.dataset_id == other.dataset_id:
        raise Refused("Choose another dataset: this one would have every row twice.")
    kinds = [kind_of_rows(Format.of(one.format or {})) for one in (source, other)]
    if kinds[0] != kinds[1]:
        raise Refused(
            f"{source.name} has {kinds[0]}, and {other.name} has {kinds[1]}. Only datasets with the same kind of rows can "
            "be merged."
        )


def begin_edit(source: Dataset, changes: Mapping[str, Any]) -> Dataset:
    """A version with these changes: {"rows": {number: record or None}, "added": [records]}, as checked by `check_change`.
    Raises Refused, OverQuota."""
    check_ready(source)
    rows, added = changes["rows"], changes["added"]
    if not rows and not added:
        raise Refused("There are no changes to save. Edit, add or exclude rows first.")
    if total := rows_of(source):
        if unknown := next((number for number in rows if not 0 < int(number) <= total), None):
            raise Refused(f"There is no row {unknown}: the dataset has {total:,} rows.")
        if not added and len(rows) == total and not any(rows.values()):
            raise Refused("All rows are excluded, so nothing would be left. Keep at least one.")
    text = json.dumps(changes).encode()
    if len(text) > MAX_CHANGES_BYTES:
        raise Refused("These are more changes than one version can have (4 MB). Save some of them first.")
    digest = drafts.digest_of(dict(changes))
    origin = {"what": EDIT, "counts": drafts.counts_of(dict(changes)), "digest": digest}
    ids, known = _ids(source, f"{EDIT}@{digest}", 1)
    if not known:  # before the dataset: its check needs them
        blobs.put_file(_changes_key(source.owner, ids[0]), io.BytesIO(text))
    return _begin(source, f"{EDIT}@{digest}", origin)[0]


def table_columns(source: Dataset) -> list[str]:
    """The names of all columns of a table of text, from its report; empty for other files."""
    format = Format.of(source.format or {})
    if format.container != "csv" or not source.report_key:
        return []
    with blobs.open_file(source.report_key) as file:
        names = list((json.load(file).get("head") or {}).get("columns") or [])
    return names if format.header else [f"column {number}" for number in range(1, len(names) + 1)]


def check_change(source: Dataset, record: Any, line: int, columns: Sequence[str] = ()) -> None:
    """Raises Refused if the edited or added row could not be trained on, naming the line and the field. `columns`: those of
    `table_columns`."""
    try:
        check_record(line, record, Format.of(source.format or {}), columns)
    except BadRow as bad:
        raise Refused(bad.sentence) from bad


def _begin(
    source: Dataset, key: str, origin: dict[str, Any], parts: Sequence[str] = ("",), *, name: str = ""
) -> list[Dataset]:
    ids, known = _ids(source, key, len(parts))
    if not known:
        new = [_version(source, origin, *pair, ids, name) for pair in zip(ids, parts, strict=True)]
        datasets.create_pending(source.owner, new)
    return [access.get_dataset_for(source.owner, id) for id in ids]


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
    source: Dataset, origin: dict[str, Any], id: str, part: str, ids: list[str], name: str
) -> Dataset:
    name = name or name_of(source, describe({**origin, "part": part}, short=True))
    dataset = Dataset(source.owner, id, name=name, purpose=source.purpose, status=DatasetStatus.CHECKING)
    other = next((one for one in ids if one != id), "")
    dataset.origin = {
        "dataset_id": source.dataset_id,
        "name": source.name,
        "part": part,
        "other": other,
        **origin,
    }
    return dataset


def describe(origin: dict[str, Any], *, short: bool = False) -> str:
    """How a version differs from the original, for example `without rows that are too long for gpt2`. `short`: as a part of
    its name."""
    if origin["what"] == MERGE:
        return f"merged with {origin['merged_name']}"
    if origin["what"] == EDIT:
        return "edited" if short else count_changes(origin["counts"])
    if origin["what"] == SPLIT:
        return _describe_part(origin, short)
    words = WITHOUT[origin["what"]]
    return f"{words} for {origin['facts']['id']}" if origin.get("facts") else words


def count_changes(counts: Mapping[str, int]) -> str:
    """`1 row edited, 2 added`"""
    parts = [f"{count:,} {name}" for name, count in counts.items() if count]
    first, _, rest = (parts or ["0 edited"])[0].partition(" ")
    noun = "row" if first == "1" else "rows"
    return ", ".join([f"{first} {noun} {rest}", *parts[1:]])


def _describe_part(origin: dict[str, Any], short: bool) -> str:
    held_out = origin["part"] == "validation"
    if lines := origin.get("by_lines"):
        lines = lines if not short or len(lines) <= 40 else f"{lines[:39]}…"
        return f"lines {lines}" if held_out else f"without lines {lines}"
    if "percent" not in origin:  # of an earlier release
        return PARTS[origin["part"]]
    percent = origin["percent"]
    words = f"{percent:g}% for validation" if held_out else f"{100 - percent:g}% for training"
    return words if short or not origin["seed"] else f"{words}, seed {origin['seed']}"


def name_of(source: Dataset, words: str) -> str:
    """A version's name, for example `support (without duplicates).jsonl`. A version of a version names both changes."""
    path = PurePath(source.name)
    suffix = path.suffix[:10] if keeps_format(source) else ""
    stem, suffix = path.stem[:150] or "dataset", suffix or ".jsonl"
    if source.origin and stem.endswith(")"):
        stem = stem[:-1]
        # a file that is edited again and again does not say so again and again
        return datasets.display_name(
            f"{stem}){suffix}" if stem.endswith(words) else f"{stem}, {words}){suffix}"
        )
    return datasets.display_name(f"{stem} ({words}){suffix}")


def _changes_key(owner: str, dataset_id: str) -> str:
    return f"datasets/{owner}/{dataset_id}/changes.json"


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
    source = _source(dataset.owner, str(origin["dataset_id"]))
    with sandbox.temporary_folder("fix-") as folder:
        path = _fetch(source, folder)
        arguments = _arguments(source, dataset.dataset_id, origin, path, folder)
        result = sandbox.run(arguments, ("fixed", "refused"), file_bytes=max_bytes)
        if result is None:
            raise Refused("Creating this version exceeded the time or memory limit. Split the file first.")
        if "error" in result:
            raise Refused(str(result["error"]))
        origin |= _difference(origin, result)
        if not origin["kept"]:
            raise Refused(f"This version would have no rows: all rows of {origin['name']} would be removed.")
        with (folder / _file(origin)).open("rb") as file:
            made = datasets.store_content(dataset, file, origin, result.get("format"))
    if origin["what"] == EDIT:
        blobs.delete_file(_changes_key(dataset.owner, dataset.dataset_id))
        drafts.discard_saved(source.owner, source.dataset_id, str(origin["digest"]))
    return made


def _source(owner: str, dataset_id: str) -> Dataset:
    source = tables.get(Dataset, owner, dataset_id)
    if source is None or source.deleted:
        raise blobs.Missing
    return source


def _fetch(source: Dataset, folder: Path) -> Path:
    path = folder / ("data" + PurePath(source.name).suffix.lower()[:10])
    blobs.fetch(source.key, path, sha256=source.sha256)
    return path


def _arguments(
    source: Dataset, dataset_id: str, origin: dict[str, Any], path: Path, folder: Path
) -> list[str]:
    """The same settings as the check of the source, so that the rows match its report."""
    current = ["fix", str(path), "--to", str(folder / "new")]
    if source.format:
        current += ["--format", json.dumps(source.format)]
    if origin["what"] == EDIT:
        changes = folder / "changes.json"
        blobs.fetch(_changes_key(source.owner, dataset_id), changes)
        return [*current, "--changes", str(changes)]
    if origin["what"] == MERGE:
        other = _source(source.owner, str(origin["merged_with"]))
        (folder / "other").mkdir()
        current += ["--merge", str(_fetch(other, folder / "other"))]
        return [*current, "--merge-format", json.dumps(other.format)] if other.format else current
    if origin["what"] == SPLIT:
        current += ["--drop", "", "--validation", str(folder / "aside")]
        current += ["--fraction", str(origin.get("percent", 100 * FRACTION) / 100)]
        current += ["--seed", str(origin.get("seed", 0))]
        return [*current, "--lines", origin["by_lines"]] if origin.get("by_lines") else current
    current += ["--drop", str(origin["what"])]
    snapshot = origin.get("facts") or {"id": catalog.STARTER}
    try:
        current += ["--date", source.date]
        current += ["--tokenizer", str(base_models.folder(str(snapshot["id"]), snapshot, only="tokenizer"))]
    except Failure as failure:
        raise Refused(f"{failure.message} {failure.advice}".strip()) from failure
    length = origin.get("sequence_length") or (source.summary or {}).get("sequence_length")
    return [*current, "--sequence-length", str(int(length))] if length else current


def _file(origin: dict[str, Any]) -> str:
    return "aside" if origin["part"] == "validation" else "new"


def _difference(origin: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    lines = list(result["dropped"].get(origin["what"], []))[:LINES_KEPT]
    kept = result["validation"] if origin["part"] == "validation" else result["kept"]
    return {
        "rows": result["rows"],
        "kept": kept,
        "lines": lines,
        "removed": list(result.get("removed") or []),
        "changed": list(result.get("changed") or []),
    }
