"""The data folder of an older version (tests/golden/var, created by tests/golden/make_var.py): this version starts with
it, every page opens, the killed and the paused job continue, and the models still generate text."""

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
from tests.golden.make_var import ARCHIVE, CONTENTS, KILLED, PAUSED, LocalStack
from tests.golden.stack import Person, dynamodb_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Old:
    """All processes, running with the old folder, and the ids, accounts and keys in it."""

    stack: LocalStack
    contents: dict[str, Any]
    ada: Person
    owner: Person
    before: dict[int, str]  # losses of the killed job that were stored before the kill
    checkpoints: dict[int, Path]  # its checkpoints by step, copied from the object storage


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)
    contents = json.loads(CONTENTS.read_text())
    with hub_server.running(scenario.repositories(folder / "hub")) as hub:
        stack = LocalStack(folder, HF_ENDPOINT=hub.url)
        checkpoints = copied_checkpoints(stack, contents["jobs"]["killed"])
        try:
            stack.start()
            before = losses(stack, contents["jobs"]["killed"], epoch=1)
            users = {name: enter(stack, account) for name, account in contents["users"].items()}
            yield Old(stack, contents, users["ada"], users["owner"], before, checkpoints)
        finally:
            stack.stop()


def enter(stack: LocalStack, account: dict[str, str]) -> Person:
    """With the old password and the old key."""
    person = Person(stack.url, account["email"], account["password"]).sign_in()
    person.use_key(account["key"])
    return person


def copied_checkpoints(stack: LocalStack, job_id: str) -> dict[int, Path]:
    """Copies of the checkpoints, with the trainer's names."""
    copies = {}
    for manifest in (stack.var / f"objects/jobs/{job_id}").glob("e*/checkpoints/*/manifest.json"):
        copy = stack.folder / "checkpoints" / manifest.parent.name
        shutil.copytree(manifest.parent, copy)
        copies[int(json.loads(manifest.read_text())["step"])] = copy
    return copies


def events(stack: LocalStack, job_id: str, epoch: int | None = None) -> list[dict[str, Any]]:
    """The stored events."""
    secret = (stack.var / "dynamodb-secret").read_text().strip()
    table = dynamodb_rows(stack.dynamodb_port, secret=secret)["llmtuner-EventChunk"]["rows"]
    chunks = [
        row for row in table if row["job_id"]["S"] == job_id and epoch in (None, int(row["epoch"]["N"]))
    ]
    chunks.sort(key=lambda row: int(row["first_seq"]["N"]))
    return [json.loads(line) for chunk in chunks for line in json.loads(chunk["lines"]["S"])]


def losses(stack: LocalStack, job_id: str, epoch: int | None = None) -> dict[int, str]:
    """The loss of each step; the last one if a step ran twice."""
    return trainer.losses(events(stack, job_id, epoch))


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_every_page_that_is_linked_opens(old: Old):
    opened, broken = crawl(old.ada)
    assert not broken
    wanted = [*old.contents["jobs"].values(), *lasting_files(old).values(), *old.contents["models"].values()]
    assert [id for id in wanted if not any(id in path for path in opened)] == []
    opened, broken = crawl(old.owner)
    assert not broken
    assert "/admin/jobs/overseenjob/" in opened


def lasting_files(old: Old) -> dict[str, str]:
    """All files except the one that expires after thirty days."""
    return {name: id for name, id in old.contents["files"].items() if name != "expiring"}


def crawl(person: Person) -> tuple[set[str], dict[str, int]]:
    """Follows all links, starting at the first page. Returns (URLs that opened, status codes of those that did not)."""
    client = httpx.Client(
        base_url=person.url, cookies=person.browser.cookies, follow_redirects=True, timeout=120
    )
    waiting, opened, broken = ["/", "/account/", "/notifications/", "/jobs/estimates/"], set(), {}
    seen: set[str] = set()
    if person.get("/admin/").status_code == 200:
        waiting.append("/admin/")
    while waiting:
        path = waiting.pop()
        page = re.sub(r"=[^&]*", "=", path)  # only one of the URLs that differ in the values of parameters
        if page in seen or re.search(NOT_FOLLOWED, path):
            continue
        seen.add(page)
        response = client.get(path)
        if response.status_code != 200:
            broken[path] = response.status_code
            continue
        opened.add(path)
        if "text/html" in response.headers.get("content-type", ""):
            for link in re.findall(r'(?:href|hx-get|src)="([^"#]+)', response.text):
                parts = urlsplit(html.unescape(link))
                if not parts.netloc and not parts.scheme:
                    query = f"?{parts.query}" if parts.query else ""
                    waiting.append(httpx.URL(path).join(parts.path or path).path + query)
    return opened, broken


NOT_FOLLOWED = r"/static/|logout|/v1|^/admin/(?!$|jobs/)"


