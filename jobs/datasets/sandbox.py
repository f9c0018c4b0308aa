"""Reads users' files, which are untrusted, in a child process with limits."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.store import child_process
from jobs.store.child_process import Limits
from jobs.store.redact import redact
from training.plan import catalog

log = logging.getLogger(__name__)
MAX_OUTPUT_BYTES = 8 << 20


def run(
    arguments: list[str],
    kind: str | tuple[str, ...],
    file_bytes: int = 1 << 20,
    more_memory: int = 0,
) -> dict[str, Any] | None:
    """Runs `python -m training ARGUMENTS…` and returns its event of this type (or one of these), or None if it exceeded the
    limits.

    `file_bytes` is the largest file that it may write. `more_memory` is added to the usual limit, in bytes."""
    kinds = (kind,) if isinstance(kind, str) else kind
    seconds = settings.JOBS["check_timeout_s"]
    limits = Limits(
        memory_bytes=int(settings.JOBS["check_memory_bytes"]) + more_memory,
        cpu_s=int(seconds),
        file_bytes=file_bytes,
        open_files=256,
    )
    child = child_process.start(*arguments, limits=limits)
    child.out.cap = MAX_OUTPUT_BYTES
    result: dict[str, Any] | None = None
    try:
        for is_error, line in child_process.read_lines(child, seconds):
            if is_error:
                log.warning("%s: %s", arguments[0], redact(line))
                continue
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("t") in kinds:
                    result = event
    finally:
        child.kill()
    return result


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """An empty folder that is deleted after the block."""
    Path(settings.WORK_DIR).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=settings.WORK_DIR))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def tokenizer_of(base: str) -> str:
    """The folder of a base model's tokenizer, or an empty string if it is not on this machine."""
    model = catalog.find(base)
    return model.folder if model else ""
