"""Validates uploaded files in a child process with limits, because files are untrusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.datasets import datasets, sandbox, versions
from jobs.store import blobs, outbox, tables
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset
from training.plan import catalog

REPORT_ONLY = frozenset({"samples", "findings", "head"})  # only in the full report, not in the row

OVER_LIMITS = "The check exceeded its time or memory limit. Split the file, or look for extremely long rows."


@outbox.handler("check")
def run(owner: str, dataset_id: str) -> bool:
    """Returns True once the dataset is ready, rejected or deleted."""
    check(owner, dataset_id)
    dataset = tables.get(Dataset, owner, dataset_id)
    return dataset is None or dataset.deleted or not dataset.unchecked


def check(owner: str, dataset_id: str) -> None:
    """Sets the dataset to ready or rejected. Idempotent. Raises errors of the stores; the check is then retried."""
    dataset = tables.get(Dataset, owner, dataset_id)
    if dataset is None or dataset.deleted:
        return
    if dataset.status == DatasetStatus.RECEIVING:
        datasets.abandon_stale(owner, dataset_id)
        return
    if dataset.status != DatasetStatus.CHECKING:
        return
    if dataset.origin and not dataset.key:
        made = versions.make(dataset)
        if made is None:
            return
        dataset = made
    if dataset.purpose != "fine-tune":  # not for training, so nothing to check
        datasets.finish_check(owner, dataset_id, DatasetStatus.READY)
        return
    report = report_on(dataset, sandbox.tokenizer_of(catalog.STARTER))
    if report is None:
        datasets.finish_check(owner, dataset_id, DatasetStatus.REJECTED, error=OVER_LIMITS)
        return
    ready = bool(report.get("ready"))
    datasets.finish_check(
        owner,
        dataset_id,
        DatasetStatus.READY if ready else DatasetStatus.REJECTED,
        summary=summary_of(report),
        format=report.get("format"),
        report=report,
        keep=bool(report.get("choose")),
        sha256=str(report.pop("sha256", "")),
        error=""
        if ready
        else str(report.get("error") or report.get("verdict") or "The file contains no examples."),
    )


def leaks(dataset: Dataset, validation: Dataset) -> dict[str, Any] | None:
    """Rows of `validation` that are also in `dataset`: {"count", "lines"}. None if the check exceeded its limits."""
    with sandbox.temporary_folder("leaks-") as folder:
        paths = []
        for name, one in (("train", dataset), ("validation", validation)):
            paths.append(folder / name / ("data" + Path(one.name).suffix.lower()[:10]))
            blobs.fetch(one.key, paths[-1], sha256=one.sha256 or None)
        arguments = ["check", str(paths[0]), "--validation", str(paths[1])]
        for option, one in (("--format", dataset), ("--validation-format", validation)):
            if one.format:
                arguments += [option, json.dumps(one.format)]
        report = sandbox.run(arguments, "report")
    if report is None:
        return None
    leak: dict[str, Any] = next((f for f in report.get("findings", []) if f["code"] == "leak"), {})
    return {"count": int(leak.get("count") or 0), "lines": list(leak.get("lines") or [])}


def read_page(dataset: Dataset, query: Mapping[str, Any]) -> dict[str, Any] | None:
    """A page of rows as written: see `training.data.pages.read_page`. None if it exceeded the limits."""
    with sandbox.temporary_folder("rows-") as folder:
        path = folder / ("data" + Path(dataset.name).suffix.lower()[:10])
        blobs.fetch(dataset.key, path, sha256=dataset.sha256 or None)
        arguments = ["rows", str(path)]
        if dataset.format:
            arguments += ["--format", json.dumps(dataset.format)]
        for name, value in query.items():
            arguments.append(f"--{name}={value}")  # with a sign, so that a search may begin with a dash
        return sandbox.run(arguments, "rows")


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in REPORT_ONLY}


def report_on(dataset: Dataset, tokenizer: str, line: int | None = None) -> dict[str, Any] | None:
    """The report, made with the tokenizer in this folder, or the tokens of the row at `line`. None if the check exceeded
    its limits."""
    with sandbox.temporary_folder("check-") as folder:
        # Of the name that the user chose, only the suffix is kept, because it indicates the file format.
        path = folder / ("data" + Path(dataset.name).suffix.lower()[:10])
        stored = blobs.fetch(dataset.key, path, sha256=dataset.sha256 or None)
        arguments = ["check", str(path), "--date", dataset.date]
        arguments += ["--limit-bytes", str(int(settings.JOBS["max_upload_bytes"]))]
        if tokenizer:
            arguments += ["--tokenizer", tokenizer]
        if dataset.format:
            arguments += ["--format", json.dumps(dataset.format)]
        if line is not None:
            return sandbox.run([*arguments, "--row", str(line)], "row")
        report = sandbox.run(arguments, "report")
        return report if report is None or dataset.sha256 else report | {"sha256": stored.sha256}
