"""Choosing which columns of a file hold the examples: found by itself, changed, previewed, and kept when none is known."""

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
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.store import access, blobs, outbox
from jobs.store.tables import Dataset
from tests.jobs.views.test_versions import come_through, page_of

RECORDS = [{"frage": f"Number {n}?", "antwort": f"It is {n}.", "notes": "x"} for n in range(12)]
PAIR = {"shape": "completion", "question": "frage", "answer": "antwort"}


def as_csv(delimiter: str = ",") -> bytes:
    lines = [delimiter.join(RECORDS[0]), *(delimiter.join(row.values()) for row in RECORDS)]
    return "\n".join(lines).encode()


def as_parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), out)
    return out.getvalue()


FILES = {
    "rows.csv": as_csv(),
    "rows.tsv": as_csv("\t"),
    "semicolon.csv": as_csv(";"),
    "rows.parquet": as_parquet(),
    "rows.jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
    "rows.json": json.dumps(RECORDS).encode(),
}


def upload(owner: str, content: bytes, name: str) -> Dataset:
    return come_through(datasets.receive(owner, name, io.BytesIO(content)))


def choose(client: Client, dataset: Dataset, htmx: bool = False, **typed: str) -> Any:
    headers = {"HX-Request": "true"} if htmx else {}
    return client.post(reverse("jobs:dataset_columns", args=[dataset.dataset_id]), typed, headers=headers)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_unknown_columns_is_kept_and_becomes_ready_by_a_choice(
    alices: Client, alice: User, name: str
) -> None:
    dataset = upload(alice.owner_id, FILES[name], name)
    assert dataset.status == "rejected"
    assert blobs.size_of(dataset.key)
    page = page_of(alices, dataset)
    assert "Which columns contain the examples?" in page
    assert re.search(r'<option value="frage" selected', page)
    answer = choose(alices, dataset, **PAIR, do="read")
    assert answer.status_code == 302
    dataset = come_through(dataset)
    assert (dataset.status, dataset.summary["examples"], dataset.error) == ("ready", 12, "")
    assert dataset.format["columns"] == {"prompt": "frage", "completion": "antwort"}
    assert "frage as prompt, antwort as completion" in page_of(alices, dataset)


def test_columns_found_by_themselves_can_be_changed(alices: Client, alice: User) -> None:
    text = "prompt,completion,better\n" + "".join(f"Number {n}?,bad,good {n}\n" for n in range(12))
    dataset = upload(alice.owner_id, text.encode(), "rows.csv")
    assert dataset.status == "ready"
    before = dataset.report_key
    assert "Number 0?" in choose(alices, dataset, htmx=True, **PAIR | {"question": "prompt", "answer": "better"}).content.decode()  # fmt: skip
    choose(alices, dataset, shape="completion", question="prompt", answer="better", do="read")
    dataset = come_through(dataset)
    assert dataset.report_key != before
    assert "good 0" in page_of(alices, dataset)


def test_the_preview_shows_what_is_learned_without_javascript_too(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, FILES["rows.csv"], "rows.csv")
    typed = {"shape": "instruction", "question": "frage", "more": "notes", "answer": "antwort"}
    whole = choose(alices, dataset, **typed, do="preview").content.decode()
    part = choose(alices, dataset, htmx=True, **typed).content.decode()
    assert "<h1" in whole
    assert "<h1" not in part
    for page in (whole, part):
        assert len(re.findall(r'pt-0.5">Line \d', page)) == 5
        assert re.search(r"bg-primary/15[^>]*>It is 0\.<", page)
        assert re.search(r"text-base-content/70[^>]*>Number 0\?\s+x<", page)
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"shape": ""}, "Choose a row format."),
        ({"shape": "pickle"}, "Choose a row format from the list."),
        ({"shape": "completion", "question": "frage"}, "Answer: choose a column."),
        ({"shape": "completion", "question": "frage", "answer": "frage"}, "is already used"),
        ({"shape": "completion", "question": "frage", "answer": "__class__"}, "has no column"),
        ({"shape": "text"}, "Text or messages: choose a column."),
    ],
)
def test_a_wrong_choice_is_told_and_changes_nothing(
    alices: Client, alice: User, typed: dict[str, str], message: str
) -> None:
    dataset = upload(alice.owner_id, FILES["rows.csv"], "rows.csv")
    answer = choose(alices, dataset, **typed, do="read")
    assert answer.status_code == 422
    assert message in answer.content.decode()
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


def test_a_choice_under_which_nothing_can_be_read_may_be_made_again(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, FILES["rows.csv"], "rows.csv")
    choose(alices, dataset, shape="chat", whole="frage", do="read")
    dataset = come_through(dataset)
    assert dataset.status == "rejected"
    assert "text that is not JSON" in dataset.error
    choose(alices, dataset, **PAIR, do="read")
    assert come_through(dataset).status == "ready"


def test_data_that_a_job_waits_for_keeps_its_columns(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, b"prompt,completion\nwho?,me\nwhere?,here\n", "rows.csv")
    transitions.submit(alice.owner_id, transitions.JobRequest(base="starter", dataset_id=dataset.dataset_id))
    choose(alices, dataset, shape="text", whole="prompt", do="read")
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "ready"
    assert "uses this dataset" in page_of(alices, dataset)


