"""What happens to jobs when things break: `bin/bench faults`, or `--short` for the form inside bin/test.

Faults are done to real processes: workers, trainers, stores, connections. After each the judge of tests/faults/history.py
looks at the stores: no event missing or doubled, one holder an epoch, weights and losses equal to the bit to those of
the run without faults. Seconds are compared with the promise; a count of wrongs must be nought.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Short: leases of 6 s instead of 30, so that a takeover is seen in seconds. Everything else is as in production.
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench faults", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="the form inside bin/test: six faults, short leases"
    )
    parser.add_argument("--quick", action="store_true", help="all faults, with leases of 6 s instead of 30")
    parser.add_argument("--rounds", type=int, default=0, help="of each fault (20 in the full form)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="faults whose name contains this")
    parser.add_argument("--logs", action="store_true", help="print what the processes logged")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.short or options.quick else 20)
    if options.short or options.quick:
        os.environ.update(QUICK)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from tests.faults import house

    house.prepare_environment()
    stage_house = house.open_house()
    try:
        return campaign(stage_house, options, rounds)
    finally:
        if options.logs:
            for log in sorted(stage_house.folder.glob("*.log")):
                print(f"==== {log.name}", log.read_text(errors="replace")[-6000:], sep="\n")
        stage_house.stop()


def campaign(stage_house: object, options: argparse.Namespace, rounds: int) -> int:
    import random

    from django.conf import settings

    from benchmarks.common import Scores
    from tests.faults import house, scenarios
    from tests.faults.history import Recorder
    from tests.faults.scenarios import Measured, Stage

    assert isinstance(stage_house, house.House)
    lease = settings.JOBS["lease_s"]
    scores = Scores()
    stage = Stage(
        stage_house,
        house.ready_dataset(),
        300 if options.short or options.quick else 1500,
        Recorder().start(),
        random.Random(options.seed),  # noqa: S311  chooses moments, no secrets
        lease_s=lease,
    )
    stage.begin()
    scores.note(
        f"lease {lease:.0f} s, {stage.steps} steps a job, {rounds} rounds of each fault, seed {options.seed}"
    )
    promises = {
        "trainer dead s": 1.0,
        "detected s": 2.0,
        "new attempt s": lease + 10,
        "out s": 30.0,
        "zombie's trainer gone s": 5.0,
        "submit s": 5.0,
        "cancelled s": 30.0,
        "paused s": 30.0,
    }
    down = 2.0 if lease < 10 else 10.0
    faults: dict[str, Callable[[], Measured]] = {
        "worker killed": lambda: scenarios.worker_killed(stage),
        "trainer killed": lambda: scenarios.trainer_killed(stage),
        "worker terminated": lambda: scenarios.worker_terminated(stage),
        "worker frozen": lambda: scenarios.worker_frozen(stage),
        "redis killed": lambda: scenarios.redis_killed(stage),
        "dynamodb killed": lambda: scenarios.dynamodb_killed(stage, down),
        "replies lost": lambda: scenarios.replies_lost(stage),
        "cancelled": lambda: scenarios.cancelled(stage),
        "paused, resumed": lambda: scenarios.paused_and_resumed(stage),
        "bells doubled": lambda: scenarios.bells_doubled(stage),
        "checkpoint damaged": lambda: scenarios.checkpoint_damaged(stage),
    }
    for place in scenarios.FAILPOINTS:
        faults[f"dies where {place}"] = lambda place=place: scenarios.failpoint(stage, place)  # type: ignore[misc]
    for name, fault in faults.items():
        if (options.only and options.only not in name) or (options.short and name not in SHORT):
            continue
        began, wrong, worst = time.monotonic(), 0, dict[str, float]()
        for _ in range(rounds):
            measured = fault()
            for what in measured.wrong:
                scores.note(f"{name}: {what}")
            wrong += bool(measured.wrong)
            for figure, value in measured.figures.items():
                worst[figure] = max(value, worst.get(figure, 0.0))
        scores.add(f"{name}: rounds right", rounds - wrong, rounds, 1.0)
        for figure, value in worst.items():
            if figure in promises:
                scores.add(f"{name}: {figure}", value, promises[figure], 1.0, less_is_better=True)
        if name in ("worker terminated", "dynamodb killed", "redis killed", "bells doubled"):
            charged = worst.get("attempts charged", 0.0)
            scores.add(f"{name}: nothing charged", 1.0 if not charged else 0.0, 1.0, 1.0)
        scores.note(f"{name}: {time.monotonic() - began:.0f} s")
    return scores.end()


if __name__ == "__main__":
    sys.exit(main())
