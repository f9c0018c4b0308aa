"""Checkpoints as models that can generate text: `<model ID>:ckpt-step-<n>`.

A checkpoint has the trained weights and the optimizer's state, but is not a model folder. The first request exports it in a
separate process, like any other model. The result is kept in this machine's cache under the manifest's hash.
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

SEPARATOR = ":ckpt-step-"
EXPORT_S = 600
JOBS_SEARCHED = 1000


def find(owner: str, model_id: str) -> tuple[Job, dict[str, Any]]:
    """The job and the checkpoint with this ID. Raises access.NotFound."""
    base, _, step = model_id.rpartition(SEPARATOR)
    for job in access.list_jobs(owner, JOBS_SEARCHED):
        if job.model_id == base:
            for checkpoint in job.checkpoints or []:
                if str(checkpoint["step"]) == step:
                    return job, checkpoint
    raise access.NotFound(f"There is no model {model_id}.")


def folder(owner: str, model_id: str) -> Path:
    """The model folder of a checkpoint on this machine, exported if necessary. Raises access.NotFound, OSError."""
    job, checkpoint = find(owner, model_id)
    place = Path(settings.MODEL_CACHE_DIR) / f"ckpt-{checkpoint['sha256'][:32]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process exports it while the others wait
        if not place.is_dir():  # the export renames it into place when it is complete
            _export(job, checkpoint, place)
    return place


def _export(job: Job, checkpoint: dict[str, Any], place: Path) -> None:
    fetched = Path(tempfile.mkdtemp(prefix=".ckpt-", dir=place.parent))
    try:
        checkpoint_files.fetch(checkpoint, fetched / "checkpoint")
        arguments = (
            "--checkpoint",
            str(fetched / "checkpoint"),
            "--to",
            str(place),
            "--base",
            str(base_models.folder(job.base, job.base_snapshot)),
        )
        child = child_process.start("export", *arguments)
        output, errors = child.process.communicate(timeout=EXPORT_S)
        if child.process.returncode:
            raise OSError(
                f"the checkpoint could not be exported: {(errors or output).decode(errors='replace')[-500:]}"
            )
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
