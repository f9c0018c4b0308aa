"""Datasets: the list, the upload, and the report of what the model will see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.html import strip_tags
from django.utils.http import urlencode
from django.utils.text import Truncator
from django.views.decorators.http import require_GET, require_POST

from jobs.datasets import datasets, multipart, reports, versions
from jobs.formatting import count, size, when
from jobs.forms import ColumnsForm, UploadForm, whole_number
from jobs.registry import base_models
from jobs.store import access, tables
from jobs.store.quotas import OverQuota
from jobs.store.tables import Dataset, DatasetReport
from jobs.views.decorators import asks_for_part, for_people, owner_of
from jobs.views.new_job import report_at, shown_sample
from training.data.formats import BadRow, Row, preview
from training.plan import catalog

PAGE = 20
STATUS = {
    "receiving": ("Receiving", "bg-warning"),
    "checking": ("Checking", "bg-warning"),
    "ready": ("Ready", "bg-success"),
    "rejected": ("Rejected", "bg-error"),
}
KINDS = {
    "chat": ("conversation", "conversations"),
    "completion": ("prompt and answer pair", "prompt and answer pairs"),
    "text": ("text", "texts"),
}


@for_people
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_datasets(owner_of(request), PAGE, request.GET.get("after") or None)
    rows = [{"dataset": d, **look(d)} for d in page]
    waiting = any(d.status in ("receiving", "checking") for d in page)
    template = "jobs/dataset_list.html#rows" if asks_for_part(request) else "jobs/dataset_list.html"
    context = {
        "rows": rows,
        "more": page.rows[-1].dataset_id if page.has_more else "",
        "waiting": waiting,
        "most": settings.JOBS["max_upload_bytes"],
        "open_uploads": lambda: [multipart.progress(row) for row in multipart.list_open(owner_of(request))],
    }
    return render(request, template, context)


@for_people
@require_POST
def upload(request: HttpRequest) -> HttpResponse:
    """Takes the file whole from a plain form and leads to its page, where the report appears. The script sends parts
    instead (`views.uploads`)."""
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return _refused(request, "; ".join(form.errors["file"]))
    file = form.cleaned_data["file"]
    try:
        dataset = datasets.receive(owner_of(request), file.name, file)
    except (datasets.Rejected, OverQuota) as error:
        return _refused(request, str(error))
    if same := datasets.find_duplicate(dataset):
        messages.info(request, f"The same file as {same.name}, uploaded {strip_tags(when(same.created_at))}.")
    return redirect("jobs:dataset", dataset.dataset_id)


def _refused(request: HttpRequest, message: str) -> HttpResponse:
    messages.error(request, message)
    return redirect("jobs:datasets")


@for_people
@require_GET
def detail(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """`?as=` shows the report for a base with another tokenizer."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    shown = report_of(dataset, request.GET.get("as", ""), request.GET.get("line", ""))
    return render(request, "jobs/dataset_detail.html", shown)


