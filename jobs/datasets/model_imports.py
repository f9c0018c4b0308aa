"""Checks model files from outside in a child process with limits, because they are untrusted, and imports bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.datasets import sandbox
from jobs.registry import imported_bases
from jobs.store.errors import Refused
from jobs.store.tables import HubModel
from training.plan import catalog

MAX_LICENSE = 60


def import_base(source: Path, name: str, license: str = "") -> HubModel:
    """Adds the model in a folder, a zip file or a GGUF file to everybody's base models. Raises Refused, StorageError."""
    imported_bases.check_name(name)
    with sandbox.temporary_folder("import-") as folder:
        model = check(source, folder / "model")
        if license:
            model["licence"] = license[:MAX_LICENSE]
        return imported_bases.add(name, model, folder / "model")


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
