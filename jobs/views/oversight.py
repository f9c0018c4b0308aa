"""Staff see all users' jobs in Django's admin. Lists are read from partitions by month and status, never by a scan."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from itertools import islice

from django.contrib import messages
from django.contrib.admin.sites import AdminSite
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from jobs.events import event_log
from jobs.events.history import JobHistory
from jobs.lifecycle import transitions
from jobs.store import access, queue, tables
from jobs.store.states import JobStatus
from jobs.store.tables import Audit, Job, JobIndex, month_of, new_id, time_of
from jobs.views import presenters
from jobs.views.decorators import refusal_as_warning

PAGE_SIZE = 50
PRIORITIES = {10: "ahead of all jobs", 0: "normal", -10: "behind all jobs"}
STATES = ("all", "active", JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True)
class OverseenRow:
    job: Job
    email: str
    state: presenters.JobView


@require_GET
def index(request: HttpRequest, *, site: AdminSite) -> HttpResponse:
    """Lists jobs by status and month, or searches by job ID, owner ID, or email address."""
    _require(request, "view")
    state = request.GET.get("state", "all")
    month = request.GET.get("month") or month_of(time.time())
    if state not in STATES or not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise Http404
    search = request.GET.get("q", "").strip()
    if search:
        jobs, more = _search(search), ""
    else:
        jobs, more = _listed(state, month, request.GET.get("after") or None)
    context = {
        **site.each_context(request),
        "title": "Jobs",
        "rows": _with_emails(jobs),
        "states": STATES,
        "state": state,
        "month": month,
        "earlier": _shifted_month(month, -1),
        "later": _shifted_month(month, 1) if month < month_of(time.time()) else "",
        "more": more,
        "q": search,
    }
    return render(request, "admin/jobs/overseen_list.html", context)


@require_GET
def detail(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    _require(request, "view")
    job = _job(owner, job_id)
    history = JobHistory.from_events(event_log.read(owner, job_id))
    first, more = presenters.settings_rows(job, history)
    context = {
        **site.each_context(request),
        "title": job.name or job_id,
        "job": job,
        "overseen": _with_emails([job])[0],
        "log": history.shown_log[-100:],
        "settings_rows": first + more,
        "may_cancel": not job.ended
        and job.desired != "cancel"
        and request.user.has_perm("jobs.change_overseenjob"),
        "priorities": PRIORITIES,
    }
    return render(request, "admin/jobs/overseen_detail.html", context)


@require_POST
def cancel(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    """Staff can cancel any job; the audit log records who did."""
    _require(request, "change")
    _job(owner, job_id)
    actor = request.user.owner_id
    Audit(month_of(time.time()), new_id("audit"), actor=actor, action="cancel", target=job_id).save()
    with refusal_as_warning(request):
        transitions.set_desired(owner, job_id, "cancel")
        messages.success(request, "The job was cancelled, or will be at its worker's next heartbeat.")
    return redirect("admin:jobs_overseenjob_detail", owner, job_id)


@require_POST
def prioritise(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    """Staff can move a job ahead of or behind all others; the audit log records who did."""
    _require(request, "change")
    _job(owner, job_id)
    priority = request.POST.get("priority", "")
    if priority not in {str(number) for number in PRIORITIES}:
        messages.warning(request, "Choose a priority from the list.")
        return redirect("admin:jobs_overseenjob_detail", owner, job_id)
    action = f"priority {priority}"
    actor = request.user.owner_id
    Audit(month_of(time.time()), new_id("audit"), actor=actor, action=action, target=job_id).save()
    with refusal_as_warning(request):
        transitions.set_priority(owner, job_id, int(priority))
        messages.success(request, f"Priority: {PRIORITIES[int(priority)]}.")
    return redirect("admin:jobs_overseenjob_detail", owner, job_id)


def _require(request: HttpRequest, permission: str) -> None:
    if not request.user.has_perm(f"jobs.{permission}_overseenjob"):
        raise PermissionDenied


def _job(owner: str, job_id: str) -> Job:
    try:
        return access.get_job_for(owner, job_id)
    except access.NotFound as error:
        raise Http404 from error


# ---- lists and search -------------------------------------------------------------------------------------------------------


def _listed(state: str, month: str, after: str | None) -> tuple[list[Job], str]:
    if state == "active":
        rows = sorted(queue.index_rows(), key=lambda row: row.job_id, reverse=True)[:PAGE_SIZE]
        return _jobs_of(rows), ""
    rows = list(islice(tables.newest(JobIndex, f"{state}#{month}", PAGE_SIZE + 1, after), PAGE_SIZE + 1))
    more = rows[PAGE_SIZE - 1].job_id if len(rows) > PAGE_SIZE else ""
    return _jobs_of(rows[:PAGE_SIZE]), more


def _jobs_of(rows: list[JobIndex]) -> list[Job]:
    """The jobs of index rows, newest first."""
    jobs = queue.active_jobs(rows)
    return sorted((job for job in jobs if access.is_visible(job)), key=lambda job: job.job_id, reverse=True)


def _search(text: str) -> list[Job]:
    if re.fullmatch(r"ftjob-[0-7][0-9A-HJKMNP-TV-Z]{25}", text):
        row = tables.get(JobIndex, f"all#{month_of(time_of(text))}", text)
        return _jobs_of([row]) if row else []
    owner = text
    if "@" in text:
        user = get_user_model().objects.filter(email__iexact=text).first()
        owner = user.owner_id if user else ""
    return list(access.list_jobs(owner, PAGE_SIZE)) if owner.startswith("user-") else []


def _with_emails(jobs: list[Job]) -> list[OverseenRow]:
    emails: dict[str, str] = dict(
        get_user_model()
        .objects.filter(owner_id__in={job.owner for job in jobs})
        .values_list("owner_id", "email")
    )
    return [OverseenRow(job, emails.get(job.owner, job.owner), presenters.job_view(job)) for job in jobs]


def _shifted_month(month: str, step: int) -> str:
    year, number = (int(part) for part in month.split("-"))
    months = year * 12 + number - 1 + step
    return f"{months // 12:04d}-{months % 12 + 1:02d}"