@for_people
@require_GET
def report(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """The report alone: fetched again while the check runs. Without htmx it is the page."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    if not asks_for_part(request):
        return redirect("jobs:dataset", dataset_id)
    shown = report_of(dataset, request.GET.get("as", ""), request.GET.get("line", ""))
    return render(request, "jobs/dataset_detail.html#report", shown)


@for_people
@require_POST
def read_as(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Has it read with another base's tokenizer, and leads to what that finds."""
    owner = owner_of(request)
    dataset = access.get_dataset_for(owner, dataset_id)
    name = request.POST.get("base", "").strip()
    try:
        facts = base_models.pin(owner, name)
    except access.NotFound:
        messages.error(request, f"There is no model {name[:100]} to read it as. Choose one of the list.")
        return redirect("jobs:dataset", dataset_id)
    address = reverse("jobs:dataset", args=[dataset_id])
    if dataset.status != "ready" or reports.uses_default_tokenizer(facts):
        return redirect(address)
    return redirect(f"{address}?{urlencode({'as': reports.request_report(dataset, facts).base})}")


@for_people
@require_POST
def delete(request: HttpRequest, dataset_id: str) -> HttpResponse:
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    datasets.delete(owner_of(request), dataset_id)
    messages.success(request, f"{dataset.name} is deleted.")
    return redirect("jobs:datasets")


@for_people
@require_POST
def row(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Has the tokens of one row made, by its `line`, and leads to them."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    line, base = whole_number(request.POST.get("line", "").strip(), 10**10), request.POST.get("as", "")
    other = tables.get(DatasetReport, dataset_id, base) if base else None
    address = reverse("jobs:dataset", args=[dataset_id])
    if dataset.status != "ready" or not line:
        messages.error(request, "Line: write the number of a line of the file.")
        return redirect(address)
    reports.request_row(dataset, other.base_snapshot if other else {"id": catalog.STARTER}, line)
    query = {"as": other.base, "line": str(line)} if other else {"line": str(line)}
    return redirect(f"{address}?{urlencode(query)}#row")


@for_people
@require_POST
def columns(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Shows what other columns would make of the first rows (`do=preview`), or reads the file so from now on."""
    owner = owner_of(request)
    dataset = access.get_dataset_for(owner, dataset_id)
    choice = _columns(dataset, request.POST)
    if choice is None:
        messages.error(request, "This file has no columns to choose from.")
        return redirect("jobs:dataset", dataset_id)
    if asks_for_part(request):
        return render(request, "jobs/_columns_preview.html", {"choice": choice})
    if request.POST.get("do") != "preview" and not choice["errors"]:
        try:
            datasets.recheck(owner, dataset_id, choice["format"])
        except datasets.Rejected as error:
            messages.error(request, str(error))
        return redirect("jobs:dataset", dataset_id)
    status = 422 if choice["errors"] else 200
    context = report_of(dataset) | {"choice": choice}
    return render(request, "jobs/dataset_detail.html", context, status=status)


def _columns(dataset: Dataset, typed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The choice of columns: the form as typed, and what the first rows would be. None where there is nothing to choose."""
    full = _full_report(dataset)
    head = full.get("head")
    if not head or dataset.status not in ("ready", "rejected"):
        return None
    if dataset.status == "rejected" and not full.get("choose"):
        return None
    form = dataset.format if isinstance(dataset.format, dict) else {}
    asked = typed if typed is not None else ColumnsForm.typed_from(form, head["columns"])
    checked = ColumnsForm(asked, columns=head["columns"])
    valid = checked.is_valid()
    data = checked.cleaned_data
    rows = preview(data["shape"], data["columns"], head["rows"]) if valid else []
    return {
        "needed": dataset.status == "rejected",
        "names": head["columns"],
        "shapes": [(name, words) for name, (words, _) in ColumnsForm.SHAPES.items()],
        "typed": {name: str(asked.get(name) or "") for name in ColumnsForm.base_fields},
        "errors": [text for texts in checked.errors.values() for text in texts],
        "format": {**head["format"], "shape": data.get("shape"), "columns": data.get("columns")},
        "rows": [_previewed(row) for row in rows],
        "cells": head["rows"],
    }


def _previewed(row: Row | BadRow) -> dict[str, Any]:
    """A row as parts to show: [(role, text, learned)]."""
    if isinstance(row, BadRow):
        return {"line": row.line, "error": f"{row.reason}. {row.fix}"}
    if row.kind == "completion":
        parts = [("", row.prompt, False), ("", row.completion, True)]
    elif row.kind == "text":
        parts = [("", row.text, True)]
    else:
        parts = [
            (m["role"], m["content"], m["role"] == "assistant" and bool(m.get("weight", 1)))
            for m in row.messages
        ]
    shown = [
        {"role": role, "text": Truncator(text).chars(400), "learned": learned}
        for role, text, learned in parts
    ]
    return {"line": row.line, "parts": shown, "together": row.kind == "completion"}


@for_people
@require_POST
def fix(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Begins a new version, by the finding that `what` names (in the report for the base `as`) or in two parts, and leads
    to it."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    shown = report_of(dataset, request.POST.get("as", ""))
    what = request.POST.get("what", "")
    try:
        versions.check(dataset, what, shown["findings"])
        new = versions.begin(dataset, what, shown["other"])
    except versions.Refused as error:
        return render(request, "jobs/dataset_detail.html", {**shown, "refused": str(error)}, status=400)
    except OverQuota as error:
        messages.error(request, str(error))
        return redirect("jobs:dataset", dataset_id)
    return redirect("jobs:dataset", new.dataset_id)


# ---- how it looks --------------------------------------------------------------------------------------------------


def look(dataset: Dataset) -> dict[str, Any]:
    word, dot = STATUS.get(dataset.status, (dataset.status, "bg-base-300"))
    summary = dataset.summary if isinstance(dataset.summary, dict) else {}
    if dataset.status == "rejected" and summary.get("choose"):
        word, dot = "Needs columns", "bg-warning"
    one, many = KINDS.get(str(summary.get("kind")), ("example", "examples"))
    return {
        "word": word,
        "dot": dot,
        "summary": summary,
        "kind": one if summary.get("examples") == 1 else many,
        "checking": dataset.status in ("receiving", "checking"),
    }


def report_of(dataset: Dataset, base: str = "", line: str = "") -> dict[str, Any]:
    """The report as the page shows it; what isn't known yet is left out. `base` names whose tokenizer it is made with,
    `line` the row whose tokens were asked for."""
    other = tables.get(DatasetReport, dataset.dataset_id, base) if base else None
    kept = dataset.summary if isinstance(dataset.summary, dict) else {}
    full = kept | _full_report(dataset)
    if other is not None:
        full = report_at(other.report_key) if other.report_key else {}
    summary = full
    choice = _columns(dataset) if other is None else None
    shown_row = _row(dataset, base if other else catalog.STARTER, line)
    query = {name: value for name, value in (("as", base if other else ""), ("line", line)) if value}
    return {
        "row": shown_row,
        "polls": bool(shown_row and shown_row["checking"])
        or (other is not None and other.status == "checking"),
        "query": f"?{urlencode(query)}" if query else "",
        "dataset": dataset,
        **look(dataset),
        "summary": summary,
        "other": other,
        "columns_in_use": _used(dataset),
        "choice": choice,
        "read_as": lambda: _read_as(dataset, base),
        "findings": []
        if choice and choice["needed"]
        else [_finding(f, dataset) for f in full.get("findings", [])],
        "can_split": dataset.status == "ready" and versions.can_split(dataset),
        "origin": _origin(dataset),
        "samples": [shown_sample(s) for s in full.get("samples", [])],
        "histogram": _histogram(summary.get("histogram") or []),
        "histogram_width": 28 * max(7, len(summary.get("histogram") or [])),
        "verdict": full.get("verdict", ""),
        "file_rows": _file_rows(dataset, summary),
        "new_job": f"{reverse('jobs:new_job')}?{urlencode(_for_job(dataset))}",
    }


def _full_report(dataset: Dataset) -> dict[str, Any]:
    return report_at(dataset.report_key) if dataset.report_key else {}


def _used(dataset: Dataset) -> str:
    """The columns that are read, and as what."""
    columns = (dataset.format or {}).get("columns")
    if not isinstance(columns, dict):
        return ""
    return ", ".join(k if k == v else f"{v} as {k}" for k, v in columns.items())


def _file_rows(dataset: Dataset, summary: dict[str, Any]) -> list[tuple[str, str]]:
    form = dataset.format if isinstance(dataset.format, dict) else {}
    found = [
        ("Format", str(form.get("name") or form.get("format") or form.get("container") or "")),
        ("Encoding", str(form.get("encoding") or "")),
        ("Columns", _used(dataset)),
        ("Rows cut", count(summary["truncated"]) if summary.get("truncated") else ""),
        ("Size", size(dataset.bytes)),
        ("sha256", dataset.sha256),
    ]
    return [row for row in found if row[1]]


TONES = {"error": "bg-error/10", "warning": "bg-warning/10"}


def _finding(finding: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    tone = TONES.get(str(finding.get("severity") or finding.get("level")), "bg-base-200")
    mend = _mend(finding) if dataset.status == "ready" else ""
    return {**finding, "tone": tone, "mend": mend}


def _row(dataset: Dataset, base: str, line: str) -> dict[str, Any] | None:
    """The tokens of the row that was asked for last, if it is this one."""
    place = reports.row_key(base)
    found = tables.get(DatasetReport, dataset.dataset_id, place) if line else None
    if found is None or str(found.base_snapshot.get("line")) != line:
        return None
    told = report_at(found.report_key) if found.report_key else {}
    return {
        "line": found.base_snapshot["line"],
        "checking": found.status == "checking",
        "error": told.get("error") or found.error,
        "sample": shown_sample(told) if told.get("tokens") else None,
        "cut": told.get("cut") or 0,
    }


def _read_as(dataset: Dataset, chosen: str) -> dict[str, Any]:
    """The bases it was read for, and those it can be read for."""
    made = reports.list_for(dataset.dataset_id)
    known = [*catalog.base_models()[1:], *base_models.list_hub(dataset.owner)]
    return {
        "made": [
            {"base": row.base, "name": row.base.partition("@")[0], "status": row.status,
             "tokens": (row.summary or {}).get("tokens"), "chosen": row.base == chosen}
            for row in made
        ],
        "bases": known,
    }  # fmt: skip


def _mend(finding: dict[str, Any]) -> str:
    """What the button says that makes a version without these rows; empty where there is none."""
    if finding.get("code") not in versions.WITHOUT:
        return ""
    many = int(finding.get("count") or 0)
    rows = "this row" if many == 1 else f"these {many:,} rows"
    twins = str(finding["code"]).endswith("duplicate")
    return f"Keep one of each, leave {rows} out" if twins else f"Leave {rows} out"


def _origin(dataset: Dataset) -> dict[str, Any] | None:
    """Where a version comes from, for a person."""
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


def _for_job(dataset: Dataset) -> dict[str, str]:
    """A job's form, filled in: with its other part where it was split."""
    origin = dataset.origin or {}
    ids = [dataset.dataset_id, str(origin.get("other") or "")]
    if origin.get("part") == "validation":
        ids.reverse()
    return {name: id for name, id in zip(("dataset", "validation_dataset"), ids, strict=True) if id}


def _histogram(counts: list[int]) -> list[dict[str, Any]]:
    """Bars of examples by length; bucket i holds up to 16 · 2^i tokens."""
    most = max(counts, default=0)
    return (
        [
            {"upto": 16 << i, "count": n, "height": max(1, round(56 * n / most)) if n else 0, "x": 28 * i}
            for i, n in enumerate(counts)
        ]
        if most
        else []
    )
