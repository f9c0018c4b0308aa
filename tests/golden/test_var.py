"""The folder of a studio that an older version left behind (tests/golden/var, made by tests/golden/make_var.py): this
version starts on it, every page opens, the killed and the paused job go on, the models still write."""

from __future__ import annotations

import html
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests import hub_server
from tests.golden import scenario, trainer
from tests.golden.compare import EXPECTED
from tests.golden.make_var import ARCHIVE, KILLED, PAUSED, TOLD, Studio
from tests.golden.stack import Person, dynamodb_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Old:
    """The studio, running on the old folder, and what its people know of it."""

    studio: Studio
    told: dict[str, Any]
    ada: Person
    owner: Person
    before: dict[int, str]  # losses of the killed job, as they were logged before its end
    checkpoints: dict[int, Path]  # its checkpoints by step, as they lay in the object storage


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)
    told = json.loads(TOLD.read_text())
    with hub_server.running(scenario.repositories(folder / "hub")) as hub:
        studio = Studio(folder, HF_ENDPOINT=hub.url)
        checkpoints = copied_checkpoints(studio, told["jobs"]["killed"])
        try:
            studio.start()
            before = losses(studio, told["jobs"]["killed"], epoch=1)
            people = {name: enter(studio, account) for name, account in told["people"].items()}
            yield Old(studio, told, people["ada"], people["owner"], before, checkpoints)
        finally:
            studio.stop()


def enter(studio: Studio, account: dict[str, str]) -> Person:
    """By the old password, and with the old key."""
    person = Person(studio.url, account["email"], account["password"]).sign_in()
    person.use_key(account["key"])
    return person


def copied_checkpoints(studio: Studio, job_id: str) -> dict[int, Path]:
    """Under the trainer's own names for them."""
    found = {}
    for manifest in (studio.var / f"objects/jobs/{job_id}").glob("e*/checkpoints/*/manifest.json"):
        copy = studio.folder / "checkpoints" / manifest.parent.name
        shutil.copytree(manifest.parent, copy)
        found[int(json.loads(manifest.read_text())["step"])] = copy
    return found


def events(studio: Studio, job_id: str, epoch: int | None = None) -> list[dict[str, Any]]:
    """As they are stored."""
    secret = (studio.var / "dynamodb-secret").read_text().strip()
    table = dynamodb_rows(studio.dynamodb_port, secret=secret)["llmtuner-EventChunk"]["rows"]
    chunks = [
        row for row in table if row["job_id"]["S"] == job_id and epoch in (None, int(row["epoch"]["N"]))
    ]
    chunks.sort(key=lambda row: int(row["first_seq"]["N"]))
    return [json.loads(line) for chunk in chunks for line in json.loads(chunk["lines"]["S"])]


def losses(studio: Studio, job_id: str, epoch: int | None = None) -> dict[int, str]:
    """Of every logged step; the last word counts where a step was run twice."""
    return trainer.losses(events(studio, job_id, epoch))


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_every_page_that_is_linked_opens(old: Old):
    opened, broken = crawl(old.ada)
    assert not broken
    wanted = [*old.told["jobs"].values(), *lasting_files(old).values(), *old.told["models"].values()]
    assert [id for id in wanted if not any(id in path for path in opened)] == []
    opened, broken = crawl(old.owner)
    assert not broken
    assert "/admin/jobs/overseenjob/" in opened


def lasting_files(old: Old) -> dict[str, str]:
    """One was uploaded to be deleted after thirty days, which may be over."""
    return {name: id for name, id in old.told["files"].items() if name != "expiring"}


def crawl(person: Person) -> tuple[set[str], dict[str, int]]:
    """Every address that pages link to, from the first one on: (those that opened, those that did not)."""
    client = httpx.Client(
        base_url=person.url, cookies=person.browser.cookies, follow_redirects=True, timeout=120
    )
    waiting, opened, broken = ["/", "/account/", "/notifications/", "/jobs/estimates/"], set(), {}
    seen: set[str] = set()
    if person.get("/admin/").status_code == 200:
        waiting.append("/admin/")
    while waiting:
        path = waiting.pop()
        page = re.sub(r"=[^&]*", "=", path)  # one of those that differ in what a parameter says
        if page in seen or re.search(NOT_FOLLOWED, path):
            continue
        seen.add(page)
        answer = client.get(path)
        if answer.status_code != 200:
            broken[path] = answer.status_code
            continue
        opened.add(path)
        if "text/html" in answer.headers.get("content-type", ""):
            for link in re.findall(r'(?:href|hx-get|src)="([^"#]+)', answer.text):
                parts = urlsplit(html.unescape(link))
                if not parts.netloc and not parts.scheme:
                    query = f"?{parts.query}" if parts.query else ""
                    waiting.append(httpx.URL(path).join(parts.path or path).path + query)
    return opened, broken


NOT_FOLLOWED = r"/static/|logout|/v1|^/admin/(?!$|jobs/)"


