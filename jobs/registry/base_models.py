"""Base models of jobs: the catalog, bases that an administrator imported, the user's tuned models, and models of the Hugging
Face Hub that were checked and added.

A job stores a snapshot of its base (`Job.base_snapshot`): the Hub's revision, or the files of an imported or tuned model with
their SHA-256. This ensures that every attempt starts from the same weights, and that a model of the Hub cannot change after its check.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.registry import hub_models, imported_bases, tuned_models
from jobs.store import access, blobs, tables
from jobs.store.errors import Refused
from jobs.store.tables import HubModel, Job, TunedModel
from training.plan import catalog, hub
from training.plan.catalog import BaseModel
from training.plan.events import Failure

MAX_HUB_MODELS = 100  # the most that one user can add
MAX_LISTED = 100  # the most tuned models in a list to choose from

Snapshot = dict[str, Any]  # a BaseModel, its revision or files, and keys that are stored (`root`, `reads_as`)


def pin(owner: str, name: str) -> Snapshot:
    """The snapshot that a job stores of its base. Raises access.NotFound, also for another user's model."""
    if known := catalog.find(name):
        return {"id": known.id}
    if row := get_added(owner, name):
        return dict(row.snapshot)
    snapshot = _of_tuned(access.get_model_for(owner, name))
    if snapshot is None:
        raise access.NotFound(f"There is no model {name}.")
    return snapshot


def find(owner: str, name: str) -> BaseModel | None:
    """The description of a base model that the user can train; None if there is no such base."""
    try:
        return from_snapshot(pin(owner, name))
    except access.NotFound:
        return None


def of_job(job: Job) -> BaseModel | None:
    return from_snapshot(job.base_snapshot or {"id": job.base})


def from_snapshot(snapshot: Mapping[str, Any]) -> BaseModel | None:
    known = catalog.find(str(snapshot.get("id")))
    if known is not None:
        return known
    if not snapshot.get("parameters"):
        return None
    return BaseModel(**{name: snapshot[name] for name in BaseModel.__dataclass_fields__ if name in snapshot})


def root_id(snapshot: Mapping[str, Any]) -> str:
    """The model from the catalog, the Hub or an import at the start of a chain of tuned models. Model IDs contain its name."""
    return str(snapshot.get("root") or snapshot["id"])


def tokenizer_family(snapshot: Mapping[str, Any]) -> str:
    """A name shared by all bases with the same tokenizer, chat template and context length. A tuned model belongs to the
    family of its base, and all sizes of GPT-2 belong to the same one."""
    if snapshot.get("reads_as"):
        return str(snapshot["reads_as"])
    id = str(snapshot["id"])
    if id in {model.id for model in catalog.GPT2_FAMILY}:
        return "gpt2"
    return f"{id}@{str(snapshot['revision'])[:12]}" if snapshot.get("revision") else id


def list_tuned(owner: str) -> list[BaseModel]:
    """A user's tuned models, newest first."""
    snapshots = (_of_tuned(model) for model in access.list_models(owner, MAX_LISTED))
    return [model for snapshot in snapshots if snapshot and (model := from_snapshot(snapshot))]


def can_be_base(model: TunedModel) -> bool:
    return _of_tuned(model) is not None


def list_imported() -> list[BaseModel]:
    """Those that an administrator imported, for all users."""
    return [model for row in imported_bases.list_all() if (model := from_snapshot(row.snapshot))]


def list_hub(owner: str) -> list[BaseModel]:
    """Models of the Hub that this user added."""
    rows = tables.rows(HubModel, owner)
    return [model for row in rows if (model := from_snapshot(row.snapshot))]


def get_added(owner: str, name: str) -> HubModel | None:
    """The row of an imported base, or of a model of the Hub, if this user added it and the administrator still allows it."""
    if not hub_models.is_id(name):
        return imported_bases.find(name)
    row = tables.get(HubModel, owner, name)
    if row is not None:
        try:
            hub_models.check_allowed(name)
        except Refused:
            return None
    return row


def add_hub_model(owner: str, name: str) -> str:
    """Checks a model of the Hub and adds it to this user's list. Returns its ID. Raises Refused."""
    if known := catalog.find(name):
        return known.id
    description = hub_models.fetch_description(name)
    others = {row.name for row in tables.rows(HubModel, owner)} - {description.model.id}
    if len(others) >= MAX_HUB_MODELS:
        raise hub_models.unavailable(
            f"You have already added {MAX_HUB_MODELS} models from the Hub, which is the limit. Choose one of them."
        )
    snapshot = description.model.as_dict() | {"revision": description.revision}
    HubModel(owner, description.model.id, snapshot=snapshot, checked_at=time.time()).save()
    return description.model.id


def remove_hub_model(owner: str, name: str) -> bool:
    """Takes a model of the Hub off this user's list; False if it is not in it. Jobs keep their snapshot of it."""
    if not hub_models.is_id(name) or tables.get(HubModel, owner, name) is None:
        return False
    tables.remove(HubModel, owner, name)
    return True


def _of_tuned(model: TunedModel) -> Snapshot | None:
    """The snapshot of a tuned model that is used as a base, with the architecture of its own base; None if that is unknown."""
    parent = dict(model.base_snapshot or {"id": model.base})
    architecture = from_snapshot(parent)
    if architecture is None or not model.files:
        return None
    about = f"Your model, tuned from {model.base}."
    tuned = replace(
        architecture, id=model.model_id, name=model.name, about=about, download=int(model.bytes), folder=""
    )
    return tuned.as_dict() | {
        "root": root_id(parent),
        "reads_as": tokenizer_family(parent),
        "prefix": model.prefix,
        "files": list(model.files),
    }


# ---- on a worker -----------------------------------------------------------------------------------------------------


def folder(base: str, snapshot: Mapping[str, Any] | None, *, only: str = "all") -> Path:
    """The base's folder on this machine, verified, and fetched if necessary. `only="tokenizer"` skips the weights. Raises
    Failure, or a storage error if another attempt may succeed."""
    snapshot = snapshot or {}
    if known := catalog.find(base):
        return Path(known.folder) if known.folder else _from_hub(known.id, None, only, with_token=True)
    if snapshot.get("files"):
        files = [
            file for file in snapshot["files"] if only == "all" or not file["name"].endswith(".safetensors")
        ]
        try:
            path = tuned_models.fetch_files(str(snapshot["prefix"]), files)
        except blobs.Missing as error:
            advice = "Start a new job from another base."
            raise Failure("base_model", "The model this job starts from was deleted.", advice) from error
        return path if only == "tokenizer" else hub.check(path)
    if not snapshot.get("revision"):
        raise Failure(
            "base_model", f"{base} has not been checked on this server.", "Choose it again in a new job."
        )
    try:
        hub_models.check_allowed(base)
    except Refused as refused:
        raise Failure("base_model", str(refused)) from refused
    return _from_hub(base, str(snapshot["revision"]), only, with_token=hub_models.is_listed(base))


def _from_hub(name: str, revision: str | None, only: str, *, with_token: bool) -> Path:
    """The trainer has no network and no token, so models of the Hub are fetched here."""
    path = hub.fetch(name, revision, with_token=with_token, only=only)
    return path if only == "tokenizer" else hub.check(path)
