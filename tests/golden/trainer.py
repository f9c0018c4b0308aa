"""Runs the trainer as a program with a tiny base model stored beside this file: two layers, 293 tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(__file__).parent / "base"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon"]
Event = dict[str, Any]


def rows(n: int = 60) -> bytes:
    """Always the same rows: hashes of the data are recorded."""
    pairs = (
        {
            "prompt": " ".join(WORDS[(i * 3 + j) % 11] for j in range(2 + i % 5)),
            "completion": " " + " ".join(WORDS[(i * 7 + j) % 11] for j in range(1 + i % 4)),
        }
        for i in range(n)
    )
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


def lay_out(folder: Path, **settings: Any) -> dict[str, Any]:
    """Writes the training file. Returns a run file without its work folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_bytes(rows())
    chosen = {
        "max_steps": 8,
        "batch_size": 6,
        "learning_rate": 2e-3,
        "checkpoint_every_steps": 3,
        "eval_every": 4,
        "sample_every": 4,
        "validation_fraction": 0.1,
        "sequence_length": 48,
        "seed": 3,
    }
    return {
        "base": str(BASE),
        "train_file": str(folder / "train.jsonl"),
        "prompts": ["the cat"],
        "job": "ftjob-golden",
        "settings": chosen | settings,
        "settings_schema": 1,  # of jobs that the first release stored
    }


def environment() -> dict[str, str]:
    """One CPU thread and no GPU, wherever the tests run."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(run: dict[str, Any], work: Path, stop_at: int | None = None) -> tuple[int, list[Event]]:
    """Returns (exit code, events). Sends SIGTERM after the metric event of step `stop_at`."""
    work.mkdir(parents=True, exist_ok=True)
    config = work / "run.json"
    config.write_text(json.dumps(run | {"work_dir": str(work)}))
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "train", str(config)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(work / "stderr.log").open("wb"),
    )
    assert process.stdout
    events: list[Event] = []
    for line in process.stdout:
        events.append(json.loads(line))
        if stop_at is not None and events[-1].get("t") == "metric" and events[-1].get("step") == stop_at:
            process.send_signal(signal.SIGTERM)
    assert process.stdin
    process.stdin.close()
    return process.wait(), events


def losses(events: list[Event]) -> dict[int, str]:
    return {event["step"]: event["loss_hex"] for event in events if event["t"] == "metric"}


def newest(events: list[Event]) -> str:
    return next(str(event["path"]) for event in reversed(events) if event["t"] == "checkpoint")
