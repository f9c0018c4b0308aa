"""Datasets: upload with and without JavaScript, the report, rejection, deletion."""

from __future__ import annotations

import io
import re
from typing import Any

from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.store import access, blobs, outbox
from tests.jobs.views.makers import make_dataset

ROWS = b'{"prompt": "colour of: lemon", "completion": "yellow"}\n' * 3


def upload(client: Client, content: bytes, name: str = "rows.jsonl") -> Any:
    file = io.BytesIO(content)
    file.name = name
    return client.post(reverse("jobs:upload"), {"file": file})


def test_a_quotation_mark_in_a_name_shows_as_typed(alices: Client, alice: User) -> None:
    """Browsers send it as %22."""
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="my %22big%22.jsonl"\r\n\r\n'
    body += b'{"prompt": "a", "completion": "b"}\n\r\n--x--\r\n'
    alices.post(reverse("jobs:upload"), body, "multipart/form-data; boundary=x")
    assert [row.name for row in access.list_datasets(alice.owner_id, 5)] == ['my "big".jsonl']


def test_an_empty_list_shows_example_rows(alices: Client) -> None:
    text = alices.get(reverse("jobs:datasets")).content.decode()
    assert "Upload training examples" in text
    assert "&quot;messages&quot;" in text or '"messages"' in text


def test_an_upload_without_javascript_leads_to_the_new_dataset(alices: Client, alice: User) -> None:
    response = upload(alices, ROWS)
    dataset = access.list_datasets(alice.owner_id).rows[0]
    assert response["Location"] == reverse("jobs:dataset", args=[dataset.dataset_id])
    text = alices.get(response["Location"]).content.decode()
    assert "Checking every row" in text
    assert 'http-equiv="refresh"' in text


def test_an_empty_file_is_rejected_at_once_and_leaves_nothing(alices: Client, alice: User) -> None:
    response = upload(alices, b"")
    assert b"The file is empty" in alices.get(response["Location"]).content
    assert not len(access.list_datasets(alice.owner_id))
    for key in blobs.list_keys(f"datasets/{alice.owner_id}/"):  # a checks worker would do this
        outbox.run("delete", alice.owner_id, key.split("/")[2], "")
    assert not blobs.list_keys(f"datasets/{alice.owner_id}/")


def test_a_repeated_file_is_recognized(alices: Client) -> None:
    upload(alices, ROWS, "first.jsonl")
    assert (
        "This is the same file as first.jsonl"
        in alices.get(upload(alices, ROWS, "second.jsonl")["Location"]).content.decode()
    )


def test_a_form_without_a_file_is_reported(alices: Client) -> None:
    response = alices.post(reverse("jobs:upload"), follow=True)
    assert "Choose a file to upload." in response.content.decode()


def test_the_report_lists_findings_with_lines_and_fixes(alices: Client, alice: User) -> None:
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


def test_a_rejected_file_shows_the_reason(alices: Client, alice: User) -> None:
    dataset = make_dataset(
        alice.owner_id, status="rejected", error="Line 17: this is not JSON. Fix the line."
    )
    text = alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])).content.decode()
    assert "Line 17: this is not JSON. Fix the line." in text
    assert "Start a job" not in text


def test_only_htmx_gets_the_report_alone(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    url = reverse("jobs:dataset_report", args=[dataset.dataset_id])
    assert alices.get(url).status_code == 302
    partial = alices.get(url, headers={"HX-Request": "true"}).content.decode()
    assert partial.strip().startswith('<div id="report"')
    assert "hx-get" not in partial  # it is ready, so the page need not poll


def test_a_dataset_can_be_deleted(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id)
    response = alices.post(reverse("jobs:delete_dataset", args=[dataset.dataset_id]), follow=True)
    assert "rows.jsonl was deleted." in response.content.decode()
    assert alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])).status_code == 404


def test_a_list_continues_with_older_datasets(alices: Client, alice: User) -> None:
    for n in range(22):
        make_dataset(alice.owner_id, name=f"rows-{n:02}.jsonl")
    first = alices.get(reverse("jobs:datasets"))
    assert b"rows-21.jsonl" in first.content
    assert b"rows-01.jsonl" not in first.content
    older = alices.get(reverse("jobs:datasets") + "?after=" + first.context["more"])
    assert b"rows-01.jsonl" in older.content
    assert b"rows-21.jsonl" not in older.content
