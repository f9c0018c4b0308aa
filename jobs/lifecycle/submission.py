"""What a person asks for: checked against what they may use, and made into the row of a job. Nothing is written here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.datasets import reports
from jobs.registry import base_models
from jobs.store import access
from jobs.store.tables import Dataset, Job, time_of
from training.plan.config import ConfigError, parse, stored_names


class Refused(Exception):
    """This cannot be done; `field` names what to change, the message says how."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(message)


@dataclass(frozen=True)
class JobRequest:
    """What a person asks for."""

    base: str
    dataset_id: str
    name: str = ""
    validation_dataset_id: str | None = None
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # training.plan.config.FIELDS; left out = automatic
    prompts: tuple[str, ...] = ()  # pinned prompts for samples
    suffix: str = ""
    seed: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    api: Mapping[str, Any] | None = None  # what `/v1` was sent, to answer in the same words
    needs: Mapping[str, Any] = field(default_factory=dict)  # {"memory": bytes, "gpu": true}
    start_from: Mapping[str, Any] | None = None  # set by `retry`
    base_snapshot: Mapping[str, Any] | None = None  # set by `retry`: the very base of the job it repeats

    def hash(self) -> str:
        body = json.dumps(
            {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "base_snapshot"},
            sort_keys=True,
            default=dict,
        )
        return hashlib.sha256(body.encode()).hexdigest()


def check(owner: str, request: JobRequest) -> list[Dataset]:
    try:
        parse(request.settings)
    except ConfigError as error:
        raise Refused(error.field, error.message) from error
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", request.suffix):
        raise Refused("suffix", "Use up to 64 letters, digits, dots, dashes and underscores.")
    if not request.base or len(request.base) > 300 or not request.base.isascii():
        raise Refused("base", "Name a base model.")
    if len(request.name) > 200:
        raise Refused("name", "Give a name of at most 200 characters.")
    found = []
    for where in ("dataset_id", "validation_dataset_id"):
        dataset_id = getattr(request, where)
        if where == "validation_dataset_id" and not dataset_id:
            continue
        try:
            dataset = access.get_dataset_for(owner, dataset_id)
        except access.NotFound as error:
            raise Refused(where, f"There is no dataset {dataset_id}. Upload it first.") from error
        if dataset.status == "rejected":
            raise Refused(where, f"The dataset was refused: {dataset.error or 'its report says why'}")
        found.append(dataset)
    return found


def pin_base(owner: str, request: JobRequest) -> Mapping[str, Any]:
    try:
        pinned = base_models.pin(owner, request.base)
    except access.NotFound as error:
        raise Refused(
            "base",
            f"There is no model {request.base} to start from. Choose one of the list, or add it from the Hub.",
        ) from error
    return request.base_snapshot or pinned


def new_job(owner: str, job_id: str, request: JobRequest, datasets: list[Dataset], slug: str) -> Job:
    own = reports.uses_default_tokenizer(request.base_snapshot or {"id": request.base})
    ready = own and all(dataset.status == "ready" for dataset in datasets)
    parts = [
        "ft",
        base_models.root_id(request.base_snapshot or {"id": request.base}),
        slug or owner[-8:].lower(),
        request.suffix,
        job_id[-8:].lower(),
    ]
    stored = stored_names(request.settings)
    job = Job(
        owner,
        job_id,
        name=request.name or datasets[0].name,
        base=request.base,
        base_snapshot=dict(request.base_snapshot) if request.base_snapshot else None,
        method=str(stored.get("method") or "full"),
        dataset_id=request.dataset_id,
        dataset_name=datasets[0].name,
        validation_dataset_id=request.validation_dataset_id or None,
        settings=stored,
        prompts=list(request.prompts),
        suffix=request.suffix,
        seed=request.seed,
        metadata=dict(request.metadata),
        api=dict(request.api) if request.api is not None else None,
        needs=dict(request.needs),
        model_id=":".join(parts),
        body_hash=request.hash(),
        status="queued" if ready else "validating",
        created_at=time_of(job_id),
    )
    if request.start_from:
        # The pointer stands from the beginning, so the first attempt goes on there as any later one would.
        job.start_from = dict(request.start_from)
        job.checkpoint_key, job.checkpoint_step = request.start_from["key"], request.start_from["step"]
        job.checkpoints = [dict(request.start_from)]
    return job


def clone_request(job: Job) -> JobRequest:
    """The same wish again, from the start."""
    return JobRequest(
        base=job.base,
        dataset_id=job.dataset_id,
        name=job.name,
        validation_dataset_id=job.validation_dataset_id,
        settings=job.settings,
        prompts=tuple(job.prompts),
        suffix=job.suffix,
        seed=None if job.seed is None else int(job.seed),
        metadata=job.metadata,
        api=job.api,
        needs=job.needs,
    )
