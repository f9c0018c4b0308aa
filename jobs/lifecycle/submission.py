"""A job request: checked against what its owner may use, and turned into the row of a job. Nothing is written here."""

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

NOT_SET = (None, "", "auto")


class Refused(Exception):
    """The request cannot be accepted. `field` names what to change, and the message says how."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(message)


@dataclass(frozen=True)
class JobRequest:
    """What a user requests."""

    base: str
    dataset_id: str
    name: str = ""
    validation_dataset_id: str | None = None
    # Of training.plan.config.FIELDS; what is left out is automatic.
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()  # pinned prompts for samples
    suffix: str = ""
    seed: int | None = None  # used unless `settings` has one; new_job moves it there
    metadata: Mapping[str, str] = field(default_factory=dict)
    api: Mapping[str, Any] | None = None  # the body sent to `/v1`, to respond in the same terms
    needs: Mapping[str, Any] = field(default_factory=dict)  # {"memory": bytes, "gpu": true}
    start_from: Mapping[str, Any] | None = None  # set by `retry`
    base_snapshot: Mapping[str, Any] | None = None  # set by `retry`: the exact base of the job it repeats

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
        raise Refused("suffix", "Use up to 64 letters, digits, dots, hyphens and underscores.")
    if not request.base or len(request.base) > 300 or not request.base.isascii():
        raise Refused("base", "Choose a base model.")
    if len(request.name) > 200:
        raise Refused("name", "Enter a name of at most 200 characters.")
    datasets = []
    for name in ("dataset_id", "validation_dataset_id"):
        dataset_id = getattr(request, name)
        if name == "validation_dataset_id" and not dataset_id:
            continue
        try:
            dataset = access.get_dataset_for(owner, dataset_id)
        except access.NotFound as error:
            raise Refused(name, f"There is no dataset {dataset_id}. Upload it first.") from error
        if dataset.status == "rejected":
            raise Refused(name, f"The dataset was rejected: {dataset.error or 'see its report.'}")
        datasets.append(dataset)
    return datasets


def pin_base(owner: str, request: JobRequest) -> Mapping[str, Any]:
    try:
        pinned = base_models.pin(owner, request.base)
    except access.NotFound as error:
        raise Refused(
            "base",
            f"There is no base model {request.base}. Choose one from the list, or add it from the Hub.",
        ) from error
    return request.base_snapshot or pinned


def check_base(datasets: list[Dataset], snapshot: Mapping[str, Any]) -> None:
    """Raises Refused if a report already says that this base cannot be trained on the dataset."""
    if refusal := reports.refusal_for(datasets[0], snapshot):
        raise Refused("dataset_id", refusal)


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
    if request.seed is not None and stored.get("seed") in NOT_SET:
        stored["seed"] = request.seed  # a job has one seed, and this is where it is kept
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
        metadata=dict(request.metadata),
        api=dict(request.api) if request.api is not None else None,
        needs=dict(request.needs),
        model_id=":".join(parts),
        body_hash=request.hash(),
        status="queued" if ready else "validating",
        created_at=time_of(job_id),
    )
    if request.start_from:
        # The pointer is set from the start, so the first attempt resumes there as any later one would.
        job.start_from = dict(request.start_from)
        job.checkpoint_key, job.checkpoint_step = request.start_from["key"], request.start_from["step"]
        job.checkpoints = [dict(request.start_from)]
    return job


def settings_of(job: Job) -> dict[str, Any]:
    """The settings as requested, with the seed that the job trains with.

    Rows of earlier versions may have a second seed beside the settings. That one was used for training, so a job
    that has started keeps the seed it started with; until then, a seed set by editing counts.
    """
    settings = dict(job.settings or {})
    if job.seed is not None:
        started_with = ((job.plan or {}).get("settings") or {}).get("seed")
        if started_with is not None:
            settings["seed"] = int(started_with)
        elif job.checkpoint_step is not None or settings.get("seed") in NOT_SET:
            settings["seed"] = int(job.seed)
    return settings


def clone_request(job: Job) -> JobRequest:
    """The same request again, from the start."""
    return JobRequest(
        base=job.base,
        dataset_id=job.dataset_id,
        name=job.name,
        validation_dataset_id=job.validation_dataset_id,
        settings=settings_of(job),
        prompts=tuple(job.prompts),
        suffix=job.suffix,
        metadata=job.metadata,
        api=job.api,
        needs=job.needs,
    )
