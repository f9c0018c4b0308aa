"""Simulates the job protocol over the real tables, and checks that the simulation catches planted bugs. See
tests/jobs/lifecycle/protocol.py.

Longer runs: `bin/test --all`, and `bin/bench protocol`.
"""

from __future__ import annotations

import logging
import random
import time

import pytest

from tests.jobs.lifecycle import protocol
from tests.jobs.lifecycle.planted import PLANTED

pytestmark = pytest.mark.usefixtures("stores")
SECONDS = [12, pytest.param(200, marks=pytest.mark.campaign)]
MIN_RUNS = len(protocol.SCENARIOS)  # however slow the machine is
TRIES = 12  # runs with a planted bug, starting with the seed that caught it before

# The scenario and seed that caught a planted bug when this was written. After a change in the order of calls it may take
# a few more seeds. `bin/bench protocol` runs every planted bug.
STARTING_SEEDS: dict[str, tuple[str, int]] = {
    "worker may write after the end": ("pause", 2),
    "readers read chunks first": ("twin", 5),
    "paused is an end": ("pause", 0),
    "janitor forgets the fallbacks": ("delete", 0),
    "janitor sweeps everything": ("delete", 0),
    "superseded files are deleted before the pointer moves": ("superseded", 0),
    "lost leases are taken blindly": ("delete", 3),
    "jobs are listed after they are stored": ("delete", 0),
    "quota is a counter": ("cancel", 0),
    "claim ignores later changes": ("mixed", 0),
    "cancels can be taken back": ("cancel", 1),
    "requeueing is blind": ("cancel", 3),
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", SECONDS)
def test_no_interleaving_violates_an_invariant(seconds):
    first, started, runs = random.randrange(10**6), time.monotonic(), 0
    while runs < MIN_RUNS or time.monotonic() - started < seconds:
        scenario = list(protocol.SCENARIOS)[runs % len(protocol.SCENARIOS)]
        violation, sim = protocol.explore(scenario, first + runs)
        assert not violation, "\n".join([*sim.log[-80:], f"{scenario}, seed {first + runs}: {violation}"])
        runs += 1


@pytest.mark.slow
@pytest.mark.parametrize("bug", STARTING_SEEDS)
def test_a_planted_bug_is_caught(bug):
    scenario, seed = STARTING_SEEDS[bug]
    others = [name for name in protocol.SCENARIOS if name not in ("lossy", scenario)]
    plan = [(scenario, seed), (scenario, seed + 1), *((name, seed + 1) for name in others)]
    assert any(protocol.explore(name, number, bug)[0] for name, number in plan[:TRIES])


def test_every_starting_seed_belongs_to_a_planted_bug():
    assert set(STARTING_SEEDS) <= set(PLANTED)
