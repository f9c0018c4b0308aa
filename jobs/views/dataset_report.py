"""How a dataset and its report are shown: status, findings, samples, columns, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from django.urls import reverse
from django.utils.http import urlencode
from django.utils.text import Truncator

from jobs.datasets import drafts, reports, versions
from jobs.formatting import count, size
from jobs.forms import ColumnsForm
from jobs.registry import base_models
from jobs.store import blobs, tables
from jobs.store.states import DatasetStatus, ReportStatus
from jobs.store.tables import Dataset, DatasetReport
from training.data.formats import BadRow, Row, preview
from training.data.row_schemas import preview_of_message
from training.plan import catalog

STATUS_LABELS: dict[str, tuple[str, str]] = {  # status: (label, CSS class of the dot)
    DatasetStatus.RECEIVING: ("Receiving", "bg-warning"),
    DatasetStatus.CHECKING: ("Checking", "bg-warning"),
    DatasetStatus.READY: ("Ready", "bg-success"),
    DatasetStatus.REJECTED: ("Rejected", "bg-error"),
}
KIND_LABELS = {
    "chat": ("conversation", "conversations"),
    "completion": ("prompt and answer pair", "prompt and answer pairs"),
    "text": ("text", "texts"),
    "preference": ("preference pair", "preference pairs"),
}


def status_context(dataset: Dataset) -> dict[str, Any]:
    label, tone = STATUS_LABELS.get(dataset.status, (dataset.status, "bg-base-300"))
    summary = dataset.summary if isinstance(dataset.summary, dict) else {}
    if dataset.status == DatasetStatus.REJECTED and summary.get("choose"):
        label, tone = "Needs columns", "bg-warning"
    one, many = KIND_LABELS.get(str(summary.get("kind")), ("example", "examples"))
    return {
        "label": label,
        "tone": tone,
        "summary": summary,
        "kind": one if summary.get("examples") == 1 else many,
        "checking": dataset.unchecked,
    }


def report_context(dataset: Dataset, base: str = "", line: str = "") -> dict[str, Any]:
    """The report as the page shows it, without unknown values. `base` names the model whose tokenizer is used, and `line` the
    row whose tokens were requested."""
    other = tables.get(DatasetReport, dataset.dataset_id, base) if base else None
    if other is None:
        stored = dataset.summary if isinstance(dataset.summary, dict) else {}
        report = stored | _full_report(dataset)
    else:
        report = load_report(other.report_key) if other.report_key else {}
    choice = columns_context(dataset) if other is None else None
    row = _row(dataset, base if other else catalog.STARTER, line)
    query = {name: value for name, value in (("as", base if other else ""), ("line", line)) if value}
    histogram = report.get("histogram") or []
    findings = [] if choice and choice["needed"] else report.get("findings", [])
    draft = drafts.get(dataset) if dataset.status == DatasetStatus.READY else None
    is_counting = other is not None and other.status == ReportStatus.CHECKING
    return {
        "dataset": dataset,
        **status_context(dataset),
        "summary": report,
        "verdict": report.get("verdict", ""),
        "findings": [_finding(finding, dataset) for finding in findings],
        "samples": [display_sample(sample) for sample in report.get("samples", [])],
        "histogram": _histogram(histogram),
        "histogram_label": ", ".join(f"{n:,} up to {16 << i:,} tokens" for i, n in enumerate(histogram)),
        "histogram_width": 28 * max(7, len(histogram)),
        "row": row,
        "other": other,
        "polls": is_counting or bool(row and row["checking"]),
        "query": f"?{urlencode(query)}" if query else "",
        "columns_in_use": _columns_in_use(dataset),
        "choice": choice,
        "tokenizers": lambda: _tokenizers(dataset, base),
        "can_change": dataset.status == DatasetStatus.READY and dataset.purpose == "fine-tune",
        "draft": draft,
        "draft_words": versions.count_changes(draft.counts) if draft else "",
        "saved_as_jsonl": not versions.keeps_format(dataset),
        "origin": _origin(dataset),
        "file_rows": _file_rows(dataset, report),
        "new_job": f"{reverse('jobs:new_job')}?{urlencode(_job_query(dataset))}",
    }


def load_report(key: str) -> dict[str, Any]:
    """A dataset's whole report, from object storage."""
    try:
        with blobs.open_file(key) as file:
            report = json.load(file)
    except blobs.Missing:
        return {}
    return report if isinstance(report, dict) else {}


