"""Tuned models: created from successful jobs, fetched for use, streamed as a zip file, deleted."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from asgiref.sync import sync_to_async
from django.conf import settings

from jobs.store import access, blobs, outbox, queue, tables
from jobs.store.end_steps import step
from jobs.store.states import JobStatus
from jobs.store.tables import Dataset, Job, TunedModel
from training.plan.tasks import TASKS, Task

BLOCK = 1 << 20
MAX_ALIASES = 8
WHOLE = ".whole"  # a marker file in a folder whose files were all fetched and verified
ALIAS = re.compile(r"ft:[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")  # the name of a model tuned at OpenAI


@step(10)
def create_if_succeeded(job: Job) -> None:
    if job.status == JobStatus.SUCCEEDED and not job.deleted:
        create_from(job)


def create_from(job: Job) -> None:
    """Creates the row of a successful job's model, unless there is one or its tombstone."""
    result = dict(job.result or {})
    files = [{name: entry[name] for name in ("name", "bytes", "sha256")} for entry in result.get("files", [])]
    model = TunedModel(
        job.owner,
        job.model_id,
        job_id=job.job_id,
        name=job.name,
        base=job.base,
        base_snapshot=job.base_snapshot,
        method=job.method,
        trained_on=_kind_of_rows(job),
        step=int(result.get("kept_step") or result.get("step") or 0),
        fencing_token=int(result.get("epoch") or job.fencing_token),
        prefix=str(result.get("prefix") or ""),
        files=files,
        bytes=sum(entry["bytes"] for entry in files),
        metrics=dict(result.get("metrics") or {}),
        verdict=result.get("verdict"),
        export_check=result.get("fidelity"),
        aliases=(job.api or {}).get("aliases", []),
        created_at=job.ended_at,
    )
    tables.put_new(model)


def _kind_of_rows(job: Job) -> str:
    """From the report on the job's dataset, which stays when the dataset is deleted."""
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    return str((dataset.summary or {}).get("kind") or "") if dataset else ""


def task_of(model: TunedModel) -> Task | None:
    """The task that its answers were scored by; None if they were not."""
    scores = (model.metrics or {}).get("scores") or {}
    return TASKS.get(scores.get("task", ""))


def delete(owner: str, model_id: str) -> None:
    """Raises access.NotFound."""
    access.get_model_for(owner, model_id)
    outbox.put("delete", owner, model_id)
    put_tombstone(owner, model_id)
    outbox.enqueue("delete", owner, model_id)


def put_tombstone(owner: str, model_id: str) -> None:
    """Puts a tombstone, even if there is no model, so that a late writer cannot create it."""
    TunedModel(owner, model_id).update(actions=[TunedModel.deleted.set(True), TunedModel.files.set([])])


@outbox.deletion_handler("ft:")
def delete_bytes(owner: str, model_id: str) -> bool:
    """Deletes a model's files. Returns False while a job that starts from the model may still need them."""
    model = tables.get(TunedModel, owner, model_id)
    if model and model.deleted and model.prefix:
        if _is_a_base(model):
            return False
        blobs.delete_prefix(model.prefix.rstrip("/") + "/")
    return True


def folders_in_use(job: Job) -> list[str]:
    """Those of the job's folders in object storage that its model still uses."""
    model = tables.get(TunedModel, job.owner, job.model_id) if job.model_id else None
    return [model.prefix] if model and (not model.deleted or _is_a_base(model)) else []


def _is_a_base(model: TunedModel) -> bool:
    """Whether the model is the base of a job that has not ended and so may still need its files."""
    return any(job.base == model.model_id and not job.ended for job in queue.active_of(model.owner))


class BadAlias(ValueError):
    """An alias is not allowed. The message says which one and why."""


def set_aliases(owner: str, model_id: str, aliases: list[str]) -> TunedModel:
    """Sets the names of models tuned at OpenAI that this model replaces. Raises BadAlias, access.NotFound."""
    model = access.get_model_for(owner, model_id)
    wanted = list(dict.fromkeys(aliases))
    if len(wanted) > MAX_ALIASES:
        raise BadAlias(f"A model can have at most {MAX_ALIASES} aliases.")
    for name in wanted:
        if not ALIAS.fullmatch(name):
            raise BadAlias(
                f"{name[:80]}: an alias must begin with ft: and contain only letters, digits and . _ - : as names at OpenAI do."
            )
        taken = find(owner, name)
        if taken is not None and taken.model_id != model_id:
            raise BadAlias(f"{name} is already an alias of {taken.model_id}. Remove it there first.")
    updated = tables.update(model, [TunedModel.aliases.set(wanted)], TunedModel.deleted == False)  # noqa: E712  a condition expression
    if updated is None:
        raise access.NotFound(f"There is no model {model_id}.")
    return updated


def find(owner: str, name: str) -> TunedModel | None:
    """The owner's model with this ID, or else the newest one with this alias."""
    with contextlib.suppress(access.NotFound):
        return access.get_model_for(owner, name)
    if not ALIAS.fullmatch(name):
        return None
    return next((row for row in access.list_models(owner, 10_000) if name in (row.aliases or [])), None)


