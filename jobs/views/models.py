"""Fine-tuned models: the list, a model's page, and the download of its files."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from jobs.formatting import count, size
from jobs.registry import base_models, tuned_models
from jobs.store import access
from jobs.store.tables import TunedModel
from jobs.views import playground, presenters
from jobs.views.decorators import owner_of, signed_in, signed_in_async

PAGE_SIZE = 20
METRICS = (
    ("loss", "Held-out loss", "loss"),
    ("exact_match", "Exact match", "percent"),
    ("accuracy", "Token accuracy", "percent"),
    ("perplexity", "Perplexity", "loss"),
)
# What a model was trained on, as stored.
ROWS = {"chat": "Conversations", "completion": "Prompts and completions", "text": "Plain text"}


@signed_in
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_models(owner_of(request), PAGE_SIZE, request.GET.get("after") or None)
    rows = sorted(page, key=lambda model: -model.created_at)
    more = page.rows[-1].model_id if page.has_more else ""
    return render(request, "jobs/model_list.html", {"rows": rows, "more": more})


@signed_in
@require_GET
def detail(request: HttpRequest, model_id: str) -> HttpResponse:
    model = access.get_model_for(owner_of(request), model_id)
    numbers = model.metrics if isinstance(model.metrics, dict) else {}
    scores = presenters.scores(numbers)
    # Exact match is among the scores, if it is a metric of the task.
    shown = [row for row in METRICS if not (scores and row[0] == "exact_match")]
    metrics = [(label, numbers[name], unit) for name, label, unit in shown if numbers.get(name) is not None]
    context = {
        "model": model,
        "parent": _parent(model),
        "aliases_text": "\n".join(model.aliases or []),
        "can_be_base": base_models.can_be_base(model),
        "metrics": metrics,
        "scores": scores,
        "verdict": (model.verdict or {}).get("sentence", ""),
        "details": _details(model),
        "export_check": _export_check(model.export_check if isinstance(model.export_check, dict) else {}),
        "typed": playground.defaults_for(model),
    }
    return render(request, "jobs/model_detail.html", context)


def _parent(model: TunedModel) -> TunedModel | None:
    """The fine-tuned model it started from, if any and if it still exists."""
    if not model.base.startswith("ft:"):
        return None
    try:
        return access.get_model_for(model.owner, model.base)
    except access.NotFound:
        return None


def _details(model: TunedModel) -> list[tuple[str, str]]:
    rows = [
        ("ID", model.model_id),
        ("Base", model.base),
        ("Method", "LoRA" if model.method == "lora" else "Full fine-tuning"),
        ("Trained on", ROWS.get(model.trained_on, "")),
        ("Task", _task(model)),
        ("Step", count(model.step) if model.step else ""),
        ("Size", size(model.bytes)),
    ]
    return [row for row in rows if row[1]]


def _task(model: TunedModel) -> str:
    task = tuned_models.task_of(model)
    return task.label.capitalize() if task else ""


def _export_check(result: dict[str, Any]) -> str:
    """The result of the export check: before publication, an export is loaded and compared with the trained weights."""
    if not result:
        return ""
    sentence = result.get("sentence") or result.get("message")
    return str(sentence or "The exported files were loaded and gave the same results as the trained model.")


@signed_in_async
@require_GET
async def download(request: HttpRequest, model_id: str) -> HttpResponseBase:
    """A zip of the Hugging Face files, created while it is sent: nothing is kept in memory or on disk."""
    model = await sync_to_async(access.get_model_for)(owner_of(request), model_id)
    response = StreamingHttpResponse(tuned_models.archive(model), content_type="application/zip")
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(model_id.replace(':', '-'))}.zip"
    response["X-Accel-Buffering"] = "no"
    return response


@signed_in
@require_POST
def aliases(request: HttpRequest, model_id: str) -> HttpResponse:
    try:
        model = tuned_models.set_aliases(owner_of(request), model_id, request.POST.get("aliases", "").split())
    except tuned_models.BadAlias as refusal:
        messages.error(request, str(refusal))
    else:
        messages.success(
            request,
            f"The model can now also be used as {' or '.join(model.aliases)}."
            if model.aliases
            else "All aliases were removed.",
        )
    return redirect("jobs:model", model_id)


@signed_in
@require_POST
def delete(request: HttpRequest, model_id: str) -> HttpResponse:
    tuned_models.delete(owner_of(request), model_id)
    messages.success(request, "The model and its files were deleted.")
    return redirect("jobs:models")
