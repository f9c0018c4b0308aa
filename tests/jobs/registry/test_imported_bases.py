"""Base models from this machine's disk: imported by an administrator, chosen by everybody, kept as long as jobs need them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from jobs.datasets import model_imports, sandbox
from jobs.inference import generation, inference_worker
from jobs.lifecycle import transitions
from jobs.registry import base_models, hub_models, imported_bases
from jobs.store import access, blobs, outbox, tables
from jobs.store.errors import Refused
from jobs.store.tables import DatasetReport, HubModel, Job
from tests.jobs.makers import make_claim, make_dataset, make_job, make_owner, read
from tests.training import tiny
from training.plan import catalog

pytestmark = pytest.mark.usefixtures("stores")


@pytest.fixture
def base(tmp_path: Path) -> HubModel:
    """An imported base under a new name."""
    folder = tiny.write_model(tmp_path / "model")
    return imported_bases.add(tables.new_id("tiny")[:20], catalog.describe(folder).as_dict(), folder)


@pytest.fixture(autouse=True)
def without_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "enqueue", lambda *args: None)


def make_job_from(base: HubModel, owner: str) -> Job:
    dataset_id = make_dataset(owner).dataset_id
    family = base_models.tokenizer_family(base.snapshot)
    DatasetReport(dataset_id, family, owner=owner, status="ready", summary={}).save()
    return make_job(owner, base=base.name, dataset_id=dataset_id)


def import_id(base: HubModel) -> str:
    return str(base.snapshot["prefix"]).rpartition("/")[2]


def run_command(*arguments: str) -> str:
    out = io.StringIO()
    call_command("import_base", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.slow
def test_the_command_imports_a_folder_and_removes_it_again(tmp_path):
    name = tables.new_id("tiny")[:20]
    folder = tiny.write_model(tmp_path / "model")
    written = run_command(str(folder), "--name", name, "--license", "MIT")
    assert f"{name} was added" in written
    assert "license MIT" in written
    assert base_models.find(make_owner(), name) in base_models.list_imported()
    with pytest.raises(CommandError, match="already a base model"):
        run_command(str(folder), "--name", name)
    run_command("--remove", name)
    assert imported_bases.find(name) is None
    with pytest.raises(CommandError, match="was imported"):
        run_command("--remove", name)


@pytest.mark.campaign
def test_a_tokenizer_that_takes_forever_or_all_memory_ends_only_its_process(tmp_path, settings, monkeypatch):
    folder = tiny.write_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": forever}))
    monkeypatch.setitem(settings.JOBS, "check_timeout_s", 30.0)
    with pytest.raises(Refused, match="time, memory or disk limit"):
        model_imports.check(folder, tmp_path / "base")
    big = "{{ 'x' * 99999999999 }}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": big}))
    with pytest.raises(Refused, match="chat template does not render"):
        model_imports.check(folder, tmp_path / "base")


def test_the_check_runs_with_limits_and_without_the_network(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        sandbox, "run", lambda *args, **limits: calls.append(limits) or {"error": "Not a model."}
    )
    with pytest.raises(Refused, match=r"Not a model\."):
        model_imports.check(tiny.write_model(tmp_path / "model"), tmp_path / "base")
    assert calls[0]["file_bytes"]
    assert calls[0]["more_memory"] < 16 << 20


@pytest.mark.parametrize(
    "name", ["starter", "gpt2", "openai-community/gpt2", "a/b", "ft:x", "../x", "", "x" * 65]
)
def test_a_name_that_is_taken_or_could_be_another_kind_of_name_is_refused(name):
    with pytest.raises(Refused) as refused:
        imported_bases.check_name(name)
    assert refused.value.field == "name"


def test_everybody_can_train_from_it_and_generate_with_it(base):
    for owner in (make_owner(), make_owner()):
        job = make_job_from(base, owner)
        assert job.model_id.startswith(f"ft:{base.name}:")
        assert base_models.of_job(job).layers == 2
        assert generation.check_model(owner, base.name) is None
        folder = inference_worker.model_folder(owner, base.name)
        assert folder == base_models.folder(job.base, job.base_snapshot)
        assert (folder / "model.safetensors").is_file()


def test_its_files_are_pinned_by_their_hashes(base):
    blobs.put_file(blobs.join(base.snapshot["prefix"], "config.json"), iter([b"{}"]))
    with pytest.raises(blobs.Damaged):
        base_models.folder(base.name, base.snapshot)


def test_two_imports_under_one_name_do_not_replace_each_other(base, tmp_path):
    with pytest.raises(Refused, match="already a base model"):
        imported_bases.add(base.name, base.snapshot, tmp_path / "model")
    assert imported_bases.find(base.name).snapshot == base.snapshot


def test_a_removed_base_is_kept_until_its_jobs_have_ended(base):
    owner = make_owner()
    job = make_job_from(base, owner)
    key = blobs.join(base.snapshot["prefix"], "config.json")
    imported_bases.remove(base.name)
    with pytest.raises(transitions.Refused, match=f"no base model {base.name}"):
        make_job(owner, base=base.name)
    with pytest.raises(access.NotFound):
        generation.check_model(owner, base.name)
    removal = f"{import_id(base)}#removed"
    assert not outbox.delete_bytes(imported_bases.STUDIO, removal)
    assert (base_models.folder(job.base, read(job).base_snapshot) / "config.json").is_file()
    transitions.set_desired(owner, job.job_id, "cancel")
    assert outbox.delete_bytes(imported_bases.STUDIO, removal)
    assert blobs.size_of(key) is None


def test_the_files_of_an_import_that_did_not_end_are_deleted_a_day_later(base, monkeypatch):
    key = blobs.join(base.snapshot["prefix"], "config.json")
    assert outbox.delete_bytes(imported_bases.STUDIO, import_id(base))  # it is in the list
    assert blobs.size_of(key)
    tables.remove(HubModel, imported_bases.STUDIO, base.name)
    assert not outbox.delete_bytes(imported_bases.STUDIO, import_id(base))
    monkeypatch.setattr(imported_bases, "UNFINISHED_S", -1)
    assert outbox.delete_bytes(imported_bases.STUDIO, import_id(base))
    assert blobs.size_of(key) is None


def test_a_model_of_the_hub_can_be_taken_off_the_list_while_a_job_uses_it(settings):
    from tests.jobs.registry.test_bases import SNAPSHOT, make_job_from_hub

    owner = make_owner()
    HubModel(owner, "people/tiny", snapshot=SNAPSHOT).save()
    job = make_job_from_hub(owner)
    assert not base_models.remove_hub_model(make_owner(), "people/tiny")
    assert base_models.remove_hub_model(owner, "people/tiny")
    assert base_models.find(owner, "people/tiny") is None
    assert make_claim(job).job.base_snapshot["revision"] == SNAPSHOT["revision"]
    hub_models.check_allowed("people/tiny")
