"""Real processes are killed, stopped and disconnected while jobs run, and all invariants hold. The short form of
`bin/bench faults`, in a separate environment, so that the stores of other tests are not affected."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.faults import SHORT
from tests.services import ROOT

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def campaign():
    own = ("LLMTUNER_TEST_DIR", "VAR_DIR", "DYNAMODB", "REDIS", "WEB_PORT", "PUBLIC_URL", "DATABASE_URL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--short"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("fault", SHORT)
def test_a_fault_neither_loses_nor_repeats_nor_changes_anything(campaign, fault):
    lines = [line for line in campaign.splitlines() if line.startswith(f"{fault}: rounds right")]
    assert lines, campaign[-3000:]
    assert lines[0].endswith(" met"), "\n".join(line for line in campaign.splitlines() if fault in line)


def test_a_trainer_dies_within_a_second_of_its_worker(campaign):
    assert any(
        line.startswith("worker killed: trainer dead s") and line.endswith(" met")
        for line in campaign.splitlines()
    )


def test_a_worker_exits_within_thirty_seconds_of_sigterm(campaign):
    assert any(
        line.startswith("worker terminated: out s") and line.endswith(" met")
        for line in campaign.splitlines()
    )
