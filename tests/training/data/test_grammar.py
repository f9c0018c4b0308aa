"""Every case of the grammar through the program that checks uploads: the verdict is the one known
beforehand, names its line, comes soon and takes little memory."""

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
    60.0  # of the processor, where the slowest needs two: a bound for what would take minutes, on any machine
)
MEMORY = 128 << 20
OF_THE_WHOLE_FILE = {"few", "poor_fit"}  # no line to look at
# One process for all, under the limits of a check: what it does with one file must not show in the next.
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
    idle, begun = memory.peak_rss(), time.process_time()
    found = report(path, tokenizer, EncodingOptions(512), validation=validation or None)
    seconds = time.process_time() - begun
    print(json.dumps([name, seconds, memory.peak_rss() - idle, found]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("grammar")
    asked = []
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
        asked.append(json.dumps([case.name, str(path), str(validation) if case.validation else ""]))
    warm = Path(folder / "warm.jsonl")
    warm.write_text('{"prompt": "a", "completion": " b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ALL, str(STARTER_FOLDER), str(warm)],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = (json.loads(line) for line in done.stdout.splitlines())
    return {name: (seconds, memory, report) for name, seconds, memory, report in found}


def test_the_grammar_has_all_its_cases() -> None:
    families = Counter(case.name[:2] for case in ALL)
    # 264 with the 44 of the door; of G2's list each item is a case here, which makes three more.
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
    found = {finding["code"]: finding for finding in report["findings"]}
    if case.finding:
        assert case.finding in found
        assert bool(found[case.finding]["lines"]) is (case.finding not in OF_THE_WHOLE_FILE)
