"""Comparing the running product with what was recorded: one item a line, sorted, so that a change reads well as a diff."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

EXPECTED = Path(__file__).parent / "expected"
RECORD = "RECORD_GOLDENS"  # set by `python -m tests.golden.record` alone
# What comes in some runs and not in others, as speed and arithmetic of the machine have it. It is recorded and may be
# missing; under another name it is a new line, which fails.
PERHAPS = re.compile(
    r"\.(gemm_share|eta_s): number|\.reasons\.precision: text|finish_reason: “(stop|length)”"
    r"|estimated_finish: (number|empty)"
    r"|^JobIndex\.lease: stored as S"  # only while somebody works on an entry of the outbox
    # A tiny model may write nothing.
    r"|^(chat/completions|completions|playground) .*\.(content|text): (text|empty)"
)


def compare(name: str, lines: Iterable[str]) -> None:
    """Fails unless `lines` are exactly those of expected/<name>.txt."""
    found = {*lines}
    path = EXPECTED / f"{name}.txt"
    if os.environ.get(RECORD):
        path.write_text("".join(f"{line}\n" for line in sorted(found)), encoding="utf-8")
        return
    known = {*path.read_text(encoding="utf-8").splitlines()}
    difference = [f"- {line}" for line in sorted(known - found) if not PERHAPS.search(line)]
    difference += [f"+ {line}" for line in sorted(found - known) if not PERHAPS.search(line)]
    assert not difference, (
        f"{path.name}: the product no longer agrees with what was recorded (- recorded, + now).\n"
        + "\n".join(difference)
        + "\nStored data and other programs depend on these names. If the change is meant, and old data can still be read: "
        ".venv/bin/python -m tests.golden.record"
    )
