"""Reads Parquet a few rows at a time. pyarrow is imported only here, and only when such a file is read.

The sizes in a Parquet file's metadata are not trusted (200 KB may decompress to 2 GB). The whole file is
decoded and counted before its first row is returned, because everything after that costs a thousand times
more; decoding stops at the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.data.bad_row import BadFile, is_empty

BATCH = 64
CONVERT = "Write it again with a common tool (pandas, DuckDB), or save it as JSONL."
MAX_COLUMNS = 1000
SMALL, MOST_TIMES = 64 << 20, 500  # decoded bytes allowed for any file, plus this many times its own size


def names(path: Path) -> list[str]:
    """The names of its columns. Raises BadFile."""
    return list(_open(path).schema_arrow.names)


def records(
    path: Path, columns: dict[str, str], limit: int, beside: frozenset[str] = frozenset()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values) of the given columns and those named `beside`, in any case; other columns are never
    decoded."""
    file = _open(path)
    wanted = _wanted(file, columns, beside)
    limit = min(limit, SMALL + MOST_TIMES * path.stat().st_size)
    number = decoded = 0
    with _named_damage(lambda: number + 1):
        for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
            decoded += _text_in(batch)
            number += batch.num_rows
            if decoded > limit:
                raise BadFile(
                    0, f"it decompresses to more than {limit >> 20} MB", "Split it into smaller files."
                )
        number = 0
        for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
            kinds = {field.name: field.type for field in batch.schema if _is_nested(field.type)}
            for record in _without_nanoseconds(batch).to_pylist():
                number += 1
                if kinds:
                    record |= {name: _as_json(record[name], kind) for name, kind in kinds.items()}
                yield number, record
    if number == 0:
        raise BadFile(0, "the Parquet file has no rows", "Upload a file with at least one example.")


def unused(path: Path, columns: dict[str, str], limit: int, beside: frozenset[str]) -> dict[str, int]:
    """{name: rows in which it holds something} of the columns that `records` leaves out. Where the metadata
    says it, the column is not decoded; a column that would be larger than `limit` counts every row that is not
    null."""
    file = _open(path)
    wanted = _wanted(file, columns, beside)
    counts: dict[str, int] = {}
    leaf = 0
    with _named_damage(lambda: 0):
        for field in file.schema_arrow:
            leaves = _leaves(field.type)
            if wanted is not None and field.name not in wanted:
                chunks = [
                    group.column(number)
                    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups))
                    for number in range(leaf, leaf + leaves)
                ]
                counts[field.name] = _count(file, field, chunks, limit)
            leaf += leaves
    return {name: count for name, count in counts.items() if count}


def _wanted(file: Any, columns: dict[str, str], beside: frozenset[str]) -> list[str] | None:
    """The columns to decode; None = all."""
    names = file.schema_arrow.names
    wanted = [name for name in columns.values() if name in names]
    if not wanted:
        return None
    return wanted + [name for name in names if name.strip().lower() in beside and name not in wanted]


def _count(file: Any, field: Any, chunks: list[Any], limit: int) -> int:
    """The rows in which a column holds something."""
    nulls = [chunk.statistics.null_count for chunk in chunks if _has_null_count(chunk)]
    known = len(nulls) == len(chunks)
    if known and sum(nulls) == sum(chunk.num_values for chunk in chunks):
        return 0
    rows = int(file.metadata.num_rows)
    large = sum(chunk.total_uncompressed_size for chunk in chunks) > limit
    if known and (large or not (_is_nested(field.type) or _may_be_blank(field.type))):
        return rows - sum(nulls) if len(chunks) == file.metadata.num_row_groups else rows
    if large:
        return rows
    batches = file.iter_batches(BATCH, columns=[field.name], use_threads=False)
    return sum(_filled(batch.column(0)) for batch in batches)


def _has_null_count(chunk: Any) -> bool:
    return bool(chunk.is_stats_set and chunk.statistics.has_null_count)


def _filled(values: Any) -> int:
    """How many values hold something, by the rule of `is_empty`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if _is_nested(values.type):
        return sum(not is_empty(_as_json(value, values.type)) for value in values.to_pylist())
    if _may_be_blank(values.type):
        return sum(not is_empty(value) for value in values.to_pylist())
    return len(values) - int(pc.sum(pc.is_null(values)).as_py() or 0)


def _as_json(value: Any, kind: Any) -> Any:
    """A value as JSON has it: maps are objects, and a field that a struct does not fill is absent, because a
    column's structs all have the same fields."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_map(kind):
        return {str(key): _as_json(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {key: _as_json(item, kinds[key]) for key, item in value.items() if item is not None}
    return [_as_json(item, kind.value_type) for item in value] if _is_nested(kind) else value


def _is_nested(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(kind)) and kind.num_fields > 0


def _leaves(kind: Any) -> int:
    """How many columns a type takes in the file."""
    if not _is_nested(kind):
        return 1
    return sum(_leaves(kind.field(number).type) for number in range(kind.num_fields))


def _without_nanoseconds(batch: Any) -> Any:
    """Times in microseconds, the finest that Python has."""
    import pyarrow as pa

    fields = [field.with_type(_microseconds(field.type)) for field in batch.schema]
    if all(field.type == old.type for field, old in zip(fields, batch.schema, strict=True)):
        return batch
    return batch.cast(pa.schema(fields), safe=False)


def _microseconds(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_microseconds(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_microseconds(field.type)) for field in kind])
    return kind


@contextmanager
def _named_damage(row: Callable[[], int]) -> Iterator[None]:
    """Raises BadFile with the row instead of the library's errors."""
    import pyarrow as pa

    try:
        yield
    except BadFile:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadFile(row(), f"the Parquet file is damaged here: {_words(error)}", CONVERT) from error


def _text_in(batch: Any) -> int:
    """Bytes as text: repeated values are small in the file and in Arrow, but not as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size = int(batch.nbytes)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary) if _is_text(column.type.value_type) else None
            size += (pc.sum(lengths.take(column.indices)).as_py() or 0) if lengths is not None else 0
    return size


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _may_be_blank(kind: Any) -> bool:
    """Whether a value of this type may be empty without being null."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _open(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BadFile(
            0, "this server cannot read Parquet: pyarrow is not installed", "Save it as JSONL."
        ) from error
    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False, thrift_string_size_limit=1 << 24)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadFile(0, f"this Parquet file cannot be read: {_words(error)}", CONVERT) from error
    if len(names) > MAX_COLUMNS:
        raise BadFile(
            0,
            f"it has {len(names)} columns; the limit is {MAX_COLUMNS}",
            "Keep only the columns to train on.",
        )
    doubled = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if doubled is not None:
        raise BadFile(0, f"two columns are named {doubled!r}", "Give each column its own name.")
    return file


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
