"""Exact resume: runs killed with SIGKILL at random moments end bit for bit like an uninterrupted run.

    bin/bench resume [--runs 20] [--first 1] [--steps 200] [--seed 1]

Each run trains a tiny GPT-2 with dropout, two micro-batches per step, epochs that end within steps, and a checkpoint
every few steps. It is killed 1 to 5 times (during a step, while a checkpoint is written, at the end of an epoch) and
resumed from the newest checkpoint each time. Runs are equal if the digest of the weights and the loss of every step (as
hex) are. Exits 0 only if all runs are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Scores  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon", "until", "it", "rained"]
Losses = dict[int, str]


def lay_out(folder: Path, steps: int, **settings: Any) -> dict[str, Any]:
    """Writes a base model and 67 examples. Returns a run file without its work folder."""
    from tests.training.tiny import write_model

    rng = random.Random(7)  # noqa: S311  not for secrets
    write_model(folder / "base")
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))),
            "completion": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
        }
        for _ in range(67)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {
        "max_steps": steps,
        "batch_size": 6,
        "micro_batch_tokens": 64,
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "dropout": 0.1,
        "checkpoint_every_steps": 7,
        "eval_every": 50,
        "sample_every": 1000,
        "validation_fraction": 0.1,
        "seed": 3,
        "sequence_length": 48,
    }
    return {
        "base": str(folder / "base"),
        "train_file": str(folder / "train.jsonl"),
        "prompts": ["the cat"],
        "settings": defaults | settings,
    }


def start(run: dict[str, Any], work: Path) -> subprocess.Popen[bytes]:
    """Starts the trainer as a program. Its events are in work/events.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    config = work / f"config-{time.time_ns()}.json"
    config.write_text(json.dumps(run | {"work_dir": str(work)}))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training", "train", str(config)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def events(work: Path, kind: str) -> list[dict[str, Any]]:
    path = work / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the last one may be incomplete
    return [event for line in lines if line and (event := json.loads(line))["t"] == kind]


def losses(work: Path) -> Losses:
    """Loss of each step as hex. A step that ran twice must have the same loss both times."""
    by_step: Losses = {}
    for event in events(work, "metric"):
        if by_step.setdefault(event["step"], event["loss_hex"]) != event["loss_hex"]:
            by_step[event["step"]] = "differs between attempts"
    return by_step


def digest(work: Path) -> str:
    return hashlib.sha256((work / "final" / "model.safetensors").read_bytes()).hexdigest()


def newest(work: Path) -> str | None:
    """The newest checkpoint that is still on disk, or None."""
    paths = [event["path"] for event in events(work, "checkpoint") if Path(event["path"]).is_dir()]
    return paths[-1] if paths else None


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.002)


def killed_run(run: dict[str, Any], work: Path, steps: int, rng: random.Random) -> int:
    """Kills one run 1 to 5 times. Returns how often it was still alive then."""
    kills = 0
    moments = sorted(rng.sample(range(1, steps), rng.randint(1, 5)))
    for epoch, moment in enumerate(moments, start=1):
        process = start(run | {"epoch": epoch, "resume_from": newest(work)}, work)
        wait_until(process, lambda at=moment: max(losses(work), default=0) >= at)  # type: ignore[misc]  # bound now
        if rng.random() < 0.3:  # while a checkpoint is written
            wait_until(process, lambda: any((work / "checkpoints").glob("tmp-*")))
        else:
            time.sleep(rng.random() * 0.01)  # somewhere within a step
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    process = start(run | {"epoch": len(moments) + 1, "resume_from": newest(work)}, work)
    if process.wait() != 0:
        raise SystemExit(f"the last attempt exited with code {process.returncode}; see {work}")
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench resume")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--first", type=int, default=1, help="number of the first run, to split a campaign into several calls"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    scores = Scores()
    with tempfile.TemporaryDirectory() as folder:
        run = lay_out(Path(folder), args.steps)
        reference = Path(folder) / "reference"
        if start(run, reference).wait() != 0:
            raise SystemExit("the uninterrupted run failed")
        expected_digest, expected_losses = digest(reference), losses(reference)
        scores.note(
            f"seed {args.seed}, uninterrupted: {len(expected_losses)} steps, weights {expected_digest[:16]}"
        )
        equal = kills = 0
        for number in range(args.first, args.first + args.runs):
            work = Path(folder) / f"run{number}"
            rng = random.Random(f"{args.seed}:{number}")  # noqa: S311  not for secrets
            count = killed_run(run, work, args.steps, rng)
            kills += count
            same = digest(work) == expected_digest and losses(work) == expected_losses
            equal += same
            scores.note(f"run {number}: killed {count} times, {'equal' if same else 'DIFFERENT'}")
        scores.note(f"{kills} kills")
        scores.add("resume: runs equal bit for bit", equal, args.runs, 1.0)
    return scores.end()


if __name__ == "__main__":
    sys.exit(main())
