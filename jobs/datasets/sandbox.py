"""A file that came from a stranger is read by a child process with limits; here is what it answers."""

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
MAX_ANSWER_BYTES = 8 << 20


def run(arguments: list[str], answer: str, file_bytes: int = 1 << 20) -> dict[str, Any] | None:
    """`python -m training ARGUMENTS…`: its line of the kind `answer`; None when the limits were not enough."""
    seconds = settings.JOBS["check_timeout_s"]
    limits = Limits(
        memory_bytes=int(settings.JOBS["check_memory_bytes"]),
        cpu_s=int(seconds),
        file_bytes=file_bytes,
        open_files=256,
    )
    child = child_process.start(*arguments, limits=limits)
    child.out.cap = MAX_ANSWER_BYTES
    found: dict[str, Any] | None = None
    try:
        for is_error, line in child_process.read_lines(child, seconds):
            if is_error:
                log.warning("%s: %s", arguments[0], redact(line))
                continue
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if said.get("t") == answer:
                    found = said
    finally:
        child.kill()
    return found


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """An empty one, for the length of the block."""
    Path(settings.WORK_DIR).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=settings.WORK_DIR))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def tokenizer_of(base: str) -> str:
    """Where the tokenizer of a base model lies, if that is on this machine."""
    found = catalog.find(base)
    return found.folder if found else ""
