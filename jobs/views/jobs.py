"""Jobs: the list, the form for a new job, a job's page, and its actions."""

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
from jobs.registry import base_models
from jobs.store import access
from jobs.store.tables import Job
from jobs.views import presenters
from jobs.views.decorators import owner_of, refusal_as_warning, signed_in, wants_partial
from jobs.views.job_form import JobForm
from training.plan import catalog

PAGE_SIZE = 20
MAX_EVENTS, TAIL, WINDOWS, WINDOW = 10_000, 2_000, 15, 300  # events read for a job's page


@signed_in
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_jobs(owner_of(request), PAGE_SIZE, request.GET.get("after") or None)
    rows = [{"job": job, "state": presenters.job_view(job)} for job in page]
    context = {
        "rows": rows,
        "more": page.rows[-1].job_id if page.has_more else "",
        "active": any(not job.ended for job in page),
    }
    if not rows and not request.GET.get("after"):
        context["has_data"] = len(access.list_datasets(owner_of(request), 1)) > 0
    template = "jobs/job_list.html#rows" if wants_partial(request) else "jobs/job_list.html"
    return render(request, template, context)


# ---- new job -----------------------------------------------------------------------------------------------------


@signed_in
@require_http_methods(["GET", "POST"])
def new(request: HttpRequest) -> HttpResponse:
    """GET shows the form, prefilled from a dataset or from a job to clone. POST starts the job."""
    owner = owner_of(request)
    if request.method == "GET":
        form = JobForm.open(owner, request.GET)
        return render(request, "jobs/new_job.html", form.context())
    form = JobForm.of(owner, request.POST)
    form.add_from_hub()
    if form.is_valid():
        with form.refusal_as_error():
            webhooks.set_email(owner, request.user.notification_email)
            job = transitions.submit(owner, form.request(), slug=request.user.slug)
            return redirect("jobs:job", job.job_id)
    return render(request, "jobs/new_job.html", form.context(), status=422)


@signed_in
@require_POST
def add_base(request: HttpRequest) -> HttpResponse:
    """Checks the Hub model in the form and selects it. The page keeps everything that was typed."""
    form = JobForm.of(owner_of(request), request.POST)
    if not form.values["hub"].strip():
        form.refuse("hub", "Enter the ID of a Hub model first: owner/name.")
    form.add_from_hub()
    return render(request, "jobs/new_job.html", form.context(), status=422 if "hub" in form.errors else 200)


@signed_in
@require_POST
def remove_base(request: HttpRequest) -> HttpResponse:
    """Takes the chosen Hub model off the user's list, and selects the starter model. The page keeps everything else."""
    form = JobForm.of(owner_of(request), request.POST)
    name = form.values["base"]
    if base_models.remove_hub_model(form.owner, name):
        messages.success(request, f"{name} was removed from your base models. Your jobs and models stay.")
        form.values["base"] = catalog.STARTER
    return render(request, "jobs/new_job.html", form.context())


@signed_in
@require_POST
def count_tokens(request: HttpRequest) -> HttpResponse:
    """Starts counting the dataset's tokens with the chosen base's tokenizer, and shows the form as it was typed."""
    form = _form_of(request)
    form.count_tokens()
    template = "jobs/_new_job_parts.html" if wants_partial(request) else "jobs/new_job.html"
    return render(request, template, form.context())


@signed_in
@require_POST
def estimate(request: HttpRequest) -> HttpResponse:
    """The estimate, reasons, and warnings of the form as typed. htmx swaps in those partials; otherwise the whole page."""
    form = _form_of(request)
    form.apply_buttons(request.POST)
    template = "jobs/_new_job_parts.html" if wants_partial(request) else "jobs/new_job.html"
    return render(request, template, form.context())


def _form_of(request: HttpRequest) -> JobForm:
    """The submitted form, of a new job or of the job being edited."""
    owner, edited = owner_of(request), request.POST.get("edited")
    if edited:
        return JobForm.editing(access.get_job_for(owner, edited), request.POST)
    return JobForm.of(owner, request.POST)


# ---- one job -------------------------------------------------------------------------------------------------------


@signed_in
@require_GET
def detail(request: HttpRequest, job_id: str) -> HttpResponse:
    """`?part=aside` returns only the sidebar, refreshed when samples and resume checks arrive."""
    job = access.get_job_for(owner_of(request), job_id)
    history = JobHistory.from_events(_sampled_events(job))
    context = presenters.sidebar(job, history)
    if request.GET.get("part") == "aside" and wants_partial(request):
        return render(request, "jobs/_job_aside.html", context)
    curve = chart(history)
    steps = thin(sorted(history.metrics), 100)
    context |= {
        "history": history,
        "chart": curve,
        "rows": [history.metrics[step] for step in steps],
        "summary": summary(history),
        "sparks": presenters.sparklines(history, curve),
        "page_data": {"seq": history.seq, "chart": curve, "status": job.status, "ended": job.ended},
    }
    return render(request, "jobs/job_detail.html", context)


