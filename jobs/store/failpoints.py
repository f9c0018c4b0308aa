"""Places where a test may kill or stop a process: `FAILPOINTS=name:action[:n]`, at the n-th passing (the first), or at
every one (`:every`).

Actions: `kill9` (this process, at once), `raise`, `pause<seconds>`. In production nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from django.conf import settings

_passed: Counter[str] = Counter()


class InjectedFailure(Exception):
    """A failure that a test asked for."""


def hit(name: str) -> None:
    """Does what the environment asks for at this place; mostly nothing."""
    if not settings.FAILPOINTS or settings.PRODUCTION:
        return
    place, _, rest = settings.FAILPOINTS.partition(":")
    action, _, number = rest.partition(":")
    if place != name:
        return
    _passed[name] += 1
    if number != "every" and _passed[name] != int(number or 1):
        return
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFailure(name)
    elif action.startswith("pause"):
        time.sleep(float(action.removeprefix("pause")))
