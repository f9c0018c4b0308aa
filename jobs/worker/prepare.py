"""What a trainer needs before it starts: the data, the base model, the checkpoint to go on from, and its run file.

Everything is fetched to the attempt's own folder and verified by its sha256; the trainer itself reaches no store.
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
from jobs.registry import base_models, checkpoint_files
from jobs.store import access, blobs
from jobs.store.tables import Dataset, Job
from jobs.worker import resume_check
from training.plan.events import Failure

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """`config` is the run file; `bad` are checkpoints that don't verify, `used` the one that did."""

    config: dict[str, Any]
    used: dict[str, Any] | None
    bad: list[dict[str, Any]]
    proof: resume_check.Proof | None


def prepare(job: Job, folder: Path, gone_on: Callable[[], None]) -> Prepared:
    """Fetches everything. `gone_on` is called between files and may raise to stop. Raises Failure for what is the user's
    fault, OSError and the storage's errors for what may work the next time."""
    config: dict[str, Any] = {
        "base": str(base_models.folder(job.base, job.base_snapshot)),
        "work_dir": str(folder / "work"),
        "settings": dict(job.settings or {}),
        "prompts": list(job.prompts or []),
        # Checkpoints belong to a job; a retry goes on from those of the job before it, under that one's name.
        "job": job.start_from["key"].split("/")[1] if job.start_from else job.job_id,
        "epoch": int(job.fencing_token),
    }
    if job.seed is not None:
        config["settings"]["seed"] = int(job.seed)
    micro_batch = (job.progress or {}).get(
        "micro_batch_tokens"
    )  # halved by the failure doctor in an earlier attempt
    if micro_batch:
        config["settings"]["micro_batch_tokens"] = int(micro_batch)
    for name, dataset_id in (("train", job.dataset_id), ("validation", job.validation_dataset_id)):
        if dataset_id:
            gone_on()
            dataset = _dataset(job.owner, dataset_id)
            config[f"{name}_file"] = str(_fetch(dataset, folder / "data" / name))
            config[f"{name}_format"] = dataset.format
            if name == "train" and (expected := _expected(job, dataset)):
                config["expected"] = expected
    gone_on()
    used, bad = newest_good(job, folder, gone_on)
    if used:
        config["resume_from"] = used["folder"]
    logged = (
        resume_check.gather(job.job_id, int(job.last_seq), int(used["step"]) if used else 0)
        if job.last_seq
        else None
    )
    return Prepared(config, used, bad, logged)


def _expected(job: Job, dataset: Dataset) -> dict[str, int]:
    """What the report counted and the trainer must see too. With another tokenizer or another length there are other
    tokens, and long texts are cut into other parts."""
    summary, exact = reports.summary_for(dataset, job.base_snapshot or {"id": job.base})
    as_reported = exact and not (job.settings or {}).get("sequence_length")
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


def newest_good(
    job: Job, folder: Path, gone_on: Callable[[], None]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The checkpoint the pointer names, else the newest other one that verifies: ({… "folder"}, those that don't).

    A storage that can't be reached is no bad checkpoint: that raises, and the attempt is tried again."""
    known = {entry["key"]: entry for entry in job.checkpoints or []}
    if job.start_from:  # a retry begins where another job stopped
        known.setdefault(job.start_from["key"], job.start_from)
    first = job.checkpoint_key or (job.start_from or {}).get("key")
    order = sorted(known.values(), key=lambda entry: (entry["key"] == first, entry["step"]), reverse=True)
    bad: list[dict[str, Any]] = []
    for entry in order:
        gone_on()
        # Where the trainer keeps its own, so that it finds the others beside it.
        target = folder / "work" / "checkpoints" / Path(entry["key"]).name
        try:
            checkpoint_files.fetch(entry, target)
        except (blobs.Missing, blobs.Damaged, ValueError, KeyError, TypeError) as error:
            log.warning("%s: checkpoint %s does not verify: %s", job.job_id, entry["key"], error)
            shutil.rmtree(target, ignore_errors=True)
            bad.append(entry)
            continue
        _fetch_best(target, list(known.values()), gone_on)
        return entry | {"folder": str(target)}, bad
    return None, bad


def _fetch_best(resume: Path, known: list[dict[str, Any]], gone_on: Callable[[], None]) -> None:
    """The checkpoint with the lowest held-out loss so far, whose weights may become the model. Without it the last
    weights do, and the trainer says so."""
    best = json.loads((resume / "state.json").read_text()).get("best_checkpoint")
    for entry in known:
        name = Path(entry["key"]).name
        if name == best and name != resume.name:
            gone_on()
            try:
                checkpoint_files.fetch(entry, resume.parent / name)
            except (blobs.Missing, blobs.Damaged, ValueError, KeyError, TypeError) as error:
                log.warning("the best checkpoint %s does not verify: %s", entry["key"], error)
                shutil.rmtree(resume.parent / name, ignore_errors=True)


def work_folder(job_id: str, epoch: int) -> Path:
    return Path(settings.WORK_DIR) / job_id / f"e{epoch}"
