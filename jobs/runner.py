"""One attempt at a job: from a claim to its end, beside a trainer that is a child of this process.

The trainer has no credentials and no store. It reads files, writes files and prints lines; this module fetches what it
needs, numbers and stores what it says, uploads what it makes and obeys what people want (`desired`).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.lifecycle import Claim


def run(claim: Claim, stop: threading.Event | None = None) -> None:
    """Runs the claimed job until it ends, is paused or cancelled, is lost to another holder, or `stop` is set (then it
    is given back within 30 s). Must be called from the main thread: the trainer dies with the thread that starts it.
    Never raises for anything that happens to the job; what it can't write down, the reconciler finds."""
    raise NotImplementedError