def _sampled_events(job: Job) -> list[event_log.Event]:
    """All events of an ordinary job. For a very long one, the beginning, the end, and evenly spaced windows in between: the
    page thins the curve anyway, and the CSV file and the log download have everything."""
    last = int(job.last_seq)
    if last <= MAX_EVENTS:
        return event_log.read(job.owner, job.job_id)
    stride = (last - TAIL) // WINDOWS
    events: list[event_log.Event] = []
    for n in range(WINDOWS):
        after = max(n * stride, events[-1].seq if events else 0)
        events += event_log.read(job.owner, job.job_id, after, limit=WINDOW)[:WINDOW]
    return events + event_log.read(job.owner, job.job_id, max(last - TAIL, events[-1].seq))


@signed_in
@require_http_methods(["GET", "POST"])
def edit(request: HttpRequest, job_id: str) -> HttpResponse:
    """The form of a job whose first attempt has not started."""
    job = access.get_job_for(owner_of(request), job_id)
    if not presenters.job_view(job).can_edit:
        messages.warning(request, "The job has already started. Clone it and edit the copy.")
        return redirect("jobs:job", job_id)
    if request.method == "GET":
        return render(request, "jobs/new_job.html", JobForm.editing(job).context())
    form = JobForm.editing(job, request.POST)
    if form.is_valid():
        with form.refusal_as_error():
            transitions.edit(job.owner, job_id, form.request())
            messages.success(request, "Changes saved. The job keeps its place in the queue.")
            return redirect("jobs:job", job_id)
    return render(request, "jobs/new_job.html", form.context(), status=422)


@signed_in
@require_GET
def actions(request: HttpRequest, job_id: str) -> HttpResponse:
    job = access.get_job_for(owner_of(request), job_id)
    if not wants_partial(request):
        return redirect("jobs:job", job_id)
    return render(request, "jobs/_job_actions.html", {"job": job, "state": presenters.job_view(job)})


@signed_in
@require_POST
def pause(request: HttpRequest, job_id: str) -> HttpResponse:
    return _set_desired(request, job_id, "pause")


@signed_in
@require_POST
def resume(request: HttpRequest, job_id: str) -> HttpResponse:
    return _set_desired(request, job_id, "run")


@signed_in
@require_POST
def cancel(request: HttpRequest, job_id: str) -> HttpResponse:
    return _set_desired(request, job_id, "cancel")


def _set_desired(request: HttpRequest, job_id: str, desired: Any) -> HttpResponse:
    with refusal_as_warning(request):
        transitions.set_desired(owner_of(request), job_id, desired)
    return redirect("jobs:job", job_id)


@signed_in
@require_POST
def retry(request: HttpRequest, job_id: str) -> HttpResponse:
    """A new job with the same data and settings, from the last checkpoint if there is one."""
    with refusal_as_warning(request):
        webhooks.set_email(owner_of(request), request.user.notification_email)
        job_id = transitions.retry(owner_of(request), job_id, slug=request.user.slug).job_id
    return redirect("jobs:job", job_id)


@signed_in
@require_POST
def rename(request: HttpRequest, job_id: str) -> HttpResponse:
    access.get_job_for(owner_of(request), job_id)
    form = RenameForm(request.POST)
    if form.is_valid():
        transitions.rename(owner_of(request), job_id, form.cleaned_data["name"])
    else:
        messages.error(request, "; ".join(form.errors["name"]))
    return redirect("jobs:job", job_id)


@signed_in
@require_POST
def delete(request: HttpRequest, job_id: str) -> HttpResponse:
    job = access.get_job_for(owner_of(request), job_id)
    with refusal_as_warning(request):
        transitions.delete(owner_of(request), job_id)
        messages.success(request, f"{job.name} was deleted.")
        return redirect("jobs:jobs")
    return redirect("jobs:job", job_id)


# ---- downloads --------------------------------------------------------------------------------------------------

CSV_COLUMNS = ("step", "loss", "eval_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory", "time")


@signed_in
@require_GET
def metrics_csv(request: HttpRequest, job_id: str) -> HttpResponse:
    """All metrics of every step. There are only numbers, so no cell can be a spreadsheet formula."""
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


@signed_in
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
