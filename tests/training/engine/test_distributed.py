"""Several processes train as one: the same losses and the same model, within rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import write_model
from training import command
from training.export.export_check import logits_of
from training.models.load import load_model
from training.plan.run_file import Run

STEPS = 6


def train(
    work: Path, base: Path, processes: int, resume_from: str | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Runs the train command. Returns its events."""
    work.mkdir()
    data = work / "data.jsonl"
    rows = [
        {"prompt": "the cat " * (1 + i % 5), "completion": "sat on the mat " * (1 + i % 3)} for i in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {
        "max_steps": STEPS,
        "batch_size": 8,
        "micro_batch_tokens": 48,
        "learning_rate": 3e-3,
        "dropout": 0.0,
        "seed": 3,
        "validation_fraction": 0.2,
        "train_on": "all",
    }
    run = {
        "base": str(base),
        "train_file": str(data),
        "work_dir": str(work / "out"),
        "settings": chosen | settings,
        "rehearse": False,
        "resume_from": resume_from,
    }
    if processes == 1:  # in this process, since importing torch again would take longer than the training
        lines: list[dict[str, Any]] = []
        command.train(Run.parse(run), lambda t, **values: lines.append({"t": t, **values}))
        return lines
    (work / "run.json").write_text(json.dumps(run))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "training", "train", str(work / "run.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def pick(lines: list[dict[str, Any]], kind: str, name: str) -> list[Any]:
    return [line[name] for line in lines if line["t"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "method"), [(False, "full"), (True, "full"), (True, "lora")])
def test_two_processes_train_as_one_and_resume(tmp_path, shard, method):
    """Each has the whole model, or it is sharded over both (FSDP2). One process can resume from their checkpoint."""
    base = write_model(tmp_path / "base")
    # Three examples per step, so that one process has a row more than the other.
    chosen = {"method": method, "checkpoint_every_steps": 4, "batch_size": 3, "micro_batch_tokens": 32}
    one, two = (train(tmp_path / str(n), base, n, shard=shard, **chosen) for n in (1, 2))
    assert shard == any("sharded" in text for text in pick(two, "log", "message"))
    for name in ("loss", "grad_norm"):
        assert pick(two, "metric", name) == pytest.approx(pick(one, "metric", name), rel=1e-4)
    assert pick(two, "metric", "step") == list(range(1, STEPS + 1))
    assert pick(two, "metric", "tokens") == pick(one, "metric", "tokens")
    assert pick(two, "eval", "loss") == pytest.approx(pick(one, "eval", "loss"), rel=1e-4)
    assert two[-1]["t"] == "done"
    assert two[-1]["fidelity"]["exact"]
    # The weights are not compared: the gradient of the keys' bias is only rounding error, which AdamW scales to full steps.
    logits = [logits_of(load_model(tmp_path / n / "out" / "final"), range(5, 40)) for n in ("1", "2")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    half_way = pick(two, "checkpoint", "path")[0]
    again = train(tmp_path / "3", base, 2, half_way, shard=shard, **chosen)
    assert pick(again, "resumed", "exact") == [True]
    assert pick(again, "metric", "loss_hex") == pick(two, "metric", "loss_hex")[4:]
    alone = train(tmp_path / "4", base, 1, half_way, **chosen)
    assert pick(alone, "metric", "loss") == pytest.approx(pick(two, "metric", "loss")[4:], rel=1e-4)
