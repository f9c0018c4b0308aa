"""A dataset's reports for other base models, each with its own tokenizer, chat template and context length.

The check of an upload uses those of the starter model. For other bases, the checks worker makes a report when a job needs it
(the job stays `validating` until then) or a user requests it. Bases of the same tokenizer family share a report.

checking ──► ready | refused (nothing to train on) | failed (no tokenizer, so the counts stay unknown)
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Mapping
from typing import Any

from jobs.datasets import checks, datasets
from jobs.datasets.signals import dataset_settled
from jobs.registry import base_models
from jobs.store import blobs, outbox, tables
from jobs.store.states import DatasetStatus, ReportStatus
from jobs.store.tables import Dataset, DatasetReport, Job
from training.data.summary import Summary
from training.plan import catalog
from training.plan.config import parse
from training.plan.events import Failure
from training.plan.warnings import every_answer_cut

LEAKS = "#leaks#"  # prefix used in the key instead of a base, for the rows that two datasets have in common
ROWS = "#rows#"  # the same, for pages of rows
PAGES_KEPT = 16  # of rows, for each dataset


def uses_default_tokenizer(snapshot: Mapping[str, Any]) -> bool:
    """Whether the report made at upload is valid for this base."""
    return base_models.tokenizer_family(snapshot) == catalog.STARTER


def get(dataset_id: str, snapshot: Mapping[str, Any]) -> DatasetReport | None:
    return tables.get(DatasetReport, dataset_id, base_models.tokenizer_family(snapshot))


def list_for(dataset_id: str) -> list[DatasetReport]:
    return [row for row in tables.rows(DatasetReport, dataset_id) if "#" not in row.base]


def request_report(dataset: Dataset, snapshot: Mapping[str, Any]) -> DatasetReport:
    """The report, or a pending one. Requests it again if it failed. Idempotent."""
    base = base_models.tokenizer_family(snapshot)
    current = tables.get(DatasetReport, dataset.dataset_id, base)
    if current is not None and current.status != ReportStatus.FAILED:
        if current.status == ReportStatus.CHECKING:
            outbox.put("report", dataset.owner, f"{dataset.dataset_id}@{base}")
        return current
    mine = secrets.token_hex(8)
    row = DatasetReport(
        dataset.dataset_id, base, owner=dataset.owner, base_snapshot=dict(snapshot), request_id=mine
    )
    outbox.put("report", dataset.owner, f"{dataset.dataset_id}@{base}")
    free = DatasetReport.dataset_id.does_not_exist() | (DatasetReport.status == ReportStatus.FAILED)
    put = tables.put_if(row, free, lambda current: current.request_id == mine)
    outbox.enqueue("report", dataset.owner, f"{dataset.dataset_id}@{base}")
    return put or tables.get(DatasetReport, dataset.dataset_id, base) or row


def request_row(dataset: Dataset, snapshot: Mapping[str, Any], line: int) -> DatasetReport:
    """The tokens of one row for this base. A request for another row replaces the first."""
    key = row_key(base_models.tokenizer_family(snapshot))
    current = tables.get(DatasetReport, dataset.dataset_id, key)
    if (
        current is not None
        and current.base_snapshot.get("line") == line
        and current.status != ReportStatus.FAILED
    ):
        return current
    row = DatasetReport(
        dataset.dataset_id,
        key,
        owner=dataset.owner,
        base_snapshot={**snapshot, "line": line},
        request_id=secrets.token_hex(8),
    )
    outbox.put("report", dataset.owner, f"{dataset.dataset_id}@{key}")
    row.save()
    outbox.enqueue("report", dataset.owner, f"{dataset.dataset_id}@{key}")
    return row


def request_page(dataset: Dataset, query: Mapping[str, Any]) -> DatasetReport:
    """A page of rows, as written. `query` has the arguments of `training.data.pages.read_page`. A request for another page
    may replace one of those kept."""
    digest = hashlib.sha256(json.dumps(query, sort_keys=True).encode()).digest()
    key = f"{ROWS}{digest[0] % PAGES_KEPT}"
    current = tables.get(DatasetReport, dataset.dataset_id, key)
    wanted = {"query": dict(query)}
    if (
        current is not None and current.base_snapshot == wanted
    ):  # also if it failed: the file would fail again
        return current
    row = DatasetReport(
        dataset.dataset_id,
        key,
        owner=dataset.owner,
        base_snapshot=wanted,
        request_id=secrets.token_hex(8),
    )
    outbox.put("report", dataset.owner, f"{dataset.dataset_id}@{key}")
    row.save()
    if current is not None and current.report_key:
        blobs.delete_file(current.report_key)
    outbox.enqueue("report", dataset.owner, f"{dataset.dataset_id}@{key}")
    return row


def request_leaks(dataset: Dataset, validation: Dataset) -> dict[str, Any] | None:
    """Validation rows that are also in the training dataset: {"count", "lines"}. Requests the comparison if needed; None
    until it is known."""
    key = f"{LEAKS}{validation.dataset_id}"
    current = tables.get(DatasetReport, dataset.dataset_id, key)
    snapshot = {"validation": validation.dataset_id, "report": validation.report_key}
    # Not requested yet, or the validation dataset has been checked with other columns since.
    if current is None or current.base_snapshot != snapshot:
        current = None
        outbox.put("report", dataset.owner, f"{dataset.dataset_id}@{key}")
        DatasetReport(dataset.dataset_id, key, owner=dataset.owner, base_snapshot=snapshot).save()
        outbox.enqueue("report", dataset.owner, f"{dataset.dataset_id}@{key}")
    return dict(current.summary) if current is not None and current.summary else None


def row_key(base: str) -> str:
    return f"{base}#row"


def summary_for(dataset: Dataset, snapshot: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the dataset's counts, whether they were made with this base's tokenizer)."""
    if uses_default_tokenizer(snapshot):
        return dict(dataset.summary or {}), True
    current = get(dataset.dataset_id, snapshot)
    if current is not None and current.status == ReportStatus.READY:
        return dict(current.summary or {}), True
    return dict(dataset.summary or {}), False


