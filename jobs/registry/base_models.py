"""What a job can start from: the catalogue, tuned models of one's own, and models of the Hub that were checked and added.

A job keeps what it starts from as it was then (`Job.base_snapshot`): the Hub's revision, or a tuned model's files with their
sha256. So every attempt starts from the same weights, and a model of the Hub can't change after its check.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.registry import hub_models, tuned_models
from jobs.store import access, blobs, tables
from jobs.store.tables import HubModel, Job, TunedModel
from training.plan import catalog, hub
from training.plan.catalog import BaseModel
from training.plan.events import Failure

MOST = 100  # models of the Hub that one person may add
SHOWN = 100  # of their tuned models, in a list to choose from

Facts = dict[str, Any]


def pin(owner: str, name: str) -> Facts:
    """What a job keeps of its base. Raises access.NotFound: somebody else's model is as unknown as none at all."""
    if known := catalog.find(name):
        return {"id": known.id}
    if row := get_hub_model(owner, name):
        return dict(row.snapshot)
    facts = _of_tuned(access.get_model_for(owner, name))
    if facts is None:
        raise access.NotFound(f"There is no model {name}.")
    return facts


def find(owner: str, name: str) -> BaseModel | None:
    """What a person should know of a base before choosing it; None for what they can't start from."""
    try:
        return from_snapshot(pin(owner, name))
    except access.NotFound:
        return None


def of_job(job: Job) -> BaseModel | None:
    return from_snapshot(job.base_snapshot or {"id": job.base})


def from_snapshot(facts: Mapping[str, Any]) -> BaseModel | None:
    known = catalog.find(str(facts.get("id")))
    if known is not None:
        return known
    if not facts.get("parameters"):
        return None
    return BaseModel(**{name: facts[name] for name in BaseModel.__dataclass_fields__ if name in facts})


def root_id(facts: Mapping[str, Any]) -> str:
    """The model of the catalogue or the Hub that it all began with: what a model's id is named after."""
    return str(facts.get("root") or facts["id"])


def tokenizer_family(facts: Mapping[str, Any]) -> str:
    """One name for all bases that read text alike (tokenizer, chat template, context): a tuned model reads as what it came
    from, and the sizes of GPT-2 read as one."""
    if facts.get("reads_as"):
        return str(facts["reads_as"])
    id = str(facts["id"])
    if id in {model.id for model in catalog.GPT2_FAMILY}:
        return "gpt2"
    return f"{id}@{str(facts['revision'])[:12]}" if facts.get("revision") else id


def list_tuned(owner: str) -> list[BaseModel]:
    """A person's own models, the newest first."""
    found = (_of_tuned(model) for model in access.list_models(owner, SHOWN))
    return [model for facts in found if facts and (model := from_snapshot(facts))]


def can_be_base(model: TunedModel) -> bool:
    return _of_tuned(model) is not None


def list_hub(owner: str) -> list[BaseModel]:
    """Models of the Hub that this person added."""
    rows = tables.rows(HubModel, owner)
    return [model for row in rows if (model := from_snapshot(row.snapshot))]


def get_hub_model(owner: str, name: str) -> HubModel | None:
    """The row of a model of the Hub, if this person added it and the operator still allows it."""
    row = tables.get(HubModel, owner, name) if hub_models.is_id(name) else None
    if row is not None:
        try:
            hub_models.check_allowed(name)
        except hub_models.Refused:
            return None
    return row


def add_hub_model(owner: str, name: str) -> str:
    """Checks a model of the Hub and adds it to this person's list. Returns its id. Raises hub_check.Refused."""
    if known := catalog.find(name):
        return known.id
    found = hub_models.look_up(name)
    others = {row.name for row in tables.rows(HubModel, owner)} - {found.model.id}
    if len(others) >= MOST:
        raise hub_models.Refused(f"You have added {MOST} models of the Hub, the most at a time.")
    facts = found.model.as_dict() | {"revision": found.revision}
    HubModel(owner, found.model.id, snapshot=facts, checked_at=time.time()).save()
    return found.model.id


def _of_tuned(model: TunedModel) -> Facts | None:
    """A tuned model as a base. It has the shape of what it came from; None where that isn't known."""
    before = dict(model.base_snapshot or {"id": model.base})
    shape = from_snapshot(before)
    if shape is None or not model.files:
        return None
    about = f"Your own, tuned from {model.base}."
    own = replace(
        shape, id=model.model_id, name=model.name, about=about, download=int(model.bytes), folder=""
    )
    return own.as_dict() | {
        "root": root_id(before),
        "reads_as": tokenizer_family(before),
        "prefix": model.prefix,
        "files": list(model.files),
    }


# ---- on a worker -----------------------------------------------------------------------------------------------------


def folder(base: str, facts: Mapping[str, Any] | None, *, only: str = "all") -> Path:
    """Where the base lies on this machine, fetched if need be and verified; `only="tokenizer"` leaves the weights where
    they are. Raises Failure, and the storage's errors for what may work the next time."""
    facts = facts or {}
    if known := catalog.find(base):
        return Path(known.folder) if known.folder else _from_hub(known.id, None, only, with_token=True)
    if facts.get("files"):
        files = [
            file for file in facts["files"] if only == "all" or not file["name"].endswith(".safetensors")
        ]
        try:
            found = tuned_models.fetch_files(str(facts["prefix"]), files)
        except blobs.Missing as error:
            advice = "Start a new job from another base."
            raise Failure("base_model", "The model this job starts from was deleted.", advice) from error
        return found if only == "tokenizer" else hub.check(found)
    if not facts.get("revision"):
        raise Failure("base_model", f"{base} was never checked here.", "Choose it again in a new job.")
    try:
        hub_models.check_allowed(base)
    except hub_models.Refused as refused:
        raise Failure("base_model", str(refused)) from refused
    return _from_hub(base, str(facts["revision"]), only, with_token=hub_models.is_listed(base))


def _from_hub(name: str, revision: str | None, only: str, *, with_token: bool) -> Path:
    """The trainer has no network and no token: models of the Hub are fetched here, by us."""
    found = hub.fetch(name, revision, with_token=with_token, only=only)
    return found if only == "tokenizer" else hub.check(found)
