"""The form of a new job: generated from the settings table, explained, estimated, and started."""

from __future__ import annotations

import re
import time

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs import access
from jobs.tables import Dataset
from tests.journeys.makers import make_dataset
from training.config import FIELDS

NEW, ESTIMATE = "/jobs/new/", "/jobs/new/estimate/"


@pytest.fixture
def dataset(alice: User) -> Dataset:
    return make_dataset(alice.owner_id)


def post(client: Client, where: str, dataset: Dataset, **data: str):
    return client.post(where, {"dataset": dataset.dataset_id, "base": "starter", **data})


def test_without_data_the_page_says_what_comes_first(alices: Client) -> None:
    text = alices.get(NEW).content.decode()
    assert "First, something to learn from" in text
    assert reverse("jobs:datasets") in text


def test_every_setting_is_there_with_a_label_and_its_meaning(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW).content.decode()
    for name, spec in FIELDS.items():
        assert f'name="{name}"' in text, name
        assert f'<label for="id_{name}">{spec.label}</label>' in text, name


def test_automatic_values_carry_their_reason_and_an_estimate(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW, {"dataset": dataset.dataset_id}).content.decode()
    assert "because 120 examples" in text
    assert re.search(r'id="estimate".*half the time under', text, re.S)
    assert "Where" in text
    assert "coloured tokens are learned" in text


def test_start_makes_the_job_and_leads_to_its_page(alices: Client, alice: User, dataset: Dataset) -> None:
    answer = post(alices, NEW, dataset, epochs="2", learning_rate="", name="My first", prompts="Who?\nWhere?")
    job = access.list_jobs(alice.owner_id).rows[0]
    assert answer.status_code == 302
    assert answer["Location"] == reverse("jobs:job", args=[job.job_id])
    assert (job.name, job.status, job.settings, job.prompts) == (
        "My first",
        "queued",
        {"epochs": 2.0},
        ["Who?", "Where?"],
    )


def test_an_unnamed_job_is_named_after_its_data(alices: Client, alice: User) -> None:
    post(alices, NEW, make_dataset(alice.owner_id, name="support-march.jsonl"))
    assert access.list_jobs(alice.owner_id).rows[0].name == "Support march"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", "-1", "Must be at least 0.01."),
        ("epochs", "1e9", "Must be at most 1000."),
        ("epochs", "nan", "Give a number."),
        ("batch_size", "1.5", "Give a whole number."),
        ("learning_rate", "fast", "Give a number."),
        ("method", "magic", "Choose one of full, lora."),
        ("suffix", "Not A Slug", "lower-case letters"),
        ("base", "", "Choose the model"),
    ],
)
def test_a_mistake_is_told_beside_its_field_and_nothing_starts(
    alices: Client, alice: User, dataset: Dataset, field: str, value: str, message: str
) -> None:
    answer = post(alices, NEW, dataset, **{field: value})
    assert answer.status_code == 422
    assert message in answer.content.decode()
    assert not len(access.list_jobs(alice.owner_id))


def test_extra_fields_change_nothing(alices: Client, alice: User, dataset: Dataset) -> None:
    post(alices, NEW, dataset, owner="user-X", status="succeeded", epoch="9", priority="99", id="ftjob-1")
    job = access.list_jobs(alice.owner_id).rows[0]
    assert (job.owner, job.status, job.epoch, job.priority) == (alice.owner_id, "queued", 0, 0)


def test_updating_the_estimate_without_javascript_brings_the_whole_page_back(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5").content.decode()
    assert re.search(r'name="epochs" value="5"', text)
    assert "<h1" in text
    assert not len(access.list_jobs(alice.owner_id))


def test_a_preset_fills_the_form(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, preset="quick").content.decode()
    assert re.search(r'name="epochs" value="1"', text)


def test_a_setting_goes_back_to_automatic(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5", automatic="epochs").content.decode()
    assert re.search(r'name="epochs" value=""', text)


def test_htmx_gets_only_the_parts_that_change_within_300_ms(alices: Client, dataset: Dataset) -> None:
    data = {"dataset": dataset.dataset_id, "base": "starter", "epochs": "5"}
    alices.post(ESTIMATE, data, headers={"HX-Request": "true"})  # what is remembered between keys is read
    took = []
    for _ in range(5):
        began = time.perf_counter()
        text = alices.post(ESTIMATE, data, headers={"HX-Request": "true"}).content.decode()
        took.append(time.perf_counter() - began)
    assert "<html" not in text
    assert 'id="estimate" hx-swap-oob="true"' in text
    assert 'id="hint-epochs" hx-swap-oob="true"' in text
    assert min(took) < 0.3, took


def test_data_that_is_still_checked_can_be_chosen_already(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id, status="checking")
    assert "still being checked" in alices.get(NEW).content.decode()
    post(alices, NEW, dataset)
    assert access.list_jobs(alice.owner_id).rows[0].status == "validating"


def test_rejected_data_cannot(alices: Client, alice: User, dataset: Dataset) -> None:
    answer = post(alices, NEW, make_dataset(alice.owner_id, status="rejected"))
    assert answer.status_code == 422
    assert "was rejected. Choose another one." in answer.content.decode()
