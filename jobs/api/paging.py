"""Lists as OpenAI pages them: the same query again with `after=<last id>`, until `has_more` is false."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from ninja import Query
from pydantic import Field

from jobs.access import Page
from jobs.tables import Table

T = TypeVar("T", bound=Table)
After = Annotated[str | None, Field(max_length=400, description="The last id of the page before.")]
Limit = Annotated[int, Query(20, ge=1, le=1000, description="How many at most.")]
STEP = 100  # rows read at once where some are left out


def collect(
    fetch: Callable[[int, str | None], Page[T]],
    id_of: Callable[[T], str],
    limit: int,
    after: str | None,
    keep: Callable[[T], bool] | None = None,
    most: int = 5000,
) -> tuple[list[T], bool]:
    """Up to `limit` rows after `after` that are to be kept, and whether there are more. Reads at most `most` rows."""
    kept: list[T] = []
    read = 0
    while len(kept) <= limit and read < most:
        found = fetch(STEP if keep else limit + 1 - len(kept), after)
        kept += [row for row in found.rows if keep is None or keep(row)]
        read += len(found.rows)
        if not found.has_more:
            break
        after = id_of(found.rows[-1])
    return kept[:limit], len(kept) > limit


def page(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    return {
        "object": "list",
        "data": items,
        "has_more": has_more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }
