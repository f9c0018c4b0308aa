"""The rows of a dataset: shown page by page, edited, added and excluded; datasets merged and split.

Rows are read by a checks worker. Changes are kept in a draft until they are saved as a new version."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import urlencode
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from jobs.datasets import drafts, reports, versions
from jobs.forms import whole_number
from jobs.store import access
from jobs.store.errors import Refused
from jobs.store.quotas import OverQuota
from jobs.store.states import DatasetStatus, ReportStatus
from jobs.store.tables import Dataset
from jobs.views import row_editor
from jobs.views.dataset_report import load_report, preview_row
from jobs.views.decorators import owner_of, refusal_as_warning, signed_in, wants_partial
from training.data.bad_row import BadRow
from training.data.formats import Format, preview
from training.data.pages import PAGE_ROWS
from training.data.rewrite import kind_of_rows, parse_record

LAST = 10**10
MAX_SEARCH = 200
CHOICES = 200  # datasets to merge with


@signed_in
@require_GET
def index(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """A page of rows (`page`), the page with the row on a `line`, or the rows that contain `q` (after row `after`)."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    context = _rows_context(dataset, request.GET)
    template = "jobs/dataset_rows.html#rows" if wants_partial(request) else "jobs/dataset_rows.html"
    return render(request, template, context)


@signed_in
@require_http_methods(["GET", "HEAD", "POST"])
def edit(request: HttpRequest, dataset_id: str, row: str) -> HttpResponse:
    """The form of a row: its number, `new`, or `new-` and the key of an added row. POST keeps the change in the draft, or
    shows the form again (`do` adds or removes a message, or changes between fields and JSON)."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    number, key = whole_number(row, LAST), row.removeprefix("new-") if row.startswith("new") else ""
    if not number and not re.fullmatch(r"new|[0-9a-f]{8}", key):
        raise Http404
    if request.method == "POST":
        return _edit(request, dataset, number, key)
    context = _stored_row(dataset, number, key)
    if context is None:
        raise Http404
    return _form(request, dataset, number, key, **context)


@signed_in
@require_POST
def draft(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Excludes a row, undoes a change (`row` or `key`), discards all of them, or saves them as a new version (`do`)."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    number = whole_number(request.POST.get("row", ""), LAST)
    match request.POST.get("do"):
        case "save":
            with refusal_as_warning(request):
                version = versions.begin_edit(dataset, drafts.get(dataset).changes)
                return redirect("jobs:dataset", version.dataset_id)
        case "discard":
            drafts.discard(dataset.owner, dataset_id)
            messages.success(request, "The changes were discarded.")
        case "undo":
            drafts.undo(dataset, str(number or ""), request.POST.get("key", ""))
        case "exclude" if number:
            line = whole_number(request.POST.get("line", ""), LAST) or 0
            with refusal_as_warning(request):
                versions.check_ready(dataset)
                drafts.change_row(dataset, number, line, None)
    return _back(request, dataset, number)


@signed_in
@require_http_methods(["GET", "HEAD", "POST"])
def merge(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Chooses another dataset, and merges both into a new one."""
    owner = owner_of(request)
    dataset = access.get_dataset_for(owner, dataset_id)
    other_id, name, error = request.POST.get("other", ""), request.POST.get("name", "").strip(), ""
    if request.method == "POST":
        try:
            version = versions.begin_merge(dataset, access.get_dataset_for(owner, other_id), name)
            return redirect("jobs:dataset", version.dataset_id)
        except (Refused, OverQuota) as refused:
            error = str(refused)
    kind = kind_of_rows(Format.of(dataset.format or {}))
    others = [
        {
            "dataset": one,
            "kind": other_kind,
            "fits": other_kind == kind,
            "selected": one.dataset_id == other_id,
        }
        for one in access.list_datasets(owner, CHOICES)
        if one.dataset_id != dataset_id and versions.is_ready(one)
        for other_kind in [kind_of_rows(Format.of(one.format or {}))]
    ]
    context = {
        "dataset": dataset,
        "kind": kind,
        "others": sorted(others, key=lambda one: not one["fits"]),
        "can_merge": dataset.status == DatasetStatus.READY and any(one["fits"] for one in others),
        "name": name,
        "error": error,
    }
    return render(request, "jobs/dataset_merge.html", context, status=422 if error else 200)


