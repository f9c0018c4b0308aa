"""The files of a job's checkpoint in object storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.store import blobs


def fetch(entry: dict[str, Any], target: Path) -> None:
    """Fetches a checkpoint and verifies its files. The pointer has the SHA-256 of the manifest, which has those of all other
    files."""
    target.mkdir(parents=True, exist_ok=True)
    prefix = entry["key"].rstrip("/")
    blobs.fetch(f"{prefix}/manifest.json", target / "manifest.json", sha256=entry["sha256"])
    manifest = json.loads((target / "manifest.json").read_text())
    for file in manifest["files"]:
        name = Path(file["name"]).name
        blobs.fetch(f"{prefix}/{name}", target / name, sha256=file["sha256"])
