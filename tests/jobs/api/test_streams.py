"""Streams of `/v1` hold no thread while they wait."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from django.test import AsyncClient

from jobs.api import events
from jobs.lifecycle import transitions
from tests.jobs.api.conftest import ApiUser, training_rows
from tests.jobs.makers import make_job

STREAMS = 40


def thread_count(pid: int) -> int:
    match = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])


async def test_open_event_streams_do_not_hold_a_thread_each(
    web: Any, client: openai.OpenAI, users: dict[str, ApiUser]
) -> None:
    file = client.files.create(file=("a.jsonl", training_rows()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="starter", training_file=file.id, suffix="held")
    client.fine_tuning.jobs.pause(job.id)
    opened: list[int] = []
    all_open = asyncio.Event()

    async def read_stream(async_client: openai.AsyncOpenAI) -> str:
        request = async_client.fine_tuning.jobs.with_streaming_response.list_events(
            job.id, extra_query={"stream": "true"}
        )
        async with request as response:
            opened.append(1)
            if len(opened) == STREAMS:
                all_open.set()
            return [line async for line in response.iter_lines() if line][-1]

    async with openai.AsyncOpenAI(
        base_url=f"{web.url}/v1", api_key=users["alice"].key, timeout=90
    ) as async_client:
        tasks = [asyncio.create_task(read_stream(async_client)) for _ in range(STREAMS)]
        await asyncio.wait_for(all_open.wait(), 60)
        await asyncio.sleep(1)
        assert thread_count(web.processes["web"].pid) < STREAMS / 2
        await async_client.fine_tuning.jobs.cancel(job.id)
        assert set(await asyncio.gather(*tasks)) == {"data: [DONE]"}


async def test_open_streams_are_limited_per_user(
    stores: None, users: dict[str, ApiUser], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = users["alice"], users["bob"]
    monkeypatch.setitem(events._open, alice.owner, events.STREAMS_PER_OWNER)
    responses = []
    for user in (alice, bob):
        job = await asyncio.to_thread(make_job, user.owner)
        await asyncio.to_thread(transitions.set_desired, user.owner, job.job_id, "cancel")
        response = await AsyncClient().get(
            f"/v1/fine_tuning/jobs/{job.job_id}/events?stream=true",
            headers=user.headers,
        )
        responses.append(response)
    assert [response.status_code for response in responses] == [429, 200]
    assert b"[DONE]" in b"".join([chunk async for chunk in responses[1].streaming_content])
    assert not events._open[bob.owner]