def test_a_file_without_columns_is_refused_for_good(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, b"[1, 2, 3]", "rows.json")
    assert dataset.status == "rejected"
    assert blobs.size_of(dataset.key) is None
    assert "Which columns" not in page_of(alices, dataset)
    assert choose(alices, dataset, **PAIR, do="read").status_code == 302
    assert access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "rejected"


def test_what_stands_in_the_cells_is_shown_as_text(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, b"frage,<b>x</b>\n<script>alert(1)</script>,y\n", "rows.csv")
    page = choose(
        alices, dataset, shape="completion", question="frage", answer="<b>x</b>", do="preview"
    ).content.decode()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<b>x</b>" not in page


# ---- any row ---------------------------------------------------------------------------------------------------------


def show_row(client: Client, dataset: Dataset, line: str) -> Any:
    return client.post(reverse("jobs:dataset_row", args=[dataset.dataset_id]), {"line": line})


def run_errands(dataset: Dataset) -> None:
    for row in outbox.pending():
        kind, owner, id = outbox.parse(row)
        if kind == "report" and id.startswith(dataset.dataset_id):
            outbox.run(kind, owner, id, row.lease or "")


def test_the_tokens_of_any_row_can_be_seen(alices: Client, alice: User) -> None:
    lines = [json.dumps({"prompt": f"Number {n}?\n", "completion": f" It is {n}."}) for n in range(40)]
    dataset = upload(alice.owner_id, "\n".join(lines).encode(), "rows.jsonl")
    answer = show_row(alices, dataset, "31")
    assert answer["Location"].endswith("?line=31#row")
    address = answer["Location"].partition("#")[0]
    assert 'aria-label="Tokenizing line 31"' in alices.get(address).content.decode()
    run_errands(dataset)
    page = alices.get(address).content.decode()
    row = page[re.search(r"Line 31\s*<", page).start() :]
    tokens = re.findall(r'<span\s+class="rounded px-0.5 (bg-primary/15|[^"]*)">([^<]*)</span\s*>', row)
    learned = "".join(text for tone, text in tokens if tone == "bg-primary/15")
    assert learned.startswith(" It is 30.")
    assert "Number 30?" in "".join(text for _, text in tokens)
    show_row(alices, dataset, "999")
    run_errands(dataset)
    assert "No row begins on line 999." in alices.get(address.replace("31", "999")).content.decode()
    assert not re.search(r"Line 31\s*<", alices.get(address).content.decode())  # one at a time is kept


@pytest.mark.parametrize("line", ["", "0", "-1", "x", "9" * 30, "²"])
def test_what_is_no_line_is_told(alices: Client, alice: User, line: str) -> None:
    dataset = upload(alice.owner_id, b'{"text": "a"}\n', "rows.jsonl")
    show_row(alices, dataset, line)
    assert "Line: enter a line number" in page_of(alices, dataset)


def test_a_table_without_a_header_loses_no_row(alices: Client, alice: User) -> None:
    text = "".join(f"{n},How old is {n}?,It is {n} years old.\n" for n in range(12))
    dataset = upload(alice.owner_id, text.encode(), "rows.csv")
    page = page_of(alices, dataset)
    assert dataset.status == "rejected"
    assert "If the first row is data, choose that too." in dataset.error
    assert re.search(r'name="headerless"[^>]* checked', page)
    assert "How old is 0?" in page.partition('id="columns-preview"')[2]
    typed = {"shape": "completion", "question": "How old is 0?", "answer": "It is 0 years old."}
    choose(alices, dataset, **typed, headerless="on", do="read")
    dataset = come_through(dataset)
    assert (dataset.status, dataset.summary["rows"]) == ("ready", 12)
    assert dataset.format["header"] is False
    assert dataset.format["columns"] == {"prompt": "column 2", "completion": "column 3"}
    page = page_of(alices, dataset)
    assert "column 1 (11 rows)" not in page
    assert "column 1 (12 rows)" in page
    assert re.search(r'name="headerless"[^>]* checked', page)
    assert re.search(r'<option value="How old is 0\?" selected', page)
    choose(alices, dataset, **typed, do="read")  # it was a header after all
    assert come_through(dataset).summary["rows"] == 11


def test_segments_and_preference_pairs_can_be_chosen(alices: Client, alice: User) -> None:
    parts = [{"label": False, "text": "How?"}, {"label": True, "text": "So."}]
    rows = [
        {"frage": f"Number {n}?", "gut": f"{n}", "schlecht": f"not {n}", "teile": parts} for n in range(12)
    ]
    dataset = upload(alice.owner_id, "\n".join(map(json.dumps, rows)).encode(), "rows.jsonl")
    assert re.search(r'value="segments"[^>]* checked', page_of(alices, dataset))
    typed = {"shape": "preference", "question": "frage", "answer": "gut", "worse": "schlecht"}
    assert "not 0" in choose(alices, dataset, htmx=True, **typed).content.decode()
    choose(alices, dataset, **typed, do="read")
    dataset = come_through(dataset)
    assert (dataset.status, dataset.summary["kind"]) == ("ready", "preference")
    choose(alices, dataset, shape="segments", whole="teile", do="read")
    dataset = come_through(dataset)
    assert (dataset.status, dataset.format["columns"]) == ("ready", {"segments": "teile"})
