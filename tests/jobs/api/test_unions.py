"""Where a field takes one of several kinds, the refusal is about the kind that was meant."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from tests.jobs.api.conftest import Person

CREATE = {"model": "starter", "training_file": "file-1"}
CHAT = {"model": "starter"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_epochs": 100}, "n_epochs': Input should be from 1 to 50, or 'auto'."),
        ({"n_epochs": 0}, "n_epochs': Input should be from 1 to 50, or 'auto'."),
        ({"n_epochs": 2.5}, "n_epochs': Input should be a valid integer, or 'auto'."),
        ({"n_epochs": "many"}, "n_epochs': Input should be a valid integer, or 'auto'."),
        ({"batch_size": 1000}, "batch_size': Input should be from 1 to 256, or 'auto'."),
        (
            {"learning_rate_multiplier": -1},
            "learning_rate_multiplier': Input should be more than 0, up to 1000, or 'auto'.",
        ),
        (
            {"learning_rate_multiplier": 1001.5},
            "learning_rate_multiplier': Input should be more than 0, up to 1000, or 'auto'.",
        ),
        (
            {"learning_rate_multiplier": "high"},
            "learning_rate_multiplier': Input should be a valid number, or 'auto'.",
        ),
    ],
)
@pytest.mark.parametrize("where", ["hyperparameters", "method.supervised.hyperparameters"])
def test_a_hyperparameter_is_refused_with_its_range(
    people: dict[str, Person], stores: None, where: str, values: dict[str, Any], message: str
):
    body: dict[str, Any] = (
        {"hyperparameters": values}
        if where == "hyperparameters"
        else {"method": {"type": "supervised", "supervised": {"hyperparameters": values}}}
    )
    error = refused(people, "fine_tuning/jobs", CREATE | body)
    assert error["message"] == f"Invalid '{where}.{message}"
    assert error["param"] == f"{where}.{next(iter(values))}"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1 item"),
        (
            {"messages": [{"role": "user", "content": "a"}], "temperature": 3},
            "temperature",
            "less than or equal to 2",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 17}, "stop", "at most 16 items"),
    ],
)
def test_so_is_a_field_of_a_chat(
    people: dict[str, Person], stores: None, body: dict[str, Any], param: str, words: str
):
    error = refused(people, "chat/completions", CHAT | body)
    assert error["param"] == param
    assert words in error["message"]


def refused(people: dict[str, Person], path: str, body: dict[str, Any]) -> Any:
    answer = Client().post(
        f"/v1/{path}",
        body,
        content_type="application/json",
        headers={"Authorization": f"Bearer {people['alice'].key}"},
    )
    assert answer.status_code == 400, answer.content
    return answer.json()["error"]
