"""The outbox: every kind of work has a handler in every process."""

from __future__ import annotations

import subprocess
import sys

from jobs.store import outbox

PROGRAM = """
import django
django.setup()
from jobs.store import outbox
print(*sorted(outbox._handlers))
print(*sorted(outbox._deletions))
"""


def test_a_process_that_only_sets_up_django_has_every_handler():
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    ).stdout
    kinds, prefixes = output.splitlines()
    assert kinds.split() == sorted(outbox.KINDS)
    assert prefixes.split() == ["base-", "file-", "ft:", "ftjob-", "upload-"]
