"""`/models`: what one can generate with and train on: the studio's bases, and the models one has tuned."""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from ninja import Router

from jobs import access, tuned_models
from jobs.api import paging
from jobs.api.caller import READ, WRITE, CallerRequest
from jobs.api.errors import bad, not_found
from jobs.api.schemas import Deleted, Error, Model, Page
from training import catalog

router = Router(auth=READ)
Json = dict[str, Any]
# A model on the Hub: owner/name. Nothing that could be read as a path on this machine.
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def local_name(name: str) -> str:
    """What the studio calls the model that a caller calls so: OpenAI's names are mapped by BASE_MODEL_ALIASES."""
    return str(settings.BASE_MODEL_ALIASES.get(name, name))


def base_for_training(name: str) -> str:
    """The local base to train, or a 400 that says which there are and which setting maps foreign names."""
    wanted = local_name(name)
    known = catalog.find(wanted)
    if known is not None:
        return known.id
    if HUB_ID.fullmatch(wanted) and ".." not in wanted:
        return wanted
    bases = ", ".join(base.id for base in catalog.base_models())
    raise bad(
        f"The base model '{name}' is not here. This studio trains: {bases}, or any owner/name of the Hugging Face Hub. "
        f"To keep code unchanged, the operator maps names in the setting BASE_MODEL_ALIASES, for instance "
        f"BASE_MODEL_ALIASES='{name}=gpt2'.",
        "model",
        "model_not_available",
    )


@router.get("", response={200: Page[Model]}, summary="List models")
def list_models(request: CallerRequest) -> Json:
    """All bases and all tuned models, in one page as at OpenAI."""
    owner = request.auth.owner
    rows, has_more = paging.collect(
        lambda limit, after: access.list_models(owner, limit, after), lambda row: row.model_id, 1000, None
    )
    bases = [_base(base) for base in catalog.base_models()]
    return paging.page([*bases, *map(_tuned, rows)], has_more)


@router.get("/{path:model}", response={200: Model, 404: Error}, summary="Retrieve a model")
def retrieve_model(request: CallerRequest, model: str) -> Json:
    known = catalog.find(local_name(model))
    if known is not None:
        return {**_base(known), "id": model}
    return {**_tuned(_find(request, local_name(model))), "id": model}


@router.delete(
    "/{path:model}", response={200: Deleted, 404: Error}, auth=WRITE, summary="Delete a tuned model"
)
def delete_model(request: CallerRequest, model: str) -> Json:
    if catalog.find(model) is not None:
        raise bad("Base models come with the studio and cannot be deleted.", "model", "not_deletable")
    row = _find(request, model)
    tuned_models.delete(request.auth.owner, row.model_id)
    return {"id": model, "object": "model", "deleted": True}


def _find(request: CallerRequest, model: str) -> Any:
    try:
        return tuned_models.get_for(request.auth.owner, model)
    except access.NotFound as missing:
        raise not_found("model") from missing


def _base(base: catalog.BaseModel) -> Json:
    facts = {"kind": "base", "parameters": base.parameters, "context": base.context, "licence": base.licence}
    return {"id": base.id, "object": "model", "created": 0, "owned_by": "llmtuner", "llmtuner": facts}


def _tuned(row: Any) -> Json:
    facts = {
        "kind": "tuned",
        "base": row.base,
        "job": row.job_id,
        "step": int(row.step),
        "bytes": int(row.bytes),
        "metrics": row.metrics,
        "verdict": row.verdict,
        "fidelity": row.fidelity,
        "aliases": row.aliases,
    }
    shown = {name: value for name, value in facts.items() if value not in (None, "", {}, [])}
    return {
        "id": row.model_id,
        "object": "model",
        "created": int(row.created_at),
        "owned_by": row.owner,
        "llmtuner": shown,
    }
