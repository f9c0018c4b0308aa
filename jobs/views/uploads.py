"""Multipart uploads, used by the page's script. Without the script, a plain form is used (`views.datasets.upload`)."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.html import strip_tags
from django.views.decorators.http import require_http_methods, require_POST

from jobs.datasets import model_imports, multipart
from jobs.datasets.datasets import Rejected
from jobs.formatting import when
from jobs.forms import whole_number
from jobs.store.quotas import OverQuota
from jobs.store.tables import Upload
from jobs.views.decorators import owner_of, signed_in


def refused(message: str) -> JsonResponse:
    return JsonResponse({"error": message}, status=422)


@signed_in
@require_POST
def begin(request: HttpRequest) -> HttpResponse:
    """Starts or resumes the upload of a file with `name`, `bytes`, and `mark` (its fingerprint): returns its parts so far.

    If the owner already has the file, returns that dataset instead, unless `again` is set."""
    name, fingerprint = request.POST.get("name", ""), request.POST.get("mark", "")[:100]
    size = whole_number(request.POST.get("bytes", ""), 10**15)
    if size is None:
        return refused("Choose a file to upload.")
    owner = owner_of(request)
    if not request.POST.get("again") and (same := multipart.find_duplicate(owner, size, fingerprint)):
        address = reverse("jobs:dataset", args=[same.dataset_id])
        return JsonResponse(
            {"same": {"url": address, "name": same.name, "when": strip_tags(when(same.created_at))}}
        )
    try:
        row = multipart.begin(owner, name, size, fingerprint)
    except (Rejected, OverQuota) as error:
        return refused(str(error))
    return begun(row)


def begun(row: Upload) -> JsonResponse:
    """Where the script sends the parts, and which ones the server already has."""
    return JsonResponse(
        {
            "url": reverse("jobs:upload_part", args=[row.upload_id, 0]).removesuffix("0/"),
            "links": reverse("jobs:upload_links", args=[row.upload_id]) if row.multipart else "",
            "complete": reverse("jobs:complete_upload", args=[row.upload_id]),
            "cancel": reverse("jobs:cancel_upload", args=[row.upload_id]),
            "part_bytes": multipart.PART,
            "have": sorted(
                n for n, size in multipart.received_parts(row).items() if size == multipart.part_size(row, n)
            ),
        },
        status=201,
    )


@signed_in
@require_http_methods(["PUT"])
def part(request: HttpRequest, upload_id: str, number: int) -> HttpResponse:
    """The body is the bytes of the part."""
    row = multipart.get_for(owner_of(request), upload_id)
    try:
        multipart.put_part(row, number, request, request.headers.get("X-Part-Sha256", ""))
    except Rejected as error:
        return refused(str(error))
    return JsonResponse({"part": number})


@signed_in
@require_POST
def links(request: HttpRequest, upload_id: str) -> HttpResponse:
    """Signed links for the parts in `numbers`."""
    row = multipart.get_for(owner_of(request), upload_id)
    text = request.POST.get("numbers", "")
    numbers = [whole_number(number, 10**6) for number in text.split(",")] if text else []
    if None in numbers:
        return JsonResponse({"error": "The file has no such part. Choose it again."}, status=400)
    try:
        return JsonResponse(
            {"links": multipart.part_links(row, [number for number in numbers if number is not None])}
        )
    except Rejected as error:
        return refused(str(error))


@signed_in
@require_POST
def complete(request: HttpRequest, upload_id: str) -> HttpResponse:
    row = multipart.get_for(owner_of(request), upload_id)
    try:
        if row.purpose == multipart.BASE:
            model_imports.complete(row)
            return JsonResponse({"url": reverse("admin:jobs_importedbase_changelist")})
        dataset = multipart.complete(row)
    except (Rejected, OverQuota) as error:
        return refused(str(error))
    return JsonResponse({"url": reverse("jobs:dataset", args=[dataset.dataset_id])})


@signed_in
@require_POST
def cancel(request: HttpRequest, upload_id: str) -> HttpResponse:
    """Used by the script's Stop button and by the page's plain form."""
    row = multipart.get_for(owner_of(request), upload_id)
    multipart.cancel(row)
    if request.headers.get("Accept", "").startswith("application/json"):
        return JsonResponse({"cancelled": True})
    messages.success(request, f"The upload of {row.filename} was discarded.")
    return redirect(
        "admin:jobs_importedbase_changelist" if row.purpose == multipart.BASE else "jobs:datasets"
    )
