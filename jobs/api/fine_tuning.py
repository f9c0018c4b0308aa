"""`/fine_tuning/jobs`: `jobs.lifecycle` in OpenAI's format."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict
from typing import Annotated, Any

from django.http import StreamingHttpResponse
from ninja import Query, Router

from accounts.auth import authenticate
from jobs.api import events, models, paging, results
from jobs.api.caller import READ, READ_STREAM, WRITE, CallerRequest, in_pool
from jobs.api.errors import bad, not_found
from jobs.api.schemas.common import Error, Page
from jobs.api.schemas.fine_tuning import Checkpoint, Hyperparameters, Job, JobCreate, JobEvent, ShownStatus
from jobs.events import event_log, history
from jobs.lifecycle import transitions
from jobs.lifecycle import warnings as job_warnings
from jobs.lifecycle.submission import settings_of, task_rows
from jobs.notifications import webhooks
from jobs.registry import base_models
from jobs.store import access, tables
from jobs.store.states import JobStatus
from jobs.store.tables import Job as Row
from training.plan import auto_settings, config, tasks
from training.plan.catalog import BaseModel

router = Router(auth=READ)
Json = dict[str, Any]
WINDOW_S = 600
NOT_SETTINGS = {"name", "prompts"}  # also under `llmtuner`
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@router.post("", response={200: Job, 400: Error, 429: Error}, auth=WRITE, summary="Create a fine-tuning job")
def create_job(request: CallerRequest, body: JobCreate) -> Json:
    """A repeated request does not create a second job. It is recognized by its `Idempotency-Key` or, without one, by its
    body, for ten minutes."""
    owner = request.auth.owner
    _refuse_unsupported(body)
    base = models.base_for_training(owner, body.model)
    job_request = transitions.JobRequest(
        name=str((body.llmtuner or {}).get("name") or body.suffix or ""),
        base=base,
        dataset_id=_file(owner, body.training_file, "training_file"),
        validation_dataset_id=_file(owner, body.validation_file, "validation_file")
        if body.validation_file
        else None,
        settings=_settings(owner, body, base),
        suffix=_suffix(body.suffix or ""),
        seed=body.seed,
        metadata=body.metadata or {},
        prompts=_prompts(body),
        api=_as_sent(body),
    )
    key = _idempotency(request, body)
    webhooks.set_email(owner, request.auth.user.notification_email)
    job = transitions.submit(owner, job_request, idempotency_key=key, slug=request.auth.slug)
    created = show(job)
    if "task" not in created["llmtuner"] and (task := _guessed_task(job)):
        created["llmtuner"]["task"] = task
    created["llmtuner"]["warnings"] = [asdict(warning) for warning in job_warnings.for_job(job)]
    return created


@router.get("", response={200: Page[Job], 400: Error}, summary="List jobs")
def list_jobs(
    request: CallerRequest, after: paging.After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Json:
    """Add `metadata[key]=value` to list only jobs with this metadata."""
    metadata = {
        match[1]: value for name, value in request.GET.items() if (match := _METADATA.fullmatch(name))
    }
    owner = request.auth.owner
    paging.check_after(Row, owner, after)
    jobs = access.list_jobs(owner, limit, after, metadata=metadata)
    return paging.page([show(job) for job in jobs], jobs.has_more)


@router.get("/{job_id}", response={200: Job, 404: Error}, summary="Retrieve a job")
def retrieve_job(request: CallerRequest, job_id: str) -> Json:
    return show(_find(request.auth.owner, job_id))


@router.post(
    "/{job_id}/cancel", response={200: Job, 400: Error, 404: Error}, auth=WRITE, summary="Cancel a job"
)
def cancel_job(request: CallerRequest, job_id: str) -> Json:
    return _set_desired(request, job_id, "cancel")


@router.post(
    "/{job_id}/pause", response={200: Job, 400: Error, 404: Error}, auth=WRITE, summary="Pause a job"
)
def pause_job(request: CallerRequest, job_id: str) -> Json:
    return _set_desired(request, job_id, "pause")


@router.post(
    "/{job_id}/resume", response={200: Job, 400: Error, 404: Error}, auth=WRITE, summary="Resume a job"
)
def resume_job(request: CallerRequest, job_id: str) -> Json:
    return _set_desired(request, job_id, "run")


@router.get(
    "/{job_id}/events",
    response={200: Page[JobEvent], 400: Error, 404: Error},
    auth=READ_STREAM,
    openapi_extra={"responses": {200: {"content": {"text/event-stream": {}}}}},
    summary="List a job's events",
)
async def list_events(
    request: CallerRequest,
    job_id: str,
    after: paging.After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    stream: Annotated[
        bool, Query(description="Stream all events, starting with the first, until the job ends.")
    ] = False,
) -> Any:
    """Newest first."""
    owner = request.auth.owner
    job = await in_pool(_find, owner, job_id)
    if not stream:
        rows, has_more = await in_pool(events.newest_first, owner, job, limit, after)
        return paging.page(rows, has_more)

    events.check_stream_quota(owner)

    async def still_allowed() -> bool:
        return await in_pool(authenticate, request) is not None

    response = StreamingHttpResponse(events.stream(job, still_allowed), content_type="text/event-stream")
    response["X-Accel-Buffering"] = "no"
    return response


@router.get(
    "/{job_id}/checkpoints",
    response={200: Page[Checkpoint], 400: Error, 404: Error},
    summary="List a job's checkpoints",
)
def list_checkpoints(
    request: CallerRequest,
    job_id: str,
    after: paging.After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Json:
    """Newest first. Each checkpoint is a model that can generate text, under its own name."""
    job = _find(request.auth.owner, job_id)
    names = _checkpoint_names(job)
    job_history = (
        history.JobHistory.from_events(event_log.read(request.auth.owner, job_id))
        if names
        else history.JobHistory()
    )
    times = {int(entry["step"]): entry.get("time") for entry in job.checkpoints}
    rows = [
        _checkpoint(job, step, names[step], times.get(step), job_history)
        for step in sorted(names, reverse=True)
    ]
    rows = paging.rest(rows, after)
    return paging.page(rows[:limit], len(rows) > limit)


# ---- requests ----------------------------------------------------------------------------------


def _refuse_unsupported(body: JobCreate) -> None:
    if body.method is not None and body.method.type != "supervised":
        raise bad(
            f"The method '{body.method.type}' is not supported yet. Use 'supervised'.",
            "method.type",
            "unsupported_method",
        )
    if body.integrations:
        raise bad(
            "Integrations are not supported. Leave the field out.", "integrations", "unsupported_parameter"
        )


def _file(owner: str, file_id: str, param: str) -> str:
    try:
        return access.get_dataset_for(owner, file_id).dataset_id
    except access.NotFound as error:
        raise bad(f"The file in {param} does not exist.", param, "invalid_file") from error


def _hyperparameters(body: JobCreate) -> Hyperparameters:
    if body.method and body.method.supervised and body.method.supervised.hyperparameters:
        return body.method.supervised.hyperparameters
    return body.hyperparameters or Hyperparameters()


def _settings(owner: str, body: JobCreate, base: str) -> Json:
    """OpenAI's three hyperparameters and our settings, validated together. If both are given, ours take precedence."""
    theirs = _hyperparameters(body)
    ours = {name: value for name, value in (body.llmtuner or {}).items() if name not in NOT_SETTINGS}
    settings: Json = {}
    adapter = _parsed(ours).adapter
    if isinstance(theirs.n_epochs, int):
        settings["epochs"] = theirs.n_epochs
    if isinstance(theirs.batch_size, int) and "batch_tokens" not in ours:
        settings["batch_size"] = theirs.batch_size
    if theirs.learning_rate_multiplier not in (None, "auto"):
        settings["learning_rate"] = _learning_rate(
            float(theirs.learning_rate_multiplier or 1), base_models.find(owner, base), adapter
        )
    if body.seed is not None:
        settings["seed"] = body.seed
    settings |= ours
    _parsed(settings)
    return settings


