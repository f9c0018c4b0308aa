"""Every page in a real browser: no errors in the console, nothing wider than a phone, polling without a stream, and use
without JavaScript."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from jobs.datasets import drafts, reports
from jobs.store import blobs
from jobs.store.tables import DatasetReport
from tests.factories import browser_of, make_user
from tests.jobs.views.makers import make_dataset, make_estimate_record, make_job, make_model, metric

pytestmark = pytest.mark.browser


def rows_pages(owner: str) -> list[str]:
    chat = [{"role": "user", "content": "Where is it? " * 30}, {"role": "assistant", "content": "Here."}]
    dataset = make_dataset(
        owner, format={"container": "jsonl", "shape": "chat", "columns": {"messages": "messages"}}
    )
    record = {
        "messages": chat,
        "a_field_with_a_long_name": "x" * 300,
        "tools": [{"function": {"name": "y" * 90}}],
    }
    rows = [{"row": n, "line": n, "preview": "Where", "record": record} for n in range(1, 21)]
    page = reports.request_page(dataset, {"page": 1, "line": 0, "search": "", "after": 0})
    stored = blobs.put_file(
        "rows.json", io.BytesIO(json.dumps({"rows": rows, "page": 1, "more": True}).encode())
    )
    page.update(actions=[DatasetReport.status.set("ready"), DatasetReport.report_key.set(stored.key)])
    drafts.change_row(dataset, 2, 2, None)
    drafts.put_added(dataset, "0123abcd", record)
    address = f"/datasets/{dataset.dataset_id}"
    return [f"{address}/rows/", f"{address}/rows/3/", f"{address}/merge/"]


def make_pages(owner: str) -> list[str]:
    dataset = make_dataset(owner)
    lines = [metric(step, 4.0 - step / 50) for step in range(1, 80)]
    lines += [
        {"t": "eval", "step": 40, "loss": 3.0},
        {"t": "sample", "step": 0, "prompt": "Who?", "text": "me " * 60},
    ]
    progress = {"step": 79, "total_steps": 100, "eta_s": 30}
    job = make_job(owner, lines=lines, phase="training", progress=progress, dataset_id=dataset.dataset_id)
    waiting = make_job(owner, "queued", dataset_id=dataset.dataset_id)
    failed = make_job(owner, "failed", reason="killed", message="x" * 300)
    model = make_model(owner)
    make_estimate_record(owner, 90)
    return [
        "/jobs/", "/jobs/new/", "/jobs/estimates/", f"/jobs/{job.job_id}/", f"/jobs/{failed.job_id}/", "/datasets/",
        f"/datasets/{dataset.dataset_id}/", *rows_pages(owner), "/models/", f"/models/{model.model_id}/", "/playground/",
        "/notifications/", f"/jobs/{waiting.job_id}/edit/",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_logs_errors_or_overflows(page: Any, owner: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    for address in make_pages(owner):
        response = page.goto(address)
        assert response.status == 200, address
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address


def test_controls_have_accessible_names_and_each_page_one_heading(page: Any, owner: str) -> None:
    for address in make_pages(owner):
        page.goto(address)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea, summary')]
                .filter((e) => e.checkVisibility() && !e.ariaLabel && !e.textContent.trim() && !(e.labels && e.labels.length))
                .map((e) => e.outerHTML)"""
        )
        assert not unnamed, (address, unnamed)
        assert page.locator("h1").count() == 1, address


def test_a_page_polls_when_its_stream_is_blocked(page: Any, owner: str, console_errors: list[str]) -> None:
    from tests.jobs.views.test_live import append_events

    job = make_job(owner, lines=[metric(1), metric(2)])
    page.route("**/stream*", lambda route: route.abort())
    page.goto(f"/jobs/{job.job_id}/")
    page.wait_for_timeout(2500)
    append_events(job, [{"t": "log", "level": "info", "message": "received by polling"}])
    page.get_by_text("received by polling").wait_for(timeout=120_000)
    assert all("ERR_FAILED" in error for error in console_errors)
    console_errors.clear()


def test_the_studio_works_without_javascript(
    chromium: Any, web: Any, transactional_db: None, tmp_path: Any
) -> None:
    user = make_user("alice")
    context = chromium.new_context(base_url=web.url, java_script_enabled=False)
    context.add_cookies(
        [{"name": "session", "value": browser_of(user).cookies["session"].value, "url": web.url}]
    )
    page = context.new_page()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n' * 4)
    page.goto("/datasets/")
    page.set_input_files("input[type=file]", rows)
    page.click("#upload .btn-primary")
    page.wait_for_url("**/datasets/file-*/")
    make_dataset(user.owner_id, name="ready.jsonl")
    page.goto("/jobs/new/")
    page.fill("input[name=epochs]", "4")
    page.click("text=Update estimate")
    assert page.input_value("input[name=epochs]") == "4"
    page.click("text=Thorough")
    page.click("#estimate button.btn-primary")
    page.wait_for_url("**/jobs/ftjob-*/")
    page.click("summary:has-text('Cancel')")
    page.click("text=Cancel job")
    assert page.locator("#state").get_by_text("Cancelled").is_visible()
    context.close()
