"""Every small file of tests/training/data/cases through the page: kept or refused, with the report's words."""

from __future__ import annotations

import html
import io
import json

from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.store import access, blobs
from tests.jobs.views.makers import dataset_page, run_checks, upload_dataset
from tests.training.data.test_cases import CASES, FOLDER


def test_the_page_says_what_becomes_of_each_file(alices: Client, alice: User) -> None:
    for name, case in CASES.items():
        file = io.BytesIO((FOLDER / name).read_bytes())
        file.name = name
        response = alices.post(reverse("jobs:upload"), {"file": file})
        dataset = access.get_dataset_for(alice.owner_id, response["Location"].split("/")[-2])
        dataset = run_checks(dataset)
        page = html.unescape(dataset_page(alices, dataset))
        chooses = not case.shape
        assert dataset.status == ("ready" if case.ready else "rejected"), name
        assert (blobs.size_of(dataset.key) is not None) == (case.ready or chooses), name
        if chooses:
            assert "Which columns contain the examples?" in page
            continue
        assert (dataset.summary["rows"], dataset.summary["trained_tokens"]) == (case.rows, case.trained), name
        assert case.words in page, name
        assert case.unused in page, name


def test_a_text_and_its_label_are_offered_as_prompt_and_answer(alices: Client, alice: User) -> None:
    """By their names and lengths, not because they come first."""
    for name, prompt, answer in (
        ("13b_text_label.csv", "text", "label"),
        ("30o_text_suffix_label.csv", "review", "sentiment"),
    ):
        dataset = upload_dataset(alice.owner_id, (FOLDER / name).read_bytes(), name)
        page = dataset_page(alices, dataset)
        question, reply = (
            page.partition(f'name="{field}"')[2].partition("</select>")[0] for field in ("question", "answer")
        )
        assert f'<option value="{prompt}" selected' in question, name
        assert f'<option value="{answer}" selected' in reply, name
    choice = {"shape": "completion", "question": "review", "answer": "sentiment", "do": "read"}
    alices.post(reverse("jobs:dataset_columns", args=[dataset.dataset_id]), choice)
    dataset = run_checks(dataset)
    assert dataset.status == "ready"
    assert "id (12 rows)" in dataset_page(alices, dataset)


def test_a_base_that_cuts_away_every_answer_is_refused(alices: Client, alice: User) -> None:
    name = "10b_long_prompt.jsonl"
    dataset = upload_dataset(alice.owner_id, (FOLDER / name).read_bytes(), name)
    form = {"dataset": dataset.dataset_id, "base": "starter", "do": "start"}
    response = alices.post(reverse("jobs:new_job"), form)
    assert response.status_code == 422
    assert "Every answer is cut off" in response.content.decode()


def test_preference_pairs_are_refused_in_words(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, (FOLDER / "23_dpo.jsonl").read_bytes(), "23_dpo.jsonl")
    response = alices.post(reverse("jobs:new_job"), {"dataset": dataset.dataset_id, "base": "starter"})
    assert response.status_code == 422
    assert "Training on pairs is not supported." in response.content.decode()


def test_a_sequence_length_that_cuts_away_every_answer_is_refused(alices: Client, alice: User) -> None:
    rows = [{"prompt": f"{n} " + "is " * 70, "completion": " odd" if n % 2 else " even"} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    dataset = upload_dataset(alice.owner_id, text, "rows.jsonl")
    form = {"dataset": dataset.dataset_id, "base": "starter", "do": "start", "sequence_length": "32"}
    response = alices.post(reverse("jobs:new_job"), form)
    assert response.status_code == 422
    assert "Every answer is cut off: the prompts alone fill the 32 tokens" in response.content.decode()
    assert alices.post(reverse("jobs:new_job"), {**form, "sequence_length": "128"}).status_code == 302