def _parsed(settings: Json) -> config.Settings:
    try:
        return config.parse(settings)
    except config.ConfigError as error:
        raise bad(error.message, f"llmtuner.{error.field}") from error


def _learning_rate(multiplier: float, base: BaseModel | None, adapter: str) -> float:
    """OpenAI multiplies the learning rate that it would choose; we multiply the one that we would choose."""
    if base is None:  # deleted at the same time
        raise bad("This base model no longer exists. Choose another one.", "model", "model_not_available")
    return float(f"{multiplier * auto_settings.learning_rate(adapter, base)[0]:.6g}")


def _prompts(body: JobCreate) -> tuple[str, ...]:
    prompts = (body.llmtuner or {}).get("prompts") or []
    if (
        not isinstance(prompts, list)
        or len(prompts) > 8
        or not all(isinstance(p, str) and len(p) <= 4000 for p in prompts)
    ):
        raise bad(
            "prompts must be a list of at most 8 strings of at most 4,000 characters each.",
            "llmtuner.prompts",
        )
    return tuple(prompts)


def _suffix(text: str) -> str:
    """OpenAI accepts any text. Our model IDs allow only letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")


def _as_sent(body: JobCreate) -> Json:
    """Stored with the job, so that responses repeat the caller's own values."""
    return {"model": body.model, "hyperparameters": _hyperparameters(body).model_dump(exclude_none=True)}


