"""The task in the form follows the dataset while the form is filled in, and refusals appear beside it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.jobs.views.makers import make_dataset
from tests.jobs.views.test_task_choice import PAIRS, TEXT

pytestmark = pytest.mark.browser


def test_the_task_follows_the_dataset_and_says_what_contradicts_it(page: Any, owner: str) -> None:
    labels = make_dataset(owner, "labels.jsonl", report={"task_rows": PAIRS})
    novel = make_dataset(owner, "novel.txt", report={"task_rows": TEXT, "kind": "text"})
    page.goto(f"/jobs/new/?dataset={labels.dataset_id}")
    hint = page.locator("#hint-task")
    hint.get_by_text("Automatic: classification, 4 labels. Held-out answers are scored by").wait_for()
    page.locator("select[name=dataset]").select_option(novel.dataset_id)
    hint.get_by_text("Automatic: plain text. Plain text has no answers to score.").wait_for()
    page.locator("#id_task").select_option("Tools")
    hint.get_by_text("The rows are plain text without prompts and answers.").wait_for()
    page.get_by_text("Fix the marked fields to see an estimate.").wait_for()
    page.locator("#mark-task").get_by_role("button", name="reset to auto").click()
    hint.get_by_text("Automatic: plain text.").wait_for()
    page.get_by_text("chance of finishing within").wait_for()
