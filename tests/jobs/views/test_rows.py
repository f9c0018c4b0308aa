"""A dataset's rows on its page: shown, searched, edited, added and excluded, and saved as a new version."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import datasets, drafts, reports, versions
from jobs.store import access, blobs, outbox, quotas, tables
from jobs.store.errors import Refused
from jobs.store.tables import Dataset, Usage
from tests.jobs.views.makers import dataset_page, make_dataset, run_checks, upload_dataset

PAIRS = [
    {"id": n, "prompt": f"Number {n}?", "completion": f" It is {n * n}.", "meta": {"n": [n]}}
    for n in range(50)
]
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "w", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "w", "parameters": {}}}],
    "source": "crm\r\nexport",
}


def upload(owner: str, records: list[dict[str, Any]], name: str = "support.jsonl") -> Dataset:
    return upload_dataset(owner, "".join(json.dumps(record) + "\n" for record in records).encode(), name)


def run_reports(dataset: Dataset) -> None:
    """Do what a checks worker does when pages or tokens of a dataset are requested."""
    for work in outbox.pending():
        kind, owner, id = outbox.parse(work)
        if kind == "report" and dataset.dataset_id in id:
            outbox.run(kind, owner, id, work.lease or "")


def rows_page(client: Client, dataset: Dataset, **query: Any) -> str:
    address = reverse("jobs:dataset_rows", args=[dataset.dataset_id])
    client.get(address, query)
    run_reports(dataset)
    response = client.get(address, query)
    assert response.status_code == 200
    return response.content.decode()


def numbers_in(page: str) -> list[int]:
    return [int(number) for number in re.findall(r'id="row-(\d+)"', page)]


def form_of(client: Client, dataset: Dataset, row: str = "new") -> tuple[str, dict[str, str]]:
    """The form's HTML and its fields, as a browser would send them."""
    address = reverse("jobs:edit_row", args=[dataset.dataset_id, row])
    client.get(address)
    run_reports(dataset)
    text = client.get(address).content.decode()
    return text, fields_in(text)


def fields_in(text: str) -> dict[str, str]:
    hidden = dict(re.findall(r'<input type="hidden" name="(record|line|key)" value="([^"]*)"', text))
    areas = re.findall(r'<textarea[^>]*name="([^"]+)"[^>]*>\n?(.*?)</textarea>', text, re.DOTALL)
    selects = [
        (name, re.search(r"<option selected>([^<]+)", options)[1])  # type: ignore[index]
        for name, options in re.findall(
            r'<select[^>]*name="(role-[^"]+)"[^>]*>(.*?)</select>', text, re.DOTALL
        )
    ]
    values = {**hidden, **dict(areas), **dict(selects)}
    return {
        name: html.unescape(value).replace("\r\n", "\n").replace("\n", "\r\n")
        for name, value in values.items()
    }


def send(client: Client, dataset: Dataset, row: str, fields: dict[str, str], do: str = "keep") -> Any:
    return client.post(reverse("jobs:edit_row", args=[dataset.dataset_id, row]), {**fields, "do": do})


def change(client: Client, dataset: Dataset, do: str, **fields: Any) -> Any:
    return client.post(reverse("jobs:row_draft", args=[dataset.dataset_id]), {"do": do, **fields})


def save(client: Client, dataset: Dataset) -> Dataset:
    id = change(client, dataset, "save")["Location"].split("/")[-2]
    return run_checks(access.get_dataset_for(dataset.owner, id))


