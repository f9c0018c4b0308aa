"""The invariants of the job protocol over a real DynamoDB engine: `bin/bench protocol`.

Random interleavings with crashes, lost responses, late writes and stale workers (no invariant may be violated); the same
with one rule switched off (each such bug must be caught); 16 processes claiming 1,000 jobs at once (one winner each);
every kind of conditional write with its response lost, 50 times each (the rows are as if it had arrived); a cancellation
in each state in which no worker runs the job, 20 times each; and one user's hundred jobs beside another user's single one.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Scores

TRIES = 25  # per planted bug and scenario


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench protocol", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="interleavings per scenario")
    parser.add_argument("--jobs", type=int, default=1000, help="jobs to claim")
    parser.add_argument("--processes", type=int, default=16, help="processes that claim them")
    parser.add_argument("--only", default="", help="explore, planted, claims, replies, cancels or fairness")
    parser.add_argument("--replies", type=int, default=50, help="lost responses per kind of write")
    parser.add_argument("--seed", type=int, default=1)
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
        if options.only in ("", "replies"):
            replies(scores, options.replies, options.seed)
        if options.only in ("", "cancels"):
            cancels(scores, options.seed)
        if options.only in ("", "fairness"):
            fairness(scores)
    finally:
        service.kill()
    return scores.end()


def open_store() -> Any:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    os.environ["JOBS_MAX_JOBS_PER_OWNER"] = "1000"
    import django

    django.setup()
    logging.disable(logging.ERROR)
    from jobs.store import tables
    from tests import services

    service = services.dynamodb(Path(tempfile.mkdtemp()), int(os.environ["DYNAMODB_PORT"])).start()
    tables.create_tables()
    return service


def explore(scores: Scores, runs: int) -> None:
    from tests.jobs.lifecycle import protocol

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
    from tests.jobs.lifecycle import protocol
    from tests.jobs.lifecycle.planted import PLANTED

    caught = 0
    for bug in PLANTED:
        result = next(
            (
                (scenario, seed, violation)
                for seed in range(TRIES)
                for scenario in protocol.SCENARIOS
                if (violation := protocol.explore(scenario, seed, bug)[0])
            ),
            None,
        )
        caught += result is not None
        scores.note(f"{bug}: {result or 'NOT CAUGHT'}")
    scores.add("planted bugs caught", caught, len(PLANTED), 1)


def claims(scores: Scores, count: int, processes: int) -> None:
    """All processes claim the same job at the same moment, one job after another."""
    from jobs.store import tables
    from jobs.store.tables import Job

    owner = tables.new_id("user")
    for _ in range(count):
        tables.put_new(Job(owner, tables.new_id("ftjob"), status="queued"))
    start = multiprocessing.get_context("spawn")
    together, results = start.Barrier(processes), start.Queue()
    started = time.monotonic()
    racers = [start.Process(target=race, args=(owner, together, results)) for n in range(processes)]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=3600) for _ in racers]
    for racer in racers:
        racer.join()
    winners = [sum(round) for round in zip(*won, strict=True)]
    tokens = [job.fencing_token for job in tables.rows(Job, owner)]
    scores.note(f"{processes} processes, {count} jobs, {time.monotonic() - started:.0f} s")
    scores.add("jobs with exactly one winner", winners.count(1), count, 1)
    scores.add("jobs whose fencing token is 1", tokens.count(1), count, 1)


def race(owner: str, together: Barrier, results: Any) -> None:
    import django

    django.setup()
    disable_notifications()
    from jobs.lifecycle import transitions
    from jobs.store import tables

    won = []
    for job in list(tables.rows(tables.Job, owner)):  # all of them have read every job as queued
        together.wait()
        won.append(transitions.claim(job, transitions.this_worker()) is not None)
    results.put(won)


def disable_notifications() -> None:
    """This benchmark runs without Redis."""
    logging.disable(logging.ERROR)
    from jobs.events import event_log
    from jobs.store import redis_client

    for module, name in (
        (event_log, "announce"),
        (redis_client, "enqueue_training"),
        (redis_client, "enqueue"),
    ):
        setattr(module, name, lambda *_: None)


def replies(scores: Scores, times: int, seed: int) -> None:
    from tests.faults.lost_responses import KINDS, stale_worker

    disable_notifications()
    for name, kind in {**KINDS, "none, but the worker is stale": stale_worker}.items():
        right, started = 0, time.monotonic()
        for number in range(times):
            wrong = kind(random.Random(f"{seed}/{name}/{number}"))  # noqa: S311  not for secrets
            right += not wrong
            for violation in wrong:
                scores.note(f"{name}, number {number}: {violation}")
        scores.add(f"replies lost: {name}", right, times, 1)
        scores.note(f"{name}: {time.monotonic() - started:.0f} s")


def cancels(scores: Scores, seed: int) -> None:
    """Cancels jobs that no worker runs; `bin/bench faults --only cancelled` cancels running ones."""
    from tests.faults.cancels import STATES, cancel

    disable_notifications()
    for state in STATES:
        right = 0
        for number in range(20):
            wrong = cancel(state, random.Random(f"{seed}/{state}/{number}"))  # noqa: S311  not for secrets
            right += not wrong
            for violation in wrong:
                scores.note(f"{state}, number {number}: {violation}")
        scores.add(f"cancelled at once: {state}", right, 20, 1)


def fairness(scores: Scores) -> None:
    from tests.faults.cancels import jobs_started_before_other_user

    disable_notifications()
    for slots in (1, 2, 4):
        name = f"started before the other, {slots} slots"
        scores.add(name, jobs_started_before_other_user(slots), 0, 1, less_is_better=True)


if __name__ == "__main__":
    sys.exit(main())
