"""`manage.py import_openai FOLDER --email you@example.com` imports training files and jobs exported from OpenAI.

The folder contains training files (`*.jsonl`, with any name) and, optionally, jobs as returned by OpenAI's API (`*.json`: a
single `fine_tuning.job`, or a page of a list of them). Each file becomes a dataset. With `--start`, each job becomes a job
here, which trains the mapped local base model on the same file with the same number of epochs and batch size. The resulting
model can also be called by its name at OpenAI. Running the command again imports only what is new.
"""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError

from jobs.api import models
from jobs.api.errors import ApiError
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.registry import tuned_models
from jobs.store import access, quotas
from jobs.store.errors import Refused


class Command(BaseCommand):
    help = "Imports a folder of training files and jobs exported from OpenAI."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path)
        parser.add_argument("--email", required=True, help="Email address of the user who will own them.")
        parser.add_argument(
            "--start", action="store_true", help="Also start a job here for each exported job."
        )
        parser.add_argument("--base", help="Base model to train instead of the ones that the jobs name.")

    def handle(self, *, folder: Path, email: str, start: bool, base: str | None, **_: Any) -> None:
        if not folder.is_dir():
            raise CommandError(f"{folder} is not a folder.")
        user = get_user_model().objects.filter(email=email.lower()).first()
        if user is None:
            raise CommandError(f"No user has the email address {email}. Sign up with it first.")
        files = self._import_files(user.owner_id, folder)
        for job in _described_jobs(folder):
            self._import_job(user, job, files, start, base)

    def _import_files(self, owner: str, folder: Path) -> dict[str, str]:
        """Dataset IDs by every name that a job may use for the file: its name with or without extension (OpenAI's file ID)."""
        known = {row.sha256: row.dataset_id for row in access.list_datasets(owner, 1000)}
        ids: dict[str, str] = {}
        for path in sorted(folder.rglob("*.jsonl")):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest in known:
                self.stdout.write(f"{path.name}: already imported as {known[digest]}")
            else:
                with path.open("rb") as file:
                    known[digest] = datasets.receive(owner, path.name, file, purpose="fine-tune").dataset_id
                self.stdout.write(f"{path.name}: imported as {known[digest]}")
            ids[path.name] = ids[path.stem] = known[digest]
        if not ids:
            raise CommandError(f"{folder} contains no .jsonl file.")
        return ids

    def _import_job(
        self, user: Any, job: dict[str, Any], files: dict[str, str], start: bool, base: str | None
    ) -> None:
        name = str(job.get("fine_tuned_model") or job.get("id"))
        training_file = files.get(str(job.get("training_file")))
        if training_file is None:
            self.stdout.write(
                f"{name}: skipped, because its training file {job.get('training_file')} is not in the folder"
            )
            return
        if not start:
            self.stdout.write(f"{name}: can be trained here on {training_file}; add --start to do so")
            return
        try:
            request = transitions.JobRequest(
                base=base or models.base_for_training(user.owner_id, str(job.get("model"))),
                dataset_id=training_file,
                validation_dataset_id=files.get(str(job.get("validation_file"))),
                name=name[:200],
                settings=_settings(job),
                seed=job.get("seed") if isinstance(job.get("seed"), int) else None,
                metadata={"imported_from": str(job.get("id"))[:512]},
                api={"model": str(job.get("model")), "aliases": _aliases(job)},
            )
            webhooks.set_email(user.owner_id, user.notification_email)
            made = transitions.submit(
                user.owner_id, request, idempotency_key=f"import#{job.get('id')}", slug=user.slug
            )
        except (ApiError, Refused, quotas.OverQuota) as refusal:
            self.stdout.write(f"{name}: {getattr(refusal, 'message', refusal)}")
            return
        self.stdout.write(f"{name}: started as {made.job_id}, model {made.model_id}")


def _described_jobs(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CommandError(f"{path} cannot be read: {error}") from error
        entries = content.get("data", [content]) if isinstance(content, dict) else content
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("object") == "fine_tuning.job":
                yield entry


def _aliases(job: dict[str, Any]) -> list[str]:
    name = str(job.get("fine_tuned_model") or "")
    return [name] if tuned_models.ALIAS.fullmatch(name) else []


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """The job's epochs and batch size. Its learning rate is unknown: OpenAI gives only a multiplier of its own rate."""
    method = job.get("method") or {}
    hyperparameters = (
        (method.get(method.get("type", ""), {}) or {}).get("hyperparameters")
        or job.get("hyperparameters")
        or {}
    )
    settings = {"epochs": hyperparameters.get("n_epochs"), "batch_size": hyperparameters.get("batch_size")}
    return {name: value for name, value in settings.items() if isinstance(value, int)}