def display_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Makes line breaks visible, because they are tokens too."""
    tokens = [
        {**token, "text": str(token.get("text", "")).replace("\n", "⏎\n")}
        for token in sample.get("tokens", [])
    ]
    return {**sample, "tokens": tokens}


def _full_report(dataset: Dataset) -> dict[str, Any]:
    return load_report(dataset.report_key) if dataset.report_key else {}


def _columns_in_use(dataset: Dataset) -> str:
    """The columns in use and their roles."""
    columns = (dataset.format or {}).get("columns")
    if not isinstance(columns, dict):
        return ""
    return ", ".join(k if k == v else f"{v} as {k}" for k, v in columns.items())


def _file_rows(dataset: Dataset, summary: dict[str, Any]) -> list[tuple[str, str]]:
    file_format = dataset.format if isinstance(dataset.format, dict) else {}
    name = file_format.get("name") or file_format.get("format") or file_format.get("container")
    rows = [
        ("Format", str(name or "")),
        ("Encoding", str(file_format.get("encoding") or "")),
        ("Columns", _columns_in_use(dataset)),
        ("Truncated rows", count(summary["truncated"]) if summary.get("truncated") else ""),
        ("Size", size(dataset.bytes)),
        ("SHA-256", dataset.sha256),
    ]
    return [row for row in rows if row[1]]


TONES = {"error": "bg-error/10", "warning": "bg-warning/10"}


def _finding(finding: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    tone = TONES.get(str(finding.get("severity") or finding.get("level")), "bg-base-200")
    fix_label = _fix_label(finding) if dataset.status == DatasetStatus.READY else ""
    return {**finding, "tone": tone, "fix_label": fix_label}


def _row(dataset: Dataset, base: str, line: str) -> dict[str, Any] | None:
    """The tokens of this row, if it is the one that was requested last."""
    row = tables.get(DatasetReport, dataset.dataset_id, reports.row_key(base)) if line else None
    if row is None or str(row.base_snapshot.get("line")) != line:
        return None
    result = load_report(row.report_key) if row.report_key else {}
    return {
        "line": row.base_snapshot["line"],
        "checking": row.status == ReportStatus.CHECKING,
        "error": result.get("error") or row.error,
        "sample": display_sample(result) if result.get("tokens") else None,
        "cut": result.get("cut") or 0,
    }


def _tokenizers(dataset: Dataset, chosen: str) -> dict[str, Any]:
    """The base models whose tokenizers have counted this dataset, and those that can."""
    return {
        "made": [
            {
                "base": row.base,
                "name": row.base.partition("@")[0],
                "status": row.status,
                "tokens": (row.summary or {}).get("tokens"),
                "chosen": row.base == chosen,
            }
            for row in reports.list_for(dataset.dataset_id)
        ],
        "bases": [
            *catalog.base_models()[1:],
            *base_models.list_imported(),
            *base_models.list_hub(dataset.owner),
        ],
    }


def _fix_label(finding: dict[str, Any]) -> str:
    """The label of the button that creates a version without these rows; empty if there is none."""
    if finding.get("code") not in versions.WITHOUT:
        return ""
    count = int(finding.get("count") or 0)
    rows = "this row" if count == 1 else f"these {count:,} rows"
    is_duplicate = str(finding["code"]).endswith("duplicate")
    return f"Keep one copy, remove {rows}" if is_duplicate else f"Remove {rows}"


def _origin(dataset: Dataset) -> dict[str, Any] | None:
    """How a version was made, and from which dataset."""
    origin = dataset.origin
    if not origin:
        return None
    left_out = origin["rows"] - origin["kept"] if "rows" in origin else 0
    lines = list(origin.get("lines") or [])
    unnamed = left_out - len(lines) if lines else 0
    return {
        **origin,
        "words": versions.describe(origin),
        "left_out": left_out,
        "lines": lines,
        "unnamed": unnamed,
    }


def _job_query(dataset: Dataset) -> dict[str, str]:
    """The parameters that prefill the form of a new job. For a dataset that was split, they include the other part."""
    origin = dataset.origin or {}
    ids = [dataset.dataset_id, str(origin.get("other") or "")]
    if origin.get("part") == "validation":
        ids.reverse()
    return {name: id for name, id in zip(("dataset", "validation_dataset"), ids, strict=True) if id}


def _histogram(counts: list[int]) -> list[dict[str, Any]]:
    """A histogram of the examples by length. Bucket i counts those with up to 16 · 2^i tokens."""
    highest = max(counts, default=0)
    if not highest:
        return []
    return [
        {"upto": 16 << i, "count": n, "height": max(1, round(56 * n / highest)) if n else 0, "x": 28 * i}
        for i, n in enumerate(counts)
    ]


# ---- columns ----


def columns_context(dataset: Dataset, typed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The form that assigns columns, as typed, with a preview of the first rows. None if the file has no columns."""
    report = _full_report(dataset)
    head = report.get("head")
    if not head or dataset.status not in (DatasetStatus.READY, DatasetStatus.REJECTED):
        return None
    if dataset.status == DatasetStatus.REJECTED and not report.get("choose"):
        return None
    if typed is None:
        file_format = dataset.format if isinstance(dataset.format, dict) else {}
        cells = [row["cells"] for row in head["rows"]]
        typed = ColumnsForm.typed_from(file_format, head["columns"], cells)
        if dataset.status == "rejected" and head.get("first_row_is_data"):
            typed["headerless"] = "on"
    form = ColumnsForm(typed, columns=head["columns"])
    valid = form.is_valid()
    data = form.cleaned_data
    is_table = head["format"].get("container") == "csv"
    headerless = bool(data.get("headerless")) and is_table
    shown = numbered_rows(head) if headerless else head["rows"]
    rows = preview(data["shape"], data["columns"], shown) if valid else []
    return {
        "needed": dataset.status == DatasetStatus.REJECTED,
        "names": head["columns"],
        "shapes": [(name, label) for name, (label, _) in ColumnsForm.SHAPES.items()],
        "typed": {name: str(typed.get(name) or "") for name in ColumnsForm.base_fields},
        "errors": [text for texts in form.errors.values() for text in texts],
        "format": {
            **head["format"],
            "shape": data.get("shape"),
            "columns": data.get("columns"),
            "header": not headerless,
        },
        "is_table": is_table,
        "rows": [preview_row(row) for row in rows],
        "cells": head["rows"],
    }


