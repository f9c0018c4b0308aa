"""`/models`: base models and the caller's tuned models, for generation and training."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from ninja import Router

from jobs.api import paging
from jobs.api.caller import READ, WRITE, CallerRequest
from jobs.api.errors import bad, not_found
from jobs.api.schemas.common import Deleted, Error, Page
from jobs.api.schemas.models import Model
from jobs.registry import base_models, hub_models, tuned_models
from jobs.store import access
from training.plan import catalog

router = Router(auth=READ)
Json = dict[str, Any]
ALL = 1_000_000  # no page size is needed, because a quota limits the number of models


def local_name(name: str) -> str:
    """Translates the caller's name of a model to ours. BASE_MODEL_ALIASES maps OpenAI's names; the aliases that users
    give to their own models are resolved by `tuned_models.get_for`."""
    return str(settings.BASE_MODEL_ALIASES.get(name, name))


def base_for_training(owner: str, name: str) -> str:
    """The ID of the base model to train. Raises a 400 that lists the available models and names the setting that maps other
    names. A Hub model is checked on first use. The caller's tuned models can be trained further."""
    wanted = local_name(name)
    known = base_models.find(owner, wanted)
    if known is None and (model := tuned_models.find(owner, wanted)):
        known = base_models.find(owner, model.model_id)
    if known is not None:
        return known.id
    if hub_models.is_id(wanted):
        return base_models.add_hub_model(owner, wanted)
    listed = ", ".join(base.id for base in _shared())
    raise bad(
        f"There is no base model '{name}'. Available: {listed}, your own tuned models, and models on the Hugging Face Hub "
        f"as owner/name. To keep client code unchanged, the administrator can map names with BASE_MODEL_ALIASES, for "
        f"example BASE_MODEL_ALIASES='{name}=gpt2'.",
        "model",
        "model_not_available",
    )


@router.get("", response={200: Page[Model], 400: Error}, summary="List models")
def list_models(request: CallerRequest, after: paging.After = None) -> Json:
    """Lists all base models and all of your tuned models on a single page, as OpenAI does."""
    owner = request.auth.owner
    known = [_base(base) for base in (*_shared(), *base_models.list_hub(owner))]
    tuned = [_tuned(row) for row in access.list_models(owner, ALL)]
    return paging.page(paging.rest([*known, *tuned], after), False)


@router.get("/{path:model}", response={200: Model, 404: Error}, summary="Retrieve a model")
def retrieve_model(request: CallerRequest, model: str) -> Json:
    known = catalog.find(local_name(model))
    if known is not None:
        return {**_base(known), "id": model}
    if added := base_models.get_added(request.auth.owner, local_name(model)):
        return {**_base(base_models.from_snapshot(added.snapshot)), "id": model}
    return {**_tuned(_find(request, local_name(model))), "id": model}


@router.delete(
    "/{path:model}", response={200: Deleted, 404: Error}, auth=WRITE, summary="Delete a tuned model"
)
def delete_model(request: CallerRequest, model: str) -> Json:
    """The name of a model on the Hub takes it off your base models."""
    owner = request.auth.owner
    if any(base.id == model for base in _shared()) or catalog.find(model):
        raise bad("Base models that all users share cannot be deleted.", "model", "not_deletable")
    if not base_models.remove_hub_model(owner, model):
        tuned_models.delete(owner, _find(request, model).model_id)
    return {"id": model, "object": "model", "deleted": True}


def _shared() -> list[catalog.BaseModel]:
    """The base models that all users have."""
    return [*catalog.base_models(), *base_models.list_imported()]


def _find(request: CallerRequest, model: str) -> Any:
    try:
        return tuned_models.get_for(request.auth.owner, model)
    except access.NotFound as error:
        raise not_found("model") from error


def _base(base: catalog.BaseModel | None) -> Json:
    assert base is not None  # a row always has its snapshot
    details = {
        "kind": "base",
        "parameters": base.parameters,
        "context": base.context,
        "licence": base.licence,
    }
    return {"id": base.id, "object": "model", "created": 0, "owned_by": "llmtuner", "llmtuner": details}


def _tuned(row: Any) -> Json:
    metrics = dict(row.metrics or {})
    details = {
        "kind": "tuned",
        "base": row.base,
        "job": row.job_id,
        "trained_on": row.trained_on,
        "step": int(row.step),
        "bytes": int(row.bytes),
        "scores": metrics.pop("scores", None),
        "metrics": metrics,
        "verdict": row.verdict,
        "fidelity": row.export_check,
        "aliases": row.aliases,
    }
    shown = {name: value for name, value in details.items() if value not in (None, "", {}, [])}
    return {
        "id": row.model_id,
        "object": "model",
        "created": int(row.created_at),
        "owned_by": row.owner,
        "llmtuner": shown,
    }
