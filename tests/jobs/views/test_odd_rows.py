"""Rows that few people have: pages show them and versions keep them."""

from __future__ import annotations

import json

import pytest
from django.test import Client

from accounts.models import User
from jobs.store import blobs
from tests.jobs.views.makers import dataset_page, upload_dataset
from tests.jobs.views.test_rows import change, form_of, rows_of, rows_page, save, send

HALF = "\ud83d"  # of a character


def lines(*records: object) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def test_half_a_character_in_fields_that_nothing_uses_is_shown_on_every_page(
    alices: Client, alice: User
) -> None:
    odd = {"prompt": "a?", "completion": "b", f"k{HALF}": "v", "note": HALF}
    dataset = upload_dataset(alice.owner_id, lines(odd, {"prompt": "c?", "completion": "d"}), "x.jsonl")
    assert dataset.status == "ready", dataset.error
    assert "k? (1 row)" in dataset_page(alices, dataset)
    assert "a?" in rows_page(alices, dataset)
    text, fields = form_of(alices, dataset, "1")
    assert "k\ufffd" in text
    send(alices, dataset, "1", fields | {"text-1": "new"})
    saved = save(alices, dataset)
    assert rows_of(saved)[0] == odd | {"completion": "new"}


def test_half_a_character_in_what_was_typed_is_refused_on_the_page(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, lines({"text": "one"}), "x.jsonl")
    typed = json.dumps({f"k{HALF}": "v"})
    response = send(alices, dataset, "new", {"record": "{}", "json": typed})
    assert response.status_code == 422
    assert "k\ufffd" in response.content.decode()


@pytest.mark.parametrize(
    "content",
    [
        lines({f"k{HALF}": "v"}),
        lines({"messages": [{"role": f"r{HALF}", "content": "x"}]}),
        lines({"prompt": "a", "completion": 5, f"k{HALF}": 1}, {f"k{HALF}": 1}),
    ],
)
def test_half_a_character_in_a_rejected_row_is_shown_on_the_page(
    alices: Client, alice: User, content: bytes
) -> None:
    dataset = upload_dataset(alice.owner_id, content, "x.jsonl")
    assert dataset.status == "rejected"
    assert "Line 1" in dataset_page(alices, dataset)


def test_the_last_row_is_edited_in_a_file_without_a_newline_at_its_end(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, lines({"text": "one"}, {"text": "two"}), "x.jsonl")
    _, fields = form_of(alices, dataset, "2")
    send(alices, dataset, "2", fields | {"text-0": "three"})
    _, fields = form_of(alices, dataset, "new")
    send(alices, dataset, "new", fields | {"text-0": "four"})
    change(alices, dataset, "exclude", row="1", line="1")
    change(alices, dataset, "exclude", row="1", line="1")  # twice
    assert rows_of(save(alices, dataset)) == [{"text": "three"}, {"text": "four"}]


def test_a_table_with_quoted_newlines_is_edited(alices: Client, alice: User) -> None:
    content = b'prompt,completion\r\n"a\nb?","c\r\nd"\r\ne?,f'
    dataset = upload_dataset(alice.owner_id, content, "x.csv")
    _, fields = form_of(alices, dataset, "2")
    send(alices, dataset, "2", fields | {"text-1": 'say "x", then\ny'})
    saved = save(alices, dataset)
    with blobs.open_file(saved.key) as file:
        text = file.read()
    assert text == b'prompt,completion\r\n"a\nb?","c\r\nd"\r\ne?,"say ""x"", then\ny"\r\n'
