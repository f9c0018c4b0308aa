"""The playground: a prompt or a chat message, answered by the fine-tuned model and its base, token by token."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_http_methods, require_POST

from jobs.forms import GenerateForm
from jobs.inference import generation
from jobs.inference.generation import GenerateRequest
from jobs.registry import base_models, tuned_models
from jobs.store import access
from jobs.store.tables import TunedModel
from jobs.views.decorators import owner_of, signed_in_async
from training.plan import catalog
from training.plan.catalog import BaseModel

MODES = {"chat": "chat", "completion": "prompt", "text": "prompt"}  # by what a model was trained on
DEFAULTS: dict[str, Any] = {"temperature": 0, "top_p": 1, "max_tokens": 128}


@signed_in_async
@require_http_methods(["GET", "POST"])
async def page(request: HttpRequest) -> HttpResponseBase:
    """GET shows the form. POST is for browsers without JavaScript: it waits for the whole answer and shows it."""
    owner = owner_of(request)
    models = list(await sync_to_async(access.list_models)(owner, 50))
    chosen = (
        request.POST.get("model")
        or request.GET.get("model")
        or (models[0].model_id if models else catalog.STARTER)
    )
    tuned = next((model for model in models if model.model_id == chosen), None)
    context: dict[str, Any] = {
        "models": models,
        "chosen": chosen,
        "base": tuned.base if tuned else "",
        "bases": await sync_to_async(_bases_on_this_server)(),
        "typed": {"prompt": request.GET.get("prompt", ""), **defaults_for(tuned)},
        "answers": [],
        "form": GenerateForm(),
    }
    if request.method == "POST":
        form = GenerateForm(request.POST)
        context |= {"form": form, "typed": {**DEFAULTS, **request.POST.dict()}}
        if form.is_valid():
            context["answers"] = [
                await _complete(owner, form.cleaned_data, model)
                for model in _models_to_run(form, context["base"])
            ]
    return await sync_to_async(render)(request, "jobs/playground.html", context)


def _bases_on_this_server() -> list[BaseModel]:
    """Those that need no download from the Hub."""
    return [*(base for base in catalog.base_models() if base.folder), *base_models.list_imported()]


def defaults_for(model: TunedModel | None) -> dict[str, Any]:
    """What the form starts with: the input type of the rows the model was trained on, and room for an answer of its
    task."""
    task = tuned_models.task_of(model) if model else None
    typed = {**DEFAULTS, "mode": MODES.get(model.trained_on if model else "", "prompt")}
    return typed | ({"max_tokens": task.max_tokens} if task else {})


def _models_to_run(form: GenerateForm, base: str) -> list[str]:
    model = form.cleaned_data["model"]
    return [model, base] if form.cleaned_data.get("compare") and base and base != model else [model]


async def _complete(owner: str, data: dict[str, Any], model: str) -> dict[str, str]:
    try:
        answer = await generation.complete(owner, _request(data, model))
    except access.NotFound:
        return {"model": model, "error": "This model does not exist or was deleted. Choose another one."}
    except (generation.Busy, generation.Failed) as error:
        return {"model": model, "error": str(error)}
    [choice] = answer.choices
    return {"model": model, "text": shown_text(answer.texts[0], choice.get("tool_calls", []))}


def shown_text(text: str, calls: list[dict[str, str]]) -> str:
    """An answer with its tool calls, as playground.js shows it, too."""
    lines = [f"Calls {call['name']} with {call['arguments']}" for call in calls]
    return "\n".join([text, *lines] if text else lines)


def _request(data: dict[str, Any], model: str) -> GenerateRequest:
    parameters: dict[str, Any] = {
        name: default if data.get(name) is None else data[name] for name, default in DEFAULTS.items()
    }
    if data.get("mode") == "chat":
        messages = [{"role": "user", "content": data["prompt"]}]
        return GenerateRequest(model, messages=messages, tools=data["tools"], **parameters)
    return GenerateRequest(model, prompt=data["prompt"], **parameters)


@signed_in_async
@require_POST
async def stream(request: HttpRequest) -> HttpResponseBase:
    """One model's answer, streamed as JSON lines. Closing the connection stops the generation."""
    form = GenerateForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"error": " ".join(form.error_lines())}, status=422)
    data = form.cleaned_data
    tokens = generation.stream(owner_of(request), _request(data, data["model"]))
    try:
        first = await anext(tokens)  # so that a refusal becomes a response with a status, not a broken stream
    except access.NotFound:
        return JsonResponse(
            {"error": "This model does not exist or was deleted. Choose another one."}, status=404
        )
    except generation.Busy as busy:
        return JsonResponse({"error": str(busy)}, status=429, headers={"Retry-After": str(busy.retry_after)})
    except generation.Failed as failed:
        return JsonResponse({"error": failed.message}, status=502)
    response = StreamingHttpResponse(_lines(first, tokens), content_type="application/x-ndjson")
    response["X-Accel-Buffering"] = "no"
    return response


async def _lines(first: dict[str, Any], tokens: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        yield json.dumps(first).encode() + b"\n"
        async for line in tokens:
            yield json.dumps(line).encode() + b"\n"
    except generation.Failed as failed:
        yield json.dumps({"t": "error", "message": failed.message}).encode() + b"\n"
    finally:
        await tokens.aclose()  # type: ignore[attr-defined]  # inference.stream is an async generator