# ---- use -----------------------------------------------------------------------------------------------------------


def checkpoint_models(job: Job) -> list[TunedModel]:
    """The checkpoints of a job as models to try. They are available as long as the job keeps them."""
    trained_on = _kind_of_rows(job)
    return [
        _of_checkpoint(job, checkpoint, trained_on)
        for checkpoint in job.checkpoints
        if checkpoint.get("files")
    ]


def get_for(owner: str, model_id: str) -> TunedModel:
    """A model by its ID or alias, or a job's checkpoint as a model (`<model id>:ckpt-step-<n>`). Raises
    access.NotFound."""
    base, separator, step = model_id.rpartition(":ckpt-step-")
    if not separator:
        if (model := find(owner, model_id)) is None:
            raise access.NotFound(f"There is no model {model_id}.")
        return model
    for job in access.list_jobs(owner, 200):
        if job.model_id == base:
            for checkpoint in job.checkpoints:
                if str(checkpoint["step"]) == step:
                    return _of_checkpoint(job, checkpoint, _kind_of_rows(job))
    raise access.NotFound(f"There is no model {model_id}.")


def _of_checkpoint(job: Job, checkpoint: dict[str, Any], trained_on: str) -> TunedModel:
    files = checkpoint.get("files") or []
    return TunedModel(
        job.owner,
        f"{job.model_id}:ckpt-step-{checkpoint['step']}",
        job_id=job.job_id,
        name=f"{job.name}, step {checkpoint['step']}",
        base=job.base,
        method=job.method,
        trained_on=trained_on,
        step=checkpoint["step"],
        fencing_token=checkpoint.get("epoch") or job.fencing_token,
        prefix=checkpoint["key"],
        files=files,
        bytes=sum(entry["bytes"] for entry in files),
    )


def fetch(model: TunedModel) -> Path:
    """The model's folder on this machine, fetched if necessary. Every file is verified by its SHA-256 when it is fetched."""
    return fetch_files(model.prefix, list(model.files))


def fetch_files(prefix: str, files: list[dict[str, Any]]) -> Path:
    name = hashlib.sha256(
        f"{blobs.is_local()} {prefix} {sorted(f['sha256'] for f in files)}".encode()
    ).hexdigest()[:32]
    folder = Path(settings.MODEL_CACHE_DIR) / name
    whole = folder / WHOLE
    if not whole.exists():
        with _exclusive(folder):
            if not whole.exists():
                blobs.fetch_folder(prefix, files, folder)
                whole.touch()
    return folder


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Holds a file lock, so that one process of this machine fetches a folder at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget(model: TunedModel) -> None:
    """Deletes this machine's copy."""
    shutil.rmtree(fetch(model), ignore_errors=True)


# ---- download ------------------------------------------------------------------------------------------------------


def archive(model: TunedModel) -> AsyncIterator[bytes]:
    """The model as a zip file, created while it is sent: uncompressed (weights do not compress), zip64, one block in memory."""
    return _in_threads(zipped(model))


def zipped(model: TunedModel) -> Iterator[bytes]:
    out = _ZipBuffer()
    folder = model.model_id.replace(":", "-").replace("/", "-")
    with zipfile.ZipFile(cast(IO[bytes], out), "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for entry in model.files:
            info = zipfile.ZipInfo(f"{folder}/{blobs.safe_name(entry['name'])}", (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            digest = hashlib.sha256()
            with archive.open(info, "w", force_zip64=True) as file:
                for block in blobs.blocks(blobs.join(model.prefix, entry["name"]), BLOCK):
                    digest.update(block)
                    file.write(block)
                    yield out.take()
            if digest.hexdigest() != entry["sha256"]:
                raise blobs.StorageError(
                    f"{entry['name']}: damaged: its SHA-256 does not match the recorded one"
                )
    yield out.take()


def archive_length(model: TunedModel) -> int:
    """Size of the zip file in bytes, computed from the file sizes. Each file has a local header with 20 bytes of zip64, a
    data descriptor of 24, and a directory entry (with up to 28 more bytes of zip64 beyond 4 GB)."""
    total, directory = 0, 0
    folder = model.model_id.replace(":", "-").replace("/", "-")
    for entry in model.files:
        name = len(f"{folder}/{entry['name']}".encode())
        big = (entry["bytes"] > zipfile.ZIP64_LIMIT) * 16
        far = (total > zipfile.ZIP64_LIMIT) * 8
        directory += 46 + name + big + far + (4 if big or far else 0)
        total += 30 + name + 20 + entry["bytes"] + 24
    end = 22 + (76 if total > zipfile.ZIP64_LIMIT or len(model.files) > 0xFFFF else 0)
    return total + directory + end


class _ZipBuffer:
    """A file that cannot seek. `take` returns what was written since the last call."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []

    def write(self, data: Any) -> int:
        self.blocks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        data, self.blocks = b"".join(self.blocks), []
        return data


async def _in_threads(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Makes an iterator asynchronous. It uses a thread only while a block is computed."""
    take = sync_to_async(lambda: next(blocks, None), thread_sensitive=False)
    while (block := await take()) is not None:
        if block:
            yield block