# ---- the list ------------------------------------------------------------------------------------------------------


def _query(data: Mapping[str, str]) -> dict[str, Any]:
    search = "".join(letter for letter in data.get("q", "").strip()[:MAX_SEARCH] if letter.isprintable())
    line = 0 if search else whole_number(data.get("line", "").strip(), LAST) or 0
    page = 1 if search or line else whole_number(data.get("page", ""), LAST) or 1
    after = (whole_number(data.get("after", ""), LAST) or 0) if search else 0
    return {"page": page, "line": line, "search": search, "after": after}


def _place(data: Mapping[str, str]) -> dict[str, str]:
    """The part of an address that says where in the list one is."""
    return {name: data[name] for name in ("page", "line", "q", "after") if data.get(name)}


def _rows_context(dataset: Dataset, data: Mapping[str, str]) -> dict[str, Any]:
    query = _query(data)
    is_ready = versions.is_ready(dataset)
    page_report = reports.request_page(dataset, query) if is_ready else None
    content = load_report(page_report.report_key) if page_report and page_report.report_key else {}
    draft = drafts.get(dataset)
    format = Format.of(dataset.format or {})
    total = versions.rows_of(dataset)
    number = int(content.get("page") or 0)
    return {
        "dataset": dataset,
        "is_ready": is_ready,
        "checking": page_report is not None and page_report.status == ReportStatus.CHECKING,
        "error": page_report.error if page_report else "",
        "rows": [_shown(row, draft, format) for row in content.get("rows", [])],
        "added": [{"key": key, **_segments(record, format)} for key, record in draft.added.items()],
        "draft": draft,
        "changed_lines": sorted((int(number), int(change["line"])) for number, change in draft.rows.items()),
        "summary_of_changes": versions.count_changes(draft.counts),
        "change_count": len(draft.rows) + len(draft.added),
        "saved_as_jsonl": not versions.keeps_format(dataset),
        "query": query,
        "here": urlencode(_place(data)),
        "page": number,
        "pages": -(-total // PAGE_ROWS),
        "total": total,
        "previous": number - 1 if number > 1 and not query["search"] else 0,
        "next": number + 1 if content.get("more") and not query["search"] else 0,
        "next_matches": content["rows"][-1]["row"] if content.get("more") and query["search"] else 0,
    }


def _shown(row: Mapping[str, Any], draft: drafts.Draft, format: Format) -> dict[str, Any]:
    """A row with its change in the draft, if any."""
    change = draft.rows.get(str(row["row"]))
    record = change["record"] if change and change["record"] is not None else row["record"]
    state = "" if change is None else "excluded" if change["record"] is None else "edited"
    shown = {"number": row["row"], "line": row["line"], "state": state, "too_long": row["record"] is None}
    if record is None:
        return shown | {"segments": [{"role": "", "text": row["preview"], "trained": False}]}
    return shown | _segments(record, format, int(row["line"]))


def _segments(record: dict[str, Any], format: Format, line: int = 1) -> dict[str, Any]:
    (row,) = preview(format.shape, format.columns, [{"line": line, "cells": record}])
    return {**preview_row(row), "line": line}


def _back(request: HttpRequest, dataset: Dataset, number: int | None) -> HttpResponseRedirect:
    """To the list, where it was: the address has the query of the list."""
    query = _place(request.GET)
    if number and not query:
        query = {"page": str((number - 1) // PAGE_ROWS + 1)}
    address = reverse("jobs:dataset_rows", args=[dataset.dataset_id])
    anchor = f"#row-{number}" if number else "#added"
    return HttpResponseRedirect(f"{address}?{urlencode(query)}{anchor}" if query else f"{address}{anchor}")


# ---- the form ------------------------------------------------------------------------------------------------------


def _stored_row(dataset: Dataset, number: int | None, key: str) -> dict[str, Any] | None:
    """What the form of a row shows: from the draft, from the file, or blank. None if there is no such row."""
    draft = drafts.get(dataset)
    if not versions.is_ready(dataset):
        return None
    if key == "new":
        return {
            "record": row_editor.blank_record(
                Format.of(dataset.format or {}), versions.table_columns(dataset)
            )
        }
    if key:
        return {"record": draft.added[key]} if key in draft.added else None
    change = draft.rows.get(str(number))
    if change and change["record"] is not None:
        return {"record": change["record"], "line": change["line"]}
    query = {"page": (int(number or 0) - 1) // PAGE_ROWS + 1, "line": 0, "search": "", "after": 0}
    page_report = reports.request_page(dataset, query)
    if page_report.status == ReportStatus.CHECKING:
        return {"record": None, "checking": True}
    content = load_report(page_report.report_key) if page_report.report_key else {}
    row = next((row for row in content.get("rows", []) if row["row"] == number), None)
    return {"record": row["record"], "line": row["line"]} if row else None


def _edit(request: HttpRequest, dataset: Dataset, number: int | None, key: str) -> HttpResponse:
    post = request.POST
    line = whole_number(post.get("line", ""), LAST) or 0
    typed = post["json"].replace("\r\n", "\n") if "json" in post else None
    record: dict[str, Any] = {}
    try:
        record = parse_record(post.get("record", ""), 0)
        new = row_editor.record_from(post, record) if typed is None else parse_record(typed, line)
    except BadRow as bad:
        return _form(
            request, dataset, number, key, record=record, line=line, typed=typed or "", error=bad.sentence
        )
    shown: dict[str, Any] = {"record": new, "line": line}
    add, _, index = (post.get("do") or "").partition("-")
    places = [whole_number(part, 1000) for part in index.split("-")]
    match add, places:
        case "add", [int(place)]:
            return _form(
                request, dataset, number, key, **shown | {"record": row_editor.with_message(new, place)}
            )
        case "remove", [int(place), int(message)]:
            shown["record"] = row_editor.without_message(new, place, message)
            return _form(request, dataset, number, key, **shown)
        case "json", _:
            return _form(request, dataset, number, key, **shown, typed=row_editor.pretty(new))
        case "fields", _:
            return _form(request, dataset, number, key, **shown)
    try:
        versions.check_ready(dataset)
        versions.check_change(dataset, new, line, versions.table_columns(dataset))
        if number:
            drafts.change_row(dataset, number, line, new)
        else:
            drafts.put_added(dataset, key if key != "new" else _new_key(post), new)
    except Refused as refused:
        return _form(request, dataset, number, key, **shown, typed=typed, error=str(refused))
    return _back(request, dataset, number)


def _new_key(post: Mapping[str, str]) -> str:
    """The key that the form of a new row came with, so that sending it twice adds one row."""
    key = post.get("key", "")
    return key if re.fullmatch(r"[0-9a-f]{8}", key) else secrets.token_hex(4)


def _form(
    request: HttpRequest,
    dataset: Dataset,
    number: int | None,
    key: str,
    *,
    record: dict[str, Any] | None,
    line: int = 0,
    typed: str | None = None,
    error: str = "",
    checking: bool = False,
) -> HttpResponse:
    if record and typed is None and len(record) > row_editor.MAX_FIELDS:
        typed = row_editor.pretty(record)
    fields = row_editor.fields_of(record) if record and typed is None else []
    context = {
        "dataset": dataset,
        "number": number,
        "key": key,
        "new_key": request.POST.get("key") or secrets.token_hex(4),
        "line": line,
        "record": row_editor.hidden(record) if record is not None else "",
        "fields": fields,
        "typed": typed,
        "typed_shown": row_editor.in_area(typed or ""),
        "too_long": record is None and not checking,
        "checking": checking,
        "error": error,
        "kind": kind_of_rows(Format.of(dataset.format or {})),
    }
    return render(request, "jobs/dataset_row.html", context, status=422 if error else 200)
