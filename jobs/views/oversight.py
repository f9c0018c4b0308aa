"""Staff see everybody's jobs, inside Django's admin. Lists come from partitions by month and state, never from a scan."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

from django.contrib import messages
from django.contrib.admin.sites import AdminSite
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from jobs.events import event_log
from jobs.events.history import fold
from jobs.lifecycle import transitions
from jobs.store import access, queue, tables
from jobs.store.tables import Audit, Job, JobIndex, month_of, new_id, time_of
from jobs.views import presenters

PAGE = 50
PRIORITIES = {10: "before everybody's", 0: "ordinary", -10: "behind everybody's"}
STATES = ("all", "active", "succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Found:
    job: Job
    person: str
    state: presenters.State


@require_GET
def index(request: HttpRequest, *, site: AdminSite) -> HttpResponse:
    """By state and month, or by an id, an owner or an e-mail address."""
    _allowed(request, "view")
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
        "rows": _with_people(jobs),
        "states": STATES,
        "state": state,
        "month": month,
        "earlier": _month_beside(month, -1),
        "later": _month_beside(month, 1) if month < month_of(time.time()) else "",
        "more": more,
        "q": search,
    }
    return render(request, "admin/jobs/overseen_list.html", context)


@require_GET
def detail(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    _allowed(request, "view")
    job = _job(owner, job_id)
    story = fold(event_log.read(owner, job_id))
    first, more = presenters.settings_rows(job, story)
    context = {
        **site.each_context(request),
        "title": job.name or job_id,
        "job": job,
        "found": _with_people([job])[0],
        "log": story.shown_log[-100:],
        "settings_rows": first + more,
        "may_cancel": not job.ended
        and job.desired != "cancel"
        and request.user.has_perm("jobs.change_overseenjob"),
        "priorities": PRIORITIES,
    }
    return render(request, "admin/jobs/overseen_detail.html", context)


@require_POST
def cancel(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    """Staff may stop anybody's job; who did it is written down."""
    _allowed(request, "change")
    _job(owner, job_id)
    actor = request.user.owner_id
    Audit(month_of(time.time()), new_id("audit"), actor=actor, action="cancel", target=job_id).save()
    try:
        transitions.ask(owner, job_id, "cancel")
    except transitions.Refused as refused:
        messages.warning(request, refused.message)
    else:
        messages.success(request, "The job is cancelled, or will be with its next heartbeat.")
    return redirect("admin:jobs_overseenjob_detail", owner, job_id)


@require_POST
def prioritise(request: HttpRequest, owner: str, job_id: str, *, site: AdminSite) -> HttpResponse:
    """Staff may put a job before or behind everybody's; who did it is written down."""
    _allowed(request, "change")
    _job(owner, job_id)
    priority = request.POST.get("priority", "")
    if priority not in {str(number) for number in PRIORITIES}:
        messages.warning(request, "Choose one of the priorities.")
        return redirect("admin:jobs_overseenjob_detail", owner, job_id)
    action = f"priority {priority}"
    actor = request.user.owner_id
    Audit(month_of(time.time()), new_id("audit"), actor=actor, action=action, target=job_id).save()
    try:
        transitions.prioritise(owner, job_id, int(priority))
    except transitions.Refused as refused:
        messages.warning(request, refused.message)
    else:
        messages.success(request, f"Its priority is {PRIORITIES[int(priority)]} now.")
    return redirect("admin:jobs_overseenjob_detail", owner, job_id)


def _allowed(request: HttpRequest, what: str) -> None:
    if not request.user.has_perm(f"jobs.{what}_overseenjob"):
        raise PermissionDenied


def _job(owner: str, job_id: str) -> Job:
    try:
        return access.get_job_for(owner, job_id)
    except access.NotFound as error:
        raise Http404 from error


# ---- finding -------------------------------------------------------------------------------------------------------


def _listed(state: str, month: str, after: str | None) -> tuple[list[Job], str]:
    if state == "active":
        rows = sorted(queue.index_rows(), key=lambda row: row.job_id, reverse=True)[:PAGE]
        return _behind(rows), ""
    rows = list(islice(tables.newest(JobIndex, f"{state}#{month}", PAGE + 1, after), PAGE + 1))
    more = rows[PAGE - 1].job_id if len(rows) > PAGE else ""
    return _behind(rows[:PAGE]), more


def _behind(rows: list[JobIndex]) -> list[Job]:
    """The jobs of list rows, newest first."""
    found = queue.active_jobs(rows)
    return sorted((job for job in found if access.is_visible(job)), key=lambda job: job.job_id, reverse=True)


def _search(text: str) -> list[Job]:
    if re.fullmatch(r"ftjob-[0-9A-HJKMNP-TV-Z]{26}", text):
        row = tables.get(JobIndex, f"all#{month_of(time_of(text))}", text)
        return _behind([row]) if row else []
    owner = text
    if "@" in text:
        person = get_user_model().objects.filter(email__iexact=text).first()
        owner = person.owner_id if person else ""
    return list(access.list_jobs(owner, PAGE)) if owner.startswith("user-") else []


def _with_people(jobs: list[Job]) -> list[Found]:
    people: dict[str, Any] = dict(
        get_user_model()
        .objects.filter(owner_id__in={job.owner for job in jobs})
        .values_list("owner_id", "email")
    )
    return [Found(job, people.get(job.owner, job.owner), presenters.state(job)) for job in jobs]


def _month_beside(month: str, step: int) -> str:
    year, number = (int(part) for part in month.split("-"))
    whole = year * 12 + number - 1 + step
    return f"{whole // 12:04d}-{whole % 12 + 1:02d}"