def test_no_recorded_address_answers_with_an_error_of_ours(old: Old):
    """Each of expected/addresses.txt, filled with what is in the folder; some take only what pages post."""
    ids = {
        "job_id": old.told["jobs"]["full"],
        "dataset_id": old.told["files"]["train"],
        "file_id": old.told["files"]["train"],
        "model_id": old.told["models"]["full"],
        "model": old.told["models"]["lora"],
        "webhook_endpoint_id": old.told["hook"],
        "upload_id": "upload-none",
        "owner": old.ada.job(old.told["jobs"]["full"])["organization_id"],
    } | dict.fromkeys(("pk", "number"), "1") | dict.fromkeys(("token", "filename"), "none")  # fmt: skip
    statuses = {}
    for line in (EXPECTED / "addresses.txt").read_text().splitlines():
        address = line.split("  ")[0]
        if "…" in address or address.startswith("^"):
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", lambda match: ids[match[1]], address)
        for person in (old.ada, old.owner):
            answer = person.api.get(f"{person.url}{path}") if path.startswith("/v1") else person.get(path)
            statuses[f"{path} for {person.email}"] = answer.status_code
    assert {path: status for path, status in statuses.items() if status >= 500} == {}
    assert sum(status == 200 for status in statuses.values()) > 40


# ---- what is stored ---------------------------------------------------------------------------------------------------


def test_files_jobs_and_models_are_there(old: Old):
    statuses = {name: old.ada.file(id)["status"] for name, id in lasting_files(old).items()}
    assert statuses.pop("rejected") == "error"
    assert set(statuses.values()) == {"processed"}
    jobs = {name: old.ada.job(old.told["jobs"][name])["status"] for name in ("full", "lora", "failed")}
    assert jobs == {"full": "succeeded", "lora": "succeeded", "failed": "failed"}
    models = {model["id"] for model in old.ada.call("GET", "models")["data"]}
    assert {*old.told["models"].values()} <= models
    hooks = [hook["id"] for hook in old.ada.call("GET", "webhook_endpoints")["data"]]
    assert hooks == [old.told["hook"]]


def test_a_submission_sent_again_is_still_the_same_job(old: Old):
    """By its idempotency key, whose row keeps a hash of what was asked."""
    things = scenario.Things(files=old.told["files"])
    again = scenario.submit(old.ada, things, "killed", scenario.TINY, KILLED)
    assert again == old.told["jobs"]["killed"]


def test_models_write(old: Old):
    full, lora = old.told["models"]["full"], old.told["models"]["lora"]
    checkpoint = old.ada.checkpoints(old.told["jobs"]["full"])[-1]["fine_tuned_model_checkpoint"]
    for model in (full, lora, checkpoint, scenario.OLD_NAME):
        body = {"model": model, "prompt": "the cat", "max_tokens": 4, "seed": 1}
        assert old.ada.call("POST", "completions", json=body)["usage"]["completion_tokens"] > 0, model


def test_the_killed_job_goes_on_as_if_nothing_had_been(old: Old):
    job_id = old.told["jobs"]["killed"]
    job = old.ada.wait_for_job(job_id, "succeeded")
    settings = job["llmtuner"]["plan"]["settings"]
    after = losses(old.studio, job_id)
    assert sorted(after) == list(range(1, KILLED["max_steps"] + 1))
    start = next(event["step"] for event in events(old.studio, job_id) if event["t"] == "resumed")
    checkpoint = old.checkpoints[start]
    stored = json.loads((checkpoint / "manifest.json").read_text())

    # On this machine from the same checkpoint, in one go: equal to the bit, on whatever processor it was made.
    run = run_file(old, settings, job_id)
    code, told = trainer.train(run | {"resume_from": str(checkpoint)}, old.studio.folder / "resumed")
    assert code == 0
    resumed = trainer.losses(told)
    assert resumed == {step: loss for step, loss in after.items() if step > start}

    # Uninterrupted from the first step: to the bit too, if this processor computes as the one that made the checkpoint.
    code, told = trainer.train(run, old.studio.folder / "whole")
    assert code == 0
    whole = trainer.losses(told)
    twin = json.loads((Path(trainer.newest(told)) / "manifest.json").read_text())
    known = {step: loss for step, loss in old.before.items() if step <= start}
    if twin["environment"] == stored["environment"] and all(
        whole[step] == loss for step, loss in known.items()
    ):
        assert after == whole
    else:  # roundings differ, and what follows from them grows with the steps
        near = [step for step in known if step <= 50]
        assert near
        for step in near:
            assert float.fromhex(whole[step]) == pytest.approx(float.fromhex(known[step]), rel=1e-4)


def run_file(old: Old, settings: dict[str, Any], job_id: str) -> dict[str, Any]:
    """What the worker gave the trainer: the settings as asked, and the resolved ones that depend on the machine."""
    folder = old.studio.folder / "twin"
    run = trainer.lay_out(folder)
    asked = {**KILLED, "micro_batch_tokens": settings["micro_batch_tokens"]}
    return run | {"job": job_id, "settings": asked}


def test_the_paused_job_can_be_resumed(old: Old):
    job_id = old.told["jobs"]["paused"]
    assert old.ada.job(job_id)["llmtuner"]["status"] == "paused"
    before = losses(old.studio, job_id)
    old.ada.call("POST", f"fine_tuning/jobs/{job_id}/resume")
    old.ada.wait_for_job(job_id, "succeeded")
    resumed = [event for event in events(old.studio, job_id) if event["t"] == "resumed"]
    assert resumed[0]["step"] == max(before)  # a pause ends with a checkpoint, so no step is run twice
    after = losses(old.studio, job_id)
    assert before.items() <= after.items()
    assert sorted(after) == list(range(1, PAUSED["max_steps"] + 1))
