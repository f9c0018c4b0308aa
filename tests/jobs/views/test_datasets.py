"""Datasets: upload with and without JavaScript, the report, rejection, deletion."""

from __future__ import annotations

import io
import re

from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.store import access, blobs, outbox
from tests.jobs.views.makers import make_dataset

ROWS = b'{"prompt": "colour of: lemon", "completion": "yellow"}\n' * 3


def send(client: Client, content: bytes, name: str = "rows.jsonl"):
    file = io.BytesIO(content)
    file.name = name
    return client.post(reverse("jobs:upload"), {"file": file})


def test_an_empty_list_shows_what_files_look_like(alices: Client) -> None:
    text = alices.get(reverse("jobs:datasets")).content.decode()
    assert "Upload training examples" in text
    assert "&quot;messages&quot;" in text or '"messages"' in text


def test_a_plain_form_leads_to_the_new_dataset(alices: Client, alice: User) -> None:
    answer = send(alices, ROWS)
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert answer["Location"] == reverse("jobs:dataset", args=[dataset.dataset_id])
    text = alices.get(answer["Location"]).content.decode()
    assert "Checking every row" in text
    assert 'http-equiv="refresh"' in text


def test_an_empty_file_is_refused_at_once_and_leaves_nothing(alices: Client, alice: User) -> None:
    answer = send(alices, b"")
    assert b"The file is empty" in alices.get(answer["Location"]).content
    assert not len(access.list_datasets(alice.owner_id))
    for key in blobs.list_keys(f"datasets/{alice.owner_id}/"):  # what the checks worker is rung for
        outbox.run("delete", alice.owner_id, key.split("/")[2], "")
    assert not blobs.list_keys(f"datasets/{alice.owner_id}/")


def test_the_same_file_again_is_recognised(alices: Client) -> None:
    send(alices, ROWS, "first.jsonl")
    assert (
        "This is the same file as first.jsonl"
        in alices.get(send(alices, ROWS, "second.jsonl")["Location"]).content.decode()
    )


def test_a_form_without_a_file_says_so(alices: Client) -> None:
    answer = alices.post(reverse("jobs:upload"), follow=True)
    assert "Choose a file to upload." in answer.content.decode()


def test_the_report_names_findings_with_lines_and_what_to_do(alices: Client, alice: User) -> None:
    finding = {
        "severity": "warning", "title": "Empty answers", "count": 2, "lines": [7, 1204],
        "why": "The model would learn to say nothing.", "fix": "Fill them in.",
    }  # fmt: skip
    dataset = make_dataset(alice.owner_id, report={"findings": [finding]})
    text = alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])).content.decode()
    for part in (
        "Empty answers",
        "Lines 7, 1,204",
        "learn to say nothing",
        "Fill them in.",
        "4,800",
        "1,200",
    ):
        assert part in text
    assert re.search(r'bg-primary/15"> Here</span\s*>', text)


def test_a_rejected_file_says_line_reason_and_what_to_do(alices: Client, alice: User) -> None:
    dataset = make_dataset(
        alice.owner_id, status="rejected", error="Line 17: this is no JSON. Mend the line."
    )
    text = alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])).content.decode()
    assert "Line 17: this is no JSON. Mend the line." in text
    assert "Start a job" not in text


def test_the_report_alone_is_for_htmx(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    address = reverse("jobs:dataset_report", args=[dataset.dataset_id])
    assert alices.get(address).status_code == 302
    part = alices.get(address, headers={"HX-Request": "true"}).content.decode()
    assert part.strip().startswith('<div id="report"')
    assert "hx-get" not in part  # it is ready: nothing more to ask for


def test_delete(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    answer = alices.post(reverse("jobs:delete_dataset", args=[dataset.dataset_id]), follow=True)
    assert "rows.jsonl was deleted." in answer.content.decode()
    assert alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])).status_code == 404


def test_lists_go_on_to_older_ones(alices: Client, alice: User) -> None:
    for n in range(22):
        make_dataset(alice.owner_id, name=f"rows-{n:02}.jsonl")
    first = alices.get(reverse("jobs:datasets"))
    assert b"rows-21.jsonl" in first.content
    assert b"rows-01.jsonl" not in first.content
    older = alices.get(reverse("jobs:datasets") + "?after=" + first.context["more"])
    assert b"rows-01.jsonl" in older.content
    assert b"rows-21.jsonl" not in older.content
