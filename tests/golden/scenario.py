"""One of everything that people and programs do with the studio, over HTTP alone."""

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
    """What the Hub of these tests holds: the tiny base, and one whose weights cannot be read."""
    for name in ("tiny", "broken"):
        shutil.copytree(trainer.BASE, folder / name, dirs_exist_ok=True)
    (folder / "broken/model.safetensors").write_bytes(b"w" * 5000)
    return {TINY: folder / "tiny", BROKEN: folder / "broken"}


@dataclass
class Things:
    """Ids of what was made."""

    files: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    hook: str = ""
    answers: dict[str, Any] = field(default_factory=dict)  # of the API, by what was asked


def submit(ada: Person, things: Things, name: str, base: str, settings: dict[str, Any], **fields: Any) -> str:
    body = {"model": base, "training_file": things.files["train"], "suffix": name, "llmtuner": {"name": name, "prompts": ["the cat"], **settings}}  # fmt: skip
    answer = ada.call("POST", "fine_tuning/jobs", json=body | fields, headers={"Idempotency-Key": name})
    things.answers.setdefault("fine_tuning/jobs POST", answer)
    things.jobs[name] = answer["id"]
    return str(answer["id"])


def before_workers(ada: Person, receiver: Receiver) -> Things:
    """While no worker runs: everything that asks for work, which now waits."""
    things = Things()
    train = trainer.rows()
    events = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
    hook = {"url": receiver.url, "name": "golden", "event_types": events}
    things.answers["webhook_endpoints POST"] = ada.call("POST", "webhook_endpoints", json=hook)
    things.hook = things.answers["webhook_endpoints POST"]["id"]
    ada.post(f"/notifications/{things.hook}/test/")

    things.files["train"] = ada.upload("train.jsonl", train)
    things.files["heldout"] = ada.upload("heldout.jsonl", trainer.rows(15))
    things.files["rejected"] = ada.upload("broken.jsonl", REJECTED)
    keep = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592000"}
    things.files["expiring"] = ada.upload("expiring.jsonl", train, **keep)
    deleted = ada.upload("deleted.jsonl", train)
    things.answers["files DELETE"] = ada.call("DELETE", f"files/{deleted}")
    upload_in_parts(ada, things, train)

    heldout = {"validation_file": things.files["heldout"], "seed": 7, "metadata": {"team": "golden"}}
    hyperparameters = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 1.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    submit(ada, things, "full", TINY, SETTINGS, **heldout, method=method)
    return things


def upload_in_parts(ada: Person, things: Things, content: bytes) -> None:
    """By the API to its end, and by the page's way, which stays open."""
    body = {"bytes": len(content), "filename": "parts.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}  # fmt: skip
    upload = ada.call("POST", "uploads", json=body)
    things.answers["uploads POST"] = upload
    half = len(content) // 2
    parts = [ada.call("POST", f"uploads/{upload['id']}/parts", files={"data": ("part", piece)}) for piece in (content[:half], content[half:])]  # fmt: skip
    things.answers["uploads/parts POST"] = parts[0]
    complete = {"part_ids": [part["id"] for part in parts]}
    things.answers["uploads/complete POST"] = ada.call("POST", f"uploads/{upload['id']}/complete", json=complete)  # fmt: skip
    things.files["parts"] = things.answers["uploads/complete POST"]["file"]["id"]
    begun = ada.post("/datasets/uploads/", name="page.jsonl", bytes=str(len(content)), mark="sha256:golden")
    address = begun.json()["url"] + "1/"
    put = ada.browser.put(address, content=content, headers=ada.headers())
    assert put.status_code == 200, put.text


def with_workers(ada: Person, staff: Person, things: Things, *, keep_all: bool) -> None:
    """What waited is done, and what follows from it. `keep_all`: nothing is deleted or cancelled but what must be."""
    for name, id in things.files.items():
        told = ada.wait_for_file(id)
        assert told["status"] == ("error" if name == "rejected" else "processed"), told
    model = ada.wait_for_job(things.jobs["full"], "succeeded")["fine_tuned_model"]
    things.models["full"] = model
    ada.wait_for_model(model)
    # From the tuned model, with adapters, by the page's form.
    form = {"dataset": things.files["train"], "base": model, "name": "adapters", "suffix": "adapters", "prompts": "the cat"}  # fmt: skip
    numbers = {name: str(value) for name, value in SETTINGS.items()}
    answer = ada.post("/jobs/new/", **form, **numbers, method="lora", validation_fraction="0")
    found = re.search(r"/jobs/(ftjob-\w+)/", answer.headers["location"])
    assert found
    things.jobs["lora"] = found[1]
    submit(ada, things, "failed", BROKEN, SETTINGS)
    things.models["lora"] = ada.wait_for_job(things.jobs["lora"], "succeeded")["fine_tuned_model"]
    ada.wait_for_model(things.models["lora"])
    ada.wait_for_job(things.jobs["failed"], "failed")
    ada.post(f"/models/{model}/names/", aliases=OLD_NAME)
    generate(ada, things)
    if not keep_all:
        ends(ada, staff, things)


def pause(ada: Person, things: Things, name: str, settings: dict[str, Any]) -> None:
    """A long job, paused once it has a checkpoint."""
    id = submit(ada, things, name, TINY, settings)
    wait_until(lambda: ada.checkpoints(id), 600, id)
    ada.call("POST", f"fine_tuning/jobs/{id}/pause")
    ada.wait_for_job(id, "paused")


def generate(ada: Person, things: Things) -> None:
    chat = {
        "model": things.models["full"],
        "messages": [{"role": "user", "content": "the cat"}],
        "max_tokens": 3,
    }
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", chat | {"logprobs": True, "top_logprobs": 2}),
        ("completions", {"model": OLD_NAME, "prompt": "the cat", "max_tokens": 3, "logprobs": 2}),
    ]
    for path, body in asked:
        things.answers[f"{path} POST"] = ada.call("POST", path, json=body)
    with ada.api.stream("POST", "chat/completions", json=chat | {"stream": True, "stream_options": {"include_usage": True}}) as answer:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    things.answers["chat/completions stream"] = [json.loads(line) for line in lines]
    checkpoint = ada.checkpoints(things.jobs["full"])[-1]["fine_tuned_model_checkpoint"]
    ada.call("POST", "completions", json={"model": checkpoint, "prompt": "the", "max_tokens": 2})
    form = {"model": things.models["lora"], "mode": "prompt", "prompt": "the cat", "max_tokens": "3"}
    text = ada.post("/playground/stream", **form).text
    things.answers["playground stream"] = [json.loads(line) for line in text.splitlines()]


