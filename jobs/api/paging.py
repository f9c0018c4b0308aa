"""OpenAI's pagination: clients repeat the query with `after=<last ID>` until `has_more` is false."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from jobs.api.errors import ApiError, bad
from jobs.store import tables
from jobs.store.tables import Table

After = Annotated[str | None, Field(max_length=400, description="The last ID of the previous page.")]


def check_after(table: type[Table], owner: str, after: str | None) -> None:
    """Refuses a cursor that is not the ID of a row of this owner. Deleted rows count too, because a client may delete rows
    while it lists them."""
    if after is None:
        return
    if not (after and after.isascii() and tables.get(table, owner, after)):
        raise _unknown(after)


def rest(items: list[dict[str, Any]], after: str | None) -> list[dict[str, Any]]:
    """The items after this ID. For lists that are always read completely."""
    if after is None:
        return items
    ids = [item["id"] for item in items]
    if after not in ids:
        raise _unknown(after)
    return items[ids.index(after) + 1 :]


def _unknown(after: str) -> ApiError:
    return bad(f"This list contains nothing with the ID '{after[:100]}'.", "after")


def page(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    return {
        "object": "list",
        "data": items,
        "has_more": has_more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }
