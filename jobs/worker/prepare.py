"""Prepares everything a trainer needs: the data, the base model, the checkpoint to resume from, and the run file.

All files are fetched into the attempt's folder and verified by their SHA-256, because the trainer itself has no access to
the stores.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.datasets import datasets, reports
from jobs.lifecycle.submission import schema_of, settings_of
from jobs.registry import base_models, checkpoint_files
from jobs.store import access, blobs
from jobs.store.tables import Dataset, Job
from jobs.worker import resume_check
from jobs.worker.resume_check import ResumeCheck
from training.plan.events import Failure

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """`config` is the run file, `checkpoint` is the one to resume from, and `damaged` lists those that failed verification."""

    config: dict[str, Any]
    checkpoint: dict[str, Any] | None
    damaged: list[dict[str, Any]]
    resume_check: ResumeCheck | None


def prepare(job: Job, folder: Path, check_stop: Callable[[], None]) -> Prepared:
    """Fetches everything. `check_stop` is called between files and may raise an exception to stop. Raises Failure if the user
    must fix something, and OSError or a storage error if a retry may succeed."""
    config: dict[str, Any] = {
        "base": str(base_models.folder(job.base, job.base_snapshot)),
        "work_dir": str(folder / "work"),
        "settings": settings_of(job),
        "settings_schema": schema_of(job),
        "prompts": list(job.prompts or []),
        # Checkpoints carry the id of their job; a retry resumes from those of the earlier job, under its id.
        "job": job.start_from["key"].split("/")[1] if job.start_from else job.job_id,
        "epoch": int(job.fencing_token),
    }
    micro_batch = (job.progress or {}).get(
        "micro_batch_tokens"
    )  # halved after an earlier attempt ran out of memory
    if micro_batch:
        config["settings"]["micro_batch_tokens"] = int(micro_batch)
    for name, dataset_id in (("train", job.dataset_id), ("validation", job.validation_dataset_id)):
        if dataset_id:
            check_stop()
            dataset = _dataset(job.owner, dataset_id)
            config[f"{name}_file"] = str(_fetch(dataset, folder / "data" / name))
            config[f"{name}_format"] = dataset.format
            if name == "train":
                config["date"] = dataset.date
                if expected := _expected(job, dataset):
                    config["expected"] = expected
    check_stop()
    checkpoint, damaged = newest_intact(job, folder, check_stop)
    check = None
    if checkpoint:
        config["resume_from"] = checkpoint["folder"]
    if job.last_seq:
        from_step = int(checkpoint["step"]) if checkpoint else 0
        check = resume_check.from_log(job.job_id, int(job.last_seq), from_step)
    return Prepared(config, checkpoint, damaged, check)


def _expected(job: Job, dataset: Dataset) -> dict[str, int]:
    """The counts of the report that the trainer must reproduce. Another base's tokenizer counts other tokens, and its chat
    template may leave conversations out or make several examples of one; with another sequence length long texts are
    split differently."""
    summary, exact = reports.summary_for(dataset, job.base_snapshot or {"id": job.base})
    if not exact:
        return {}
    as_reported = not (job.settings or {}).get("sequence_length")
    names = ("examples", "tokens") if as_reported else () if summary.get("kind") == "text" else ("examples",)
    return {name: int(summary[name]) for name in names if summary.get(name)}


def _dataset(owner: str, dataset_id: str) -> Dataset:
    try:
        return datasets.get_for_job(owner, dataset_id)
    except access.NotFound as error:
        raise Failure(
            "bad_data", "The dataset was deleted.", "Upload it again and start a new job."
        ) from error


def _fetch(dataset: Dataset, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("data" + Path(dataset.name).suffix.lower()[:10])
    blobs.fetch(dataset.key, path, sha256=dataset.sha256)
    return path


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def newest_intact(
    job: Job, folder: Path, check_stop: Callable[[], None]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Fetches the checkpoint that the pointer names, or else the newest other one that can be verified. Returns the
    checkpoint with its "folder", and the damaged ones.

    A checkpoint is not considered damaged because the storage is unreachable: that raises, and the attempt is retried."""
    known = {entry["key"]: entry for entry in job.checkpoints or []}
    if job.start_from:  # a retry starts where another job stopped
        known.setdefault(job.start_from["key"], job.start_from)
    first = job.checkpoint_key or (job.start_from or {}).get("key")
    order = sorted(known.values(), key=lambda entry: (entry["key"] == first, entry["step"]), reverse=True)
    damaged: list[dict[str, Any]] = []
    for entry in order:
        check_stop()
        # The folder where the trainer keeps its own checkpoints, so that it finds the other ones next to it.
        target = folder / "work" / "checkpoints" / Path(entry["key"]).name
        try:
            checkpoint_files.fetch(entry, target)
        except (blobs.Missing, blobs.Damaged, ValueError, KeyError, TypeError) as error:
            log.warning("%s: checkpoint %s failed verification: %s", job.job_id, entry["key"], error)
            shutil.rmtree(target, ignore_errors=True)
            damaged.append(entry)
            continue
        _fetch_best(target, list(known.values()), check_stop)
        return entry | {"folder": str(target)}, damaged
    return None, damaged


def _fetch_best(resume: Path, known: list[dict[str, Any]], check_stop: Callable[[], None]) -> None:
    """Fetches the checkpoint with the lowest held-out loss so far, because its weights may become the model. Without it the
    final weights become the model, and the trainer reports that."""
    best = json.loads((resume / "state.json").read_text()).get("best_checkpoint")
    for entry in known:
        name = Path(entry["key"]).name
        if name == best and name != resume.name:
            check_stop()
            try:
                checkpoint_files.fetch(entry, resume.parent / name)
            except (blobs.Missing, blobs.Damaged, ValueError, KeyError, TypeError) as error:
                log.warning("the best checkpoint %s failed verification: %s", entry["key"], error)
                shutil.rmtree(resume.parent / name, ignore_errors=True)


def work_folder(job_id: str, fencing_token: int) -> Path:
    return Path(settings.WORK_DIR) / job_id / f"e{fencing_token}"
