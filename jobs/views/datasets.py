"""Datasets: the list, the upload, and the report of what the model sees."""

from __future__ import annotations

import re
from collections.abc import Mapping

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.html import strip_tags
from django.utils.http import urlencode
from django.views.decorators.http import require_GET, require_POST

from jobs.datasets import datasets, multipart, reports, versions
from jobs.formatting import when
from jobs.forms import UploadForm, whole_number
from jobs.registry import base_models
from jobs.store import access, tables
from jobs.store.errors import Refused
from jobs.store.quotas import OverQuota
from jobs.store.states import DatasetStatus
from jobs.store.tables import DatasetReport
from jobs.views.dataset_report import columns_context, report_context, status_context
from jobs.views.decorators import owner_of, signed_in, wants_partial
from training.plan import catalog

PAGE_SIZE = 20


@signed_in
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_datasets(owner_of(request), PAGE_SIZE, request.GET.get("after") or None)
    rows = [{"dataset": d, **status_context(d)} for d in page]
    waiting = any(d.unchecked for d in page)
    template = "jobs/dataset_list.html#rows" if wants_partial(request) else "jobs/dataset_list.html"
    context = {
        "rows": rows,
        "more": page.rows[-1].dataset_id if page.has_more else "",
        "waiting": waiting,
        "max_bytes": settings.JOBS["max_upload_bytes"],
        "open_uploads": lambda: [multipart.progress(row) for row in multipart.list_open(owner_of(request))],
    }
    return render(request, template, context)


@signed_in
@require_POST
def upload(request: HttpRequest) -> HttpResponse:
    """Receives a whole file from a plain form and redirects to its page, where the report appears. The script uses
    multipart uploads instead (`views.uploads`)."""
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return _refused(request, "; ".join(form.errors["file"]))
    file = form.cleaned_data["file"]
    try:
        dataset = datasets.receive(owner_of(request), datasets.name_in_form(file.name), file)
    except (datasets.Rejected, OverQuota) as error:
        return _refused(request, str(error))
    if same := datasets.find_duplicate(dataset):
        messages.info(
            request, f"This is the same file as {same.name}, uploaded {strip_tags(when(same.created_at))}."
        )
    return redirect("jobs:dataset", dataset.dataset_id)


def _refused(request: HttpRequest, message: str) -> HttpResponse:
    messages.error(request, message)
    return redirect("jobs:datasets")


@signed_in
@require_GET
def detail(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """`?as=` selects the report for a base model with another tokenizer."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    context = report_context(dataset, request.GET.get("as", ""), request.GET.get("line", ""))
    return render(request, "jobs/dataset_detail.html", context)


@signed_in
@require_GET
def report(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Only the report, polled while the check runs. Without htmx, redirects to the whole page."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    if not wants_partial(request):
        return redirect("jobs:dataset", dataset_id)
    context = report_context(dataset, request.GET.get("as", ""), request.GET.get("line", ""))
    return render(request, "jobs/dataset_detail.html#report", context)


@signed_in
@require_POST
def read_as(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Starts counting with another base model's tokenizer, and redirects to that report."""
    owner = owner_of(request)
    dataset = access.get_dataset_for(owner, dataset_id)
    name = request.POST.get("base", "").strip()
    try:
        base_snapshot = base_models.pin(owner, name)
    except access.NotFound:
        messages.error(request, f"Unknown model: {name[:100]}. Choose a model from the list.")
        return redirect("jobs:dataset", dataset_id)
    address = reverse("jobs:dataset", args=[dataset_id])
    if dataset.status != DatasetStatus.READY or reports.uses_default_tokenizer(base_snapshot):
        return redirect(address)
    return redirect(f"{address}?{urlencode({'as': reports.request_report(dataset, base_snapshot).base})}")


@signed_in
@require_POST
def delete(request: HttpRequest, dataset_id: str) -> HttpResponse:
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    datasets.delete(owner_of(request), dataset_id)
    messages.success(request, f"{dataset.name} was deleted.")
    return redirect("jobs:datasets")


@signed_in
@require_POST
def row(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Starts tokenizing the row at `line`, and redirects to the result."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    line, base = whole_number(request.POST.get("line", "").strip(), 10**10), request.POST.get("as", "")
    other = tables.get(DatasetReport, dataset_id, base) if base else None
    address = reverse("jobs:dataset", args=[dataset_id])
    if dataset.status != DatasetStatus.READY or not line:
        messages.error(request, "Line: enter a line number of the file.")
        return redirect(address)
    reports.request_row(dataset, other.base_snapshot if other else {"id": catalog.STARTER}, line)
    query = {"as": other.base, "line": str(line)} if other else {"line": str(line)}
    return redirect(f"{address}?{urlencode(query)}#row")


@signed_in
@require_POST
def columns(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Previews the first rows with other columns (`do=preview`), or checks the file again with those columns."""
    owner = owner_of(request)
    dataset = access.get_dataset_for(owner, dataset_id)
    choice = columns_context(dataset, request.POST)
    if choice is None:
        messages.error(request, "This file has no columns to choose from.")
        return redirect("jobs:dataset", dataset_id)
    if wants_partial(request):
        return render(request, "jobs/_columns_preview.html", {"choice": choice})
    if request.POST.get("do") != "preview" and not choice["errors"]:
        try:
            datasets.recheck(owner, dataset_id, choice["format"])
        except datasets.Rejected as error:
            messages.error(request, str(error))
        return redirect("jobs:dataset", dataset_id)
    status = 422 if choice["errors"] else 200
    context = report_context(dataset) | {"choice": choice}
    return render(request, "jobs/dataset_detail.html", context, status=status)


@signed_in
@require_POST
def fix(request: HttpRequest, dataset_id: str) -> HttpResponse:
    """Starts a new version and redirects to it: `what` is the code of a finding (in the report for the base model `as`)
    whose rows are removed, or a split into two parts, by `percent` and `seed` or by `lines`."""
    dataset = access.get_dataset_for(owner_of(request), dataset_id)
    context = report_context(dataset, request.POST.get("as", ""))
    what = request.POST.get("what", "")
    try:
        if what == versions.SPLIT:
            new, _ = versions.begin_split(dataset, _split_from(request.POST))
        else:
            versions.check(dataset, what, context["findings"])
            new = versions.begin(dataset, what, context["other"])
    except Refused as error:
        refused = {"refused": str(error), "refused_split": what == versions.SPLIT, "typed": request.POST}
        return render(request, "jobs/dataset_detail.html", {**context, **refused}, status=400)
    except OverQuota as error:
        messages.error(request, str(error))
        return redirect("jobs:dataset", dataset_id)
    return redirect("jobs:dataset", new.dataset_id)


def _split_from(typed: Mapping[str, str]) -> versions.Split:
    """Raises Refused."""
    if lines := typed.get("lines", "").strip():
        return versions.Split(lines=lines[:1000])
    percent, seed = typed.get("percent", "10").strip(), whole_number(typed.get("seed", "0").strip(), 2**31)
    if not re.fullmatch(r"\d{1,2}(\.\d{1,3})?", percent, re.ASCII):
        raise Refused("Share: enter a percentage above 0, up to 90.")
    if seed is None:
        raise Refused("Seed: enter a whole number.")
    return versions.Split(float(percent), seed)
