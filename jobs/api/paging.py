"""Lists as OpenAI pages them: the same query again with `after=<last id>`, until `has_more` is false."""

from __future__ import annotations

from typing import Annotated, Any

from ninja import Query
from pydantic import Field

from jobs.api.errors import ApiError, bad
from jobs.store import tables
from jobs.store.tables import Table

After = Annotated[str | None, Field(max_length=400, description="The last id of the page before.")]
Limit = Annotated[int, Query(20, ge=1, le=1000, description="How many at most.")]


def check_after(table: type[Table], owner: str, after: str | None) -> None:
    """Refuses a cursor that is no id of the owner's. Rows that were deleted count: one may delete while one lists."""
    if after is None:
        return
    known = after.isascii() and after and tables.get(table, owner, after)
    if not known:
        raise _unknown(after)


def rest(items: list[dict[str, Any]], after: str | None) -> list[dict[str, Any]]:
    """What comes after this id in a list that is always read whole."""
    if after is None:
        return items
    ids = [item["id"] for item in items]
    if after not in ids:
        raise _unknown(after)
    return items[ids.index(after) + 1 :]


def _unknown(after: str) -> ApiError:
    return bad(f"Nothing in this list has the id '{after[:100]}'.", "after")


def page(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    return {
        "object": "list",
        "data": items,
        "has_more": has_more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }
