"""Choosing the columns that contain the examples: detected, changed, previewed, or asked for when none is known."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import transitions
from jobs.store import access, blobs, outbox
from jobs.store.tables import Dataset
from tests.jobs.views.makers import dataset_page, run_checks, upload_dataset

RECORDS = [{"frage": f"Number {n}?", "antwort": f"It is {n}.", "notes": "x"} for n in range(12)]
PAIR: dict[str, Any] = {"shape": "completion", "question": "frage", "answer": "antwort"}


def as_csv(delimiter: str = ",") -> bytes:
    lines = [delimiter.join(RECORDS[0]), *(delimiter.join(row.values()) for row in RECORDS)]
    return "\n".join(lines).encode()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), buffer)
    return buffer.getvalue()


FILES = {
    "rows.csv": as_csv(),
    "rows.tsv": as_csv("\t"),
    "semicolon.csv": as_csv(";"),
    "rows.parquet": as_parquet(),
    "rows.jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
    "rows.json": json.dumps(RECORDS).encode(),
}


def choose_columns(client: Client, dataset: Dataset, htmx: bool = False, **fields: Any) -> Any:
    headers = {"HX-Request": "true"} if htmx else {}
    return client.post(reverse("jobs:dataset_columns", args=[dataset.dataset_id]), fields, headers=headers)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_unknown_columns_is_ready_once_they_are_chosen(
    alices: Client, alice: User, name: str
) -> None:
    dataset = upload_dataset(alice.owner_id, FILES[name], name)
    assert dataset.status == "rejected"
    assert blobs.size_of(dataset.key)
    page = dataset_page(alices, dataset)
    assert "Which columns contain the examples?" in page
    assert re.search(r'<option value="frage" selected', page)
    response = choose_columns(alices, dataset, **PAIR, do="read")
    assert response.status_code == 302
    dataset = run_checks(dataset)
    assert (dataset.status, dataset.summary["examples"], dataset.error) == ("ready", 12, "")
    assert dataset.format["columns"] == {"prompt": "frage", "completion": "antwort"}
    assert "frage as prompt, antwort as completion" in dataset_page(alices, dataset)


def test_detected_columns_can_be_changed(alices: Client, alice: User) -> None:
    text = "prompt,completion,better\n" + "".join(f"Number {n}?,bad,good {n}\n" for n in range(12))
    dataset = upload_dataset(alice.owner_id, text.encode(), "rows.csv")
    assert dataset.status == "ready"
    before = dataset.report_key
    fields = PAIR | {"question": "prompt", "answer": "better"}
    assert "Number 0?" in choose_columns(alices, dataset, htmx=True, **fields).content.decode()
    choose_columns(alices, dataset, **fields, do="read")
    dataset = run_checks(dataset)
    assert dataset.report_key != before
    assert "good 0" in dataset_page(alices, dataset)


def test_the_preview_marks_trained_text_with_and_without_javascript(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, FILES["rows.csv"], "rows.csv")
    fields: dict[str, Any] = {
        "shape": "instruction",
        "question": "frage",
        "more": "notes",
        "answer": "antwort",
    }
    full_page = choose_columns(alices, dataset, **fields, do="preview").content.decode()
    partial = choose_columns(alices, dataset, htmx=True, **fields).content.decode()
    assert "<h1" in full_page
    assert "<h1" not in partial
    for page in (full_page, partial):
        assert len(re.findall(r'pt-0.5">Line \d', page)) == 5
        assert re.search(r"bg-primary/15[^>]*>It is 0\.<", page)
        assert re.search(r"text-base-content/70[^>]*>Number 0\?\s+x<", page)
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": ""}, "Choose a row format."),
        ({"shape": "pickle"}, "Choose a row format from the list."),
        ({"shape": "completion", "question": "frage"}, "Answer: choose a column."),
        ({"shape": "completion", "question": "frage", "answer": "frage"}, "is already used"),
        ({"shape": "completion", "question": "frage", "answer": "__class__"}, "has no column"),
        ({"shape": "text"}, "Text or messages: choose a column."),
    ],
)
def test_an_invalid_choice_is_reported_and_changes_nothing(
    alices: Client, alice: User, fields: dict[str, Any], message: str
) -> None:
    dataset = upload_dataset(alice.owner_id, FILES["rows.csv"], "rows.csv")
    response = choose_columns(alices, dataset, **fields, do="read")
    assert response.status_code == 422
    assert message in response.content.decode()
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


def test_columns_can_be_chosen_again_after_an_unreadable_choice(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, FILES["rows.csv"], "rows.csv")
    choose_columns(alices, dataset, shape="chat", whole="frage", do="read")
    dataset = run_checks(dataset)
    assert dataset.status == "rejected"
    assert "text that is not JSON" in dataset.error
    choose_columns(alices, dataset, **PAIR, do="read")
    assert run_checks(dataset).status == "ready"


def test_a_dataset_used_by_a_waiting_job_keeps_its_columns(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, b"prompt,completion\nwho?,me\nwhere?,here\n", "rows.csv")
    transitions.submit(alice.owner_id, transitions.JobRequest(base="starter", dataset_id=dataset.dataset_id))
    choose_columns(alices, dataset, shape="text", whole="prompt", do="read")
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "ready"
    assert "uses this dataset" in dataset_page(alices, dataset)


def test_a_file_without_columns_is_rejected_and_deleted(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, b"[1, 2, 3]", "rows.json")
    assert dataset.status == "rejected"
    assert blobs.size_of(dataset.key) is None
    assert "Which columns" not in dataset_page(alices, dataset)
    assert choose_columns(alices, dataset, **PAIR, do="read").status_code == 302
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


def test_cell_contents_are_escaped(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, b"frage,<b>x</b>\n<script>alert(1)</script>,y\n", "rows.csv")
    page = choose_columns(
        alices, dataset, shape="completion", question="frage", answer="<b>x</b>", do="preview"
    ).content.decode()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<b>x</b>" not in page


# ---- any row ---------------------------------------------------------------------------------------------------------


def show_row(client: Client, dataset: Dataset, line: str) -> Any:
    return client.post(reverse("jobs:dataset_row", args=[dataset.dataset_id]), {"line": line})


def run_report_tasks(dataset: Dataset) -> None:
    for row in outbox.pending():
        kind, owner, id = outbox.parse(row)
        if kind == "report" and id.startswith(dataset.dataset_id):
            outbox.run(kind, owner, id, row.lease or "")


def test_the_tokens_of_any_row_can_be_shown(alices: Client, alice: User) -> None:
    lines = [json.dumps({"prompt": f"Number {n}?\n", "completion": f" It is {n}."}) for n in range(40)]
    dataset = upload_dataset(alice.owner_id, "\n".join(lines).encode(), "rows.jsonl")
    response = show_row(alices, dataset, "31")
    assert response["Location"].endswith("?line=31#row")
    url = response["Location"].partition("#")[0]
    assert 'aria-label="Tokenizing line 31"' in alices.get(url).content.decode()
    run_report_tasks(dataset)
    page = alices.get(url).content.decode()
    heading = re.search(r"Line 31\s*<", page)
    assert heading
    row = page[heading.start() :]
    tokens = re.findall(r'<span\s+class="rounded px-0.5 (bg-primary/15|[^"]*)">([^<]*)</span\s*>', row)
    learned = "".join(text for tone, text in tokens if tone == "bg-primary/15")
    assert learned.startswith(" It is 30.")
    assert "Number 30?" in "".join(text for _, text in tokens)
    show_row(alices, dataset, "999")
    run_report_tasks(dataset)
    assert "No row begins on line 999." in alices.get(url.replace("line=31", "line=999")).content.decode()
    assert not re.search(r"Line 31\s*<", alices.get(url).content.decode())  # only one row is kept at a time


@pytest.mark.parametrize("line", ["", "0", "-1", "x", "9" * 30, "²"])
def test_an_invalid_line_number_is_reported(alices: Client, alice: User, line: str) -> None:
    dataset = upload_dataset(alice.owner_id, b'{"text": "a"}\n', "rows.jsonl")
    show_row(alices, dataset, line)
    assert "Line: enter a line number" in dataset_page(alices, dataset)


def test_a_table_without_a_header_loses_no_row(alices: Client, alice: User) -> None:
    text = "".join(f"{n},How old is {n}?,It is {n} years old.\n" for n in range(12))
    dataset = upload_dataset(alice.owner_id, text.encode(), "rows.csv")
    page = dataset_page(alices, dataset)
    assert dataset.status == "rejected"
    assert "If the first row is data, choose that too." in dataset.error
    assert re.search(r'name="headerless"[^>]* checked', page)
    assert "How old is 0?" in page.partition('id="columns-preview"')[2]
    typed: dict[str, Any] = {
        "shape": "completion",
        "question": "How old is 0?",
        "answer": "It is 0 years old.",
    }
    choose_columns(alices, dataset, **typed, headerless="on", do="read")
    dataset = run_checks(dataset)
    assert (dataset.status, dataset.summary["rows"]) == ("ready", 12)
    assert dataset.format["header"] is False
    assert dataset.format["columns"] == {"prompt": "column 2", "completion": "column 3"}
    page = dataset_page(alices, dataset)
    assert "column 1 (11 rows)" not in page
    assert "column 1 (12 rows)" in page
    assert re.search(r'name="headerless"[^>]* checked', page)
    assert re.search(r'<option value="How old is 0\?" selected', page)
    choose_columns(alices, dataset, **typed, do="read")  # it was a header after all
    assert run_checks(dataset).summary["rows"] == 11


def test_segments_and_preference_pairs_can_be_chosen(alices: Client, alice: User) -> None:
    parts = [{"label": False, "text": "How?"}, {"label": True, "text": "So."}]
    rows = [
        {"frage": f"Number {n}?", "gut": f"{n}", "schlecht": f"not {n}", "teile": parts} for n in range(12)
    ]
    dataset = upload_dataset(alice.owner_id, "\n".join(map(json.dumps, rows)).encode(), "rows.jsonl")
    assert re.search(r'value="segments"[^>]* checked', dataset_page(alices, dataset))
    typed: dict[str, Any] = {"shape": "preference", "question": "frage", "answer": "gut", "worse": "schlecht"}
    assert "not 0" in choose_columns(alices, dataset, htmx=True, **typed).content.decode()
    choose_columns(alices, dataset, **typed, do="read")
    dataset = run_checks(dataset)
    assert (dataset.status, dataset.summary["kind"]) == ("ready", "preference")
    choose_columns(alices, dataset, shape="segments", whole="teile", do="read")
    dataset = run_checks(dataset)
    assert (dataset.status, dataset.format["columns"]) == ("ready", {"segments": "teile"})