def cut_answers(dataset: Dataset, snapshot: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why nothing can be learned with the sequence length of these settings, as far as the reports say; empty if
    something can."""
    summary, exact = summary_for(dataset, snapshot)
    return every_answer_cut(parse(settings), Summary.from_dict(summary)) if exact else ""


def refusal_for(dataset: Dataset, snapshot: Mapping[str, Any]) -> str:
    """Why this base cannot be trained on this dataset, as far as the reports made so far say; empty if
    nothing speaks against it."""
    if uses_default_tokenizer(snapshot):
        return str((dataset.summary or {}).get("refusal") or "")
    current = get(dataset.dataset_id, snapshot)
    return current.error if current is not None and current.status == ReportStatus.REFUSED else ""


def for_job(job: Job, dataset: Dataset) -> DatasetReport | None:
    """The report that the job waits for, requested if needed; None if the report made at upload is valid. A failed report is
    not requested again: the training worker will report what is wrong with the base, or can fetch it in the meantime."""
    snapshot = job.base_snapshot or {"id": job.base}
    if uses_default_tokenizer(snapshot):
        return None
    current = get(dataset.dataset_id, snapshot)
    return (
        current
        if current is not None and current.status == ReportStatus.FAILED
        else request_report(dataset, snapshot)
    )


@outbox.handler("report")
def build(owner: str, id: str) -> bool:
    """The outbox handler. Returns whether the work is done. Raises errors of the stores; the work is then retried."""
    dataset_id, _, base = id.partition("@")
    row = tables.get(DatasetReport, dataset_id, base)
    dataset = tables.get(Dataset, owner, dataset_id)
    if row is None or row.status != ReportStatus.CHECKING:
        return True
    if dataset is None or dataset.deleted or dataset.status != DatasetStatus.READY:
        tables.remove(DatasetReport, dataset_id, base)  # a job that waits for the report requests it again
        return True
    if base.startswith(LEAKS):
        return _find_leaks(dataset, row)
    query, line = row.base_snapshot.get("query"), row.base_snapshot.get("line")
    is_part = query is not None or line is not None  # of the dataset, not a report on it
    status, error, report = _read_page(dataset, query) if query is not None else _made(dataset, row, line)
    actions = [DatasetReport.status.set(status), DatasetReport.error.set(error[:2000])]
    if report is not None:
        # Pages of rows are in ASCII, because they keep also what UTF-8 cannot express.
        text = json.dumps(report, ensure_ascii=query is not None).encode("utf-8", "replace")
        name = hashlib.sha256(base.encode()).hexdigest()[:16]
        key = f"datasets/{owner}/{dataset_id}/reports/{name}-{row.request_id}.json"
        actions += [
            DatasetReport.report_key.set(blobs.put_file(key, io.BytesIO(text)).key),
            DatasetReport.summary.set({} if is_part else datasets.trim_summary(checks.summary_of(report))),
        ]
    tables.update(
        row, actions, DatasetReport.request_id == row.request_id, lambda current: current.status == status
    )
    if not is_part:
        dataset_settled.send(Dataset, owner=owner, dataset_id=dataset_id)
    current = tables.get(DatasetReport, dataset_id, base)
    # It is `checking` again if it was requested once more in the meantime.
    return build(owner, id) if current is not None and current.status == ReportStatus.CHECKING else True


def _find_leaks(dataset: Dataset, row: DatasetReport) -> bool:
    validation = tables.get(Dataset, dataset.owner, str(row.base_snapshot["validation"]))
    current = None
    if validation is not None and not validation.deleted and validation.status == DatasetStatus.READY:
        current = checks.leaks(dataset, validation)
    actions = [DatasetReport.status.set(ReportStatus.READY if current else ReportStatus.FAILED)]
    if current:
        actions.append(DatasetReport.summary.set(current))
    tables.update(row, actions, DatasetReport.status == ReportStatus.CHECKING)
    return True


def _read_page(dataset: Dataset, query: Mapping[str, Any]) -> tuple[str, str, dict[str, Any] | None]:
    page = checks.read_page(dataset, query)
    if page is None:
        return ReportStatus.FAILED, "The rows could not be read within the time or memory limit.", None
    return ReportStatus.READY, "", page


def _made(dataset: Dataset, row: DatasetReport, line: int | None) -> tuple[str, str, dict[str, Any] | None]:
    try:
        folder = base_models.folder(str(row.base_snapshot["id"]), row.base_snapshot, only="tokenizer")
    except Failure as failure:
        return ReportStatus.FAILED, " ".join(part for part in (failure.message, failure.advice) if part), None
    report = checks.report_on(dataset, str(folder), line=line)
    if report is not None and line is not None:
        return ReportStatus.READY, "", report
    if report is None:
        return ReportStatus.FAILED, checks.OVER_LIMITS, None
    refusal = report.get("refusal") or (
        "" if report.get("ready") else report.get("error") or report["verdict"]
    )
    if refusal:
        return ReportStatus.REFUSED, str(refusal), report
    return ReportStatus.READY, "", report
