"""Compares the product with the recorded files: one item per line, sorted, so that changes are easy to read as a diff."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

EXPECTED = Path(__file__).parent / "expected"
RECORD = "RECORD_GOLDENS"  # set only by `python -m tests.golden.record`
# Lines that appear only in some runs, depending on the speed and rounding of the machine. They are recorded and may be
# missing; under another name they are new lines, which fail.
OPTIONAL = re.compile(
    r"\.(gemm_share|eta_s): number|\.reasons\.precision: text|finish_reason: “(stop|length)”"
    r"|estimated_finish: (number|empty)"
    r"|^JobIndex\.lease: stored as S"  # only while a worker processes an entry of the outbox
    # A tiny model may generate no text.
    r"|^(chat/completions|completions|playground) .*\.(content|text): (text|empty)"
)


def compare(name: str, lines: Iterable[str]) -> None:
    """Fails unless `lines` are exactly those of expected/<name>.txt."""
    current = {*lines}
    path = EXPECTED / f"{name}.txt"
    if os.environ.get(RECORD):
        path.write_text("".join(f"{line}\n" for line in sorted(current)), encoding="utf-8")
        return
    recorded = {*path.read_text(encoding="utf-8").splitlines()}
    difference = [f"- {line}" for line in sorted(recorded - current) if not OPTIONAL.search(line)]
    difference += [f"+ {line}" for line in sorted(current - recorded) if not OPTIONAL.search(line)]
    assert not difference, (
        f"{path.name}: the product no longer matches the recorded file (- recorded, + now).\n"
        + "\n".join(difference)
        + "\nStored data and other programs depend on these names. If the change is intended and old data can still be read, run: "
        ".venv/bin/python -m tests.golden.record"
    )
