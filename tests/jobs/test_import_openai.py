"""Importing a folder that was exported from OpenAI creates its datasets and jobs, once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from jobs.registry import tuned_models
from jobs.store import access, tables
from tests.factories import make_user
from tests.jobs.makers import make_claim, read, result

pytestmark = [pytest.mark.usefixtures("stores"), pytest.mark.django_db]
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
OPENAI_NAME = "ft:gpt-4o-mini-2024-07-18:acme:support:9abcDEFg"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Two files with OpenAI's IDs, a job in a file of its own, and a page of two more: one without its training file, one with
    an unknown base."""
    (tmp_path / "files").mkdir()
    for name in ("file-train1", "file-valid1"):
        (tmp_path / "files" / f"{name}.jsonl").write_text(json.dumps(ROW | {"id": name}) + "\n")
    write(tmp_path / "job.json", job_of("ftjob-one", validation_file="file-valid1"))
    page = [job_of("ftjob-two", training_file="file-lost"), job_of("ftjob-three", model="gpt-9", seed=5)]
    write(tmp_path / "jobs.json", {"object": "list", "data": page})
    write(tmp_path / "notes.json", {"anything": "else"})
    return tmp_path


def job_of(job_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job",
        "id": job_id,
        "model": "gpt-4o-mini-2024-07-18",
        "training_file": "file-train1",
        "validation_file": None,
        "fine_tuned_model": OPENAI_NAME if job_id == "ftjob-one" else None,
        "seed": 42,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": "auto"}},
        },
    } | fields


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def run_import(exported: Path, user: Any, **options: Any) -> str:
    out = io.StringIO()
    call_command("import_openai", str(exported), email=user.email, stdout=out, **options)
    return out.getvalue()


def test_files_become_datasets_once(exported: Path):
    alice = make_user("alice")
    output = run_import(exported, alice)
    assert output.count(": imported as file-") == 2
    assert "add --start" in output
    assert "file-lost is not in the folder" in output
    again = run_import(exported, alice)
    assert again.count("already imported as file-") == 2
    datasets = list(access.list_datasets(alice.owner_id, 10))
    assert sorted(row.name for row in datasets) == ["file-train1.jsonl", "file-valid1.jsonl"]
    assert not list(access.list_jobs(alice.owner_id, 10))


def test_exported_jobs_are_submitted_with_their_settings(exported: Path):
    alice = make_user("alice")
    output = run_import(exported, alice, start=True)
    assert "There is no base model 'gpt-9'" in output
    (job,) = access.list_jobs(alice.owner_id, 10)
    names = {row.dataset_id: row.name for row in access.list_datasets(alice.owner_id, 10)}
    assert (names[job.dataset_id], names[job.validation_dataset_id]) == (
        "file-train1.jsonl",
        "file-valid1.jsonl",
    )
    assert (job.base, job.settings["seed"], job.settings["epochs"]) == ("starter", 42, 4)
    assert job.metadata == {"imported_from": "ftjob-one"}
    run_import(exported, alice, start=True)
    assert len(list(access.list_jobs(alice.owner_id, 10))) == 1
    run_import(exported, alice, start=True, base="gpt2")  # replaces the unknown base
    assert sorted(row.base for row in access.list_jobs(alice.owner_id, 10)) == ["gpt2", "starter"]


def test_the_model_is_found_by_its_openai_name(exported: Path):
    alice, bob = make_user("alice"), make_user("bob")
    run_import(exported, alice, start=True)
    (job,) = access.list_jobs(alice.owner_id, 10)
    job.update(actions=[tables.Job.status.set("queued")])
    claim = make_claim(job)
    done = read(job)
    done.result = result(claim)
    done.ended_at = 1.0
    tuned_models.create_from(done)
    assert tuned_models.get_for(alice.owner_id, OPENAI_NAME).model_id == job.model_id
    with pytest.raises(access.NotFound):
        tuned_models.get_for(bob.owner_id, OPENAI_NAME)


@pytest.mark.parametrize("problem", ["no folder", "no files", "unknown user", "invalid JSON"])
def test_an_error_describes_the_problem(exported: Path, problem: str):
    alice = make_user("alice")
    if problem == "invalid JSON":
        (exported / "job.json").write_text("{")
    if problem == "no files":
        exported = exported / "empty"
        exported.mkdir()
    if problem == "no folder":
        exported = exported / "nowhere"
    if problem == "unknown user":
        alice.email = "nobody@example.com"
    messages = {
        "no folder": "is not a folder",
        "no files": "no .jsonl",
        "unknown user": "Sign up",
        "invalid JSON": "cannot be read",
    }
    with pytest.raises(CommandError, match=messages[problem]):
        run_import(exported, alice)
