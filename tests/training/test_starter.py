"""The bundled starter model and its sample task: small, without leaks, failed before training and solved after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.engine import inputs
from training.plan.catalog import SAMPLE_FOLDER, STARTER_FOLDER
from training.plan.run_file import Run
from training.starter import make_sample


def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE_FOLDER / name).read_text().splitlines()]


def test_the_sample_is_reproduced_by_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_sample, "FOLDER", tmp_path)
    make_sample.main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (SAMPLE_FOLDER / name).read_bytes()


def test_no_held_out_answer_is_in_the_training_rows() -> None:
    trained = {row["completion"] for row in records("train.jsonl")}
    assert not trained & {row["completion"] for row in records("heldout.jsonl")}


def test_nearest_neighbor_lookup_does_not_solve_the_sample() -> None:
    trained = [(set(row["prompt"].split()), row["completion"]) for row in records("train.jsonl")]

    def nearest(prompt: str) -> str:
        words = set(prompt.split())
        return max(trained, key=lambda row: len(words & row[0]) / len(words | row[0]))[1]

    held = records("heldout.jsonl")
    assert sum(nearest(row["prompt"]) == row["completion"] for row in held) <= 0.3 * len(held)


def test_the_card_states_data_seed_license_and_loss() -> None:
    card = (STARTER_FOLDER / "README.md").read_text()
    for word in ("WordNet 3.0 Copyright 2006 by Princeton University", "seed", "Held-out loss", "documents"):
        assert word in card


def test_the_starter_model_is_within_its_size_limit() -> None:
    assert sum(f.stat().st_size for f in STARTER_FOLDER.iterdir()) < 12 << 20


def test_validation_rows_that_are_also_trained_on_are_reported(tmp_path: Path) -> None:
    def notes(validation: str) -> list[str]:
        run = {
            "base": str(STARTER_FOLDER),
            "train_file": str(SAMPLE_FOLDER / "train.jsonl"),
            "validation_file": str(SAMPLE_FOLDER / validation),
            "work_dir": str(tmp_path),
        }
        return inputs.read(Run.parse(run)).notes

    assert notes("heldout.jsonl") == []
    assert (
        "480 of 480 validation examples are also in the training data and are left out"
        in notes("train.jsonl")[0]
    )


@pytest.mark.slow
def test_automatic_settings_solve_the_sample(tmp_path: Path) -> None:
    run = {
        "base": str(STARTER_FOLDER),
        "train_file": str(SAMPLE_FOLDER / "train.jsonl"),
        "validation_file": str(SAMPLE_FOLDER / "heldout.jsonl"),
        "work_dir": str(tmp_path / "work"),
        "settings": {},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    with subprocess.Popen(
        [sys.executable, "-m", "training", "train", str(tmp_path / "run.json")],
        stdin=subprocess.PIPE,  # kept open, since the trainer stops when it is closed
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        events = [json.loads(line) for line in trainer.stdout]
    assert trainer.returncode == 0, events[-1]
    matches = [event["exact_match"] for event in events if event["t"] == "eval"]
    assert matches[0] <= 0.1
    assert matches[-1] >= 0.9
