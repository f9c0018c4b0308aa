"""The task of a job through the published `openai` client: chosen, guessed, refused, and how answers were scored."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.jobs.api.test_openai_client import extension_of, validated, wait_for, wait_for_status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("studio")]


def upload(client: openai.OpenAI, rows: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    wait_for(lambda: client.files.retrieve(file.id), lambda file: file.status == "processed")
    return file.id


def labels(count: int, different: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Message {i}: {'win' if i % 2 else 'hello'}\n", "completion": f"{i % different}"}
        for i in range(count)
    ]


def create(client: openai.OpenAI, file_id: str, **settings: Any) -> Any:
    return validated(
        client.fine_tuning.jobs.create(
            model="starter", training_file=file_id, extra_body={"llmtuner": settings}
        )
    )


def test_a_job_and_its_model_have_the_scores_of_a_guessed_task(client: openai.OpenAI) -> None:
    created = create(client, upload(client, labels(60, 2)), max_steps=4, validation_fraction=0.2)
    guessed = {"name": "classification", "automatic": True, "text": "Automatic: classification, 2 labels"}
    assert extension_of(created)["task"] == guessed
    job = wait_for_status(client, created.id)
    assert extension_of(job)["task"] == guessed
    scores = extension_of(job)["scores"]
    assert (scores["task"], scores["answers"], scores["labels"]) == ("classification", 12, 2)
    assert scores["base"].keys() == scores["tuned"].keys() == {"label_accuracy"}
    model = wait_for(
        lambda: next((m for m in client.models.list() if m.id == job.fine_tuned_model), None), bool
    )
    details = extension_of(client.models.retrieve(model.id))  # type: ignore[union-attr]
    assert details["scores"] == scores
    assert "scores" not in details["metrics"]
    messages = [event.message for event in client.fine_tuning.jobs.list_events(created.id, limit=100)]
    assert any("12 held-out answers: label accuracy" in message for message in messages)


def test_a_chosen_task_is_shown(client: openai.OpenAI) -> None:
    created = create(client, upload(client, labels(60, 2)), task="instruction", max_steps=1)
    client.fine_tuning.jobs.cancel(created.id)
    assert extension_of(created)["task"] == {"name": "instruction", "automatic": False, "text": "Instruction"}
    assert extension_of(created)["settings"]["task"] == "instruction"


@pytest.mark.parametrize(
    ("task", "words"),
    [("tools", "No answer in the rows calls a tool."), ("classification", "which is too many for labels")],
)
def test_a_task_that_contradicts_the_rows_is_refused(client: openai.OpenAI, task: str, words: str) -> None:
    file_id = upload(client, labels(60, 50))
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        create(client, file_id, task=task)
    assert refused.value.param == "llmtuner.task"


def test_an_unknown_task_is_refused_with_those_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Choose one of chat, instruction") as refused:
        create(client, upload(client, labels(60, 2)), task="translation")
    assert refused.value.param == "llmtuner.task"
