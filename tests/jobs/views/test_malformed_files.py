"""Files that can't be trained on, through the same door as good ones: each gets a message that says where and why, nothing
crashes and nothing of the file stays."""

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

GOOD = b'{"prompt": "a", "completion": " b"}\n'


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return out.getvalue()


# name of the file, its bytes, what the message must hold
KINDS = {
    "one byte": ("rows.jsonl", b"{", r"[Ll]ine 1"),
    "one letter": ("rows.jsonl", b"x", r"[Ll]ine 1"),
    "only spaces": ("rows.jsonl", b"   \n\n  \n", r"white space|no example"),
    "binary": ("rows.jsonl", bytes(range(256)) * 8, r"\w"),
    "zeros": ("rows.jsonl", b"\0" * 999, r"\w"),
    "broken in the middle": ("rows.jsonl", GOOD * 16 + b'{"prompt": "a", "completion": }\n' + GOOD, r"[Ll]ine 17"),
    "cut off": ("rows.jsonl", GOOD * 4 + GOOD[:20], r"[Ll]ine 5"),
    "numbers for rows": ("rows.jsonl", b"1\n2\n", r"[Ll]ine 1"),
    "lists for rows": ("rows.jsonl", b"[]\n", r"\w"),
    "unknown columns": ("rows.jsonl", b'{"foo": "a", "bar": "b"}\n', r"[Ll]ine 1.*foo"),
    "answer missing": ("rows.jsonl", GOOD * 2 + b'{"prompt": "a"}\n', r"[Ll]ine 3"),
    "answer is a number": ("rows.jsonl", GOOD + b'{"prompt": "a", "completion": 7}\n', r"[Ll]ine 2"),
    "answer is null": ("rows.jsonl", GOOD + b'{"prompt": "a", "completion": null}\n', r"[Ll]ine 2"),
    "messages is a text": ("rows.jsonl", b'{"messages": "hello"}\n', r"[Ll]ine 1"),
    "messages is empty": ("rows.jsonl", b'{"messages": []}\n', r"[Ll]ine 1"),
    "message without role": ("rows.jsonl", b'{"messages": [{"content": "x"}]}\n', r"[Ll]ine 1.*role"),
    "unknown role": ("rows.jsonl", b'{"messages": [{"role": "king", "content": "x"}]}\n', r"[Ll]ine 1.*king"),
    "nobody answers": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"\w"),
    "deep nesting": ("rows.jsonl", b"[" * 100_000 + b"\n", r"\w"),
    "long number": ("rows.jsonl", b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}\n', r"[Ll]ine 1"),
    "NaN": ("rows.jsonl", b'{"prompt": NaN, "completion": "b"}\n', r"[Ll]ine 1"),
    "latin-1": ("rows.jsonl", '{"prompt": "café", "completion": "b"}\n'.encode("latin-1"), r"UTF-8|[Ee]ncod"),
    "zip": ("rows.zip", zipped(), r"[Zz]ip|archive"),
    "zip named jsonl": ("rows.jsonl", zipped(), r"[Zz]ip|archive"),
    "gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 100), r"[Gg]zip|archive|compressed"),
    "pickle": ("rows.pkl", pickle.dumps([{"prompt": "a"}]), r"\w"),
    "picture": ("rows.csv", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, r"\w"),
    "PDF": ("rows.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"\w"),
    "HTML": ("rows.jsonl", b"<!doctype html><title>Sign in</title>", r"\w"),
    "CSV with only a heading": ("rows.csv", b"prompt,completion\n", r"no example|row"),
    "CSV with other columns": ("rows.csv", b"name,age\nBob,7\n", r"name|column"),
    "JSON of something else": ("rows.json", b'{"a": {"b": 1}}', r"\w"),
    "broken Parquet": ("rows.parquet", b"PAR1" + b"\0" * 64 + b"PAR1", r"\w"),
    "half of a pair": ("rows.jsonl", b'{"prompt": "\\ud800", "completion": 1}\n', r"[Ll]ine 1"),
}  # fmt: skip

NAMELESS = {"CSV with other columns", "unknown columns", "JSON of something else"}


@pytest.fixture
def door(alices: Client, alice: User) -> tuple[Client, str]:
    return alices, alice.owner_id


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_used_is_told_why(door: tuple[Client, str], kind: str) -> None:
    browser, owner = door
    name, content, wanted = KINDS[kind]
    file = io.BytesIO(content)
    file.name = name
    answer = browser.post(reverse("jobs:upload"), {"file": file})
    dataset = access.list_datasets(owner).rows[0]
    checks.check(owner, dataset.dataset_id)
    dataset = access.get_dataset_for(owner, dataset.dataset_id)
    assert dataset.status == "rejected", json.dumps(dataset.summary)
    assert re.search(wanted, dataset.error), dataset.error
    assert len(dataset.error) > 20
    assert "Traceback" not in dataset.error
    page = browser.get(answer["Location"])
    assert page.status_code == 200
    assert (b"be used for training" in b" ".join(page.content.split())) == (kind not in NAMELESS)
    kept = [key for key in blobs.list_keys(f"datasets/{owner}/") if key.endswith("/data")]
    # Nothing stays of what can't be used, unless a choice of columns may make it so.
    assert bool(kept) == (kind in NAMELESS) == (b"Which columns contain the examples?" in page.content)
