"""A job's events and checkpoints, worded as scripts written for OpenAI expect them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from django.test import AsyncClient, Client

from jobs.api import events
from jobs.events.event_log import Event
from jobs.store import tables
from jobs.worker.trainer_output import KINDS
from tests.jobs.api.conftest import ApiUser
from training.plan.events import PHASES

pytestmark = pytest.mark.usefixtures("stores")
LINES: list[dict[str, Any]] = [
    {"t": "phase", "phase": "preparing"},
    {"t": "plan", "total_steps": 4, "examples": 8, "tokens": 80, "trained_tokens": 40, "settings": {}},
    {"t": "eval", "step": 0, "loss": 3.25, "accuracy": 0.125},
    {"t": "phase", "phase": "training"},
    {"t": "metric", "step": 1, "loss": 2.5, "accuracy": 0.25, "lr": 1e-3, "tokens_per_s": 100.0},
    {"t": "checkpoint", "step": 1, "bytes": 10, "files": [], "sha256": "0" * 64, "final": False},
    {"t": "metric", "step": 4, "loss": 1.0, "accuracy": 0.5, "lr": 1e-3, "tokens_per_s": 100.0},
    {"t": "eval", "step": 4, "loss": 1.5, "accuracy": 0.375},
    {"t": "done", "step": 4, "path": "final", "files": [], "metrics": {}},
]


def store_job(user: ApiUser, status: str, **fields: Any) -> tables.Job:
    """A job with these events, as an attempt leaves it."""
    job = tables.Job(user.owner, tables.new_id("ftjob"), base="starter", status=status)
    job.model_id = f"ft:starter:alice:events:{job.job_id[-8:].lower()}"
    job.plan, job.last_seq, job.ended_at = LINES[1], len(LINES), 1_700_000_100
    job.checkpoints = [{"step": 1, "key": "jobs/x/1", "sha256": "0" * 64, "time": 1_700_000_001}]
    for name, value in fields.items():
        setattr(job, name, value)
    lines = [json.dumps(line | {"time": 1_700_000_000 + number}) for number, line in enumerate(LINES)]
    tables.EventChunk(
        job.job_id, 1, last_seq=len(LINES), fencing_token=1, lease_owner="h", lines=lines
    ).save()
    job.save()
    return job


def get(user: ApiUser, path: str) -> Any:
    response = Client().get(f"/v1/fine_tuning/jobs{path}", headers=user.headers)
    assert response.status_code == 200, response.content
    return response.json()


def test_a_succeeded_job_ends_with_openais_two_messages(users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    job = store_job(alice, "succeeded", result={"step": 4})
    newest = get(alice, f"/{job.job_id}/events?limit=2")
    assert [event["message"] for event in newest["data"]] == [
        "The job has successfully completed",
        f"New fine-tuned model created: {job.model_id}",
    ]
    assert {(event["level"], event["type"]) for event in newest["data"]} == {("info", "message")}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_pages_of_any_size_join_without_gaps_or_duplicates(users: dict[str, ApiUser], limit: int) -> None:
    alice = users["alice"]
    job = store_job(alice, "succeeded", result={"step": 4})
    seen: list[dict[str, Any]] = []
    after = ""
    while True:
        page = get(alice, f"/{job.job_id}/events?limit={limit}{after}")
        seen += page["data"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    numbers = [int(event["id"].rpartition("-")[2]) for event in seen]
    assert numbers == list(range(len(LINES) + 2, 0, -1))


@pytest.mark.parametrize(
    ("status", "fields", "message", "level"),
    [
        ("failed", {"message": "The disk is full."}, "The job failed: The disk is full.", "error"),
        ("failed", {}, "The job failed", "error"),
        ("cancelled", {}, "The job was cancelled", "warn"),
    ],
)
def test_a_failed_or_cancelled_job_ends_with_one_event(
    users: dict[str, ApiUser], status: str, fields: dict[str, Any], message: str, level: str
) -> None:
    job = store_job(users["alice"], status, **fields)
    page = get(users["alice"], f"/{job.job_id}/events?limit=100")
    assert len(page["data"]) == len(LINES) + 1
    assert (page["data"][0]["message"], page["data"][0]["level"]) == (message, level)


def test_steps_are_worded_as_at_openai(users: dict[str, ApiUser]) -> None:
    job = store_job(users["alice"], "running", ended_at=None)
    all_events = get(users["alice"], f"/{job.job_id}/events?limit=100")["data"]
    metrics = [event for event in all_events if event["type"] == "metrics"]
    steps = [
        re.fullmatch(r"Step (\d+)/(\d+): training loss=(\d+\.\d+)", event["message"]) for event in metrics
    ]
    assert [match.groups() for match in steps if match] == [("4", "4", "1.00"), ("1", "4", "2.50")]
    assert [event["message"] for event in metrics if "validation" in event["message"]] == [
        "Step 4/4: validation loss=1.50",
        "Step 0/4: validation loss=3.25",
    ]
    data = [{name: value for name, value in event["data"].items() if name != "llmtuner"} for event in metrics]
    assert data == [
        {
            "step": 4,
            "total_steps": 4,
            "valid_loss": 1.5,
            "valid_mean_token_accuracy": 0.375,
            "full_valid_loss": 1.5,
            "full_valid_mean_token_accuracy": 0.375,
        },
        {"step": 4, "total_steps": 4, "train_loss": 1.0, "train_mean_token_accuracy": 0.5},
        {"step": 1, "total_steps": 4, "train_loss": 2.5, "train_mean_token_accuracy": 0.25},
        {
            "step": 0,
            "total_steps": 4,
            "valid_loss": 3.25,
            "valid_mean_token_accuracy": 0.125,
            "full_valid_loss": 3.25,
            "full_valid_mean_token_accuracy": 0.125,
        },
    ]
    assert f"Checkpoint created at step 1 with Snapshot ID: {job.model_id}:ckpt-step-1" in [
        event["message"] for event in all_events
    ]


async def test_the_stream_has_the_same_events_as_the_list(users: dict[str, ApiUser]) -> None:
    from asgiref.sync import sync_to_async

    alice = users["alice"]
    job = await sync_to_async(store_job)(alice, "succeeded", result={"step": 4})
    listed = (await sync_to_async(get)(alice, f"/{job.job_id}/events?limit=100"))["data"]
    response = await AsyncClient().get(
        f"/v1/fine_tuning/jobs/{job.job_id}/events?stream=true",
        headers=alice.headers,
    )
    body = b"".join([piece async for piece in response.streaming_content]).decode()
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    assert [json.loads(line) for line in lines] == listed[::-1]


@pytest.mark.parametrize("kind", sorted(KINDS - {"phase"}) + [f"phase {phase}" for phase in PHASES])
def test_no_message_is_a_bare_event_type_or_phase(kind: str) -> None:
    job = tables.Job("user-A", "ftjob-01HZZZZZZZZZZZZZZZZZZZZZZZ")
    line: dict[str, Any] = {"t": kind.split()[0], "phase": kind.partition(" ")[2], "time": 1.0}
    for payload in events.show(job, Event(1, line), None):
        assert payload["message"]
        assert payload["message"] not in {*KINDS, *PHASES}


# ---- checkpoints and cancellation ---------------------------------------------------------------


def test_the_last_checkpoint_is_the_model_itself(users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    job = store_job(alice, "succeeded", result={"step": 4})
    checkpoints = get(alice, f"/{job.job_id}/checkpoints")["data"]
    assert [(c["step_number"], c["fine_tuned_model_checkpoint"]) for c in checkpoints] == [
        (4, job.model_id),
        (1, f"{job.model_id}:ckpt-step-1"),
    ]
    assert checkpoints[0]["metrics"]["train_loss"] == 1.0
    assert checkpoints[0]["metrics"]["full_valid_loss"] == 1.5
    assert checkpoints[0]["created_at"] == 1_700_000_100
    only_older = get(alice, f"/{job.job_id}/checkpoints?after={checkpoints[0]['id']}")["data"]
    assert [c["step_number"] for c in only_older] == [1]


def test_a_checkpoint_written_at_the_last_step_is_listed_once(users: dict[str, ApiUser]) -> None:
    job = store_job(users["alice"], "succeeded", result={"step": 1})
    checkpoints = get(users["alice"], f"/{job.job_id}/checkpoints")["data"]
    assert [c["fine_tuned_model_checkpoint"] for c in checkpoints] == [job.model_id]


def test_a_deleted_model_is_not_listed_as_a_checkpoint(users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    job = store_job(alice, "succeeded", result={"step": 4})
    tables.TunedModel(alice.owner, job.model_id, deleted=True).save()
    checkpoints = get(alice, f"/{job.job_id}/checkpoints")["data"]
    assert [c["step_number"] for c in checkpoints] == [1]
    running = store_job(alice, "running", ended_at=None)
    checkpoints = get(alice, f"/{running.job_id}/checkpoints")["data"]
    assert [c["step_number"] for c in checkpoints] == [1]


def test_cancelling_a_running_job_returns_cancelled_at_once(users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    job = store_job(alice, "running", ended_at=None, lease="l", fencing_token=1)
    response = Client().post(f"/v1/fine_tuning/jobs/{job.job_id}/cancel", headers=alice.headers)
    assert response.json()["status"] == "cancelled"
    assert response.json()["llmtuner"]["status"] == "running"
    assert get(alice, f"/{job.job_id}")["status"] == "cancelled"
    assert get(alice, "?limit=1")["data"][0]["status"] == "cancelled"
    stored = tables.get(tables.Job, alice.owner, job.job_id)
    assert stored is not None
    assert (stored.status, stored.desired) == ("running", "cancel")


def test_a_success_that_is_already_stored_wins_over_a_cancel(users: dict[str, ApiUser]) -> None:
    job = store_job(users["alice"], "succeeded", result={"step": 4}, desired="cancel")
    payload = get(users["alice"], f"/{job.job_id}")
    assert (payload["status"], payload["fine_tuned_model"]) == ("succeeded", job.model_id)


def test_the_same_body_starts_a_new_job_while_the_old_one_is_being_cancelled(
    users: dict[str, ApiUser],
) -> None:
    alice = users["alice"]
    file_id = tables.new_id("file")
    tables.Dataset(alice.owner, file_id, name="a.jsonl", status="ready", bytes=10).save()
    body = {"model": "starter", "training_file": file_id}

    def create() -> str:
        response = Client().post(
            "/v1/fine_tuning/jobs",
            body,
            content_type="application/json",
            headers=alice.headers,
        )
        assert response.status_code == 200, response.content
        return str(response.json()["id"])

    first = create()
    assert create() == first
    row = tables.get(tables.Job, alice.owner, first)
    assert row is not None
    row.status, row.desired = "running", "cancel"  # as a worker holds it until its next heartbeat
    row.save()
    assert create() != first
