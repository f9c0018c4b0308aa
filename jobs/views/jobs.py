"""Jobs: the list, the form of a new one, a job's page and what can be done to it."""

from __future__ import annotations

import csv
import io
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from jobs.events import event_log
from jobs.events.history import JobHistory, chart, sentence, summary, thin
from jobs.formatting import moment
from jobs.forms import RenameForm
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.store import access
from jobs.store.tables import Job
from jobs.views import new_job, presenters
from jobs.views.decorators import asks_for_part, for_people, owner_of

PAGE = 20
WHOLE, TAIL, WINDOWS, WINDOW = 10_000, 2_000, 15, 300  # events of a job's page


@for_people
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_jobs(owner_of(request), PAGE, request.GET.get("after") or None)
    rows = [{"job": job, "state": presenters.state(job)} for job in page]
    context = {
        "rows": rows,
        "more": page.rows[-1].job_id if page.has_more else "",
        "alive": any(not job.ended for job in page),
    }
    if not rows and not request.GET.get("after"):
        context["has_data"] = len(access.list_datasets(owner_of(request), 1)) > 0
    template = "jobs/job_list.html#rows" if asks_for_part(request) else "jobs/job_list.html"
    return render(request, template, context)


# ---- a new one -----------------------------------------------------------------------------------------------------


@for_people
@require_http_methods(["GET", "POST"])
def new(request: HttpRequest) -> HttpResponse:
    """GET shows the form, filled from a dataset or from a job to clone. POST starts the job."""
    owner = owner_of(request)
    if request.method == "GET":
        draft = new_job.Draft.open(owner, request.GET)
        return render(request, "jobs/new_job.html", draft.context())
    draft = new_job.Draft.of(owner, request.POST)
    draft.add_from_hub()
    if draft.is_valid():
        try:
            webhooks.set_email(owner, request.user.notification_email)
            job = transitions.submit(owner, draft.request(), slug=request.user.slug)
        except transitions.Refused as refused:
            draft.refuse(refused.field, refused.message)
        except transitions.OverQuota as over:
            draft.refuse("", str(over))
        else:
            return redirect("jobs:job", job.job_id)
    return render(request, "jobs/new_job.html", draft.context(), status=422)


@for_people
@require_POST
def add_base(request: HttpRequest) -> HttpResponse:
    """Checks the Hub id in the form and chooses it; the page comes back as it was typed."""
    draft = new_job.Draft.of(owner_of(request), request.POST)
    if not draft.values["hub"].strip():
        draft.refuse("hub", "Write the id of a model of the Hub first: owner/name.")
    draft.add_from_hub()
    return render(request, "jobs/new_job.html", draft.context(), status=422 if "hub" in draft.errors else 200)


@for_people
@require_POST
def count_tokens(request: HttpRequest) -> HttpResponse:
    """Has the chosen data read with the chosen base's tokenizer, and shows the form as it was typed."""
    draft = _typed(request)
    draft.count()
    template = "jobs/_new_job_parts.html" if asks_for_part(request) else "jobs/new_job.html"
    return render(request, template, draft.context())


@for_people
@require_POST
def estimate(request: HttpRequest) -> HttpResponse:
    """The form as typed so far: its estimate, reasons and warnings. htmx swaps those parts; without it, the whole page."""
    draft = _typed(request)
    draft.apply_buttons(request.POST)
    template = "jobs/_new_job_parts.html" if asks_for_part(request) else "jobs/new_job.html"
    return render(request, template, draft.context())


def _typed(request: HttpRequest) -> new_job.Draft:
    """The form as it stands, of a new job or of one that is edited."""
    owner, edited = owner_of(request), request.POST.get("edited")
    if edited:
        return new_job.Draft.editing(access.get_job_for(owner, edited), request.POST)
    return new_job.Draft.of(owner, request.POST)


# ---- one job -------------------------------------------------------------------------------------------------------


@for_people
@require_GET
def detail(request: HttpRequest, job_id: str) -> HttpResponse:
    """`?part=aside` is the column beside the curve alone, fetched again when samples and proofs arrive."""
    job = access.get_job_for(owner_of(request), job_id)
    history = JobHistory.from_events(_skimmed(job))
    context = presenters.aside(job, history)
    if request.GET.get("part") == "aside" and asks_for_part(request):
        return render(request, "jobs/_job_aside.html", context)
    curve = chart(history)
    steps = thin(sorted(history.metrics), 100)
    context |= {
        "history": history,
        "chart": curve,
        "rows": [history.metrics[step] for step in steps],
        "summary": summary(history),
        "sparks": presenters.sparks(history, curve),
        "page_data": {"seq": history.seq, "chart": curve, "status": job.status, "ended": job.ended},
    }
    return render(request, "jobs/job_detail.html", context)


def _skimmed(job: Job) -> list[event_log.Event]:
    """All events of a usual job. Of a very long one its beginning, its end, and windows evenly between: the curve on the
    page is thinned anyway, the CSV and the log have everything."""
    last = int(job.last_seq)
    if last <= WHOLE:
        return event_log.read(job.owner, job.job_id)
    stride = (last - TAIL) // WINDOWS
    events: list[event_log.Event] = []
    for n in range(WINDOWS):
        after = max(n * stride, events[-1].seq if events else 0)
        events += event_log.read(job.owner, job.job_id, after, limit=WINDOW)[:WINDOW]
    return events + event_log.read(job.owner, job.job_id, max(last - TAIL, events[-1].seq))