def numbered_rows(head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first rows of a table whose first row is data: that row too, and columns by their number."""
    names = head["columns"]
    first = {"line": max(1, int(head["rows"][0]["line"]) - 1), "cells": {name: name for name in names}}
    return [
        {
            "line": row["line"],
            "cells": {f"column {n}": row["cells"].get(name, "") for n, name in enumerate(names, 1)},
        }
        for row in (first, *head["rows"][:-1])
    ]


def preview_row(row: Row | BadRow) -> dict[str, Any]:
    """A row as segments, each with its role, its text, and whether it is trained on."""
    if isinstance(row, BadRow):
        return {"line": row.line, "error": f"{row.reason}. {row.fix}"}
    if row.kind == "completion":
        parts = [("", row.prompt, False), ("", row.completion, True)]
    elif row.kind == "text":
        parts = [("", row.text, True)]
    elif row.kind == "segments":
        parts = [("", text, trained) for text, trained in row.segments]
    else:
        parts = [("tools", json.dumps(list(row.tools), ensure_ascii=False), False)] if row.tools else []
        parts += [
            (
                m["role"],
                preview_of_message(m).partition(": ")[2],
                m["role"] == "assistant" and bool(m.get("weight", 1)),
            )
            for m in row.messages
        ]
    together = row.kind in ("completion", "segments") and not row.rejected
    if row.rejected:
        if row.kind == "completion":
            parts = [("prompt", row.prompt, False), ("chosen", row.completion, True)]
            worse = str(row.rejected)
        else:
            worse = "\n".join(map(preview_of_message, row.rejected))  # type: ignore[arg-type]
        parts.append(("rejected", worse, False))
    segments = [
        {"role": role, "text": Truncator(text).chars(400), "trained": trained}
        for role, text, trained in parts
    ]
    return {"line": row.line, "segments": segments, "together": together}
