"""Changes to a dataset's rows that are not saved yet. A draft is one row of Usage with {"rows", "added"}:

rows: {row number: {"line": its line, "record": the edited row, or None to exclude it}}, added: {key: the new row}.
Saving makes a new version (jobs/datasets/versions.py), whose check removes the draft once its file is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.store import tables
from jobs.store.errors import Refused
from jobs.store.tables import Dataset, Usage

MAX_BYTES = 300_000  # as stored: a row of DynamoDB has at most 400 KB
Content = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    content: Content
    version: int = 0

    @property
    def rows(self) -> dict[str, Any]:
        return dict(self.content.get("rows") or {})

    @property
    def added(self) -> dict[str, Any]:
        return dict(self.content.get("added") or {})

    @property
    def changes(self) -> Content:
        """As `training fix --changes` reads them."""
        rows = {number: change["record"] for number, change in self.rows.items()}
        return {"rows": rows, "added": list(self.added.values())}

    @property
    def counts(self) -> dict[str, int]:
        return counts_of(self.changes)

    def __bool__(self) -> bool:
        return bool(self.rows or self.added)


def get(dataset: Dataset) -> Draft:
    row = tables.get(Usage, dataset.owner, _key(dataset.dataset_id))
    return Draft(dict(row.data or {}), int(row.version)) if row else Draft({})


def change_row(dataset: Dataset, number: int, line: int, record: Content | None) -> Draft:
    """Replaces the row with this number, or excludes it (None). Raises Refused."""
    return _update(dataset, lambda rows, added: rows.update({str(number): {"line": line, "record": record}}))


def put_added(dataset: Dataset, key: str, record: Content) -> Draft:
    """Adds a row, or replaces the added row with this key: submitting a form twice adds one row. Raises Refused."""
    return _update(dataset, lambda rows, added: added.update({key: record}))


def undo(dataset: Dataset, number: str = "", key: str = "") -> Draft:
    """Removes the change of a row, or an added row."""

    def remove(rows: Content, added: Content) -> None:
        rows.pop(number, None)
        added.pop(key, None)

    return _update(dataset, remove)


def discard(owner: str, dataset_id: str) -> None:
    """Removes all changes. Idempotent."""
    tables.remove(Usage, owner, _key(dataset_id))


def discard_saved(owner: str, dataset_id: str, digest: str) -> None:
    """Removes the draft if it still has only the changes that were saved."""
    row = tables.get(Usage, owner, _key(dataset_id))
    if row is not None and digest_of(Draft(dict(row.data or {})).changes) == digest:
        wanted = Usage.version == row.version
        tables.update(row, [Usage.data.set({}), Usage.version.add(1)], wanted)


def counts_of(changes: Content) -> dict[str, int]:
    excluded = sum(record is None for record in changes["rows"].values())
    return {
        "edited": len(changes["rows"]) - excluded,
        "added": len(changes["added"]),
        "excluded": excluded,
    }


def digest_of(changes: Content) -> str:
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()


def _update(dataset: Dataset, change: Callable[[Content, Content], Any]) -> Draft:
    while True:
        draft = get(dataset)
        rows, added = draft.rows, draft.added
        change(rows, added)
        content = {"rows": rows, "added": added}
        if len(json.dumps(content)) > MAX_BYTES:
            raise Refused(
                "These are more changes than one draft can hold (300 KB). Save those made so far as a new version, and "
                "continue there."
            )
        if _replace(dataset, draft, content):
            return Draft(content, draft.version + 1)


def _replace(dataset: Dataset, draft: Draft, content: Content) -> bool:
    """False if another request changed the draft at the same time."""
    row = Usage(dataset.owner, _key(dataset.dataset_id), data=content, version=draft.version + 1)
    condition = Usage.version == draft.version if draft.version else Usage.what.does_not_exist()
    return tables.put_if(row, condition, lambda current: current.data == content) is not None


def _key(dataset_id: str) -> str:
    return f"draft#{dataset_id}"
