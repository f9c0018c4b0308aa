"""Tuned models: the list, a model's page, its files as one zip."""

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
from jobs.views import playground
from jobs.views.decorators import for_people, for_people_async, owner_of

PAGE = 20
METRICS = (
    ("loss", "Held-out loss", "loss"),
    ("exact_match", "Exact match", "percent"),
    ("accuracy", "Token accuracy", "percent"),
    ("perplexity", "Perplexity", "loss"),
)


@for_people
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    page = access.list_models(owner_of(request), PAGE, request.GET.get("after") or None)
    rows = sorted(page, key=lambda model: -model.created_at)
    more = page.rows[-1].model_id if page.has_more else ""
    return render(request, "jobs/model_list.html", {"rows": rows, "more": more})


@for_people
@require_GET
def detail(request: HttpRequest, model_id: str) -> HttpResponse:
    model = access.get_model_for(owner_of(request), model_id)
    numbers = model.metrics if isinstance(model.metrics, dict) else {}
    metrics = [
        (label, numbers[name], shape) for name, label, shape in METRICS if numbers.get(name) is not None
    ]
    context = {
        "model": model,
        "parent": _parent(model),
        "can_go_on": base_models.can_be_base(model),
        "metrics": metrics,
        "verdict": (model.verdict or {}).get("sentence", ""),
        "facts": _facts(model),
        "fidelity": _fidelity(model.export_check if isinstance(model.export_check, dict) else {}),
        "typed": {"mode": "prompt", **playground.DEFAULTS},
    }
    return render(request, "jobs/model_detail.html", context)


def _parent(model: TunedModel) -> TunedModel | None:
    """The tuned model it began with, if it did and that is still there."""
    if not model.base.startswith("ft:"):
        return None
    try:
        return access.get_model_for(model.owner, model.base)
    except access.NotFound:
        return None


def _facts(model: TunedModel) -> list[tuple[str, str]]:
    facts = [
        ("Id", model.model_id),
        ("Base", model.base),
        ("Method", "LoRA" if model.method == "lora" else "Full: every weight"),
        ("Step", count(model.step) if model.step else ""),
        ("Size", size(model.bytes)),
    ]
    return [fact for fact in facts if fact[1]]


def _fidelity(found: dict[str, Any]) -> str:
    """The export was loaded again and compared with the trained weights before anybody could have it."""
    if not found:
        return ""
    told = found.get("sentence") or found.get("message")
    return (
        str(told)
        if told
        else "The exported files were loaded again and gave the same answers as the trained model."
    )


@for_people_async
@require_GET
async def download(request: HttpRequest, model_id: str) -> HttpResponseBase:
    """A zip of the Hugging Face files, made while it is sent: nothing of it is held in memory or on disk."""
    model = await sync_to_async(access.get_model_for)(owner_of(request), model_id)
    response = StreamingHttpResponse(tuned_models.archive(model), content_type="application/zip")
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(model_id.replace(':', '-'))}.zip"
    response["X-Accel-Buffering"] = "no"
    return response


@for_people
@require_POST
def aliases(request: HttpRequest, model_id: str) -> HttpResponse:
    try:
        model = tuned_models.set_aliases(owner_of(request), model_id, request.POST.get("aliases", "").split())
    except tuned_models.BadAlias as refusal:
        messages.error(request, str(refusal))
    else:
        messages.success(
            request,
            f"Programs may now also call it {' or '.join(model.aliases)}."
            if model.aliases
            else "It has its own name only.",
        )
    return redirect("jobs:model", model_id)


@for_people
@require_POST
def delete(request: HttpRequest, model_id: str) -> HttpResponse:
    tuned_models.delete(owner_of(request), model_id)
    messages.success(request, "The model and its files are deleted.")
    return redirect("jobs:models")
