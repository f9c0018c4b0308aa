"""Base models that an administrator imported. All users can choose them, and no Hub is needed.

Their files are in object storage under `bases/<import ID>/`. A row has the SHA-256 of each, and so has the snapshot of every
job that starts from the base, so all workers fetch the same bytes. The rows are those of `HubModel`, under the owner STUDIO.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.store import blobs, outbox, queue, tables
from jobs.store.errors import Refused
from jobs.store.tables import HubModel
from training.plan import catalog

STUDIO = "studio"  # not a user: their owner IDs begin with `user-`
# A name has no slash, unlike those of the Hub, and no colon, unlike those of fine-tuned models.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
UNFINISHED_S = 24 * 3600  # after this long, the files of an import that did not end are deleted


def check_name(name: str) -> None:
    """Raises Refused unless a base can be imported under this name."""
    if not NAME.fullmatch(name):
        raise Refused(
            "Enter a name of at most 64 letters, digits, dots, hyphens and underscores, for example SmolLM2-135M.",
            field="name",
        )
    if catalog.find(name) or find(name):
        raise Refused(f"There is already a base model {name}. Choose another name.", field="name")


def add(name: str, model: Mapping[str, Any], folder: Path, import_id: str = "") -> HubModel:
    """Stores the files of a base that was checked. `model` has the fields of BaseModel. Idempotent for the same `import_id`,
    `base-<ULID>`. Raises Refused, StorageError."""
    import_id = import_id or tables.new_id("base")
    outbox.put("delete", STUDIO, import_id)  # deletes the files if the import does not end
    prefix = f"bases/{import_id}"
    files = [
        {"name": file.name, "bytes": file.bytes, "sha256": file.sha256}
        for file in blobs.put_folder(prefix, folder)
    ]
    digest = hashlib.sha256("".join(sorted(f"{f['name']} {f['sha256']}\n" for f in files)).encode())
    snapshot = {
        **model,
        "id": name,
        "name": name,
        "about": "Imported by the administrator.",
        "download": sum(file["bytes"] for file in files),
        "revision": digest.hexdigest()[:40],
        "prefix": prefix,
        "files": files,
    }
    row = HubModel(STUDIO, name, snapshot=snapshot, checked_at=time.time())
    if tables.put_new(row, lambda current: current.snapshot.get("prefix") == prefix) is None:
        raise Refused(f"There is already a base model {name}. Choose another name.", field="name")
    return row


def find(name: str) -> HubModel | None:
    return tables.get(HubModel, STUDIO, name) if NAME.fullmatch(name) else None


def is_added(name: str, import_id: str) -> bool:
    """Whether this import has added the base."""
    row = find(name)
    return row is not None and row.snapshot.get("prefix") == f"bases/{import_id}"


def list_all() -> list[HubModel]:
    return list(tables.rows(HubModel, STUDIO))


def remove(name: str) -> None:
    """Removes a base from everybody's list. Jobs that have not ended still start from it: its files are kept until then."""
    row = find(name)
    if row is not None:
        import_id = str(row.snapshot["prefix"]).rpartition("/")[2]
        outbox.put("delete", STUDIO, f"{import_id}#removed")
        tables.remove(HubModel, STUDIO, name)
        outbox.enqueue("delete", STUDIO, f"{import_id}#removed")


@outbox.deletion_handler("base-")
def delete_bytes(owner: str, id: str) -> bool:
    """Deletes the files of a base that was removed, or whose import did not end. Returns False while they may be needed."""
    import_id, _, removed = id.partition("#")
    prefix = f"bases/{import_id}"
    if any(row.snapshot.get("prefix") == prefix for row in list_all()):
        return True
    if not removed and time.time() - tables.time_of(import_id) < UNFINISHED_S:
        return False  # its files are being stored
    if any((job.base_snapshot or {}).get("prefix") == prefix for job in queue.active_jobs() if not job.ended):
        return False
    blobs.delete_prefix(f"{prefix}/")
    return True
