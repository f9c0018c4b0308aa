"""A created job carries the warnings that the form shows for the same settings."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from django.test import Client

from tests.jobs.api.conftest import ApiUser
from tests.jobs.views.makers import make_dataset


def create(user: ApiUser, dataset_id: str, **settings: Any) -> Any:
    body = {"model": "starter", "training_file": dataset_id, "llmtuner": settings}
    response = Client().post("/v1/fine_tuning/jobs", body, "application/json", headers=user.headers)
    assert response.status_code == 200, response.content
    return response.json()


def form_text(user: ApiUser, dataset_id: str, **settings: Any) -> str:
    page = Client()
    page.force_login(user.user)
    data = {"dataset": dataset_id, "base": "starter", **settings}
    text = page.post("/jobs/new/estimate/", data).content.decode()
    return unescape(re.sub(r"\s+", " ", text))


def test_a_created_job_has_the_warnings_of_the_form(stores: None, users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    dataset_id = make_dataset(alice.owner).dataset_id
    warnings = create(alice, dataset_id, validation_fraction=0, epochs=30)["llmtuner"]["warnings"]
    assert "Nothing is held out" in [warning["title"] for warning in warnings]
    assert "Each example is seen 30 times" in [warning["title"] for warning in warnings]
    form = form_text(alice, dataset_id, validation_fraction="0", epochs="30")
    assert all(warning["title"] in form and warning["text"] in form for warning in warnings)


def test_automatic_settings_have_no_warnings(stores: None, users: dict[str, ApiUser]) -> None:
    dataset_id = make_dataset(users["alice"].owner).dataset_id
    assert create(users["alice"], dataset_id)["llmtuner"]["warnings"] == []


@pytest.mark.parametrize("status", ["receiving", "checking"])
def test_a_dataset_that_is_still_being_checked_is_a_warning(
    stores: None, users: dict[str, ApiUser], status: str
) -> None:
    dataset_id = make_dataset(users["alice"].owner, status=status, report={"examples": 0}).dataset_id
    warnings = create(users["alice"], dataset_id)["llmtuner"]["warnings"]
    assert [warning["title"] for warning in warnings] == ["This dataset is still being checked"]


def test_the_openapi_document_describes_warnings() -> None:
    from llmtuner.api import api

    job = api.get_openapi_schema()["components"]["schemas"]["Job"]
    warning = job["properties"]["llmtuner"]["properties"]["warnings"]["items"]
    assert set(warning["properties"]) == {"title", "text"}


CUT = {"first_answer": 40, "every_answer": 90}


def test_a_sequence_length_that_cuts_every_answer_is_refused(stores: None, users: dict[str, ApiUser]) -> None:
    alice = users["alice"]
    dataset_id = make_dataset(alice.owner, report=CUT).dataset_id
    body = {"model": "starter", "training_file": dataset_id, "llmtuner": {"sequence_length": 39}}
    response = Client().post("/v1/fine_tuning/jobs", body, "application/json", headers=alice.headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "llmtuner.sequence_length")
    assert error["message"].startswith("Every answer is cut off: the prompts alone fill the 39 tokens")
    everything = {"sequence_length": 39, "train_on": "all"}
    assert create(alice, dataset_id, **everything)["status"] == "queued"


def test_a_sequence_length_that_cuts_some_answers_is_a_warning(
    stores: None, users: dict[str, ApiUser]
) -> None:
    alice = users["alice"]
    dataset_id = make_dataset(alice.owner, report=CUT).dataset_id
    for length, warned in ((40, True), (89, True), (90, False)):
        warnings = create(alice, dataset_id, sequence_length=length)["llmtuner"]["warnings"]
        assert ("Some answers are cut off whole" in [warning["title"] for warning in warnings]) == warned


def test_reports_made_before_these_counts_refuse_nothing(stores: None, users: dict[str, ApiUser]) -> None:
    dataset_id = make_dataset(users["alice"].owner).dataset_id
    assert create(users["alice"], dataset_id, sequence_length=32)["status"] == "queued"
