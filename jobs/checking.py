"""Checking an uploaded file: a child process with limits reads it, since files come from strangers."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs import datasets, storage, tables, trainer_process
from jobs.redact import redact
from jobs.tables import Dataset
from jobs.trainer_process import Limits
from training import catalog

log = logging.getLogger(__name__)
MAX_REPORT_BYTES = 8 << 20
FULL = frozenset(
    {"samples", "findings"}
)  # of the report, what the row doesn't need; all of it is in the object


def check(owner: str, dataset_id: str) -> None:
    """Says ready or rejected. Safe to repeat; raises what the stores raise, and is then rung for again."""
    dataset = tables.get(Dataset, owner, dataset_id)
    if dataset is None or dataset.gone:
        return
    if dataset.status == "receiving":
        datasets.give_up_broken(owner, dataset_id)
        return
    if dataset.status != "checking":
        return
    if dataset.purpose != "fine-tune":  # nobody will train on it, so nothing is asked of it
        datasets.finish_check(owner, dataset_id, "ready")
        return
    report = report_on(dataset)
    if report is None:
        message = "The file could not be checked in the time and memory allowed. Split it, or look for endless rows."
        datasets.finish_check(owner, dataset_id, "rejected", error=message)
        return
    ready = bool(report.get("ready"))
    datasets.finish_check(
        owner,
        dataset_id,
        "ready" if ready else "rejected",
        summary={name: value for name, value in report.items() if name not in FULL},
        format=report.get("format"),
        report=report,
        error=""
        if ready
        else str(report.get("error") or report.get("verdict") or "The file holds no example."),
    )


def report_on(dataset: Dataset, base: str = catalog.STARTER) -> dict[str, Any] | None:
    """The report with the base model's tokenizer; None when the limits were not enough."""
    Path(settings.WORK_DIR).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="check-", dir=settings.WORK_DIR))
    try:
        # The name is ours; its ending tells the kind of file.
        path = folder / ("data" + Path(dataset.name).suffix.lower()[:10])
        storage.fetch(dataset.key, path, sha256=dataset.sha256)
        arguments = ["check", str(path), "--limit-bytes", str(int(settings.JOBS["max_upload_bytes"]))]
        tokenizer = tokenizer_of(base)
        if tokenizer:
            arguments += ["--tokenizer", tokenizer]
        if dataset.format:
            arguments += ["--format", json.dumps(dataset.format)]
        return _run(arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tokenizer_of(base: str) -> str:
    """Where the tokenizer of a base model lies, if that is on this machine."""
    found = catalog.find(base)
    return found.folder if found else ""


def _run(arguments: list[str]) -> dict[str, Any] | None:
    seconds = settings.JOBS["check_timeout_s"]
    limits = Limits(
        memory_bytes=int(settings.JOBS["check_memory_bytes"]),
        cpu_s=int(seconds),
        file_bytes=1 << 20,
        open_files=256,
    )
    child = trainer_process.start(*arguments, limits=limits)
    child.out.cap = MAX_REPORT_BYTES
    report: dict[str, Any] | None = None
    try:
        for is_error, line in trainer_process.words(child, seconds):
            if is_error:
                log.warning("check: %s", redact(line))
                continue
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if said.get("t") == "report":
                    report = said
    finally:
        child.kill()
    return report