def _idempotency(request: CallerRequest, body: JobCreate) -> str:
    """The key that identifies the submission. Clients retry a POST when its response is lost, and most send no key. In
    that case, the same body within ten minutes means the same job, unless that job has ended."""
    key = request.headers.get("idempotency-key", "")
    if key:
        if not _KEY.fullmatch(key):
            raise bad("An Idempotency-Key must have 1 to 255 visible ASCII characters.", "idempotency-key")
        return f"key#{key}"
    text = json.dumps(body.model_dump(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    window = int(time.time() // WINDOW_S)
    for key in (f"body#{digest}#{window - 1}", f"body#{digest}#{window}"):
        # Once a job has ended, the same body may start another one, whose key is the first one's plus that job's ID.
        while (job := _submitted(request.auth.owner, key)) is not None:
            ended = job.ended or job.desired == "cancel"  # what the caller sees: see `_status`
            if not ended and time.time() - job.created_at < WINDOW_S:
                return key
            key += f"#{job.job_id}"
    return key


def _submitted(owner: str, key: str) -> Row | None:
    row = tables.get(tables.Usage, owner, "idem#" + hashlib.sha256(key.encode()).hexdigest())
    return tables.get(Row, owner, row.job_id) if row is not None and row.job_id else None


# ---- responses ---------------------------------------------------------------------------------


def _find(owner: str, job_id: str) -> Row:
    try:
        return access.get_job_for(owner, job_id)
    except access.NotFound as error:
        raise not_found("fine-tuning job") from error


def _set_desired(request: CallerRequest, job_id: str, desired: transitions.Desired) -> Json:
    _find(request.auth.owner, job_id)
    return show(transitions.set_desired(request.auth.owner, job_id, desired))


def show(job: Row) -> Json:
    succeeded = job.status == JobStatus.SUCCEEDED
    hyperparameters = _shown_hyperparameters(job)
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "error": _error(job),
        "fine_tuned_model": job.model_id if succeeded else None,
        "finished_at": int(job.ended_at) if job.ended_at else None,
        "hyperparameters": hyperparameters,
        "model": (job.api or {}).get("model", job.base),
        "organization_id": job.owner,
        "result_files": [results.id_for(job.job_id)] if succeeded else [],
        "seed": _seed(job),
        "status": _status(job),
        "trained_tokens": int((job.progress or {}).get("tokens") or 0) if succeeded else None,
        "training_file": job.dataset_id,
        "validation_file": job.validation_dataset_id or None,
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": job.metadata or {},
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "llmtuner": _extras(job),
    }


def _status(job: Row) -> ShownStatus:
    """A job that is being cancelled is shown as cancelled, as OpenAI shows it: a cancellation is never undone, and the
    worker sees it at its next heartbeat. The stored status is under `llmtuner`. A job that had already succeeded stays so."""
    if job.desired == "cancel" and not job.ended:
        return "cancelled"
    return _shown_status(JobStatus(job.status))


def _shown_status(status: JobStatus) -> ShownStatus:
    """OpenAI has no status for retries and incomplete submissions."""
    match status:
        case JobStatus.VALIDATING:
            return "validating_files"
        case JobStatus.QUEUED | JobStatus.RETRYING:
            return "queued"
        case JobStatus.RUNNING:
            return "running"
        case JobStatus.PAUSED:
            return "paused"
        case JobStatus.SUCCEEDED:
            return "succeeded"
        case JobStatus.FAILED:
            return "failed"
        case JobStatus.CANCELLED | JobStatus.VOID:
            return "cancelled"


def _error(job: Row) -> Json | None:
    if job.status != JobStatus.FAILED:
        return None
    reason = job.reason or "unknown"
    message = " ".join(part for part in (job.message, job.advice) if part) or "The job failed."
    return {"code": reason, "message": message, "param": "training_file" if reason == "bad_data" else None}


def _shown_hyperparameters(job: Row) -> Json:
    """The requested values. `auto` is replaced by the automatic value once it is known."""
    requested = (job.api or {}).get("hyperparameters", {})
    resolved = (job.plan or {}).get("settings") or {}
    values: Json = {"learning_rate_multiplier": requested.get("learning_rate_multiplier", "auto")}
    for theirs, ours in (("n_epochs", "epochs"), ("batch_size", "batch_size")):
        value = job.settings.get(ours)
        if value in (None, "", "auto"):
            value = resolved.get(ours)
        values[theirs] = max(1, round(float(value))) if value else "auto"
    return values


def _seed(job: Row) -> int:
    return int(settings_of(job).get("seed") or 0)


def _estimated_finish(job: Row) -> int | None:
    eta = (job.progress or {}).get("eta_s")
    if _status(job) != "running" or eta is None or (job.progress or {}).get("silent_s"):
        return None
    return int(time.time() + float(eta))


def _extras(job: Row) -> Json:
    result = job.result or {}
    extras = {
        "name": job.name,
        "base": job.base,
        "status": job.status,
        "phase": job.phase,
        "desired": job.desired,
        "settings": settings_of(job),
        "progress": job.progress,
        "metrics": job.metrics,
        "task": (job.plan or {}).get("task"),
        "scores": (result.get("metrics") or {}).get("scores"),
        "kept_step": result.get("kept_step"),
        "stopped_early": result.get("early"),
        "plan": job.plan,
        "estimate": job.estimate,
        "attempts": int(job.attempts),
        "proof": job.resume_check,
        "verdict": result.get("verdict"),
        "fidelity": result.get("fidelity"),
        "advice": job.advice,
    }
    return {name: value for name, value in extras.items() if value not in (None, "", {}, [])}


def _guessed_task(job: Row) -> Json:
    """The task as chosen, or guessed from the dataset's report if it is ready."""
    dataset = tables.get(tables.Dataset, job.owner, job.dataset_id)
    return tasks.describe(config.parse(job.settings or {}).task, task_rows(dataset) if dataset else {})


def checkpoint_id(job: Row, step: int) -> str:
    return f"ftckpt-{job.job_id.removeprefix('ftjob-')}-{step}"


def _checkpoint_names(job: Row) -> dict[int, str]:
    """The name of each stored checkpoint, by step. As at OpenAI, the last one has the name of the model itself, unless the
    job kept the weights of an earlier step."""
    names = {int(entry["step"]): f"{job.model_id}:ckpt-step-{entry['step']}" for entry in job.checkpoints}
    result = job.result or {}
    kept = int(result.get("kept_step") or result.get("step") or 0)
    if job.status == JobStatus.SUCCEEDED and kept:
        model = tables.get(tables.TunedModel, job.owner, job.model_id)
        if model is None or not model.deleted:  # None: the row is created a moment after the job ends
            names[kept] = job.model_id
    return names


def _checkpoint(job: Row, step: int, name: str, at: float | None, job_history: history.JobHistory) -> Json:
    metric, held_out = job_history.metrics.get(step, {}), job_history.evals.get(step, {})
    return {
        "id": checkpoint_id(job, step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(at or job.ended_at or job.created_at),
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": job.job_id,
        "metrics": {
            "step": step,
            "train_loss": metric.get("loss"),
            "train_mean_token_accuracy": metric.get("accuracy"),
            "valid_loss": held_out.get("loss"),
            "valid_mean_token_accuracy": held_out.get("accuracy"),
            "full_valid_loss": held_out.get("loss"),
            "full_valid_mean_token_accuracy": held_out.get("accuracy"),
        },
        "step_number": step,
    }
