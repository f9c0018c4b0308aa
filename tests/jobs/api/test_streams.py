"""Streams of `/v1` cost no thread while they wait."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import openai
from django.test import AsyncClient

from jobs.api import events
from jobs.lifecycle import transitions
from tests.jobs.api.conftest import Person, rows
from tests.jobs.makers import make_job

STREAMS = 40


def threads_of(pid: int) -> int:
    result = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert result
    return int(result[1])


async def test_forty_open_streams_of_events_hold_no_thread_each(
    web: Any, client: openai.OpenAI, people: dict[str, Person]
):
    file = client.files.create(file=("a.jsonl", rows()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="starter", training_file=file.id, suffix="held")
    client.fine_tuning.jobs.pause(job.id)
    opened: list[int] = []
    all_open = asyncio.Event()

    async def watch(many: openai.AsyncOpenAI) -> str:
        request = many.fine_tuning.jobs.with_streaming_response.list_events(
            job.id, extra_query={"stream": "true"}
        )
        async with request as answer:
            opened.append(1)
            if len(opened) == STREAMS:
                all_open.set()
            return [line async for line in answer.iter_lines() if line][-1]

    async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key=people["alice"].key, timeout=90) as many:
        watching = [asyncio.create_task(watch(many)) for _ in range(STREAMS)]
        await asyncio.wait_for(all_open.wait(), 60)
        await asyncio.sleep(1)
        assert threads_of(web.processes["web"].pid) < STREAMS / 2
        await many.fine_tuning.jobs.cancel(job.id)
        assert set(await asyncio.gather(*watching)) == {"data: [DONE]"}


async def test_nobody_opens_streams_without_end(stores: None, people: dict[str, Person], monkeypatch):
    alice, bob = people["alice"], people["bob"]
    monkeypatch.setitem(events._open, alice.owner, events.STREAMS_PER_OWNER)
    answers = []
    for person in (alice, bob):
        job = await asyncio.to_thread(make_job, person.owner)
        await asyncio.to_thread(transitions.set_desired, person.owner, job.job_id, "cancel")
        answer = await AsyncClient().get(
            f"/v1/fine_tuning/jobs/{job.job_id}/events?stream=true",
            headers={"Authorization": f"Bearer {person.key}"},
        )
        answers.append(answer)
    assert [answer.status_code for answer in answers] == [429, 200]
    assert b"[DONE]" in b"".join([piece async for piece in answers[1].streaming_content])
    assert not events._open[bob.owner]
