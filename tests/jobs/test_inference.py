"""Text from a model, through a real worker and its server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import access, bells, inference, relay
from jobs.inference import Busy, Failed, GenerateRequest
from tests import services
from tests.jobs.makers import make_owner

SILENCE_S = 8
pytestmark = [pytest.mark.usefixtures("stores"), pytest.mark.slow]


@pytest.fixture(scope="module")
def worker(stores, folder):
    with (folder / "inference-of-tests.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtuner", "worker", "inference"],
            cwd=services.ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "JOBS_SERVER_SILENCE_S": str(SILENCE_S)},
            preexec_fn=services._die_with_parent,
        )
    asyncio.run(wait_for_answer())
    yield process
    process.terminate()
    process.wait(45)


async def wait_for_answer():
    until = time.monotonic() + 90
    while True:
        try:
            return await text_of(make_owner(), max_tokens=1)
        except (Busy, Failed):
            assert time.monotonic() < until


async def text_of(owner, **fields):
    request = GenerateRequest(**{"model": "starter", "prompt": "The dog is", "max_tokens": 8, **fields})
    return await inference.complete(owner, request)


def servers_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [
        int(p)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for p in (task / "children").read_text().split()
    ]


async def test_tokens_stream_and_make_the_whole_text(worker):
    lines = [
        line
        async for line in inference.stream(
            make_owner(), GenerateRequest("starter", prompt="The dog is", max_tokens=8)
        )
    ]
    assert [lines[0]["t"], lines[-1]["t"]] == ["start", "done"]
    text = "".join(line["text"] for line in lines if line["t"] == "token")
    whole = await text_of(make_owner())
    assert (text, whole.usage["completion_tokens"]) == (whole.texts[0], 8)


async def test_the_first_token_comes_soon(worker):
    await text_of(make_owner())
    times = []
    for _ in range(5):
        began = time.monotonic()
        stream = inference.stream(make_owner(), GenerateRequest("starter", prompt="The dog is", max_tokens=8))
        async for line in stream:
            if line["t"] == "token":
                times.append(time.monotonic() - began)
                break
        await stream.aclose()
    assert min(times) < 0.5  # 20 ms on a quiet machine


async def test_anothers_model_does_not_exist(worker):
    with pytest.raises(access.NotFound):
        await text_of(make_owner(), model="ft:starter:bob::12345678")


async def test_twelve_requests_of_six_people_are_all_answered(worker):
    owners = [make_owner() for _ in range(6)]
    answers = await asyncio.gather(*(text_of(owner, seed=1) for owner in owners * 2))
    assert len({answer.texts[0] for answer in answers}) == 1


async def test_a_third_request_of_one_person_waits_for_its_turn_or_is_told_to(worker, monkeypatch):
    monkeypatch.setattr(inference, "PATIENCE_S", 0.2)
    owner = make_owner()
    streams = [
        inference.stream(owner, GenerateRequest("starter", prompt="A", max_tokens=100)) for _ in range(2)
    ]
    for stream in streams:
        await anext(stream)
    with pytest.raises(Busy) as busy:
        await text_of(owner)
    assert busy.value.retry_after >= 1
    for stream in streams:
        await stream.aclose()
    assert (await text_of(owner)).usage["completion_tokens"] == 8


async def test_leaving_early_frees_the_place_at_once(worker):
    owner = make_owner()
    stream = inference.stream(owner, GenerateRequest("starter", prompt="A", max_tokens=200))
    await anext(stream)
    began = time.monotonic()
    await stream.aclose()
    assert time.monotonic() - began < 2
    assert bells.client().zcard(f"generating:{owner}") == 0


async def test_a_full_queue_says_when_to_come_back(stores, monkeypatch):
    monkeypatch.setattr(inference, "MAX_WAITING", 0)
    with pytest.raises(Busy):
        await text_of(make_owner())


async def test_a_dead_server_is_started_again(worker):
    stream = inference.stream(make_owner(), GenerateRequest("starter", prompt="A", max_tokens=200))
    await anext(stream)
    for pid in servers_of(worker.pid):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Failed, match="stopped"):
        async for _ in stream:
            pass
    await wait_for_answer()


async def test_a_silent_server_is_started_again_and_who_waited_is_answered(worker):
    for pid in servers_of(worker.pid):
        os.kill(pid, signal.SIGSTOP)  # alive, and says nothing for ever
    began = time.monotonic()
    answer = await text_of(make_owner())
    assert answer.usage["completion_tokens"] == 8
    assert time.monotonic() - began > SILENCE_S


def test_only_whose_prompt_was_being_read_is_told_so(stores, monkeypatch):
    said: dict[str, str] = {}
    monkeypatch.setattr(relay, "publish", lambda rid, lines: said.update({rid: lines[-1]}))
    asked = relay.Relay()
    for rid, state in (("r1", "sent"), ("r2", "reading"), ("r3", "started")):
        asked.waiting[rid] = relay.Waiting(rid, {}, state=state, tries=relay.MAX_TRIES)
        asked._fail(rid)
    codes = {rid: json.loads(line)["code"] for rid, line in said.items()}
    assert codes == {"r1": "server_died", "r2": "prompt_failed", "r3": "server_died"}
    assert not asked.waiting


def test_why_a_model_cannot_be_loaded_names_nothing_of_ours(stores, monkeypatch):
    said: list[str] = []

    def away(owner, model):
        raise OSError("no bucket s3://inside/ at 10.0.0.7")

    monkeypatch.setattr(relay, "model_folder", away)
    monkeypatch.setattr(relay, "is_read", lambda rid: True)
    monkeypatch.setattr(relay, "publish", lambda rid, lines: said.extend(lines))
    relay.serve("user-A", "r1", {"model": "starter"})
    assert "cannot be loaded" in said[-1]
    assert "inside" not in "".join(said)
