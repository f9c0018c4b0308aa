"""One of everything that users and programs do with the system, over HTTP only."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden import trainer
from tests.golden.stack import Person, Receiver, wait_until

TINY, BROKEN = "golden/tiny", "golden/broken"
SETTINGS = {
    "max_steps": 8,
    "batch_size": 6,
    "sequence_length": 48,
    "checkpoint_every_steps": 3,
    "eval_every": 4,
}
LONG = SETTINGS | {
    "max_steps": 100_000,
    "eval_every": 100_000,
    "sample_every": 100_000,
    "checkpoint_every_steps": 20,
}
OLD_NAME = "ft:gpt-4o-mini-2024-07-18:acme::golden01"
REJECTED = b'{"prompt": "no end'


def repositories(folder: Path) -> dict[str, Path]:
    """The models on the Hub of these tests: the tiny base, and one whose weights cannot be read."""
    for name in ("tiny", "broken"):
        shutil.copytree(trainer.BASE, folder / name, dirs_exist_ok=True)
    (folder / "broken/model.safetensors").write_bytes(b"w" * 5000)
    return {TINY: folder / "tiny", BROKEN: folder / "broken"}


@dataclass
class Resources:
    """Ids of everything that was created."""

    files: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    hook: str = ""
    responses: dict[str, Any] = field(default_factory=dict)  # of the API, by request


def submit(
    ada: Person, resources: Resources, name: str, base: str, settings: dict[str, Any], **fields: Any
) -> str:
    body = {"model": base, "training_file": resources.files["train"], "suffix": name, "llmtuner": {"name": name, "prompts": ["the cat"], **settings}}  # fmt: skip
    response = ada.call("POST", "fine_tuning/jobs", json=body | fields, headers={"Idempotency-Key": name})
    resources.responses.setdefault("fine_tuning/jobs POST", response)
    resources.jobs[name] = response["id"]
    return str(response["id"])


def before_workers(ada: Person, receiver: Receiver) -> Resources:
    """While no worker runs: everything that enqueues work."""
    resources = Resources()
    train = trainer.rows()
    events = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
    hook = {"url": receiver.url, "name": "golden", "event_types": events}
    resources.responses["webhook_endpoints POST"] = ada.call("POST", "webhook_endpoints", json=hook)
    resources.hook = resources.responses["webhook_endpoints POST"]["id"]
    ada.post(f"/notifications/{resources.hook}/test/")

    resources.files["train"] = ada.upload("train.jsonl", train)
    resources.files["heldout"] = ada.upload("heldout.jsonl", trainer.rows(15))
    resources.files["rejected"] = ada.upload("broken.jsonl", REJECTED)
    keep = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592000"}
    resources.files["expiring"] = ada.upload("expiring.jsonl", train, **keep)
    deleted = ada.upload("deleted.jsonl", train)
    resources.responses["files DELETE"] = ada.call("DELETE", f"files/{deleted}")
    upload_in_parts(ada, resources, train)

    heldout = {"validation_file": resources.files["heldout"], "seed": 7, "metadata": {"team": "golden"}}
    hyperparameters = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 1.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    submit(ada, resources, "full", TINY, SETTINGS, **heldout, method=method)
    return resources


def upload_in_parts(ada: Person, resources: Resources, content: bytes) -> None:
    """One upload completed by the API, and one by the page's requests that stays incomplete."""
    body = {"bytes": len(content), "filename": "parts.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}  # fmt: skip
    upload = ada.call("POST", "uploads", json=body)
    resources.responses["uploads POST"] = upload
    half = len(content) // 2
    parts = [ada.call("POST", f"uploads/{upload['id']}/parts", files={"data": ("part", piece)}) for piece in (content[:half], content[half:])]  # fmt: skip
    resources.responses["uploads/parts POST"] = parts[0]
    complete = {"part_ids": [part["id"] for part in parts]}
    resources.responses["uploads/complete POST"] = ada.call("POST", f"uploads/{upload['id']}/complete", json=complete)  # fmt: skip
    resources.files["parts"] = resources.responses["uploads/complete POST"]["file"]["id"]
    begun = ada.post("/datasets/uploads/", name="page.jsonl", bytes=str(len(content)), mark="sha256:golden")
    address = begun.json()["url"] + "1/"
    put = ada.browser.put(address, content=content, headers=ada.headers())
    assert put.status_code == 200, put.text


def with_workers(ada: Person, staff: Person, resources: Resources, *, keep_all: bool) -> None:
    """While workers run: the enqueued work and everything that depends on it. `keep_all`: deletes and cancels nothing else."""
    for name, id in resources.files.items():
        file = ada.wait_for_file(id)
        assert file["status"] == ("error" if name == "rejected" else "processed"), file
    model = ada.wait_for_job(resources.jobs["full"], "succeeded")["fine_tuned_model"]
    resources.models["full"] = model
    ada.wait_for_model(model)
    # From the tuned model, with adapters, through the page's form.
    form = {"dataset": resources.files["train"], "base": model, "name": "adapters", "suffix": "adapters", "prompts": "the cat"}  # fmt: skip
    numbers = {name: str(value) for name, value in SETTINGS.items()}
    response = ada.post("/jobs/new/", **form, **numbers, method="lora", validation_fraction="0")
    match = re.search(r"/jobs/(ftjob-\w+)/", response.headers["location"])
    assert match
    resources.jobs["lora"] = match[1]
    submit(ada, resources, "failed", BROKEN, SETTINGS)
    resources.models["lora"] = ada.wait_for_job(resources.jobs["lora"], "succeeded")["fine_tuned_model"]
    ada.wait_for_model(resources.models["lora"])
    ada.wait_for_job(resources.jobs["failed"], "failed")
    ada.post(f"/models/{model}/names/", aliases=OLD_NAME)
    generate(ada, resources)
    if not keep_all:
        ends(ada, staff, resources)


def pause(ada: Person, resources: Resources, name: str, settings: dict[str, Any]) -> None:
    """Pauses a long job after its first checkpoint."""
    id = submit(ada, resources, name, TINY, settings)
    wait_until(lambda: ada.checkpoints(id), 600, id)
    ada.call("POST", f"fine_tuning/jobs/{id}/pause")
    ada.wait_for_job(id, "paused")


def generate(ada: Person, resources: Resources) -> None:
    chat = {
        "model": resources.models["full"],
        "messages": [{"role": "user", "content": "the cat"}],
        "max_tokens": 3,
    }
    requests: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", chat | {"logprobs": True, "top_logprobs": 2}),
        ("completions", {"model": OLD_NAME, "prompt": "the cat", "max_tokens": 3, "logprobs": 2}),
    ]
    for path, body in requests:
        resources.responses[f"{path} POST"] = ada.call("POST", path, json=body)
    with ada.api.stream("POST", "chat/completions", json=chat | {"stream": True, "stream_options": {"include_usage": True}}) as response:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    resources.responses["chat/completions stream"] = [json.loads(line) for line in lines]
    checkpoint = ada.checkpoints(resources.jobs["full"])[-1]["fine_tuned_model_checkpoint"]
    ada.call("POST", "completions", json={"model": checkpoint, "prompt": "the", "max_tokens": 2})
    form = {"model": resources.models["lora"], "mode": "prompt", "prompt": "the cat", "max_tokens": "3"}
    text = ada.post("/playground/stream", **form).text
    resources.responses["playground stream"] = [json.loads(line) for line in text.splitlines()]


