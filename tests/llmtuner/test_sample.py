"""What bin/up prints about its first fine-tuning job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtuner import sample
from tests.jobs.views.makers import make_job

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("status", ["queued", "running", "retrying"])
def test_a_sample_job_that_is_still_running_is_not_reported_as_ended(
    stores, alice, settings, tmp_path: Path, capsys, monkeypatch, status
):
    job = make_job(alice.owner_id, status)
    settings.VAR_DIR = tmp_path
    (tmp_path / "sample.json").write_text(json.dumps({"owner": alice.owner_id, "job": job.job_id}))
    monkeypatch.setattr(sample, "JOB_TIMEOUT_S", 0)
    assert sample.run_sample("http://localhost:8420") is False
    output = "".join(capsys.readouterr())
    assert "ended" not in output
    assert f"has not finished yet. Follow its progress at http://localhost:8420/jobs/{job.job_id}" in output


def test_a_sample_that_is_not_checked_in_time_does_not_stop_the_studio(
    stores, alice, settings, tmp_path: Path, capsys, monkeypatch
):
    alice.is_superuser = True
    alice.save()
    settings.VAR_DIR = tmp_path
    monkeypatch.setattr(sample, "CHECK_TIMEOUT_S", 0)
    assert sample.run_sample("http://localhost:8420") is False
    assert "not checked within 0 s" in capsys.readouterr().err
