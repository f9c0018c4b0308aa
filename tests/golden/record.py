"""Records the golden files again: `.venv/bin/python -m tests.golden.record [pytest arguments]`.

Nothing else writes them. Review the difference before committing it: stored data, older workers or other programs rely on
each line that disappears or changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.golden.compare import RECORD

ROOT = Path(__file__).resolve().parents[2]
FILES = ["tests/golden/test_declared.py", "tests/golden/test_trainer.py", "tests/golden/test_stored.py"]


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:randomly",
        *(sys.argv[1:] or FILES),
    ]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {RECORD: "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
