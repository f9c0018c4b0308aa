"""Comparing the running product with what was recorded: one item a line, sorted, so that a change reads well as a diff."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

EXPECTED = Path(__file__).parent / "expected"
RECORD = "RECORD_GOLDENS"  # set by `python -m tests.golden.record` alone
OPTIONAL = "  (not in every run)"


def compare(name: str, lines: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Fails unless `lines` are exactly those of expected/<name>.txt. `optional` ones may be missing in a run, since the
    moment decides whether they come; a line that was never recorded always fails."""
    found = sorted({*lines})
    perhaps = {*optional}
    path = EXPECTED / f"{name}.txt"
    if os.environ.get(RECORD):
        marked = {line: line + OPTIONAL * (line in perhaps) for line in {*found, *perhaps}}
        path.write_text("".join(marked[line] + "\n" for line in sorted(marked)), encoding="utf-8")
        return
    told = path.read_text(encoding="utf-8").splitlines()
    known = {line.removesuffix(OPTIONAL) for line in told}
    needed = {line for line in told if not line.endswith(OPTIONAL)}
    missing, new = sorted(needed - {*found}), sorted({*found} - known)
    difference = [*(f"- {line}" for line in missing), *(f"+ {line}" for line in new)]
    assert not difference, (
        f"{path.name}: the product no longer agrees with what was recorded (- recorded, + now).\n"
        + "\n".join(difference)
        + "\nStored data and other programs depend on these names. If the change is meant, and old data can still be read: "
        ".venv/bin/python -m tests.golden.record"
    )