def rows_of(dataset: Dataset) -> list[Any]:
    with blobs.open_file(dataset.key) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def test_rows_are_shown_page_by_page_and_found_by_line_and_text(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    address = reverse("jobs:dataset_rows", args=[dataset.dataset_id])
    assert address in dataset_page(alices, dataset)
    assert "Reading the file" in alices.get(address).content.decode()
    first = rows_page(alices, dataset)
    assert numbers_in(first) == list(range(1, 21))
    assert "Number 3?" in first
    assert "Page 1 of 3" in first
    assert numbers_in(rows_page(alices, dataset, page=3)) == list(range(41, 51))
    assert numbers_in(rows_page(alices, dataset, line=30)) == list(range(21, 41))
    assert numbers_in(rows_page(alices, dataset, q="number 4")) == [5, *range(41, 51)]
    assert "No row contains “nowhere”" in rows_page(alices, dataset, q="nowhere")
    assert "No row begins on line 99" in rows_page(alices, dataset, line=99)
    assert "There is no such page" in rows_page(alices, dataset, page=9)
    assert numbers_in(rows_page(alices, dataset, q="--help")) == []


def test_an_old_page_of_rows_leaves_no_bytes_when_another_replaces_it(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "PAGES_KEPT", 1)
    dataset = upload(alice.owner_id, PAIRS)
    for page in (1, 2, 1):
        assert numbers_in(rows_page(alices, dataset, page=page))[0] == 20 * page - 19
    assert len(list(blobs.list_keys(f"datasets/{alice.owner_id}/{dataset.dataset_id}/reports/"))) == 1


def test_rows_are_edited_added_and_excluded_and_saved_as_a_version(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    before = blobs.local_path(dataset.key).read_bytes()
    _, fields = form_of(alices, dataset, "3")
    response = send(alices, dataset, "3", fields | {"text-2": " Four."})
    assert response["Location"].endswith("/rows/?page=1#row-3")
    change(alices, dataset, "exclude", row=5, line=5)
    change(alices, dataset, "exclude", row=6, line=6)
    change(alices, dataset, "undo", row=6)
    _, fields = form_of(alices, dataset)
    for _ in range(2):  # a double click
        send(alices, dataset, "new", fields | {"text-0": "New?", "text-1": " Yes."})
    page = rows_page(alices, dataset)
    for words in (
        "3 changes",
        "1 row edited, 1 added, 1 excluded",
        "Save as new version",
        " Four.",
        "New?",
        "Edited",
    ):
        assert words in page
    assert "Unsaved changes" in dataset_page(alices, dataset)
    version = save(alices, dataset)
    expected = [*PAIRS[:2], PAIRS[2] | {"completion": " Four."}, PAIRS[3], *PAIRS[5:]]
    assert rows_of(version) == [*expected, {"prompt": "New?", "completion": " Yes."}]
    assert (version.name, version.status) == ("support (edited).jsonl", "ready")
    assert not drafts.get(dataset)
    assert blobs.local_path(dataset.key).read_bytes() == before
    text = dataset_page(alices, version)
    for words in (
        "50 rows before, 50 after",
        "1 row edited, 1 added, 1 excluded",
        "Changed rows",
        "Number 2? Four.",
    ):
        assert words in text
    assert not [
        key for key in blobs.list_keys(f"datasets/{alice.owner_id}/{version.dataset_id}/") if "changes" in key
    ]


def test_fields_without_a_control_and_untouched_texts_are_kept_as_they_were(
    alices: Client, alice: User
) -> None:
    odd = {
        "text": "line\r\nends",
        "nul": "a\u0000b",
        "half": "\ud800",
        "n": 1.50,
        "none": None,
        "list": [[1]],
    }
    dataset = upload(alice.owner_id, [odd, {"text": "b"}])
    text, fields = form_of(alices, dataset, "1")
    assert "text-0" in fields
    assert "text-1" not in fields  # a browser would lose the control character
    assert text.count("Kept as it is") == 5
    send(alices, dataset, "1", fields)
    assert drafts.get(dataset).rows["1"]["record"] == odd


def test_messages_are_edited_added_and_removed_and_tool_calls_kept(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, [CHAT] * 3)
    text, fields = form_of(alices, dataset, "2")
    assert fields["content-0-1"] == "Weather?"
    assert "content-0-2" not in fields  # it has no text
    assert "tool_calls" in text
    fields = fields_in(
        send(alices, dataset, "2", fields | {"content-0-1": "Rain?"}, "add-0").content.decode()
    )
    assert fields["content-0-1"] == "Rain?"
    assert (fields["role-0-5"], fields["content-0-5"]) == ("user", "")
    fields = fields_in(
        send(alices, dataset, "2", fields | {"content-0-5": "Thanks"}, "add-0").content.decode()
    )
    fields = fields_in(
        send(alices, dataset, "2", fields | {"content-0-6": "Bye"}, "remove-0-0").content.decode()
    )
    assert send(alices, dataset, "2", fields).status_code == 302
    expected = [
        {"role": "user", "content": "Rain?"},
        *CHAT["messages"][2:],
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
    assert drafts.get(dataset).rows["2"]["record"] == CHAT | {"messages": expected}
    version = save(alices, dataset)
    assert rows_of(version) == [CHAT, CHAT | {"messages": expected}, CHAT]


def test_errors_name_the_line_and_the_field_and_nothing_typed_is_lost(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, [CHAT, *[{"messages": CHAT["messages"][:2] + CHAT["messages"][4:]}] * 3])
    _, fields = form_of(alices, dataset, "2")
    as_json = send(alices, dataset, "2", fields | {"content-0-1": "typed"}, "json")
    fields = fields_in(as_json.content.decode())
    assert "typed" in fields["json"]
    for typed, message in {
        fields["json"].replace(
            '"role": "user",', '"role": "boss",'
        ): "Line 2: message 2 has the role &#x27;boss&#x27;",
        '{"messages": []}': "Line 2: messages is an empty list",
        '{"messages": [\n  {"role" "user"}]}': "Line 2: line 2, character 11 of the JSON",
        "[1]": "Line 2: the row is a list, not an object",
        '{"a": 1, "a": 2}': "the key &#x27;a&#x27; appears twice",
        '{"a": NaN}': "NaN is not JSON",
        '{"text": "x"}': "Line 2: this row has the shape text, the rows before it chat",
    }.items():
        response = send(alices, dataset, "2", fields | {"json": typed})
        assert response.status_code == 422
        content = response.content.decode()
        assert message in content
        assert fields_in(content)["json"].replace("\r\n", "\n") == typed.replace("\r\n", "\n")
    assert not drafts.get(dataset)
    back = fields_in(send(alices, dataset, "2", fields, "fields").content.decode())
    assert back["content-0-1"] == "typed"


def test_a_table_keeps_its_columns_and_format(alices: Client, alice: User) -> None:
    lines = ["id;prompt;completion;note", *(f"{n};Q{n}?;A{n};" for n in range(12))]
    dataset = upload_dataset(alice.owner_id, "\n".join(lines).encode(), "table.csv")
    _, fields = form_of(alices, dataset, "2")
    send(alices, dataset, "2", fields | {"text-3": "checked; twice"})
    text, fields = form_of(alices, dataset)
    assert re.findall(r"field-label[^>]*>(\w+)<", text) == ["id", "prompt", "completion", "note"]
    other = fields | {"json": '{"prompt": "a", "completion": "b", "other": "c"}'}
    response = send(alices, dataset, "new", other)
    assert "The table has no column &#x27;other&#x27;" in response.content.decode()
    send(alices, dataset, "new", fields | {"text-1": "Q?", "text-2": "A"})
    version = save(alices, dataset)
    assert version.name == "table (edited).csv"
    content = blobs.local_path(version.key).read_text().splitlines()
    assert content[:3] == [lines[0], lines[1], '1;Q1?;A1;"checked; twice"']
    assert content[-1] == ";Q?;A;"
    assert version.format["container"] == "csv"


def test_text_files_say_that_they_will_be_saved_as_jsonl(alices: Client, alice: User) -> None:
    dataset = upload_dataset(alice.owner_id, b"One.\n---\nTwo.\n---\nThree.\n", "notes.txt")
    change(alices, dataset, "exclude", row=2, line=3)
    assert "saved as JSONL" in rows_page(alices, dataset)
    version = save(alices, dataset)
    assert (version.name, rows_of(version)) == (
        "notes (edited).jsonl",
        [{"text": "One."}, {"text": "Three."}],
    )


def test_saving_twice_makes_one_version_and_an_edited_one_is_not_named_twice(
    alices: Client, alice: User
) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    change(alices, dataset, "exclude", row=1, line=1)
    assert len({change(alices, dataset, "save")["Location"] for _ in range(2)}) == 1
    version = save(alices, dataset)
    change(alices, version, "exclude", row=1, line=1)
    second = save(alices, version)
    assert (second.name, rows_of(second)) == ("support (edited).jsonl", PAIRS[2:])
    address = reverse("jobs:row_draft", args=[dataset.dataset_id])
    page = alices.post(address, {"do": "save"}, follow=True).content.decode()
    assert "There are no changes to save" in page


def test_changes_made_while_a_version_is_written_are_not_lost(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    change(alices, dataset, "exclude", row=1, line=1)
    id = change(alices, dataset, "save")["Location"].split("/")[-2]
    change(alices, dataset, "exclude", row=2, line=2)
    assert rows_of(run_checks(access.get_dataset_for(alice.owner_id, id))) == PAIRS[1:]
    assert set(drafts.get(dataset).rows) == {"1", "2"}
    assert rows_of(save(alices, dataset)) == PAIRS[2:]


def test_a_version_that_could_not_be_made_keeps_the_draft(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    change(alices, dataset, "exclude", row=1, line=1)
    drafts.change_row(dataset, 2, 2, {"text": "x"})
    version = save(alices, dataset)
    assert version.status == "rejected"
    assert "Line 2: this row has the shape text" in dataset_page(alices, version)
    assert drafts.get(dataset).counts == {"edited": 1, "added": 0, "excluded": 1}


def test_excluding_every_row_or_a_row_that_is_not_there_is_refused(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS[:2])
    for number in (1, 2):
        change(alices, dataset, "exclude", row=number, line=number)
    address = reverse("jobs:row_draft", args=[dataset.dataset_id])
    assert "All rows are excluded" in alices.post(address, {"do": "save"}, follow=True).content.decode()
    with pytest.raises(Refused, match="There is no row 3: the dataset has 2 rows"):
        versions.begin_edit(dataset, {"rows": {"3": None}, "added": []})
    for row in ("0", "x", "new-", "new-x", "1e3", "99"):
        form_of_missing = reverse("jobs:edit_row", args=[dataset.dataset_id, row])
        alices.get(form_of_missing)
        run_reports(dataset)
        assert alices.get(form_of_missing).status_code == 404, row


def test_a_draft_has_a_limit_and_says_so(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    _, fields = form_of(alices, dataset)
    big = fields | {"text-0": "Q?", "text-1": "x" * 200_000}
    assert send(alices, dataset, "new", big | {"key": "0" * 8}).status_code == 302
    response = send(alices, dataset, "new", big | {"key": "1" * 8})
    assert response.status_code == 422
    assert "more changes than one draft can hold" in response.content.decode()


def test_a_draft_ends_with_its_dataset_and_blocks_other_columns(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    change(alices, dataset, "exclude", row=1, line=1)
    with pytest.raises(datasets.Rejected, match="changes that are not saved"):
        datasets.recheck(alice.owner_id, dataset.dataset_id, dataset.format)
    change(alices, dataset, "discard")
    datasets.recheck(alice.owner_id, dataset.dataset_id, dataset.format)
    dataset = run_checks(dataset)
    change(alices, dataset, "exclude", row=1, line=1)
    datasets.delete(alice.owner_id, dataset.dataset_id)
    outbox.run("delete", alice.owner_id, dataset.dataset_id, "")
    assert tables.get(Usage, alice.owner_id, f"draft#{dataset.dataset_id}") is None


def test_a_full_quota_keeps_the_draft(alices: Client, alice: User, settings: Any) -> None:
    dataset = upload(alice.owner_id, PAIRS)
    change(alices, dataset, "exclude", row=1, line=1)
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 1}
    response = alices.post(reverse("jobs:row_draft", args=[dataset.dataset_id]), {"do": "save"}, follow=True)
    assert "You have reached the limit of 1 datasets" in response.content.decode()
    assert len(access.list_datasets(alice.owner_id)) == len(quotas.held(alice.owner_id, "datasets")) == 1
    assert drafts.get(dataset)


def test_rows_of_a_dataset_that_is_not_ready_are_neither_shown_nor_changed(
    alices: Client, alice: User
) -> None:
    dataset = make_dataset(alice.owner_id, status="checking")
    assert "once the dataset has passed its check" in rows_page(alices, dataset)
    change(alices, dataset, "exclude", row=1, line=1)
    assert not drafts.get(dataset)
    assert alices.get(reverse("jobs:edit_row", args=[dataset.dataset_id, "1"])).status_code == 404


# ---- merging and splitting ------------------------------------------------------------------------------------------


def test_two_datasets_are_merged_and_rows_in_both_are_reported(alices: Client, alice: User) -> None:
    first = upload(alice.owner_id, PAIRS[:30], "first.jsonl")
    table = "question,answer\n" + "".join(f"Number {n}?, It is {n * n}.\n" for n in range(20, 40))
    second = upload_dataset(alice.owner_id, table.encode(), "second.csv")
    texts = upload_dataset(alice.owner_id, b"Some text.\n---\nMore.\n", "texts.txt")
    address = reverse("jobs:dataset_merge", args=[first.dataset_id])
    page = alices.get(address).content.decode()
    assert f'<option value="{second.dataset_id}"  >second.csv' in page
    assert "texts.txt (plain texts)" in page
    refused = alices.post(address, {"other": texts.dataset_id})
    assert refused.status_code == 422
    assert (
        "first.jsonl has prompt and answer pairs, and texts.txt has plain texts" in refused.content.decode()
    )
    assert "Choose another dataset" in alices.post(address, {"other": first.dataset_id}).content.decode()
    made = {alices.post(address, {"other": second.dataset_id, "name": "both"})["Location"] for _ in range(2)}
    assert len(made) == 1
    merged = run_checks(access.get_dataset_for(alice.owner_id, made.pop().split("/")[-2]))
    assert (merged.name, merged.status) == ("both.jsonl", "ready")
    assert rows_of(merged)[:30] == PAIRS[:30]
    assert rows_of(merged)[30] == {"prompt": "Number 20?", "completion": " It is 400."}
    text = dataset_page(alices, merged)
    assert "merged with second.csv" in text
    assert "50 rows in" in text
    assert "Keep one copy, remove these 10 rows" in text


def test_bobs_dataset_cannot_be_merged(alices: Client, alice: User, bob: User) -> None:
    mine, other = upload(alice.owner_id, PAIRS), upload(bob.owner_id, PAIRS)
    response = alices.post(reverse("jobs:dataset_merge", args=[mine.dataset_id]), {"other": other.dataset_id})
    assert response.status_code == 404
    assert (
        other.dataset_id
        not in alices.get(reverse("jobs:dataset_merge", args=[mine.dataset_id])).content.decode()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"percent": "95"}, "Share: enter a percentage"),
        ({"percent": "0"}, "Share: enter a percentage"),
        ({"percent": "ten"}, "Share: enter a percentage"),
        ({"seed": "-1"}, "Seed: enter a whole number"),
        ({"lines": "9-1"}, "is not a range"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused_and_keeps_what_was_typed(
    alices: Client, alice: User, fields: dict[str, str], message: str
) -> None:
    dataset = upload(alice.owner_id, [{"prompt": f"{n}", "completion": "x"} for n in range(60)])
    response = alices.post(
        reverse("jobs:fix_dataset", args=[dataset.dataset_id]), {"what": "split", **fields}
    )
    assert response.status_code == 400
    assert message in response.content.decode()
    assert f'value="{next(iter(fields.values()))}"' in response.content.decode()


def test_lines_are_split_off_into_a_validation_dataset(alices: Client, alice: User) -> None:
    dataset = upload(alice.owner_id, PAIRS[:12])
    response = alices.post(
        reverse("jobs:fix_dataset", args=[dataset.dataset_id]), {"what": "split", "lines": "2-3, 12"}
    )
    train = run_checks(access.get_dataset_for(alice.owner_id, response["Location"].split("/")[-2]))
    held_out = run_checks(access.get_dataset_for(alice.owner_id, train.origin["other"]))
    assert rows_of(held_out) == [PAIRS[1], PAIRS[2], PAIRS[11]]
    assert rows_of(train) == [PAIRS[0], *PAIRS[3:11]]
    assert held_out.name == "support (lines 2-3, 12).jsonl"
    assert f"validation_dataset={held_out.dataset_id}" in dataset_page(alices, train)
