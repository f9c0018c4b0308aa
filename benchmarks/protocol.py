"""The job protocol's promises over the real DynamoDB engine: `bin/bench protocol`.

Random interleavings with crashes, lost replies, late writes and zombies (none may break a promise); the same with a rule
switched off (each must be caught); and 16 processes that claim 1,000 jobs at once (one winner each).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Scores

TRIES = 25  # of each planted bug and scenario


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench protocol", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="interleavings of each scenario")
    parser.add_argument("--jobs", type=int, default=1000, help="jobs to claim")
    parser.add_argument("--processes", type=int, default=16, help="that claim them")
    parser.add_argument("--only", default="", help="explore, planted or claims")
    options = parser.parse_args()
    service = open_store()
    scores = Scores()
    try:
        if options.only in ("", "explore"):
            explore(scores, options.runs)
        if options.only in ("", "planted"):
            planted(scores)
        if options.only in ("", "claims"):
            claims(scores, options.jobs, options.processes)
    finally:
        service.kill()
    return scores.end()


def open_store() -> Any:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    import django

    django.setup()
    logging.disable(logging.ERROR)
    from jobs import tables
    from tests import services

    service = services.dynamodb(Path(tempfile.mkdtemp()), int(os.environ["DYNAMODB_PORT"])).start()
    tables.create_tables()
    return service


def explore(scores: Scores, runs: int) -> None:
    from tests.jobs import protocol

    for scenario in protocol.SCENARIOS:
        wrong, calls, started = 0, 0, time.monotonic()
        for seed in range(runs):
            violation, sim = protocol.explore(scenario, seed)
            calls += sim.calls
            if violation:
                wrong += 1
                print("\n".join(sim.log[-60:]), f"{scenario}, seed {seed}: {violation}", sep="\n")
        scores.add(f"violations: {scenario}", wrong, 0, 1, less_is_better=True)
        scores.note(f"{runs} runs, {calls:,} calls, {time.monotonic() - started:.0f} s")


def planted(scores: Scores) -> None:
    from tests.jobs import protocol
    from tests.jobs.planted import PLANTED

    caught = 0
    for bug in PLANTED:
        found = next(
            (
                (scenario, seed, violation)
                for seed in range(TRIES)
                for scenario in protocol.SCENARIOS
                if (violation := protocol.explore(scenario, seed, bug)[0])
            ),
            None,
        )
        caught += found is not None
        scores.note(f"{bug}: {found or 'NOT CAUGHT'}")
    scores.add("planted bugs caught", caught, len(PLANTED), 1)


def claims(scores: Scores, count: int, processes: int) -> None:
    """All processes go for the same job at the same moment, one job after another."""
    from jobs import tables
    from jobs.tables import Job

    owner = tables.new_id("user")
    ids = [tables.new_id("ftjob") for _ in range(count)]
    for job_id in ids:
        tables.put_new(Job(owner, job_id, status="queued"))
    start = multiprocessing.get_context("spawn")
    together, results = start.Barrier(processes), start.Queue()
    started = time.monotonic()
    racers = [start.Process(target=race, args=(n, owner, ids, together, results)) for n in range(processes)]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=3600) for _ in racers]
    for racer in racers:
        racer.join()
    winners = [sum(round) for round in zip(*won, strict=True)]
    epochs = [job.epoch for job in tables.rows(Job, owner)]
    scores.note(f"{processes} processes, {count} jobs, {time.monotonic() - started:.0f} s")
    scores.add("jobs with exactly one winner", winners.count(1), count, 1)
    scores.add("jobs whose epoch is 1", epochs.count(1), count, 1)


def race(number: int, owner: str, ids: list[str], together: Barrier, results: Any) -> None:
    import django

    django.setup()
    logging.disable(logging.ERROR)
    from jobs import feed, lifecycle, tables, tasks

    for module, name in ((feed, "announce"), (tasks, "ring_training")):
        setattr(module, name, lambda *_: None)  # no bells here
    won = []
    for job_id in ids:
        job = tables.get(tables.Job, owner, job_id)
        together.wait()
        won.append(job is not None and lifecycle.claim(job, lifecycle.this_worker()) is not None)
    results.put(won)


if __name__ == "__main__":
    sys.exit(main())
