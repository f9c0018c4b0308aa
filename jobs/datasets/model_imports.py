"""Imports base models. The files come from outside, so a child process with limits checks them.

An upload of a base model is sent in parts like that of a dataset (jobs/datasets/multipart.py). When it is complete, a worker
checks it, and it becomes completed or rejected.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.datasets import multipart, sandbox
from jobs.datasets.datasets import Rejected
from jobs.registry import imported_bases
from jobs.store import blobs, outbox, tables
from jobs.store.errors import Refused
from jobs.store.tables import HubModel, Upload
from training.plan import catalog

MAX_LICENSE = 60
SHOWN_S = 24 * 3600  # how long the list shows a rejected upload


def import_base(source: Path, name: str, license: str = "", import_id: str = "") -> HubModel:
    """Adds the model in a folder, a zip file or a GGUF file to everybody's base models. Raises Refused, StorageError."""
    imported_bases.check_name(name)
    with sandbox.temporary_folder("import-") as folder:
        model = check(source, folder / "model")
        if license:
            model["licence"] = license[:MAX_LICENSE]
        return imported_bases.add(name, model, folder / "model", import_id)


def check(source: Path, to: Path) -> dict[str, Any]:
    """Checks a model and writes its files to the folder `to`. Returns the fields of its BaseModel. Raises Refused."""
    limit = int(settings.HUB_MAX_GB * 1e9)
    arguments = ["import", str(source.absolute()), "--to", str(to), "--limit-bytes", str(limit)]
    event = sandbox.run(arguments, "import", file_bytes=limit, more_memory=_memory(source))
    if event is None:
        raise Refused(
            "The check of the model exceeded its time, memory or disk limit. Choose a smaller model, or raise "
            "JOBS_CHECK_MEMORY_BYTES and JOBS_CHECK_TIMEOUT_S."
        )
    if event.get("error"):
        raise Refused(str(event["error"]))
    return dict(event["model"])


def _memory(source: Path) -> int:
    """How much more memory than other checks this one may need, in bytes. Converting a quantized file makes its weights up to
    sixteen times as large; safetensors are only mapped into memory, which counts as well."""
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    size = sum(path.stat().st_size for path in files if path.is_file())
    return min(16 * size, catalog.this_machine().memory)


# ---- uploads -----------------------------------------------------------------------------------------------------------


def begin(owner: str, filename: str, size: int, fingerprint: str, base: Mapping[str, str]) -> Upload:
    """Starts or resumes the upload of a base model, or of a file in it. Raises Refused, Rejected, OverQuota."""
    imported_bases.check_name(base["name"])
    return multipart.begin(owner, filename, size, fingerprint, base)


def complete(row: Upload) -> None:
    """Has a worker check the upload. Idempotent. Raises Rejected."""
    if row.status in {"checking", "completed", "rejected"}:
        return
    key = multipart.key_of(row)
    if not row.multipart or blobs.size_of(key) is None:  # else a retry: the parts were already combined
        multipart.must_be_whole(row)
        if row.multipart:
            blobs.finish_parts(key, row.multipart)
    outbox.put("import", row.owner, row.upload_id)
    actions = [Upload.status.set("checking"), Upload.expires_at.set(time.time() + multipart.LIFETIME_S)]
    claimed = tables.update(
        row, actions, Upload.status == "pending", lambda current: current.status == "checking"
    )
    if claimed is None:
        raise Rejected("This upload was completed or cancelled in the meantime. Choose the file again.")
    outbox.enqueue("import", row.owner, row.upload_id)


def list_uploads(owner: str) -> list[Upload]:
    """The uploads of base models that are being sent or checked, or were rejected lately, newest first."""
    shown = [
        row
        for row in tables.rows(Upload, owner)
        if row.purpose == multipart.BASE
        and (
            multipart.is_open(row)
            or row.status == "checking"
            or (row.status == "rejected" and time.time() - row.created_at < SHOWN_S)
        )
    ]
    return sorted(shown, key=lambda row: row.upload_id, reverse=True)


@outbox.handler("import")
def run(owner: str, upload_id: str) -> bool:
    """Returns True once the upload is completed, rejected or cancelled. Idempotent."""
    row = tables.get(Upload, owner, upload_id)
    if row is None or row.status != "checking":
        return True
    name, import_id = str(row.base["name"]), upload_id.replace("upload-", "base-")
    error = ""
    if not imported_bases.is_added(name, import_id):  # else the worker died after it had added it
        try:
            with sandbox.temporary_folder("upload-") as folder:
                path = folder / ("model.gguf" if row.filename.lower().endswith(".gguf") else "model.zip")
                with path.open("wb") as file:
                    file.writelines(multipart.content(row))
                import_base(path, name, str(row.base.get("license") or ""), import_id)
        except (Refused, Rejected) as refused:
            error = str(refused)
    status = "rejected" if error else "completed"
    tables.update(
        row,
        [Upload.status.set(status), Upload.error.set(error[:2000])],
        Upload.status == "checking",
        lambda current: current.status == status,
    )
    multipart.discard(row)
    return True
