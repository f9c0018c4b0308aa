"""Reading rows, and writing them conditionally.

A response can be lost even though the write was applied. The client then sends the write again, and its own first write
makes the condition fail. So every conditional write here takes `already_applied`, which looks at the row and returns
whether it already contains what this write wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pynamodb.exceptions import DeleteError, PutError, UpdateError
from pynamodb.expressions.condition import Condition
from pynamodb.expressions.update import Action

from jobs.store.connection import Table

Row = TypeVar("Row", bound=Table)


# ---- conditional writes ----------------------------------------------------------------------------------------------


def put_new(row: Row, already_applied: Callable[[Row], bool] = lambda current: True) -> Row | None:
    """Puts the row if there is none. Returns it, or the existing row if `already_applied` accepts it, or None."""
    return _put(row, _hash_key(type(row)).does_not_exist(), already_applied)


def put_if(row: Row, condition: Condition, already_applied: Callable[[Row], bool]) -> Row | None:
    """Puts the row if the condition holds for the existing one. Returns the same as `put_new`."""
    return _put(row, condition, already_applied)


def _put(row: Row, condition: Condition, already_applied: Callable[[Row], bool]) -> Row | None:
    try:
        row.save(condition=condition)
    except PutError as error:
        if not refused(error):
            raise
        current = get(type(row), *keys_of(row))
        return current if current is not None and already_applied(current) else None
    return row


def update(
    row: Row,
    actions: Iterable[Action],
    condition: Condition,
    already_applied: Callable[[Row], bool] = lambda current: False,
) -> Row | None:
    """Updates the row if the condition holds. Returns the new row, or None if another writer was first. If `already_applied`
    finds that an earlier request of the same write was applied, that is a success too. `row` itself is not changed."""
    fresh = type(row)(*keys_of(row))
    try:
        fresh.update(actions=list(actions), condition=condition)
    except UpdateError as error:
        if not refused(error):
            raise
        current = get(type(row), *keys_of(row))
        return current if current is not None and already_applied(current) else None
    return fresh


def remove(table: type[Row], hash_key: Any, range_key: Any) -> None:
    """Deletes the row. Idempotent."""
    try:
        table(hash_key, range_key).delete()
    except DeleteError as error:
        if not refused(error):
            raise


def refused(error: PutError | UpdateError | DeleteError) -> bool:
    """Whether the condition failed, as opposed to the store being unreachable."""
    # Not `error.cause_response_code`: it fails when the connection was closed before a response came.
    response = getattr(error.cause, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "ConditionalCheckFailedException")


# ---- reads -----------------------------------------------------------------------------------------------------------


def get(table: type[Row], hash_key: Any, range_key: Any) -> Row | None:
    """The current row (a consistent read), or None."""
    if len(str(hash_key).encode()) > 2048 or len(str(range_key).encode()) > 1024:
        return None  # no row has such a key, and DynamoDB would answer with an error
    try:
        return table.get(hash_key, range_key, consistent_read=True)
    except table.DoesNotExist:
        return None


def rows(table: type[Row], hash_key: str, keep: Condition | None = None) -> Iterator[Row]:
    """All rows of a partition, sorted by key."""
    return iter(table.query(hash_key, keep, consistent_read=True))


def newest(
    table: type[Row], hash_key: str, limit: int, after: str | None = None, **options: Any
) -> Iterator[Row]:
    """Rows of a partition, newest first, in pages of `limit` (one read each)."""
    keep: Condition | None = None
    if after is not None:
        keep = _range_key(table) < after
    return iter(
        table.query(
            hash_key, keep, scan_index_forward=False, page_size=limit, consistent_read=True, **options
        )
    )


def search(
    table: type[Row], hash_key: str, where: Condition, after: str | None = None
) -> Iterator[tuple[list[Row], int]]:
    """Yields matching rows of a partition, newest first, with the number of rows read so far. The store filters them, which
    saves transfer and parsing. Reads grow from 100 rows to the 1 MB that DynamoDB reads at once, so that they are short if
    there are many matches, and few if there are few."""
    keys = _range_key(table) < after if after is not None else None
    matches = table.query(
        hash_key, keys, where, scan_index_forward=False, consistent_read=True, page_size=100
    )
    pages = matches.page_iter
    for page in pages:
        yield [table.from_raw_data(item) for item in page["Items"]], pages.total_scanned_count
        pages.page_size = 2 * (pages.page_size or 100)


def keys_of(row: Row) -> tuple[Any, Any]:
    return getattr(row, row._hash_keyname or ""), getattr(row, row._range_keyname or "")


def _hash_key(table: type[Table]) -> Any:
    return getattr(table, table._hash_keyname or "")


def _range_key(table: type[Table]) -> Any:
    return getattr(table, table._range_keyname or "")
