"""Checkpoints as models one can generate with: `<model id>:ckpt-step-<n>`.

A checkpoint holds what was trained and the optimizer's state, not a model folder. The first one to ask has it made, by
the same export as any model, in a process of its own; it is kept in this machine's cache under the manifest's hash.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.registry import base_models, checkpoint_files
from jobs.store import access, child_process
from jobs.store.tables import Job

MARK = ":ckpt-step-"
EXPORT_S = 600
JOBS_SEARCHED = 1000


def find(owner: str, model_id: str) -> tuple[Job, dict[str, Any]]:
    """The job and its checkpoint of this name. Raises access.NotFound."""
    base, _, step = model_id.rpartition(MARK)
    for job in access.list_jobs(owner, JOBS_SEARCHED):
        if job.model_id == base:
            for checkpoint in job.checkpoints or []:
                if str(checkpoint["step"]) == step:
                    return job, checkpoint
    raise access.NotFound(f"There is no model {model_id}.")


def folder(owner: str, model_id: str) -> Path:
    """The model folder of a checkpoint on this machine, made if need be. Raises access.NotFound, OSError."""
    job, checkpoint = find(owner, model_id)
    place = Path(settings.MODEL_CACHE_DIR) / f"ckpt-{checkpoint['sha256'][:32]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one makes it, the others wait
        if not place.is_dir():  # export renames it into place when it is whole
            _export(job, checkpoint, place)
    return place


def _export(job: Job, checkpoint: dict[str, Any], place: Path) -> None:
    fetched = Path(tempfile.mkdtemp(prefix=".ckpt-", dir=place.parent))
    try:
        checkpoint_files.fetch(checkpoint, fetched / "checkpoint")
        where = (
            "--checkpoint",
            str(fetched / "checkpoint"),
            "--to",
            str(place),
            "--base",
            str(base_models.folder(job.base, job.base_snapshot)),
        )
        child = child_process.start("export", *where)
        said, errors = child.process.communicate(timeout=EXPORT_S)
        if child.process.returncode:
            raise OSError(
                f"the checkpoint could not be exported: {(errors or said).decode(errors='replace')[-500:]}"
            )
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
