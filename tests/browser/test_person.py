"""The whole journey of a user: sign up, upload, start a job, watch the loss chart, try the model, download it, use it
elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.factories import PASSWORD

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROWS = 48
ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=16, pad_token_id=tokenizer.eos_token_id)[0]
sys.stdout.write(tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def sample_rows(folder: Path) -> Path:
    from training.plan.catalog import SAMPLE_FOLDER

    lines = (SAMPLE_FOLDER / "train.jsonl").read_text().splitlines()[:ROWS]
    path = folder / "orders.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_from_signing_up_to_using_the_model_elsewhere(
    page: Any, studio: Any, tmp_path: Path, console_errors: list[str]
) -> None:
    rows = sample_rows(tmp_path)

    email = f"carol-{tmp_path.name}@example.com"
    page.goto("/accounts/signup/")
    page.fill("input[name=email]", email)
    page.fill("input[name=password1]", PASSWORD)
    page.click("main form button:not([type=button])")
    page.get_by_text("You can now sign in").wait_for()
    page.fill("input[name=login]", email)
    page.fill("input[name=password]", PASSWORD)
    page.click("main form button:not([type=button])")
    page.wait_for_url("**/jobs/")
    assert page.get_by_text("No jobs yet").is_visible()

    page.click("text=Upload a dataset")
    page.set_input_files("input[type=file]", rows)
    page.wait_for_url("**/datasets/file-*/")
    page.get_by_text("What the model sees").wait_for(timeout=60_000)
    assert page.get_by_text("48 ", exact=False).first.is_visible()

    page.click("text=Start a job")
    page.get_by_text("50% chance of finishing within").wait_for()
    page.fill("input[name=epochs]", "2")
    page.locator("#mark-epochs").get_by_text("reset to auto").wait_for()
    page.fill("input[name=name]", "Orders to fields")
    page.click("#estimate button.btn-primary")
    page.wait_for_url("**/jobs/ftjob-*/")

    # The chart is updated without reloading the page.
    page.evaluate("window.sameDocument = true")
    page.locator("#loss-chart canvas").wait_for(timeout=120_000)
    page.locator("#log [data-step]").first.wait_for(timeout=60_000)
    before = page.get_attribute("#loss-chart", "aria-label")
    page.wait_for_function(
        "(old) => document.getElementById('loss-chart').ariaLabel !== old", arg=before, timeout=60_000
    )
    page.locator("#actions >> text=Open model").wait_for(timeout=240_000)
    page.locator("#state >> text=Succeeded").wait_for()
    assert page.evaluate("window.sameDocument")
    assert page.locator("#status").get_by_text("100%").is_visible()

    page.click("#actions >> text=Open model")
    row = json.loads(rows.read_text().splitlines()[0])
    prompt = row.get("prompt") or row["messages"][0]["content"]
    page.fill("textarea[name=prompt]", prompt)
    page.fill("input[name=max_tokens]", "16")
    page.click("text=Generate")
    page.locator("#answers [data-note]", has_text=re.compile(r"tokens in")).nth(1).wait_for(timeout=120_000)
    reply = page.locator("#answers [data-text]").first.text_content()

    with page.expect_download() as download:
        page.click("#actions >> text=Download")
    archive = tmp_path / "model.zip"
    download.value.save_as(archive)
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tmp_path / "model")
    folder = next((tmp_path / "model").rglob("config.json")).parent
    elsewhere = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), prompt],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert reply is not None
    assert elsewhere == reply or (reply == "(empty)" and not elsewhere)
    assert not console_errors
