"""Editing, splitting and merging files through `/v1`, with the web process and a checks worker running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.jobs.api.conftest import ApiUser
from tests.jobs.api.test_openai_client import wait_for

pytestmark = pytest.mark.slow
ROWS = [{"prompt": f"Number {n}?", "completion": f"It is {n}.", "id": n} for n in range(60)]


@pytest.fixture(scope="module")
def server(web: Any) -> Iterator[Any]:
    web.start_worker("checks")
    yield web
    web.stop("checks")


class Files:
    """Alice's files, as a program without our client sees them."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def upload(self, content: bytes, name: str = "rows.jsonl") -> str:
        files = {"file": (name, content)}
        response = self.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
        return self.settled(response.json()["id"])["id"]

    def settled(self, id: str) -> dict[str, Any]:
        return wait_for(
            lambda: self.http.get(f"/v1/files/{id}").json(), lambda file: file["status"] != "uploaded"
        )

    def rows(self, id: str) -> list[Any]:
        return [json.loads(line) for line in self.http.get(f"/v1/files/{id}/content").text.splitlines()]

    def post(self, id: str, action: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/files/{id}/{action}", json=body)


@pytest.fixture
def files(server: Any, users: dict[str, ApiUser]) -> Iterator[Files]:
    with httpx.Client(base_url=server.url, headers=users["alice"].headers, timeout=60) as http:
        yield Files(http)


def encoded(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_rows_are_edited_added_and_excluded(files: Files) -> None:
    id = files.upload(encoded(ROWS))
    edited, added = (
        ROWS[1] | {"completion": "One."},
        {"prompt": "New?", "completion": "Yes.", "tag": {"a": [1]}},
    )
    changes = {"edit": [{"row": 2, "content": edited}], "exclude": [5, 6], "add": [added]}
    made = [files.post(id, "versions", **changes) for _ in range(2)]
    assert [response.status_code for response in made] == [200, 200]
    assert made[0].json()["id"] == made[1].json()["id"] != id
    version = files.settled(made[0].json()["id"])
    assert (version["status"], version["filename"]) == ("processed", "rows (edited).jsonl")
    assert files.rows(version["id"]) == [ROWS[0], edited, *ROWS[2:4], *ROWS[6:], added]
    assert files.rows(id) == ROWS


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, None, "There are no changes to save"),
        ({"edit": [{"row": 1, "content": {"prompt": "a"}}]}, "edit.0.content", "'completion' is missing"),
        ({"add": [{"prompt": "a", "completion": 3}]}, "add.0", "'completion' is a number, not text"),
        ({"exclude": [61]}, None, "There is no row 61: the dataset has 60 rows"),
        ({"exclude": [1], "edit": [{"row": 1, "content": ROWS[0]}]}, "edit", "only once"),
        ({"exclude": [0]}, "exclude.0", "greater than or equal to 1"),
        ({"exclude": list(range(1, 61))}, None, "All rows are excluded"),
    ],
)
def test_changes_that_cannot_be_made_are_refused_at_once(
    files: Files, body: dict[str, Any], param: str | None, message: str
) -> None:
    id = files.upload(encoded(ROWS))
    response = files.post(id, "versions", **body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


def test_a_file_is_split_by_share_or_by_lines_and_two_are_merged(files: Files) -> None:
    id = files.upload(encoded(ROWS))
    parts = [files.settled(part["id"]) for part in files.post(id, "split", percent=25, seed=7).json()["data"]]
    rows = [files.rows(part["id"]) for part in parts]
    assert [len(part) for part in rows] == [45, 15]
    assert sorted(rows[0] + rows[1], key=lambda row: row["id"]) == ROWS
    again = files.post(id, "split", percent=25, seed=7).json()["data"]
    assert [part["id"] for part in again] == [part["id"] for part in parts]
    by_lines = files.post(id, "split", lines="1-3").json()["data"]
    assert files.rows(files.settled(by_lines[1]["id"])["id"]) == ROWS[:3]
    assert files.post(id, "split", percent=0).status_code == 400
    assert "is not a range" in files.post(id, "split", lines="x").json()["error"]["message"]
    merged = files.post(parts[1]["id"], "merge", file_id=parts[0]["id"], filename="all.jsonl").json()
    assert files.settled(merged["id"])["filename"] == "all.jsonl"
    assert files.rows(merged["id"]) == [*rows[1], *rows[0]]
    text = files.upload(b"Some text.\n---\nMore text.\n", "notes.txt")
    refused = files.post(id, "merge", file_id=text)
    assert refused.status_code == 400
    assert "prompt and answer pairs, and notes.txt has plain texts" in refused.json()["error"]["message"]


def test_others_files_and_keys_that_only_read_are_refused(files: Files, users: dict[str, ApiUser]) -> None:
    id = files.upload(encoded(ROWS))
    bobs = httpx.Client(base_url=files.http.base_url, headers=users["bob"].headers, timeout=60)
    with bobs as http:
        his = Files(http)
        mine = his.upload(encoded(ROWS))
        for action, body in (("versions", {"exclude": [1]}), ("split", {}), ("merge", {"file_id": mine})):
            assert his.post(id, action, **body).status_code == 404
        assert his.post(mine, "merge", file_id=id).status_code == 404
    files.http.headers["Authorization"] = f"Bearer {users['alice'].reader}"
    assert files.post(id, "versions", exclude=[1]).status_code == 403
