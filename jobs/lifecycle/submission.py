"""Checks a job request against what its owner may use, and turns it into the row of a job. Writes nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from jobs.datasets import reports
from jobs.registry import base_models
from jobs.store import access
from jobs.store.errors import Refused
from jobs.store.states import DatasetStatus, JobStatus
from jobs.store.tables import Dataset, Job, time_of
from training.data.summary import ONE_ANSWER, PREFERENCES, Summary
from training.plan import tasks
from training.plan.config import SCHEMA, ConfigError, check_held_out, parse, stored_names

NOT_SET = (None, "", "auto")
# Fields of JobRequest that are always part of its hash. Stored hashes hold exactly these: never change the list.
HASHED = frozenset(
    {
        "base",
        "dataset_id",
        "name",
        "validation_dataset_id",
        "settings",
        "prompts",
        "suffix",
        "seed",
        "metadata",
        "api",
        "needs",
        "start_from",
    }
)


@dataclass(frozen=True)
class JobRequest:
    """What a user requests."""

    base: str
    dataset_id: str
    name: str = ""
    validation_dataset_id: str | None = None
    # Keys are those of training.plan.config.FIELDS. Missing settings are automatic.
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_schema: int = SCHEMA  # its defaults are those of missing settings
    prompts: tuple[str, ...] = ()  # pinned prompts for samples
    suffix: str = ""
    seed: int | None = None  # used if `settings` has no seed; new_job moves it there
    metadata: Mapping[str, str] = field(default_factory=dict)
    api: Mapping[str, Any] | None = (
        None  # from the body sent to `/v1`, so that responses can repeat the caller's own values
    )
    needs: Mapping[str, Any] = field(default_factory=dict)  # {"memory": bytes, "gpu": true}
    start_from: Mapping[str, Any] | None = None  # set by `retry`
    base_snapshot: Mapping[str, Any] | None = (
        None  # set by `retry`: the snapshot of the base that the earlier job used
    )

    def hash(self) -> str:
        """Tells whether a repeated idempotency key sends the same request.

        A field that is not in HASHED counts only if it differs from its default, so that a new field leaves the hashes
        of jobs stored before unchanged.
        """
        hashed = {}
        for each in fields(self):
            value = getattr(self, each.name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name in HASHED or (each.name != "base_snapshot" and value != default):
                hashed[each.name] = value
        return hashlib.sha256(json.dumps(hashed, sort_keys=True, default=dict).encode()).hexdigest()


def check(owner: str, request: JobRequest) -> list[Dataset]:
    try:
        check_held_out(parse(request.settings, request.settings_schema), bool(request.validation_dataset_id))
    except ConfigError as error:
        raise Refused(error.message, field=error.field) from error
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", request.suffix):
        raise Refused("Use up to 64 letters, digits, dots, hyphens and underscores.", field="suffix")
    if not request.base or len(request.base) > 300 or not request.base.isascii():
        raise Refused("Choose a base model.", field="base")
    if len(request.name) > 200:
        raise Refused("Enter a name of at most 200 characters.", field="name")
    datasets = []
    for name in ("dataset_id", "validation_dataset_id"):
        dataset_id = getattr(request, name)
        if name == "validation_dataset_id" and not dataset_id:
            continue
        try:
            dataset = access.get_dataset_for(owner, dataset_id)
        except access.NotFound as error:
            raise Refused(f"There is no dataset {dataset_id}. Upload it first.", field=name) from error
        if dataset.status == DatasetStatus.REJECTED:
            raise Refused(f"The dataset was rejected: {dataset.error or 'see its report.'}", field=name)
        if holds_preferences(dataset):
            raise Refused(f"{PREFERENCES} {ONE_ANSWER}", field=name)
        datasets.append(dataset)
    if refusal := task_refusal(request.settings, datasets[0]):
        raise Refused(refusal, field="task")
    return datasets


def task_refusal(settings: Mapping[str, Any], dataset: Dataset) -> str:
    """Why the rows cannot be used for the task in these settings; empty if they can, or are not counted yet."""
    return tasks.refusal(parse(settings or {}).task, task_rows(dataset))


def task_rows(dataset: Dataset) -> dict[str, int]:
    """What the task is guessed from; empty for datasets from before it was counted."""
    return Summary.from_dict(dataset.summary or {}).task_rows


def holds_preferences(dataset: Dataset) -> bool:
    return (dataset.summary or {}).get("kind") == "preference"


def pin_base(owner: str, request: JobRequest) -> Mapping[str, Any]:
    try:
        pinned = base_models.pin(owner, request.base)
    except access.NotFound as error:
        raise Refused(
            f"There is no base model {request.base}. Choose one from the list, or add it from the Hub.",
            field="base",
        ) from error
    return request.base_snapshot or pinned


def check_base(datasets: list[Dataset], request: JobRequest) -> None:
    """Raises Refused if a report already says that this base cannot be trained on the dataset, or not with the
    sequence length that was chosen."""
    snapshot = request.base_snapshot or {"id": request.base}
    if refusal := reports.refusal_for(datasets[0], snapshot):
        raise Refused(refusal, field="dataset_id")
    if refusal := reports.cut_answers(datasets[0], snapshot, request.settings):
        raise Refused(refusal, field="sequence_length")


def new_job(owner: str, job_id: str, request: JobRequest, datasets: list[Dataset], slug: str) -> Job:
    own = reports.uses_default_tokenizer(request.base_snapshot or {"id": request.base})
    ready = own and all(dataset.status == DatasetStatus.READY for dataset in datasets)
    parts = [
        "ft",
        base_models.root_id(request.base_snapshot or {"id": request.base}),
        slug or owner[-8:].lower(),
        request.suffix,
        job_id[-8:].lower(),
    ]
    stored = stored_names(request.settings)
    if request.seed is not None and stored.get("seed") in NOT_SET:
        stored["seed"] = request.seed  # the job's seed is stored only here
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
        settings_schema=request.settings_schema,
        prompts=list(request.prompts),
        suffix=request.suffix,
        metadata=dict(request.metadata),
        api=dict(request.api) if request.api is not None else None,
        needs=dict(request.needs),
        model_id=":".join(parts),
        body_hash=request.hash(),
        status=JobStatus.QUEUED if ready else JobStatus.VALIDATING,
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

    Rows written by earlier versions may have a second seed outside of the settings, which those versions trained with. A
    job that has started keeps that seed. Before the start, a seed in the settings, set by editing the job, takes
    precedence.
    """
    settings = dict(job.settings or {})
    if job.seed is not None:
        started_with = ((job.plan or {}).get("settings") or {}).get("seed")
        if started_with is not None:
            settings["seed"] = int(started_with)
        elif job.checkpoint_step is not None or settings.get("seed") in NOT_SET:
            settings["seed"] = int(job.seed)
    return settings


def schema_of(job: Job) -> int:
    """The version of the settings' schema that the job was submitted with."""
    return int(job.settings_schema or 1)


def clone_request(job: Job) -> JobRequest:
    """The request that would create the same job again, starting from the beginning."""
    return JobRequest(
        base=job.base,
        dataset_id=job.dataset_id,
        name=job.name,
        validation_dataset_id=job.validation_dataset_id,
        settings=settings_of(job),
        settings_schema=schema_of(job),
        prompts=tuple(job.prompts),
        suffix=job.suffix,
        metadata=job.metadata,
        api=job.api,
        needs=job.needs,
    )
