"""Where a field accepts several types, the error is about the type that was meant."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from tests.jobs.api.conftest import ApiUser

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
@pytest.mark.parametrize("place", ["hyperparameters", "method.supervised.hyperparameters"])
def test_an_invalid_hyperparameter_is_rejected_with_its_range(
    users: dict[str, ApiUser], stores: None, place: str, values: dict[str, Any], message: str
) -> None:
    body: dict[str, Any] = (
        {"hyperparameters": values}
        if place == "hyperparameters"
        else {"method": {"type": "supervised", "supervised": {"hyperparameters": values}}}
    )
    error = post_invalid(users, "fine_tuning/jobs", CREATE | body)
    assert error["message"] == f"Invalid '{place}.{message}"
    assert error["param"] == f"{place}.{next(iter(values))}"


@pytest.mark.parametrize(
    ("body", "param", "text"),
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
def test_an_invalid_chat_field_is_rejected_with_its_limit(
    users: dict[str, ApiUser], stores: None, body: dict[str, Any], param: str, text: str
) -> None:
    error = post_invalid(users, "chat/completions", CHAT | body)
    assert error["param"] == param
    assert text in error["message"]


def post_invalid(users: dict[str, ApiUser], path: str, body: dict[str, Any]) -> Any:
    response = Client().post(
        f"/v1/{path}",
        body,
        content_type="application/json",
        headers=users["alice"].headers,
    )
    assert response.status_code == 400, response.content
    return response.json()["error"]
