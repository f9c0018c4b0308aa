"""Schemathesis reads the OpenAPI document and tries what it allows and forbids: no 5xx, nothing undocumented, no
call that forgets to ask who is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Person
from tests.services import ROOT

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_document_tells_the_truth(web: Any, people: dict[str, Person], tmp_path: Path):
    argv = [str(ROOT / ".venv/bin/st"), "--config-file", str(HERE / "schemathesis.toml"), "run"]
    argv += [f"{web.url}/v1/openapi.json", "--header", f"Authorization: Bearer {people['alice'].key}"]
    argv += [
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--phases",
        "coverage",
        "--request-timeout",
        "30",
        "--seed",
        "1",
        "--no-color",
    ]
    # Text is made elsewhere, and no worker runs here: generation has its own tests.
    argv += ["--exclude-path-regex", "completions"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:]
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert tested
    assert int(tested[1]) >= 24
