"""All cases of the grammar through the program that checks uploads: each gets the expected verdict with the right line,
in little time and memory."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.grammar import Case, cases
from training.plan.catalog import STARTER_FOLDER

ALL = cases()
SECONDS = (
    60.0  # CPU time; the slowest needs two, and a case with quadratic time would need minutes on any machine
)
MEMORY = 128 << 20
WITHOUT_LINES = {"few", "poor_fit"}  # findings without lines
# One process with the limits of a check for all cases: a file must not influence the next one.
CHECK_ALL = """
import gc, json, sys, time
from training.engine import memory
from training.report import check
from training.text.encode import EncodingOptions
from training.report.report import report
from training.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
report(sys.argv[2], tokenizer, EncodingOptions(512))
for line in sys.stdin:
    name, path, validation = json.loads(line)
    gc.collect()
    memory.reset_peak_rss()
    idle, started = memory.peak_rss(), time.process_time()
    result = report(path, tokenizer, EncodingOptions(512), validation=validation or None)
    seconds = time.process_time() - started
    print(json.dumps([name, seconds, memory.peak_rss() - idle, result]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("grammar")
    requests = []
    for number, case in enumerate(ALL):
        path = folder / str(number) / case.file
        path.parent.mkdir()
        if callable(case.content):
            case.content(path)
        else:
            path.write_bytes(case.content)
        validation = path.parent / "validation.jsonl"
        if case.validation:
            validation.write_bytes(case.validation)
        requests.append(json.dumps([case.name, str(path), str(validation) if case.validation else ""]))
    warm = Path(folder / "warm.jsonl")
    warm.write_text('{"prompt": "a", "completion": " b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ALL, str(STARTER_FOLDER), str(warm)],
        input="\n".join(requests),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = (json.loads(line) for line in done.stdout.splitlines())
    return {name: (seconds, memory, report) for name, seconds, memory, report in results}


def test_the_grammar_has_all_cases() -> None:
    families = Counter(case.name[:2] for case in ALL)
    # The specification has 264 with the 44 of the upload endpoint. G2 has three more here: each item of a list is a case.
    assert families == {"G1": 48, "G2": 35, "G3": 30, "G4": 24, "G5": 36, "G6": 30, "G7": 20}
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_each_case_gets_the_expected_verdict(verdicts: dict[str, Any], case: Case) -> None:
    seconds, memory, report = verdicts[case.name]
    assert report["ready"] == case.accept, report["verdict"]
    assert seconds <= SECONDS
    assert memory <= MEMORY
    if not case.accept:
        assert len(report["error"]) > 20
        assert "Traceback" not in report["error"]
    if case.line:
        assert re.match(rf"Line {case.line}\b", report["error"]), report["error"]
    findings = {finding["code"]: finding for finding in report["findings"]}
    if case.finding:
        assert case.finding in findings
        assert bool(findings[case.finding]["lines"]) is (case.finding not in WITHOUT_LINES)
