"""A job has one seed, which is part of its settings."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.api import fine_tuning
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.lifecycle.submission import clone_request
from jobs.store.tables import Job
from jobs.worker import prepare
from tests.jobs.makers import ROWS, make_job, make_owner, read

pytestmark = pytest.mark.usefixtures("stores")


def job_with(settings: dict[str, Any] | None = None, **fields: Any) -> Job:
    owner = make_owner()
    dataset = datasets.receive(owner, "rows.jsonl", io.BytesIO(ROWS), purpose="fine-tune")
    datasets.finish_check(owner, dataset.dataset_id, "ready", summary={"examples": 1})
    return make_job(owner, dataset_id=dataset.dataset_id, settings=settings or {}, **fields)


def make_old_row(job: Job, **attributes: Any) -> Job:
    """The job's row as an earlier version stored it, with the seed beside the settings."""
    row = read(job)
    for name, value in attributes.items():
        setattr(row, name, value)
    row.save()
    return row


def edit(job: Job, **settings: Any) -> Job:
    request = replace(clone_request(read(job)), settings=settings)
    return transitions.edit(job.owner, job.job_id, request)


def trained_seed(job: Job, folder: Path) -> int | None:
    """The seed in the run file."""
    config = prepare.prepare(read(job), folder, lambda: None).config
    return config["settings"].get("seed")


def test_a_job_trains_with_the_seed_of_its_request(tmp_path: Path) -> None:
    job = job_with(seed=7)
    assert trained_seed(job, tmp_path) == 7
    assert read(job).settings["seed"] == 7
    assert fine_tuning.show(read(job))["seed"] == 7


def test_a_seed_in_the_settings_wins(tmp_path: Path) -> None:
    assert trained_seed(job_with({"seed": 5}, seed=7), tmp_path) == 5


def test_a_job_trains_with_its_edited_seed(tmp_path: Path) -> None:
    job = job_with({"seed": 7}, seed=7)
    edit(job, seed=9)
    assert trained_seed(job, tmp_path) == 9
    assert fine_tuning.show(read(job))["seed"] == 9


def test_a_seed_can_be_removed_by_editing(tmp_path: Path) -> None:
    job = job_with(seed=7)
    edit(job, epochs=2)
    assert trained_seed(job, tmp_path) is None
    assert fine_tuning.show(read(job))["seed"] == 0


def test_an_old_row_keeps_its_seed_until_it_is_edited(tmp_path: Path) -> None:
    job = make_old_row(job_with(), seed=7)
    assert trained_seed(job, tmp_path / "before") == 7
    assert fine_tuning.show(read(job))["seed"] == 7
    assert clone_request(read(job)).settings["seed"] == 7
    edit(job, seed=9)
    assert (read(job).seed, read(job).settings["seed"]) == (None, 9)
    assert trained_seed(job, tmp_path / "after") == 9


def test_an_old_row_that_was_edited_and_has_not_started_trains_with_the_edit(tmp_path: Path) -> None:
    assert trained_seed(make_old_row(job_with({"seed": 9}), seed=7), tmp_path) == 9


@pytest.mark.parametrize(
    "started",
    [{"checkpoint_step": 4}, {"plan": {"settings": {"seed": 7}}}, {"plan": {}, "checkpoint_step": 4}],
)
def test_an_old_row_that_has_started_keeps_its_seed(tmp_path: Path, started: dict[str, Any]) -> None:
    job = make_old_row(job_with({"seed": 9}), seed=7, **started)
    assert trained_seed(job, tmp_path) == 7
    assert fine_tuning.show(read(job))["seed"] == 7


def test_an_old_row_keeps_the_seed_it_started_with_under_this_version(tmp_path: Path) -> None:
    started = {"attempts": 1, "checkpoint_step": 4, "plan": {"settings": {"seed": 9}}}
    assert trained_seed(make_old_row(job_with({"seed": 9}), seed=7, **started), tmp_path) == 9