@for_people
@require_http_methods(["GET", "POST"])
def edit(request: HttpRequest, job_id: str) -> HttpResponse:
    """The form of a job whose first attempt has not begun."""
    job = access.get_job_for(owner_of(request), job_id)
    if not presenters.state(job).can_edit:
        messages.warning(request, "The job has started. Clone it, and change the copy.")
        return redirect("jobs:job", job_id)
    if request.method == "GET":
        return render(request, "jobs/new_job.html", new_job.Draft.editing(job).context())
    draft = new_job.Draft.editing(job, request.POST)
    if draft.is_valid():
        try:
            transitions.edit(job.owner, job_id, draft.request())
        except transitions.Refused as refused:
            draft.refuse(refused.field, refused.message)
        except transitions.LostRace as lost:
            draft.refuse("", str(lost))
        else:
            messages.success(request, "The job is changed. It keeps its place in the queue.")
            return redirect("jobs:job", job_id)
    return render(request, "jobs/new_job.html", draft.context(), status=422)


@for_people
@require_GET
def actions(request: HttpRequest, job_id: str) -> HttpResponse:
    job = access.get_job_for(owner_of(request), job_id)
    if not asks_for_part(request):
        return redirect("jobs:job", job_id)
    return render(request, "jobs/_job_actions.html", {"job": job, "state": presenters.state(job)})


@for_people
@require_POST
def pause(request: HttpRequest, job_id: str) -> HttpResponse:
    return _ask(request, job_id, "pause")


@for_people
@require_POST
def resume(request: HttpRequest, job_id: str) -> HttpResponse:
    return _ask(request, job_id, "run")


@for_people
@require_POST
def cancel(request: HttpRequest, job_id: str) -> HttpResponse:
    return _ask(request, job_id, "cancel")


def _ask(request: HttpRequest, job_id: str, desired: Any) -> HttpResponse:
    try:
        transitions.set_desired(owner_of(request), job_id, desired)
    except transitions.Refused as refused:
        messages.warning(request, refused.message)
    return redirect("jobs:job", job_id)


@for_people
@require_POST
def retry(request: HttpRequest, job_id: str) -> HttpResponse:
    """A new job with the same data and settings, from the last checkpoint where there is one."""
    try:
        webhooks.set_email(owner_of(request), request.user.notification_email)
        job = transitions.retry(owner_of(request), job_id, slug=request.user.slug)
    except (transitions.Refused, transitions.OverQuota) as refused:
        messages.warning(request, str(refused))
        return redirect("jobs:job", job_id)
    return redirect("jobs:job", job.job_id)


@for_people
@require_POST
def rename(request: HttpRequest, job_id: str) -> HttpResponse:
    access.get_job_for(owner_of(request), job_id)
    form = RenameForm(request.POST)
    if form.is_valid():
        transitions.rename(owner_of(request), job_id, form.cleaned_data["name"])
    else:
        messages.error(request, "; ".join(form.errors["name"]))
    return redirect("jobs:job", job_id)


@for_people
@require_POST
def delete(request: HttpRequest, job_id: str) -> HttpResponse:
    job = access.get_job_for(owner_of(request), job_id)
    try:
        transitions.delete(owner_of(request), job_id)
    except transitions.Refused as refused:
        messages.warning(request, refused.message)
        return redirect("jobs:job", job_id)
    messages.success(request, f"{job.name} is deleted.")
    return redirect("jobs:jobs")


# ---- to take away --------------------------------------------------------------------------------------------------

CSV_COLUMNS = ("step", "loss", "eval_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory", "time")


@for_people
@require_GET
def metrics_csv(request: HttpRequest, job_id: str) -> HttpResponse:
    """Every step, all numbers: nothing in it is text, so nothing in it can be a formula."""
    job = access.get_job_for(owner_of(request), job_id)
    history = JobHistory.from_events(event_log.read(job.owner, job_id))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for step in sorted(history.metrics.keys() | history.evals.keys()):
        row = {
            **history.metrics.get(step, {}),
            "step": step,
            "eval_loss": history.evals.get(step, {}).get("loss", ""),
        }
        writer.writerow([row.get(name, "") for name in CSV_COLUMNS])
    return _attachment(text.getvalue(), "text/csv", f"{job_id}.csv")


@for_people
@require_GET
def log_text(request: HttpRequest, job_id: str) -> HttpResponse:
    job = access.get_job_for(owner_of(request), job_id)
    lines = []
    for event in event_log.read(job.owner, job_id):
        text, level = sentence(event.data)
        if text:
            at = moment(event.data.get("time"))
            lines.append(f"{at:%Y-%m-%d %H:%M:%S} {level:5} {text}\n" if at else f"{level:5} {text}\n")
    return _attachment("".join(lines), "text/plain; charset=utf-8", f"{job_id}.log")


def _attachment(text: str, content_type: str, name: str) -> HttpResponse:
    return HttpResponse(
        text, content_type=content_type, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )
