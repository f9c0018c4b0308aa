"""Fault injection: `bin/bench faults`, or `--short` for the form that bin/test runs.

Faults are injected into real processes: workers, trainers, stores, connections. After each one, tests/faults/invariants.py
checks the stores: no event missing or doubled, one lease owner per fencing token, weights and losses bit for bit equal to
those of the run without faults. Durations are compared with their limits, and no round may violate an invariant.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Leases of 6 s instead of 30, so that a takeover takes seconds. Everything else is as in production.
QUICK = {
    "JOBS_LEASE_S": "6",
    "JOBS_HEARTBEAT_S": "1",
    "JOBS_RECONCILE_S": "1",
    "JOBS_SELF_FENCE_S": "4",
    "JOBS_BACKOFF_FIRST_S": "1",
}

SHORT = (
    "worker killed",
    "trainer killed",
    "worker terminated",
    "worker frozen",
    "redis killed",
    "dynamodb killed",
)
LIMITS = {  # in seconds if the name ends in "s"; for "new attempt s" see `limit_of`
    "trainer dead s": 1.0,
    "detected s": 2.0,
    "out s": 30.0,
    "stale worker's trainer killed s": 5.0,
    "submit s": 5.0,
    "claimed s": 45.0,
    "web back s": 5.0,
    "cancelled s": 30.0,
    "last step after s": 10.0,
    "paused s": 30.0,
    "others before it": 0.0,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench faults", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="the form that bin/test runs: six faults, short leases"
    )
    parser.add_argument("--quick", action="store_true", help="all faults, with leases of 6 s instead of 30")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per fault (20 in the full form)")
    parser.add_argument("--steps", type=int, default=0, help="steps per job (600; 300 with short leases)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="jobs that get a fault at the same time, each with its own worker",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="only faults whose name contains this, or one of these (a,b)")
    parser.add_argument(
        "--s3", action="store_true", help="faults of S3, in an environment that stores objects there"
    )
    parser.add_argument(
        "--planted", action="store_true", help="planted bugs that must be caught, instead of faults"
    )
    parser.add_argument("--logs", action="store_true", help="print what the processes logged")
    options = parser.parse_args()
    quick = options.short or options.quick or options.planted
    rounds = options.rounds or (1 if quick else 20)
    if quick:
        os.environ.update(QUICK)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["JOBS_MAX_JOBS_PER_OWNER"] = "1000"
    options.steps = options.steps or (300 if quick else 600)

    from tests.faults import environment as env

    env.prepare_environment(objects_in_s3=options.s3)
    environment = env.start_environment()
    try:
        return campaign(environment, options, rounds)
    finally:
        for store in (environment.dynamodb, environment.redis):
            if store.process and store.process.poll() is not None:
                print(
                    f"# {store.name} exited with code {store.process.returncode}: {store.log.read_text()[-500:]}"
                )
        if options.logs:
            for log in sorted(environment.folder.glob("*.log")):
                print(f"==== {log.name}", log.read_text(errors="replace")[-6000:], sep="\n")
        environment.stop()


def campaign(environment: object, options: argparse.Namespace, rounds: int) -> int:
    import random

    from django.conf import settings

    from benchmarks.common import Scores
    from tests.faults import environment as env
    from tests.faults.invariants import Recorder
    from tests.faults.scenario import Scenario

    assert isinstance(environment, env.Environment)
    lease = settings.JOBS["lease_s"]
    scores = Scores()
    scenario = Scenario(
        environment,
        env.ready_dataset(),
        options.steps,
        Recorder().start(),
        random.Random(options.seed),  # noqa: S311  not for secrets
        lease_s=lease,
        at_once=options.at_once,
    )
    scenario.run_reference()
    scores.note(
        f"lease {lease:.0f} s, {scenario.steps} steps per job, {rounds} rounds per fault, seed {options.seed}"
    )
    if options.planted:
        return planted(scenario, scores, options.only or "")
    for name, fault in faults_of(options, 2.0 if lease < 10 else 10.0).items():
        selected = not options.only or any(part in name for part in options.only.split(","))
        if not selected or (options.short and name not in SHORT):
            continue
        done, wrong, worst, started = 0, 0, dict[str, float](), time.monotonic()
        while done < rounds:
            try:
                measured = fault(scenario, min(rounds - done, CHUNK))
            except KeyboardInterrupt:
                scores.note(f"{name}: interrupted")
                rounds = done
                break
            for violation in measured.violations:
                scores.note(f"{name}: {violation}")
            done += measured.rounds
            wrong += measured.rounds if measured.violations else 0
            for figure, value in measured.figures.items():
                worst[figure] = max(value, worst.get(figure, 0.0))
            scores.note(f"{name}: {done} done after {time.monotonic() - started:.0f} s")
            if name in ONCE:
                break
        if done:
            scores.add(f"{name}: rounds right", done - wrong, done, 1.0)
        for figure, value in worst.items():
            limit = limit_of(figure, lease)
            if limit is None:
                scores.note(f"{name}: {figure} {value:.3g}")
            else:
                scores.add(f"{name}: {figure}", value, limit, 1.0, less_is_better=True)
    return scores.end()


def limit_of(figure: str, lease_s: float) -> float | None:
    """Another attempt begins at the latest ten seconds after the lease has expired."""
    return lease_s + 10 if figure == "new attempt s" else LIMITS.get(figure)


def planted(scenario: Any, scores: Any, only: str) -> int:
    from tests.faults import mutants

    scenario.timeout_s, caught, started = 40.0, [], time.monotonic()
    for name, wrong in mutants.catch(scenario, only.split(",")):
        caught.append(bool(wrong))
        scores.note(
            f"{name}: {wrong[0][:200] if wrong else 'NOT CAUGHT'} ({time.monotonic() - started:.0f} s)"
        )
    scores.add("planted bugs caught", sum(caught), len(caught), 1.0)
    return int(scores.end())


CHUNK = 10  # rounds of a fault between two lines of progress
ONCE = {"dynamodb away for two minutes", "clocks two hours off", "fair share"}


def faults_of(options: argparse.Namespace, down_s: float) -> dict[str, Callable[[Any, int], Any]]:
    from tests.faults import processes, stores, user_actions, web

    if options.s3:
        return {
            f"s3 {fault}": lambda scenario, _, fault=fault: stores.s3_faulty(scenario, fault)  # type: ignore[misc]
            for fault in stores.S3_FAULTS
        }
    faults: dict[str, Callable[[Any, int], Any]] = {
        "worker killed": processes.worker_killed,
        "trainer killed": processes.trainer_killed,
        "worker terminated": processes.worker_terminated,
        "terminated slowly": processes.terminated_slowly,
        "worker frozen": processes.worker_frozen,
        "web killed": web.web_killed,
        "strangers": web.strangers,
        "redis killed": stores.redis_killed,
        "dynamodb killed": lambda scenario, rounds: stores.dynamodb_killed(scenario, rounds, down_s),
        "dynamodb away for two minutes": stores.dynamodb_away,
        "replies lost": stores.replies_lost,
        "paused, resumed": user_actions.paused_and_resumed,
        "duplicate messages": user_actions.duplicate_messages,
        "fair share": user_actions.fair_share,
        "clocks two hours off": processes.clocks_differ,
        "checkpoint damaged": stores.checkpoint_damaged,
    }
    for state in user_actions.RUNNING:
        faults[f"cancelled, {state}"] = lambda scenario, rounds, state=state: user_actions.cancelled(
            scenario, rounds, state
        )  # type: ignore[misc]
    for place in processes.FAILPOINTS:
        faults[f"dies where {place}"] = lambda scenario, _, place=place: processes.failpoint(scenario, place)  # type: ignore[misc]
    return faults


if __name__ == "__main__":
    sys.exit(main())
