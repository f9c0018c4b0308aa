"""Streams of `/v1` cost no thread while they wait."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import openai

from tests.api.conftest import Person, rows

STREAMS = 40


def threads_of(pid: int) -> int:
    found = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


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
