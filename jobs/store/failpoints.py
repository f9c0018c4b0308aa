"""Failpoints: places where a test can kill or pause a process. `FAILPOINTS=name:action[:n]` runs the action at the n-th hit
(by default the first), or at every hit (`:every`).

Actions: `kill9` (this process), `raise`, `pause<seconds>`. Disabled in production.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from django.conf import settings

_hits: Counter[str] = Counter()


class InjectedFailure(Exception):
    """A failure that a test requested."""


def hit(name: str) -> None:
    """Runs the action that the environment sets for this failpoint, if any."""
    if not settings.FAILPOINTS or settings.PRODUCTION:
        return
    failpoint, _, rest = settings.FAILPOINTS.partition(":")
    action, _, number = rest.partition(":")
    if failpoint != name:
        return
    _hits[name] += 1
    if number != "every" and _hits[name] != int(number or 1):
        return
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFailure(name)
    elif action.startswith("pause"):
        time.sleep(float(action.removeprefix("pause")))