def ends(ada: Person, staff: Person, resources: Resources) -> None:
    """Paused, resumed, cancelled, tried again, put first by staff, deleted."""
    pause(ada, resources, "cancelled", LONG)
    id = resources.jobs["cancelled"]
    steps = ada.checkpoints(id)[0]["step_number"]
    ada.call("POST", f"fine_tuning/jobs/{id}/resume")
    wait_until(lambda: ada.checkpoints(id)[0]["step_number"] > steps, 600, id)
    resources.responses["fine_tuning/jobs/running GET"] = ada.job(id)
    owner = ada.job(id)["organization_id"]
    staff.post(f"/admin/jobs/overseenjob/{owner}/{id}/priority/", priority="5")
    ada.call("POST", f"fine_tuning/jobs/{id}/cancel")
    ada.wait_for_job(id, "cancelled")
    response = ada.post(f"/jobs/{id}/retry/")
    match = re.search(r"/jobs/(ftjob-\w+)/", response.headers["location"])
    assert match
    again = match[1]
    ada.wait_for_job(again, "running")
    staff.post(f"/admin/jobs/overseenjob/{owner}/{again}/cancel/")
    ada.wait_for_job(again, "cancelled")
    resources.jobs["again"] = again


def after_workers(ada: Person, url: str, resources: Resources) -> None:
    """After the workers have stopped: work that is enqueued now stays in the outbox."""
    submit(ada, resources, "queued", TINY, SETTINGS)
    body = {"model": resources.models["full"], "prompt": "the cat", "max_tokens": 2}
    assert ada.api.post("completions", json=body).status_code == 503  # no worker accepted it
    ada.post(f"/jobs/{resources.jobs['again']}/delete/")
    ada.post(f"/models/{resources.models['lora']}/delete/")
    ada.post(f"/datasets/{resources.files['train']}/read-as/", base="gpt2")
    cyd = Person(url, "cyd@example.com").sign_up()
    cyd.make_key()
    cyd.upload("cyd.jsonl", trainer.rows())
    cyd.post("/accounts/reauthenticate/", password=cyd.password)
    cyd.post("/account/delete/", email=cyd.email)
    assert (
        Person(url, cyd.email).post("/accounts/login/", login=cyd.email, password=cyd.password).status_code
        == 200
    )


def read_all(ada: Person, resources: Resources) -> None:
    """Reads everything that the API returns."""
    for path in (
        "files",
        "fine_tuning/jobs",
        "models",
        "webhook_endpoints",
        "files?purpose=fine-tune-results",
    ):
        resources.responses[f"{path.replace('?', ' ')} GET"] = ada.call("GET", path)
    for name, id in resources.jobs.items():
        resources.responses[f"fine_tuning/jobs/{name} GET"] = ada.job(id)
        resources.responses[f"fine_tuning/jobs/{name}/events GET"] = ada.call("GET", f"fine_tuning/jobs/{id}/events", params={"limit": 1000})  # fmt: skip
        resources.responses[f"fine_tuning/jobs/{name}/checkpoints GET"] = ada.checkpoints(id)
