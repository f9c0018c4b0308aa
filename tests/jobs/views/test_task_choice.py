"""The task in the form and on the pages: what is guessed, what contradicts the rows, and how answers were scored."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import recovery
from jobs.store import access, tables
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset
from tests.jobs.views.makers import make_dataset, make_job, make_model, page_text

NEW, ESTIMATE = "/jobs/new/", "/jobs/new/estimate/"
PAIRS = {"rows": 120, "text": 0, "chat": 0, "several": 0, "calls": 0, "longer": 0, "labels": 4}
TEXT = PAIRS | {"text": 120, "labels": 0}
SCORES = {
    "task": "classification",
    "answers": 12,
    "labels": 4,
    "base": {"label_accuracy": 0.25},
    "tuned": {"label_accuracy": 0.91666},
}


def with_rows(owner: str, rows: dict[str, int], **fields: Any) -> Dataset:
    return make_dataset(owner, report={"task_rows": rows} if rows else {}, **fields)


def form(client: Client, dataset: Dataset, url: str = ESTIMATE, **data: str) -> str:
    values = {"dataset": dataset.dataset_id, "base": "starter", **data}
    return page_text(client.post(url, values, headers={"hx-request": "true"}))


def test_the_form_shows_what_is_guessed_and_how_it_is_scored(alices: Client, alice: User) -> None:
    text = form(alices, with_rows(alice.owner_id, PAIRS))
    assert "Automatic: classification, 4 labels. Held-out answers are scored by label accuracy." in text
    text = form(alices, with_rows(alice.owner_id, PAIRS), task="instruction")
    assert (
        "Automatic: classification, 4 labels. Held-out answers are scored by exact match and token F1."
        in text
    )
    text = form(alices, with_rows(alice.owner_id, TEXT))
    assert "Automatic: plain text. Plain text has no answers to score." in text


def test_the_task_stands_beside_the_base_model_once(alices: Client, alice: User) -> None:
    page = page_text(alices.get(NEW, {"dataset": with_rows(alice.owner_id, PAIRS).dataset_id}))
    assert page.count('name="task"') == 1
    assert page.index('id="model-title"') < page.index('name="task"') < page.index('id="settings-title"')


@pytest.mark.parametrize("status", ["checking", "ready"])
def test_without_counts_nothing_is_guessed(alices: Client, alice: User, status: str) -> None:
    assert "guessed from the rows when they are checked" in form(
        alices, with_rows(alice.owner_id, {}, status=status)
    )


def test_a_task_that_contradicts_the_rows_is_marked_and_refused(alices: Client, alice: User) -> None:
    dataset = with_rows(alice.owner_id, PAIRS)
    assert "No answer in the rows calls a tool." in form(alices, dataset, task="tools")
    response = alices.post(NEW, {"dataset": dataset.dataset_id, "base": "starter", "task": "tools"})
    assert response.status_code == 422
    assert "No answer in the rows calls a tool." in page_text(response)
    assert "Fix one problem" in page_text(response)
    assert not access.list_jobs(alice.owner_id).rows


def test_a_preset_keeps_the_refusal(alices: Client, alice: User) -> None:
    text = form(alices, with_rows(alice.owner_id, PAIRS), task="tools", preset="quick")
    assert "No answer in the rows calls a tool." in text


def test_a_chosen_task_is_stored_copied_and_shown(alices: Client, alice: User) -> None:
    dataset = with_rows(alice.owner_id, PAIRS)
    alices.post(NEW, {"dataset": dataset.dataset_id, "base": "starter", "task": "instruction"})
    [job] = access.list_jobs(alice.owner_id).rows
    assert job.settings == {"task": "instruction"}
    assert '<option value="instruction" selected>' in page_text(alices.get(NEW, {"clone": job.job_id}))
    assert "Instruction" in page_text(alices.get(reverse("jobs:job", args=[job.job_id])))


def test_a_job_fails_if_its_rows_turn_out_to_contradict_the_task(alices: Client, alice: User) -> None:
    dataset = with_rows(alice.owner_id, {}, status="checking")
    alices.post(NEW, {"dataset": dataset.dataset_id, "base": "starter", "task": "text"})
    [job] = access.list_jobs(alice.owner_id).rows
    assert job.status == "validating"
    dataset.update(
        actions=[
            Dataset.status.set(DatasetStatus.READY),
            Dataset.summary.set(dataset.summary | {"task_rows": PAIRS}),
        ]
    )
    recovery.validate(job)
    failed = access.get_job_for(alice.owner_id, job.job_id)
    assert (failed.status, failed.reason) == ("failed", "bad_settings")
    assert "not plain text" in failed.message


def test_the_job_page_shows_the_scores_before_and_after(alices: Client, alice: User) -> None:
    plan = {
        "t": "plan",
        "task": {"name": "classification", "automatic": True, "text": "Automatic: classification, 4 labels"},
    }
    done = {"t": "done", "step": 9, "kept_step": 9, "metrics": {"loss": 1.0, "scores": SCORES}}
    job = make_job(alice.owner_id, "succeeded", [plan, done])
    text = page_text(alices.get(reverse("jobs:job", args=[job.job_id])))
    assert "12 answers with 4 labels, generated without sampling" in text
    assert text.index("Label accuracy") < text.index("25%") < text.index("92%")
    assert "Automatic: classification, 4 labels" in text
    without = make_job(alice.owner_id, "succeeded", [done | {"metrics": {"loss": 1.0}}])
    assert "Held-out answers" not in page_text(alices.get(reverse("jobs:job", args=[without.job_id])))


def test_the_model_page_shows_the_scores_and_starts_with_room_for_a_label(
    alices: Client, alice: User
) -> None:
    metrics = {"loss": 1.0, "exact_match": 0.9, "scores": SCORES}
    model = make_model(alice.owner_id, metrics=metrics, trained_on="completion")
    text = page_text(alices.get(reverse("jobs:model", args=[model.model_id])))
    assert "Label accuracy" in text
    assert "92%" in text
    assert "Exact match" not in text  # of all held-out rows, which would be a second figure for the same
    assert 'name="max_tokens" value="32"' in text
    earlier = make_model(alice.owner_id)
    text = page_text(alices.get(reverse("jobs:model", args=[earlier.model_id])))
    assert "Exact match" in text
    assert 'name="max_tokens" value="128"' in text


def test_a_dataset_is_counted_at_its_upload(alices: Client, alice: User) -> None:
    from tests.jobs.views.makers import upload_dataset

    rows = "".join(
        f'{{"prompt": "Mail {i}?", "completion": "{("spam", "ham")[i % 2]}"}}\n' for i in range(20)
    )
    dataset = upload_dataset(alice.owner_id, rows.encode(), "mails.jsonl")
    assert tables.get(Dataset, alice.owner_id, dataset.dataset_id).summary["task_rows"] == PAIRS | {  # type: ignore[union-attr]
        "rows": 20,
        "labels": 2,
    }
