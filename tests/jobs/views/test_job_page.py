"""A job's page as a whole, without JavaScript."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.store import access
from tests.jobs.views.makers import make_dataset, make_job, metric
from training.plan.config import FIELDS


def job_page(client: Client, job: Any, **query: str) -> str:
    response = client.get(reverse("jobs:job", args=[job.job_id]), query)
    assert response.status_code == 200
    return response.content.decode()


def test_a_running_job_shows_progress_and_loss(alices: Client, alice: User) -> None:
    lines = [
        metric(1, 4.0),
        metric(2, 3.0),
        {"t": "eval", "step": 2, "loss": 2.5, "accuracy": 0.5, "examples": 9},
    ]
    progress = {"step": 2, "total_steps": 10, "eta_s": 600.0}
    metrics = {"loss": 3.0, "eval_loss": 2.5, "base_eval_loss": 5.0}
    job = make_job(alice.owner_id, lines=lines, phase="training", progress=progress, metrics=metrics)
    text = job_page(alices, job)
    for part in ("Training", "20%", "step 2 of 10", "10–11 min", "2.500", "from 5.000"):
        assert part in text
    assert "Training loss fell from 4.000 at step 1 to 3.000 at step 2" in text
    assert '<noscript><meta http-equiv="refresh"' in text


def test_a_silent_trainer_is_reported_instead_of_a_stale_time_left(alices: Client, alice: User) -> None:
    progress = {"step": 2, "total_steps": 10, "eta_s": 2100.0, "silent_s": 540.0, "silent_limit_s": 1980.0}
    job = make_job(alice.owner_id, phase="training", progress=progress)
    text = job_page(alices, job)
    assert "The trainer has reported no progress for 9 min." in text
    assert "After 33 min it is stopped, and training restarts from the beginning." in text
    assert "35–" not in text


def test_a_silent_trainer_with_a_checkpoint_would_resume_from_it(alices: Client, alice: User) -> None:
    progress = {"step": 7, "total_steps": 10, "silent_s": 40.0, "silent_limit_s": 120.0}
    job = make_job(alice.owner_id, phase="training", progress=progress, checkpoint_step=5)
    assert "it is stopped, and training resumes from the checkpoint at step 5." in job_page(alices, job)


def test_an_ended_job_does_not_report_a_silent_trainer(alices: Client, alice: User) -> None:
    progress = {"step": 2, "total_steps": 10, "silent_s": 540.0, "silent_limit_s": 600.0}
    assert "reported no progress" not in job_page(
        alices, make_job(alice.owner_id, "failed", progress=progress)
    )


def test_an_ended_job_does_not_refresh(alices: Client, alice: User) -> None:
    assert 'http-equiv="refresh"' not in job_page(alices, make_job(alice.owner_id, "succeeded"))


def test_the_first_load_and_the_stream_render_the_same_partial(alices: Client, alice: User) -> None:
    from jobs.views.live import status_html

    job = make_job(alice.owner_id, lines=[metric(1)], progress={"step": 1, "total_steps": 4})
    for part in status_html(access.get_job_for(alice.owner_id, job.job_id)).split("<section"):
        assert re.sub(r"\s+", " ", part).strip()[:60] in re.sub(r"\s+", " ", job_page(alices, job))


def test_a_failed_job_shows_the_reason_and_a_fix(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "failed", reason="not_finite", message="The loss at step 7 is not finite.")
    text = job_page(alices, job)
    assert "The loss at step 7 is not finite." in text
    assert "Lower the learning rate" in text
    assert "Try again" in text


def test_identical_repeated_steps_verify_the_resume(alices: Client, alice: User) -> None:
    lines = [
        metric(1),
        metric(2),
        {"t": "resumed", "step": 1, "from_step": 1, "exact": True, "why": ""},
        metric(2),
    ]
    text = job_page(alices, make_job(alice.owner_id, lines=lines))
    assert "Resume verified" in text
    assert "Step 2 was repeated: its loss is bit-identical" in text


def test_a_different_loss_after_a_resume_is_reported(alices: Client, alice: User) -> None:
    lines = [metric(1), metric(2, 3.0), {"t": "resumed", "step": 1, "exact": True}, metric(2, 3.0000001)]
    assert "0 of 1 repeated steps" in job_page(alices, make_job(alice.owner_id, lines=lines))


def test_samples_of_one_prompt_are_shown_together(alices: Client, alice: User) -> None:
    lines = [{"t": "sample", "step": s, "prompt": "Who?", "text": f"answer {s}"} for s in (0, 10, 20)]
    text = job_page(alices, make_job(alice.owner_id, lines=lines))
    assert text.index("Base") < text.index("answer 0") < text.index("Step 10") < text.index("answer 20")


def early_job(owner: str) -> Any:
    lines = [
        {"t": "eval", "step": 0, "loss": 4.0, "accuracy": 0.1, "examples": 9},
        metric(3, 3.0),
        {"t": "eval", "step": 3, "loss": 2.5, "accuracy": 0.5, "examples": 9},
        metric(7, 2.0),
        {"t": "eval", "step": 7, "loss": 2.9, "accuracy": 0.4, "examples": 9},
        {"t": "done", "step": 7, "kept_step": 3, "early": True, "metrics": {"loss": 2.5}},
    ]
    return make_job(
        owner,
        "succeeded",
        lines=lines,
        progress={"step": 7, "total_steps": 113},
        metrics={"loss": 2.0, "eval_loss": 2.5, "eval_step": 3, "base_eval_loss": 4.0},
        result={"step": 7, "kept_step": 3, "early": True},
    )


def test_early_stopping_is_shown_with_the_kept_step_and_its_loss(alices: Client, alice: User) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", job_page(alices, early_job(alice.owner_id)))
    assert "Stopped early at step 7; kept step 3" in re.sub(r"\s+", " ", text)
    assert "step 7 of 113" not in text
    assert "100%" not in text
    assert "Held-out loss is 2.500 at step 3, which is kept" in text


def test_a_job_that_kept_an_earlier_step_says_so(alices: Client, alice: User) -> None:
    result = {"step": 9, "kept_step": 6, "early": False}
    job = make_job(alice.owner_id, "succeeded", progress={"step": 9, "total_steps": 9}, result=result)
    assert "step 9 of 9, kept step 6" in job_page(alices, job)


def test_a_job_from_before_the_kept_step_was_recorded_reads_as_before(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "succeeded", progress={"step": 7, "total_steps": 113}, result={"step": 7})
    text = job_page(alices, job)
    assert "100%" in text
    assert "step 7 of 113" in text


def test_the_only_step_is_named_once(alices: Client, alice: User) -> None:
    text = job_page(alices, make_job(alice.owner_id, "succeeded", lines=[metric(1, 5.567)]))
    assert "Training loss is 5.567 at step 1, the only step so far." in text
    assert "it was 5.567" not in text


def test_times_carry_their_zone_and_a_date_for_the_readers_own(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[{"t": "log", "message": "Hi", "time": 1_700_000_000.0}])
    text = job_page(alices, job)
    assert re.search(
        r'<time datetime="[^"]+\+00:00" data-style="moment" title="[^"]+ UTC">\d\d:\d\d UTC</time>', text
    )
    assert (
        '<time class="text-base-content/65" datetime="2023-11-14T22:13:20+00:00" data-style="clock">' in text
    )


def test_settings_that_were_changed_are_marked(alices: Client, alice: User) -> None:
    text = job_page(alices, make_job(alice.owner_id, settings={"method": "lora", "lora_rank": 4}))
    assert re.search(r"LoRA, rank 4, alpha 16.{0,60}changed", text, re.S)


def test_the_objective_is_shown_once_there_is_a_choice(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(alice.owner_id)
    assert "Objective" not in job_page(alices, job)
    monkeypatch.setitem(FIELDS, "objective", replace(FIELDS["objective"], choices=("supervised", "dpo")))
    assert re.search(r"Objective.{0,100}supervised", job_page(alices, job), re.S)


def test_the_csv_has_every_step_once_from_the_last_attempt(alices: Client, alice: User) -> None:
    lines = [metric(1, 4.0), metric(2, 3.0), metric(2, 2.5), {"t": "eval", "step": 2, "loss": 2.0}]
    job = make_job(alice.owner_id, lines=lines)
    text = alices.get(reverse("jobs:job_csv", args=[job.job_id])).content.decode()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(r["step"], r["loss"], r["eval_loss"]) for r in rows] == [("1", "4.0", ""), ("2", "2.5", "2.0")]


def test_the_log_can_be_downloaded(alices: Client, alice: User) -> None:
    job = make_job(
        alice.owner_id, lines=[{"t": "log", "level": "warning", "message": "mind the gap"}, metric(1)]
    )
    response = alices.get(reverse("jobs:job_log", args=[job.job_id]))
    assert "attachment" in response["Content-Disposition"]
    assert b"warn  mind the gap" in response.content
    assert b"Step 1" in response.content


def test_polling_returns_only_newer_events(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "succeeded", lines=[metric(s) for s in range(1, 6)])
    update = alices.get(reverse("jobs:job_live", args=[job.job_id]), {"after": "3"}).json()
    assert [event["seq"] for event in update["events"]] == [4, 5, 6]
    assert update["events"][-1]["t"] == "end"
    assert update["ended"]
    assert "Progress" in update["html"]


@pytest.mark.parametrize("after", ["x", "-1", "9" * 30, "1.5", "１"])
def test_polling_rejects_an_invalid_cursor(alices: Client, alice: User, after: str) -> None:
    job = make_job(alice.owner_id)
    assert alices.get(reverse("jobs:job_live", args=[job.job_id]), {"after": after}).status_code == 400


# ---- actions ---------------------------------------------------------------------------------------------------------


def act(client: Client, job: Any, action: str, **data: str) -> Any:
    return client.post(reverse(f"jobs:{action}_job", args=[job.job_id]), data, follow=True)


def test_a_job_can_be_paused_resumed_and_cancelled(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "queued", dataset_id=make_dataset(alice.owner_id).dataset_id)
    assert "Paused" in act(alices, job, "pause").content.decode()
    assert "Queued" in act(alices, job, "resume").content.decode()
    assert "Cancelled" in act(alices, job, "cancel").content.decode()
    assert access.get_job_for(alice.owner_id, job.job_id).status == "cancelled"


def test_an_impossible_action_is_explained(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "succeeded")
    assert "already succeeded" in act(alices, job, "pause").content.decode()


def test_a_job_can_be_renamed(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id)
    assert "<h1" in act(alices, job, "rename", name="Better name").content.decode()
    assert access.get_job_for(alice.owner_id, job.job_id).name == "Better name"


def test_a_job_can_be_deleted(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "failed")
    response = act(alices, job, "delete")
    assert "Orders was deleted." in response.content.decode()
    assert alices.get(reverse("jobs:job", args=[job.job_id])).status_code == 404


def test_the_page_says_how_many_layers_have_an_adapter(alices: Client, alice: User) -> None:
    settings = {"method": "lora", "use_dora": True}
    plan = {"settings": settings, "lora": {"layers": 24, "of": 24}}
    assert "DoRA, rank 16, alpha 32, all 24 linear layers" in job_page(
        alices, make_job(alice.owner_id, settings=settings, settings_schema=2, plan=plan)
    )
    plan["lora"] = {"layers": 12, "of": 24}
    text = job_page(alices, make_job(alice.owner_id, settings=settings, settings_schema=2, plan=plan))
    assert "12 of 24 linear layers" in text


def test_a_clone_of_a_job_of_the_first_release_keeps_its_lora(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    job = make_job(alice.owner_id, dataset_id=dataset.dataset_id, settings={"method": "lora", "lora_rank": 4})
    text = alices.get(reverse("jobs:new_job"), {"clone": job.job_id}).content.decode()
    for name, value in (("lora_targets", "attention"), ("lora_rank", "4"), ("lora_alpha", "16")):
        assert re.search(rf'name="{name}"[^>]*value="{value}"', text), name


def test_a_clone_copies_the_settings(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    job = make_job(alice.owner_id, "failed", dataset_id=dataset.dataset_id, settings={"epochs": 7.0})
    text = alices.get(reverse("jobs:new_job"), {"clone": job.job_id}).content.decode()
    assert 'value="Orders (copy)"' in text
    assert re.search(r'name="epochs" value="7"', text)


def test_a_queued_job_can_be_edited_and_keeps_its_place(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    fields: dict[str, Any] = {
        "dataset_id": dataset.dataset_id,
        "settings": {"epochs": 7.0},
        "metadata": {"mine": "1"},
    }
    job = make_job(alice.owner_id, "queued", **fields)
    url = reverse("jobs:edit_job", args=[job.job_id])
    assert url in job_page(alices, job)
    assert re.search(r'name="epochs" value="7"', alices.get(url).content.decode())
    form_data = {
        "name": "Better",
        "dataset": dataset.dataset_id,
        "base": "gpt2",
        "suffix": "x",
        "epochs": "2",
    }
    response = alices.post(url, form_data)
    assert response.status_code == 302, response.content.decode()
    changed = access.get_job_for(alice.owner_id, job.job_id)
    assert (changed.name, changed.settings["epochs"], changed.metadata["mine"]) == ("Better", 2, "1")
    assert (changed.base, changed.model_id, changed.created_at) == (job.base, job.model_id, job.created_at)
    assert alices.post(url, form_data | {"epochs": "-1"}).status_code == 422


def test_a_started_job_cannot_be_edited(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    job = make_job(alice.owner_id, "running", dataset_id=dataset.dataset_id, fencing_token=1)
    url = reverse("jobs:edit_job", args=[job.job_id])
    assert url not in job_page(alices, job)
    response = alices.post(url, {"name": "x", "dataset": dataset.dataset_id, "base": "starter"}, follow=True)
    assert "Clone it" in response.content.decode()
    assert access.get_job_for(alice.owner_id, job.job_id).name == job.name


def test_the_page_data_is_plain_json(alices: Client, alice: User) -> None:
    text = job_page(alices, make_job(alice.owner_id, lines=[metric(1)]))
    match = re.search(r'<script id="job-data" type="application/json">(.*?)</script>', text, re.S)
    assert match
    assert json.loads(match[1])["chart"]["step"] == [1]
