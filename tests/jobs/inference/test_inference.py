"""Generating text through a real inference worker and its model server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from jobs.inference import generation, generation_queue, inference_worker
from jobs.inference.generation import Busy, Failed, GenerateRequest
from jobs.store import access, redis_client
from jobs.store.tables import TunedModel
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
    asyncio.run(wait_until_it_generates())
    yield process
    process.terminate()
    process.wait(45)


@pytest.fixture
def suspended_worker(worker):
    """The worker, suspended until the test resumes it or ends."""
    worker.send_signal(signal.SIGSTOP)
    yield worker
    resume(worker)


def resume(worker):
    worker.send_signal(signal.SIGCONT)


async def wait_until_it_generates():
    deadline = time.monotonic() + 90
    while True:
        try:
            return await text_of(make_owner(), max_tokens=1)
        except (Busy, Failed):
            assert time.monotonic() < deadline


async def text_of(owner, **fields):
    request = GenerateRequest(**{"model": "starter", "prompt": "The dog is", "max_tokens": 8, **fields})
    return await generation.complete(owner, request)


async def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(RedisError):
            if await asyncio.to_thread(condition):
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def servers_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [
        int(p)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for p in (task / "children").read_text().split()
    ]


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("kind", ["completion", "text"])
def test_a_question_to_a_model_without_conversations_is_sent_as_its_prompt(kind):
    model = TunedModel("owner", "ft:x", trained_on=kind)
    chat = GenerateRequest("ft:x", messages=[user("The dog is")], max_tokens=7)
    assert generation.as_trained(model, chat) == GenerateRequest("ft:x", prompt="The dog is", max_tokens=7)
    for messages in ([{"role": "system", "content": "Be kind."}, user("Hi")], [user("Hi"), user("Ho")]):
        with pytest.raises(Failed, match="/v1/completions") as refusal:
            generation.as_trained(model, GenerateRequest("ft:x", messages=messages))
        assert refusal.value.code == "chat_unsupported"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(Failed, match="no tools"):
        generation.as_trained(model, GenerateRequest("ft:x", messages=[user("Hi")], tools=[tool]))


@pytest.mark.parametrize("kind", ["chat", ""])
def test_a_chat_model_and_a_model_from_before_get_the_messages(kind):
    chat = GenerateRequest("ft:x", messages=[user("Hi"), user("Ho")])
    assert generation.as_trained(TunedModel("owner", "ft:x", trained_on=kind), chat) is chat


async def test_streamed_tokens_make_up_the_whole_text(worker):
    lines = [
        line
        async for line in generation.stream(
            make_owner(), GenerateRequest("starter", prompt="The dog is", max_tokens=8)
        )
    ]
    assert [lines[0]["t"], lines[-1]["t"]] == ["start", "done"]
    text = "".join(line["text"] for line in lines if line["t"] == "token")
    completion = await text_of(make_owner())
    assert (text, completion.usage["completion_tokens"]) == (completion.texts[0], 8)


async def test_another_users_model_is_not_found(worker):
    with pytest.raises(access.NotFound):
        await text_of(make_owner(), model="ft:starter:bob::12345678")


async def test_twelve_requests_of_six_users_are_all_answered(worker):
    owners = [make_owner() for _ in range(6)]
    completions = await asyncio.gather(*(text_of(owner, seed=1) for owner in owners * 2))
    assert len({completion.texts[0] for completion in completions}) == 1


async def test_a_third_request_of_one_user_waits_for_its_turn(worker):
    owner = make_owner()
    streams = [
        generation.stream(owner, GenerateRequest("starter", prompt="A", max_tokens=100)) for _ in range(2)
    ]
    for stream in streams:
        await anext(stream)
    third = asyncio.create_task(text_of(owner))
    await eventually(lambda: redis_client.client().zcard(generation_queue.line_of(owner)) == 1)
    for stream in streams:
        await stream.aclose()
    assert (await third).usage["completion_tokens"] == 8


async def test_closing_a_stream_early_frees_its_place(worker):
    owner = make_owner()
    stream = generation.stream(owner, GenerateRequest("starter", prompt="A", max_tokens=200))
    await anext(stream)
    assert redis_client.client().zcard(f"generation:running:{owner}") == 1
    await stream.aclose()
    await eventually(lambda: redis_client.client().zcard(f"generation:running:{owner}") == 0)


async def test_a_full_queue_says_when_to_retry(stores, monkeypatch):
    monkeypatch.setattr(generation_queue, "MAX_WAITING", 0)
    with pytest.raises(Busy) as busy:
        await text_of(make_owner())
    assert busy.value.retry_after >= 1


async def test_without_a_worker_requests_fail_soon(suspended_worker, monkeypatch):
    monkeypatch.setattr(generation, "NO_WORKER_S", 0)
    monkeypatch.setattr(generation, "RENEW_S", 0)
    redis_client.client().delete("generation:taken", "generation:running")
    with pytest.raises(generation.Unavailable, match="No inference worker"):
        await text_of(make_owner())


@pytest.mark.parametrize("kept", [True, False], ids=["with its data", "without its data"])
async def test_waiting_requests_keep_their_order_when_redis_restarts(suspended_worker, redis, folder, kept):
    owner = make_owner()
    line = generation_queue.line_of(owner)
    requests = []
    for count in range(1, 9):
        requests.append(asyncio.create_task(text_of(owner, max_tokens=2)))
        await eventually(lambda count=count: redis_client.client().zcard(line) == count)
    before = [score for _, score in redis_client.client().zrange(line, 0, -1, withscores=True)]
    redis.kill()
    for file in folder.glob("none" if kept else "appendonly*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()  # a folder since Redis 7
    redis.start()

    def is_restored():
        return [score for _, score in redis_client.client().zrange(line, 0, -1, withscores=True)] == before

    await eventually(is_restored)
    resume(suspended_worker)
    assert [completion.usage["completion_tokens"] for completion in await asyncio.gather(*requests)] == [
        2
    ] * 8


async def test_a_request_taken_by_a_lost_worker_is_queued_again(suspended_worker, monkeypatch):
    monkeypatch.setattr(generation, "RENEW_S", 0)
    owner = make_owner()
    line = generation_queue.line_of(owner)
    request = asyncio.create_task(text_of(owner))
    await eventually(lambda: redis_client.client().zcard(line) == 1)
    taken = generation_queue.take(1)  # by a worker that then dies
    assert taken.owner == owner
    generation_queue.end(owner, taken.rid, 1)  # as when its lease expires
    await eventually(lambda: redis_client.client().zcard(line) == 1)
    resume(suspended_worker)
    assert (await request).usage["completion_tokens"] == 8


async def test_a_gap_in_a_reply_is_an_error(suspended_worker):
    owner = make_owner()
    request = asyncio.create_task(text_of(owner))
    await eventually(lambda: redis_client.client().zcard(generation_queue.line_of(owner)) == 1)
    taken = generation_queue.take(1)
    token = {"t": "token", "index": 0, "text": "x"}
    inference_worker.publish(taken.rid, [json.dumps({"t": "start", "prompt_tokens": 1}), json.dumps(token)])
    inference_worker.publish(taken.rid, [json.dumps(token)], 4)  # the message before it was lost
    with pytest.raises(Failed, match="was lost"):
        await request
    generation_queue.end(owner, taken.rid, 1)


async def test_a_request_whose_client_died_leaves_the_queue(suspended_worker, monkeypatch):
    monkeypatch.setattr(generation_queue, "MAX_WAITING_OF_ONE", 2)
    owner = make_owner()
    client = redis_client.own_client()
    for rid in ("first", "second"):
        await generation_queue.enter(client, owner, rid, "{}", "", 2)
    with pytest.raises(generation_queue.Full):
        await generation_queue.enter(client, owner, "third", "{}", "", 2)
    await client.delete("reading:first")  # as it expires after its client was killed
    await generation_queue.enter(client, owner, "third", "{}", "", 2)
    taken = [generation_queue.take(3) for _ in range(3)]
    assert [entry and entry.rid for entry in taken] == ["second", "third", None]
    for entry in taken[:2]:
        generation_queue.end(owner, entry.rid, 1)
        await generation_queue.leave(client, owner, entry.rid)
    await client.aclose()


async def test_the_queue_is_also_limited_in_bytes(suspended_worker, monkeypatch):
    monkeypatch.setattr(generation_queue, "MAX_BYTES_OF_ONE", 100)
    alice, bob = make_owner(), make_owner()
    client = redis_client.own_client()
    await generation_queue.enter(client, alice, "a1", "x" * 60, "", 2)
    with pytest.raises(generation_queue.Full) as full:
        await generation_queue.enter(client, alice, "a2", "x" * 60, "", 2)
    assert full.value.whose == "yours"
    monkeypatch.setattr(generation_queue, "MAX_BYTES", 100)
    with pytest.raises(generation_queue.Full) as full:
        await generation_queue.enter(client, bob, "b1", "x" * 60, "", 2)
    assert full.value.whose == "full"
    await generation_queue.leave(client, alice, "a1")
    await client.aclose()


async def test_a_dead_model_server_is_restarted(worker):
    stream = generation.stream(make_owner(), GenerateRequest("starter", prompt="A", max_tokens=200))
    await anext(stream)
    for pid in servers_of(worker.pid):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Failed, match="stopped"):
        async for _ in stream:
            pass
    await wait_until_it_generates()


async def test_a_hung_model_server_is_restarted_and_waiting_requests_are_answered(worker):
    for pid in servers_of(worker.pid):
        os.kill(pid, signal.SIGSTOP)  # alive, but silent forever
    started = time.monotonic()
    completion = await text_of(make_owner())
    assert completion.usage["completion_tokens"] == 8
    assert time.monotonic() - started > SILENCE_S


def test_only_the_request_whose_prompt_was_being_read_fails_as_prompt_failed(stores, monkeypatch):
    published = {}
    monkeypatch.setattr(
        inference_worker, "publish", lambda rid, lines, after: published.update({rid: lines[-1]})
    )
    server = inference_worker.ModelServer()
    for rid, state in (("r1", "sent"), ("r2", "reading"), ("r3", "started")):
        server.waiting[rid] = inference_worker.Waiting(rid, {}, state=state, tries=inference_worker.MAX_TRIES)
        server._fail(rid)
    codes = {rid: json.loads(line)["code"] for rid, line in published.items()}
    assert codes == {"r1": "server_died", "r2": "prompt_failed", "r3": "server_died"}
    assert not server.waiting


def test_the_error_for_a_model_that_cannot_be_loaded_reveals_no_internals(stores, monkeypatch):
    published = []

    def fail(owner, model):
        raise OSError("no bucket s3://inside/ at 10.0.0.7")

    monkeypatch.setattr(inference_worker, "model_folder", fail)
    monkeypatch.setattr(inference_worker, "publish", lambda rid, lines: published.extend(lines))
    inference_worker.serve("user-A", "r1", {"model": "starter"})
    assert "cannot be loaded" in published[-1]
    assert "inside" not in "".join(published)
