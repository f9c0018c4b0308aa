"""Records the golden files anew: `.venv/bin/python -m tests.golden.record [pytest arguments]`.

Nothing else ever writes them. Look at the difference before committing it: each line that goes or changes its name is
something that stored data, an older worker or somebody else's program relies on.
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
