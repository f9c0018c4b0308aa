"""Copies the trainer's files to object storage and verifies them while training continues."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from jobs.store import blobs

STORAGE_ERRORS = (blobs.StorageError,)
ENTRY = ("key", "step", "epoch", "sha256", "bytes", "best", "files")


def set_aside(checkpoint: dict[str, Any], outbox: Path) -> dict[str, Any] | None:
    """Hard-links the files into our own folder: the trainer may remove old checkpoints while they are being copied."""
    source = Path(checkpoint["path"])
    target = outbox / source.name
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.mkdir(parents=True)
        for file in source.iterdir():
            os.link(file, target / file.name)
    except OSError:
        return None  # already removed by the trainer; a newer one will follow
    return checkpoint | {"path": str(target)}


def queue(waiting: list[dict[str, Any]], new: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The checkpoints that are still worth copying: the newest and the best one. Oldest first."""
    if new is None:
        return waiting
    best = [] if new.get("best") else [checkpoint for checkpoint in waiting if checkpoint.get("best")][-1:]
    for checkpoint in waiting:
        if checkpoint not in best:
            shutil.rmtree(checkpoint["path"], ignore_errors=True)
    return [*best, new]


def put_checkpoint(checkpoint: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Stores and verifies the folder under the attempt's own prefix. Returns the entry for the pointer."""
    folder = Path(checkpoint["path"])
    key = f"{prefix}checkpoints/{folder.name}"
    manifest = {"name": "manifest.json", "sha256": checkpoint["sha256"]}
    put_verified(folder, f"{key}/", [*checkpoint["files"], manifest])
    shutil.rmtree(folder, ignore_errors=True)
    fencing_token = int(prefix.rstrip("/").rpartition("/e")[2])
    return entry(checkpoint | {"key": key, "epoch": fencing_token}) | {"after": checkpoint["after"]}


def entry(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {name: checkpoint[name] for name in ENTRY if name in checkpoint}


def put_verified(folder: Path, prefix: str, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stores a folder's files. Raises blobs.Damaged unless the stored bytes are those that the trainer wrote."""
    stored = {file.name: file for file in blobs.put_folder(prefix, folder)}
    for file in expected:
        copy = stored.get(file["name"])
        if copy is None or copy.sha256 != file["sha256"]:
            raise blobs.Damaged(f"{prefix}{file['name']}")
    return [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in stored.values()]
