"""What people, files, trainers and models write is shown as text: on every page, in every place."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
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


class Seen(HTMLParser):
    """Elements, attribute names and handlers of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shape: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(sorted(name for name, _ in attrs))))


def pages(client: Client, alice: User, word: str) -> dict[str, list[Any]]:
    owner = alice.owner_id
    finding = {
        "severity": "warning",
        "title": word,
        "why": word,
        "fix": word,
        "lines": [1],
        "details": [word],
        "count": 1,
    }
    sample = {"line": 1, "preview": word, "tokens": [{"text": word, "trained": True}]}
    report = {"findings": [finding], "samples": [sample], "verdict": word}
    ready = make_dataset(owner, name=word, report=report)
    rejected = make_dataset(owner, name=word, status="rejected", error=word)
    lines = [
        metric(1),
        {"t": "log", "level": "info", "message": word},
        {"t": "sample", "step": 0, "prompt": word, "text": word},
        {"t": "resumed", "step": 1, "exact": False, "why": word},
        {"t": "verdict", "sentence": word},
        {"t": "plan", "total_steps": 2, "settings": {}, "reasons": {"epochs": word}},
    ]
    job = make_job(
        owner, "failed", lines, name=word, base=word, message=word, advice=word, reason="killed", suffix=word,
        dataset_id=ready.dataset_id, dataset_name=word, prompts=[word],
    )  # fmt: skip
    waiting = make_job(owner, "queued", name=word, dataset_id=ready.dataset_id, suffix="a", prompts=[word])
    model = make_model(
        owner,
        name=word,
        base=word,
        aliases=[word],
        verdict={"sentence": word},
        export_check={"message": word},
    )
    asked = [
        ("datasets", [], {}), ("dataset", [ready.dataset_id], {}), ("dataset", [rejected.dataset_id], {}),
        ("jobs", [], {}), ("job", [job.job_id], {}), ("new_job", [], {"clone": job.job_id}),
        ("models", [], {}), ("model", [model.model_id], {}), ("playground", [], {"model": model.model_id, "prompt": word}),
        ("edit_job", [waiting.job_id], {}),
        ("estimates", [], {}), ("notifications", [], {}),
    ]  # fmt: skip
    found = {}
    for n, (name, args, query) in enumerate(asked):
        answer = client.get(reverse(f"jobs:{name}", args=args), query)
        assert answer.status_code == 200
        found[f"{name} {n}"] = Seen(answer.content.decode()).shape
    live = client.get(reverse("jobs:job_live", args=[job.job_id])).json()
    found["live"] = Seen(live["html"]).shape
    return found


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[Any]]:
    """Of pages with a harmless word, made by the first test."""
    return {}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_element_and_no_attribute_comes_from_a_word(
    bobs: Client, bob: User, alices: Client, alice: User, payload: str, shapes: dict[str, list[Any]]
) -> None:
    if not shapes:
        shapes.update(pages(bobs, bob, "harmless"))
    assert pages(alices, alice, payload) == shapes


def test_generated_text_comes_as_json_lines_never_as_html(alices: Client) -> None:
    answer = alices.post(reverse("jobs:playground_stream"), {"model": "<b>", "prompt": "<script>"})
    assert answer["Content-Type"].startswith("application/")
