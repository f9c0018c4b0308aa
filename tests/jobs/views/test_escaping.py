"""Text from users, files, trainers and models is escaped on every page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import drafts, reports
from jobs.store import blobs
from jobs.store.tables import DatasetReport
from tests.jobs.views.makers import make_dataset, make_job, make_model, metric

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' autofocus onfocus=alert(1) x='",
    "</script><script>alert(1)</script>",
    "</textarea><svg onload=alert(1)>",
    '<div hx-get="/x" hx-trigger="load" data-hx-get="/y"></div>',
    '<p id="status" hx-swap-oob="true">x</p>',
    "javascript:alert(1)",
    "{{ 7|add:7 }}{% csrf_token %}",
    "<!--<script>-->",
    "\u202e<b>rtl</b>",
    "</pre><iframe srcdoc=x>",
]


class PageStructure(HTMLParser):
    """The elements of a page with their attribute names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))


def make_rows(owner: str, text: str) -> tuple[str, str]:
    """Two datasets: with rows and changes in all forms, and an edited version."""
    format = {"container": "jsonl", "shape": "chat", "columns": {"messages": "messages"}}
    dataset = make_dataset(owner, name=text, format=format)
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text, "x": text}]
    record = {
        "messages": [*chat, {"role": text, "content": None, text: text}],
        text: text,
        f"{text}2": {text: text},
    }
    rows: list[dict[str, Any]] = [{"row": n, "line": n, "preview": text, "record": record} for n in (1, 2)]
    rows.append({"row": 3, "line": 3, "preview": text, "record": None})
    for query in ({"page": 1, "line": 0, "search": ""}, {"page": 1, "line": 0, "search": searched(text)}):
        page = reports.request_page(dataset, {**query, "after": 0})
        content = {"rows": rows, "page": 1, "more": True}
        stored = blobs.put_file(f"{query['search'] != ''}.json", io.BytesIO(json.dumps(content).encode()))
        page.update(actions=[DatasetReport.status.set("ready"), DatasetReport.report_key.set(stored.key)])
    drafts.change_row(dataset, 2, 2, record)
    drafts.put_added(dataset, "0123abcd", record)
    origin = {
        "what": "edit",
        "dataset_id": dataset.dataset_id,
        "name": text,
        "part": "",
        "other": "",
        "rows": 3,
        "kept": 3,
    }
    origin |= {"counts": {"edited": 1}, "changed": [{"line": 1, "before": text, "after": text}]}
    return dataset.dataset_id, make_dataset(owner, name=text, origin=origin).dataset_id


def searched(text: str) -> str:
    return "".join(letter for letter in text.strip() if letter.isprintable())


def pages(client: Client, alice: User, text: str) -> dict[str, list[Any]]:
    owner = alice.owner_id
    finding = {
        "severity": "warning",
        "title": text,
        "why": text,
        "fix": text,
        "lines": [1],
        "details": [text],
        "count": 1,
    }
    sample = {"line": 1, "preview": text, "tokens": [{"text": text, "trained": True}]}
    report = {"findings": [finding], "samples": [sample], "verdict": text}
    ready = make_dataset(owner, name=text, report=report)
    rejected = make_dataset(owner, name=text, status="rejected", error=text)
    lines = [
        metric(1),
        {"t": "log", "level": "info", "message": text},
        {"t": "sample", "step": 0, "prompt": text, "text": text},
        {"t": "resumed", "step": 1, "exact": False, "why": text},
        {"t": "verdict", "sentence": text},
        {"t": "plan", "total_steps": 2, "settings": {}, "reasons": {"epochs": text}},
    ]
    job = make_job(
        owner, "failed", lines, name=text, base=text, message=text, advice=text, reason="killed", suffix=text,
        dataset_id=ready.dataset_id, dataset_name=text, prompts=[text],
    )  # fmt: skip
    waiting = make_job(owner, "queued", name=text, dataset_id=ready.dataset_id, suffix="a", prompts=[text])
    model = make_model(
        owner,
        name=text,
        base=text,
        aliases=[text],
        verdict={"sentence": text},
        export_check={"message": text},
    )
    rows, edited = make_rows(owner, text)
    requests = [
        ("datasets", [], {}), ("dataset", [ready.dataset_id], {}), ("dataset", [rejected.dataset_id], {}),
        ("jobs", [], {}), ("job", [job.job_id], {}), ("new_job", [], {"clone": job.job_id}),
        ("models", [], {}), ("model", [model.model_id], {}), ("playground", [], {"model": model.model_id, "prompt": text}),
        ("edit_job", [waiting.job_id], {}),
        ("dataset_rows", [rows], {}), ("dataset_rows", [rows], {"q": text}), ("edit_row", [rows, "1"], {}),
        ("edit_row", [rows, "2"], {}), ("edit_row", [rows, "new-0123abcd"], {}), ("dataset_merge", [rows], {}),
        ("dataset", [edited], {}),
        ("estimates", [], {}), ("notifications", [], {}),
    ]  # fmt: skip
    structures = {}
    for number, (name, args, query) in enumerate(requests):
        response = client.get(reverse(f"jobs:{name}", args=args), query)
        assert response.status_code == 200
        structures[f"{name} {number}"] = PageStructure(response.content.decode()).elements
    live_update = client.get(reverse("jobs:job_live", args=[job.job_id])).json()
    structures["live"] = PageStructure(live_update["html"]).elements
    return structures


@pytest.fixture(scope="module")
def harmless_structures() -> dict[str, list[Any]]:
    """Of the pages with harmless text, filled by the first test."""
    return {}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_adds_an_element_or_attribute(
    bobs: Client,
    bob: User,
    alices: Client,
    alice: User,
    payload: str,
    harmless_structures: dict[str, list[Any]],
) -> None:
    if not harmless_structures:
        harmless_structures.update(pages(bobs, bob, "harmless"))
    assert pages(alices, alice, payload) == harmless_structures


def test_generated_text_is_sent_as_json_lines_not_html(alices: Client) -> None:
    response = alices.post(reverse("jobs:playground_stream"), {"model": "<b>", "prompt": "<script>"})
    assert response["Content-Type"].startswith("application/")