def ends(ada: Person, staff: Person, things: Things) -> None:
    """Paused, resumed, cancelled, tried again, put first by staff, deleted."""
    pause(ada, things, "cancelled", LONG)
    id = things.jobs["cancelled"]
    steps = ada.checkpoints(id)[0]["step_number"]
    ada.call("POST", f"fine_tuning/jobs/{id}/resume")
    wait_until(lambda: ada.checkpoints(id)[0]["step_number"] > steps, 600, id)
    things.answers["fine_tuning/jobs/running GET"] = ada.job(id)
    owner = ada.job(id)["organization_id"]
    staff.post(f"/admin/jobs/overseenjob/{owner}/{id}/priority/", priority="5")
    ada.call("POST", f"fine_tuning/jobs/{id}/cancel")
    ada.wait_for_job(id, "cancelled")
    answer = ada.post(f"/jobs/{id}/retry/")
    found = re.search(r"/jobs/(ftjob-\w+)/", answer.headers["location"])
    assert found
    again = found[1]
    ada.wait_for_job(again, "running")
    staff.post(f"/admin/jobs/overseenjob/{owner}/{again}/cancel/")
    ada.wait_for_job(again, "cancelled")
    things.jobs["again"] = again


def after_workers(ada: Person, url: str, things: Things) -> None:
    """No worker runs any more: what is asked for now stays in the list of work."""
    submit(ada, things, "queued", TINY, SETTINGS)
    body = {"model": things.models["full"], "prompt": "the cat", "max_tokens": 2}
    assert ada.api.post("completions", json=body).status_code == 503  # nobody took it
    ada.post(f"/jobs/{things.jobs['again']}/delete/")
    ada.post(f"/models/{things.models['lora']}/delete/")
    ada.post(f"/datasets/{things.files['train']}/read-as/", base="gpt2")
    cyd = Person(url, "cyd@example.com").sign_up()
    cyd.make_key()
    cyd.upload("cyd.jsonl", trainer.rows())
    cyd.post("/accounts/reauthenticate/", password=cyd.password)
    cyd.post("/account/delete/", email=cyd.email)
    assert (
        Person(url, cyd.email).post("/accounts/login/", login=cyd.email, password=cyd.password).status_code
        == 200
    )


def look(ada: Person, things: Things) -> None:
    """All that the API has to say."""
    for path in (
        "files",
        "fine_tuning/jobs",
        "models",
        "webhook_endpoints",
        "files?purpose=fine-tune-results",
    ):
        things.answers[f"{path.replace('?', ' ')} GET"] = ada.call("GET", path)
    for name, id in things.jobs.items():
        things.answers[f"fine_tuning/jobs/{name} GET"] = ada.job(id)
        things.answers[f"fine_tuning/jobs/{name}/events GET"] = ada.call("GET", f"fine_tuning/jobs/{id}/events", params={"limit": 1000})  # fmt: skip
        things.answers[f"fine_tuning/jobs/{name}/checkpoints GET"] = ada.checkpoints(id)
