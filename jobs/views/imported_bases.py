"""Staff import base models in Django's admin, for all users, and remove them."""

from __future__ import annotations

import time

from django.conf import settings
from django.contrib import messages
from django.contrib.admin.sites import AdminSite
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from jobs.datasets import model_imports
from jobs.datasets.datasets import Rejected
from jobs.forms import whole_number
from jobs.registry import base_models, imported_bases
from jobs.store.errors import Refused
from jobs.store.quotas import OverQuota
from jobs.store.tables import Audit, month_of, new_id
from jobs.views import uploads
from jobs.views.decorators import owner_of

LIST = "admin:jobs_importedbase_changelist"


@require_GET
def index(request: HttpRequest, *, site: AdminSite) -> HttpResponse:
    _require(request, "view")
    sent = model_imports.list_uploads(owner_of(request))
    context = {
        **site.each_context(request),
        "title": "Base models",
        "bases": base_models.list_imported(),
        "uploads": sent,
        "checking": any(row.status == "checking" for row in sent),
        "max_bytes": settings.JOBS["max_upload_bytes"],
        "may_add": request.user.has_perm("jobs.add_importedbase"),
        "may_remove": request.user.has_perm("jobs.delete_importedbase"),
    }
    return render(request, "admin/jobs/base_list.html", context)


@require_POST
def begin(request: HttpRequest, *, site: AdminSite) -> HttpResponse:
    """Starts the upload of a file, whose parts and end are those of any upload (`views.uploads`)."""
    _require(request, "add")
    size = whole_number(request.POST.get("bytes", ""), 10**15)
    if size is None:  # a plain form, which has sent no more than the fields
        messages.warning(request, "The upload needs JavaScript. On the server, use manage.py import_base.")
        return redirect(LIST)
    base = {name: request.POST.get(name, "").strip()[:100] for name in ("model", "license")}
    try:
        row = model_imports.begin(
            owner_of(request),
            request.POST.get("name", ""),
            size,
            request.POST.get("mark", "")[:100],
            {"name": base["model"], "license": base["license"]},
        )
    except (Refused, Rejected, OverQuota) as error:
        return uploads.refused(str(error))
    _audit(request, "import base", base["model"])
    return uploads.begun(row)


@require_POST
def remove(request: HttpRequest, name: str, *, site: AdminSite) -> HttpResponse:
    _require(request, "delete")
    if imported_bases.find(name) is None:
        raise Http404
    _audit(request, "remove base", name)
    imported_bases.remove(name)
    messages.success(request, f"{name} was removed. Jobs that have not ended still use it.")
    return redirect(LIST)


def _audit(request: HttpRequest, action: str, name: str) -> None:
    actor = owner_of(request)
    Audit(month_of(time.time()), new_id("audit"), actor=actor, action=action, target=name).save()


def _require(request: HttpRequest, permission: str) -> None:
    if not request.user.has_perm(f"jobs.{permission}_importedbase"):
        raise PermissionDenied
