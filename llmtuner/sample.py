"""The first fine-tune: the bundled starter model on the bundled sample, as an ordinary job."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model

from jobs.datasets import datasets
from jobs.events import event_log
from jobs.inference import generation
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.store import access
from jobs.store.states import DatasetStatus, JobStatus

SAMPLE = settings.BASE_DIR / "training/starter/sample"
SHOWN_PROMPTS = 3
CHECK_TIMEOUT_S = 120
JOB_TIMEOUT_S = 900


def run_sample(url: str) -> bool:
    """Fine-tunes the sample and prints the progress. Returns True if the job succeeded (now or at an earlier start) and its
    model responds. A failure is printed and not raised, because it is no reason to stop serving."""
    try:
        return _run_sample(url)
    except (SampleError, generation.Busy, generation.Failed) as e:
        print(f"  The sample failed: {e}", file=sys.stderr, flush=True)
        return False


class SampleError(Exception):
    """A sample file was rejected, or was not checked in time."""


def _run_sample(url: str) -> bool:
    marker = settings.VAR_DIR / "sample.json"
    users = get_user_model().objects
    if marker.exists():
        saved = json.loads(marker.read_text())
        try:
            job = access.get_job_for(saved["owner"], saved["job"])
        except access.NotFound:  # the owner deleted it, so do not create it again
            return True
        if job.status == JobStatus.SUCCEEDED:
            return True
        user = users.filter(owner_id=saved["owner"]).first()
    else:
        user = users.filter(is_superuser=True).order_by("pk").first()
        if user is None:
            return True  # accounts were created by hand, so there is no superuser to own the sample
        print(
            "\n  Fine-tuning the bundled starter model on the bundled sample, as an ordinary job.",
            flush=True,
        )
        job = submit(user)
        marker.write_text(json.dumps({"owner": user.owner_id, "job": job.job_id}))
    print(f"  Live page: {url}/jobs/{job.job_id}", flush=True)
    events = follow(job.owner, job.job_id)
    end = next((e for e in events if e["t"] == "end"), None)
    if end is None:
        print(
            f"  The sample job has not finished yet. Follow its progress at {url}/jobs/{job.job_id}",
            flush=True,
        )
        return False
    if end.get("status") != JobStatus.SUCCEEDED:
        print(
            f"  The sample job ended as {end.get('status')}: {end.get('message', '')}",
            file=sys.stderr,
        )
        return end.get("status") == JobStatus.CANCELLED
    return show_result(job.owner, job.base, str(end["model"]), events, url)


def submit(user: Any) -> Any:
    """Uploads both files, waits for their checks, then submits the job with automatic settings."""
    files = {}
    for part in ("train", "heldout"):
        with (SAMPLE / f"{part}.jsonl").open("rb") as file:
            dataset = datasets.receive(user.owner_id, f"sample-{part}.jsonl", file)
        files[part] = wait_until_checked(user.owner_id, dataset.dataset_id)
    request = transitions.JobRequest(
        name="Sample: orders to fields",
        base="starter",
        dataset_id=files["train"],
        validation_dataset_id=files["heldout"],
        suffix="sample",
    )
    webhooks.set_email(user.owner_id, user.notification_email)
    return transitions.submit(user.owner_id, request, slug=user.slug)


def wait_until_checked(owner: str, dataset_id: str) -> str:
    deadline = time.monotonic() + CHECK_TIMEOUT_S
    while time.monotonic() < deadline:
        dataset = access.get_dataset_for(owner, dataset_id)
        if dataset.status == DatasetStatus.READY:
            return dataset_id
        if dataset.status == DatasetStatus.REJECTED:
            raise SampleError(f"a file was rejected: {dataset.error}")
        time.sleep(0.3)
    raise SampleError(
        f"a file was not checked within {CHECK_TIMEOUT_S} s. See {settings.VAR_DIR}/logs/checks.log"
    )


def follow(owner: str, job_id: str) -> list[dict[str, Any]]:
    """Prints the job's progress until it ends (at most 15 minutes) and returns its events."""
    events: list[dict[str, Any]] = []
    seq, total, deadline = 0, 0, time.monotonic() + JOB_TIMEOUT_S
    while True:
        for event in event_log.read(owner, job_id, seq):
            seq = event.seq
            events.append(event.data)
            total = event.data.get("total_steps", total)
            print_progress(event.data, total)
            if event.data["t"] == "end":
                return events
        if time.monotonic() > deadline:
            return events
        time.sleep(0.3)


def print_progress(event: dict[str, Any], total: int) -> None:
    """Redraws a single line in a terminal, or writes an occasional line to a log."""
    live = sys.stdout.isatty()
    clear = "\r\033[K" if live else ""
    if event["t"] == "metric" and (live or event["step"] % 20 == 0):
        done = round(30 * event["step"] / max(total, 1))
        bar = "━" * done + "─" * (30 - done)
        speed = f"{event['tokens_per_s']:,.0f} tokens/s"
        line = f"  {bar}  step {event['step']}/{total}  loss {event['loss']:.3f}  {speed}"
        print(clear + line, end="" if live else "\n", flush=True)
    elif event["t"] == "eval":
        exact = f", exact match {event['exact_match']:.0%}" if "exact_match" in event else ""
        print(f"{clear}  step {event['step']}: held-out loss {event['loss']:.3f}{exact}", flush=True)


def show_result(owner: str, base: str, model: str, events: list[dict[str, Any]], url: str) -> bool:
    evaluations = [e for e in events if e["t"] == "eval"]
    before = float(evaluations[0].get("exact_match", 0.0))
    after = max(float(e.get("exact_match", 0.0)) for e in evaluations)
    rows = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text().splitlines()[:SHOWN_PROMPTS]]
    for row in rows:
        prompt, expected = row["prompt"], row["completion"].strip()
        print(f"\n  \033[1m{prompt.strip()}\033[0m")
        for name, model_id in (("before", base), ("after", model)):
            print(f"    {name:9} {complete(owner, model_id, prompt)}", flush=True)
        print(f"    expected  {expected}")
    print(f"\n  Exact match on held-out rows: {before:.0%} before, {after:.0%} after.")
    print(f"  Try it: {url}/models/{model}")
    return before <= 0.10 and after >= 0.90


def complete(owner: str, model: str, prompt: str) -> str:
    request = generation.GenerateRequest(model=model, prompt=prompt, max_tokens=48, stop=["\n"])
    deadline = time.monotonic() + 60
    while True:
        try:
            return asyncio.run(generation.complete(owner, request)).texts[0].strip()
        except generation.Busy as busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(busy.retry_after)
