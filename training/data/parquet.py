"""Reads Parquet a few rows at a time. pyarrow is imported only here, and only when such a file is read.

The sizes in a Parquet file's metadata are not trusted (200 KB may decompress to 2 GB). The whole file is
decoded and counted before its first row is returned, because everything after that costs a thousand times
more; decoding stops at the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.bad_row import BadFile

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
    import pyarrow as pa

    file = _open(path)
    names = file.schema_arrow.names
    wanted = [name for name in columns.values() if name in names] or None
    if wanted:
        wanted += [name for name in names if name.strip().lower() in beside and name not in wanted]
    limit = min(limit, SMALL + MOST_TIMES * path.stat().st_size)
    number = decoded = 0
    try:
        for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
            decoded += _text_in(batch)
            number += batch.num_rows
            if decoded > limit:
                raise BadFile(
                    0, f"it decompresses to more than {limit >> 20} MB", "Split it into smaller files."
                )
        number = 0
        for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(number + 1, f"the Parquet file is damaged here: {_words(error)}", CONVERT) from error
    if number == 0:
        raise BadFile(0, "the Parquet file has no rows", "Upload a file with at least one example.")


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
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