def test_no_recorded_url_returns_a_server_error(old: Old):
    """Each URL of expected/addresses.txt, with ids from the folder; some accept only POST."""
    ids = {
        "job_id": old.contents["jobs"]["full"],
        "dataset_id": old.contents["files"]["train"],
        "file_id": old.contents["files"]["train"],
        "model_id": old.contents["models"]["full"],
        "model": old.contents["models"]["lora"],
        "webhook_endpoint_id": old.contents["hook"],
        "upload_id": "upload-none",
        "owner": old.ada.job(old.contents["jobs"]["full"])["organization_id"],
    } | dict.fromkeys(("pk", "number", "row"), "1") | dict.fromkeys(("token", "filename", "name"), "none")  # fmt: skip
    statuses = {}
    for line in (EXPECTED / "addresses.txt").read_text().splitlines():
        address = line.split("  ")[0]
        if "…" in address or address.startswith("^"):
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", lambda match: ids[match[1]], address)
        for person in (old.ada, old.owner):
            response = person.api.get(f"{person.url}{path}") if path.startswith("/v1") else person.get(path)
            statuses[f"{path} for {person.email}"] = response.status_code
    assert {path: status for path, status in statuses.items() if status >= 500} == {}
    assert sum(status == 200 for status in statuses.values()) > 40


# ---- what is stored ---------------------------------------------------------------------------------------------------


def test_files_jobs_and_models_still_exist(old: Old):
    statuses = {name: old.ada.file(id)["status"] for name, id in lasting_files(old).items()}
    assert statuses.pop("rejected") == "error"
    assert set(statuses.values()) == {"processed"}
    jobs = {name: old.ada.job(old.contents["jobs"][name])["status"] for name in ("full", "lora", "failed")}
    assert jobs == {"full": "succeeded", "lora": "succeeded", "failed": "failed"}
    models = {model["id"] for model in old.ada.call("GET", "models")["data"]}
    assert {*old.contents["models"].values()} <= models
    hooks = [hook["id"] for hook in old.ada.call("GET", "webhook_endpoints")["data"]]
    assert hooks == [old.contents["hook"]]


def test_a_repeated_submission_still_returns_the_same_job(old: Old):
    """By its idempotency key, whose row keeps a hash of the request."""
    resources = scenario.Resources(files=old.contents["files"])
    again = scenario.submit(old.ada, resources, "killed", scenario.TINY, KILLED)
    assert again == old.contents["jobs"]["killed"]


def test_models_still_generate_text(old: Old):
    full, lora = old.contents["models"]["full"], old.contents["models"]["lora"]
    checkpoint = old.ada.checkpoints(old.contents["jobs"]["full"])[-1]["fine_tuned_model_checkpoint"]
    for model in (full, lora, checkpoint, scenario.OLD_NAME):
        body = {"model": model, "prompt": "the cat", "max_tokens": 4, "seed": 1}
        assert old.ada.call("POST", "completions", json=body)["usage"]["completion_tokens"] > 0, model


def test_the_killed_job_continues_as_if_it_had_not_been_interrupted(old: Old):
    job_id = old.contents["jobs"]["killed"]
    job = old.ada.wait_for_job(job_id, "succeeded")
    settings = job["llmtuner"]["plan"]["settings"]
    after = losses(old.stack, job_id)
    assert sorted(after) == list(range(1, KILLED["max_steps"] + 1))
    start = next(event["step"] for event in events(old.stack, job_id) if event["t"] == "resumed")
    checkpoint = old.checkpoints[start]
    stored = json.loads((checkpoint / "manifest.json").read_text())

    # Resumed on this machine from the same checkpoint, without interruption: equal bit for bit, whatever CPU wrote it.
    run = run_file(old, settings, job_id)
    code, emitted = trainer.train(run | {"resume_from": str(checkpoint)}, old.stack.folder / "resumed")
    assert code == 0
    resumed = trainer.losses(emitted)
    assert resumed == {step: loss for step, loss in after.items() if step > start}

    # Uninterrupted from the first step: equal bit for bit too, if this CPU rounds like the one that wrote the checkpoint.
    code, emitted = trainer.train(run, old.stack.folder / "whole")
    assert code == 0
    whole = trainer.losses(emitted)
    twin = json.loads((Path(trainer.newest(emitted)) / "manifest.json").read_text())
    known = {step: loss for step, loss in old.before.items() if step <= start}
    if twin["environment"] == stored["environment"] and all(
        whole[step] == loss for step, loss in known.items()
    ):
        assert after == whole
    else:  # rounding differs, and the differences grow with the steps
        near = [step for step in known if step <= 50]
        assert near
        for step in near:
            assert float.fromhex(whole[step]) == pytest.approx(float.fromhex(known[step]), rel=1e-4)


def run_file(old: Old, settings: dict[str, Any], job_id: str) -> dict[str, Any]:
    """The run file of the worker: the requested settings, and the resolved ones that depend on the machine."""
    folder = old.stack.folder / "twin"
    run = trainer.lay_out(folder)
    requested = {**KILLED, "micro_batch_tokens": settings["micro_batch_tokens"]}
    return run | {"job": job_id, "settings": requested}


def test_the_paused_job_can_be_resumed(old: Old):
    job_id = old.contents["jobs"]["paused"]
    assert old.ada.job(job_id)["llmtuner"]["status"] == "paused"
    before = losses(old.stack, job_id)
    old.ada.call("POST", f"fine_tuning/jobs/{job_id}/resume")
    old.ada.wait_for_job(job_id, "succeeded")
    resumed = [event for event in events(old.stack, job_id) if event["t"] == "resumed"]
    assert resumed[0]["step"] == max(before)  # a pause ends with a checkpoint, so no step runs twice
    after = losses(old.stack, job_id)
    assert before.items() <= after.items()
    assert sorted(after) == list(range(1, PAUSED["max_steps"] + 1))
