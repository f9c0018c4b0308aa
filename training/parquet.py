"""Parquet, read a few rows at a time. Only here is pyarrow imported, and only when such a file is read.

A Parquet file's own account of its size is never believed (200 KB may decode to 2 GB): decoded bytes are counted
as they come, and reading stops at the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.shapes import BadFile

BATCH = 64
CONVERT = "Write it again with an ordinary tool (pandas, DuckDB), or save it as JSONL."
MAX_COLUMNS = 1000


def names(path: Path) -> list[str]:
    """Of its columns."""
    return list(_open(path).schema_arrow.names)


def records(path: Path, columns: dict[str, str], limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values) of the columns named; other columns are never decoded."""
    import pyarrow as pa

    file = _open(path)
    wanted = [name for name in columns.values() if name in file.schema_arrow.names]
    number = decoded = 0
    try:
        for batch in file.iter_batches(BATCH, columns=wanted or None, use_threads=False):
            found = batch.to_pylist()
            # What repeats is small in the file and in Arrow, but not once it is text.
            decoded += max(batch.nbytes, sum(len(v) for r in found for v in r.values() if isinstance(v, str)))
            if decoded > limit:
                raise BadFile(
                    number, f"it decodes to more than {limit >> 20} MB", "Split it into smaller files."
                )
            for record in found:
                number += 1
                yield number, record
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(number + 1, f"the Parquet file is damaged here: {_words(error)}", CONVERT) from error
    if number == 0:
        raise BadFile(0, "the Parquet file has no rows", "Upload a file with at least one example in it.")


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
            f"it has {len(names)} columns; at most {MAX_COLUMNS} are read",
            "Keep only the columns to train on.",
        )
    doubled = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if doubled is not None:
        raise BadFile(0, f"two columns are named {doubled!r}", "Give every column its own name.")
    return file


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
