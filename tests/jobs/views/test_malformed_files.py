"""Files that cannot be trained on, uploaded like valid ones: each gets a message that says where and why, nothing crashes,
and nothing of the file is kept."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import zipfile

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import checks
from jobs.store import access, blobs

VALID_ROW = b'{"prompt": "a", "completion": " b"}\n'


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", VALID_ROW)
    return buffer.getvalue()


# file name, content, pattern that the message must match
FILES = {
    "one byte": ("rows.jsonl", b"{", r"[Ll]ine 1"),
    "one letter": ("rows.jsonl", b"x", r"[Ll]ine 1"),
    "only spaces": ("rows.jsonl", b"   \n\n  \n", r"white space|no example"),
    "binary": ("rows.jsonl", bytes(range(256)) * 8, r"\w"),
    "zeros": ("rows.jsonl", b"\0" * 999, r"\w"),
    "invalid in the middle": ("rows.jsonl", VALID_ROW * 16 + b'{"prompt": "a", "completion": }\n' + VALID_ROW, r"[Ll]ine 17"),
    "truncated": ("rows.jsonl", VALID_ROW * 4 + VALID_ROW[:20], r"[Ll]ine 5"),
    "numbers as rows": ("rows.jsonl", b"1\n2\n", r"[Ll]ine 1"),
    "lists as rows": ("rows.jsonl", b"[]\n", r"\w"),
    "unknown columns": ("rows.jsonl", b'{"foo": "a", "bar": "b"}\n', r"[Ll]ine 1.*foo"),
    "answer missing": ("rows.jsonl", VALID_ROW * 2 + b'{"prompt": "a"}\n', r"[Ll]ine 3"),
    "answer is a number": ("rows.jsonl", VALID_ROW + b'{"prompt": "a", "completion": 7}\n', r"[Ll]ine 2"),
    "answer is null": ("rows.jsonl", VALID_ROW + b'{"prompt": "a", "completion": null}\n', r"[Ll]ine 2"),
    "messages is a string": ("rows.jsonl", b'{"messages": "hello"}\n', r"[Ll]ine 1"),
    "messages is empty": ("rows.jsonl", b'{"messages": []}\n', r"[Ll]ine 1"),
    "message without role": ("rows.jsonl", b'{"messages": [{"content": "x"}]}\n', r"[Ll]ine 1.*role"),
    "unknown role": ("rows.jsonl", b'{"messages": [{"role": "king", "content": "x"}]}\n', r"[Ll]ine 1.*king"),
    "no assistant message": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"\w"),
    "deep nesting": ("rows.jsonl", b"[" * 100_000 + b"\n", r"\w"),
    "long number": ("rows.jsonl", b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}\n', r"[Ll]ine 1"),
    "NaN": ("rows.jsonl", b'{"prompt": NaN, "completion": "b"}\n', r"[Ll]ine 1"),
    "latin-1": ("rows.jsonl", '{"prompt": "café", "completion": "b"}\n'.encode("latin-1"), r"UTF-8|[Ee]ncod"),
    "zip": ("rows.zip", zipped(), r"[Zz]ip|archive"),
    "zip named jsonl": ("rows.jsonl", zipped(), r"[Zz]ip|archive"),
    "gzip": ("rows.jsonl.gz", gzip.compress(VALID_ROW * 100), r"[Gg]zip|archive|compressed"),
    "pickle": ("rows.pkl", pickle.dumps([{"prompt": "a"}]), r"\w"),
    "image": ("rows.csv", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, r"\w"),
    "PDF": ("rows.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"\w"),
    "HTML": ("rows.jsonl", b"<!doctype html><title>Sign in</title>", r"\w"),
    "CSV with only a header row": ("rows.csv", b"prompt,completion\n", r"no example|row"),
    "CSV with other columns": ("rows.csv", b"name,age\nBob,7\n", r"name|column"),
    "JSON of another structure": ("rows.json", b'{"a": {"b": 1}}', r"\w"),
    "broken Parquet": ("rows.parquet", b"PAR1" + b"\0" * 64 + b"PAR1", r"\w"),
    "lone surrogate": ("rows.jsonl", b'{"prompt": "\\ud800", "completion": 1}\n', r"[Ll]ine 1"),
}  # fmt: skip

UNKNOWN_COLUMNS = {"CSV with other columns", "unknown columns", "JSON of another structure"}


@pytest.mark.slow
@pytest.mark.parametrize("case", FILES)
def test_an_unusable_file_is_rejected_with_a_reason(alices: Client, alice: User, case: str) -> None:
    owner = alice.owner_id
    name, content, pattern = FILES[case]
    file = io.BytesIO(content)
    file.name = name
    response = alices.post(reverse("jobs:upload"), {"file": file})
    dataset = access.list_datasets(owner).rows[0]
    checks.check(owner, dataset.dataset_id)
    dataset = access.get_dataset_for(owner, dataset.dataset_id)
    assert dataset.status == "rejected", json.dumps(dataset.summary)
    assert re.search(pattern, dataset.error), dataset.error
    assert len(dataset.error) > 20
    assert "Traceback" not in dataset.error
    page = alices.get(response["Location"])
    assert page.status_code == 200
    assert (b"be used for training" in b" ".join(page.content.split())) == (case not in UNKNOWN_COLUMNS)
    stored = [key for key in blobs.list_keys(f"datasets/{owner}/") if key.endswith("/data")]
    # An unusable file is deleted, unless choosing its columns may make it usable.
    assert (
        bool(stored) == (case in UNKNOWN_COLUMNS) == (b"Which columns contain the examples?" in page.content)
    )
