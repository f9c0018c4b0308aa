"""Many chats at once: they wait in a queue, first come first served, and nobody's many stand before another's one."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import redis
from django.conf import settings

from jobs.inference import generation_queue
from jobs.store import redis_client
from tests.jobs.api.conftest import Person

pytestmark = pytest.mark.slow
ASK: Any = [{"role": "user", "content": "colour?"}]
FIRST = re.compile(r"XADD tokens:(\w+) 1-0 ")


@pytest.fixture(scope="module")
def generating(web: Any) -> Iterator[Any]:
    """Web and one inference worker."""
    web.start_worker("inference")
    yield web
    web.stop("inference")


@pytest.fixture
def paused(generating: Any) -> Iterator[Callable[[], None]]:
    """The worker stands still until the test lets it go on."""
    process = generating.processes["inference"]
    process.send_signal(signal.SIGSTOP)
    yield lambda: process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def watched_redis() -> Iterator[list[str]]:
    """Every command that Redis runs meanwhile, in its order."""
    commands: list[str] = []
    # Without a time limit of its own: on a busy machine nothing may be said for longer.
    # A client of its own: its connection is still being read when the monitor is closed.
    watcher = redis.Redis.from_url(settings.REDIS_URL, decode_responses=True, socket_timeout=None)
    client = redis.Redis.from_url(settings.REDIS_URL)
    with watcher.monitor() as monitor:

        def listen() -> None:
            with contextlib.suppress(redis.exceptions.ConnectionError, ValueError, OSError):
                for entry in monitor.listen():
                    commands.append(entry["command"])

        threading.Thread(target=listen, daemon=True).start()
        yield commands
        client.set("everything is seen", 1)
        until = time.monotonic() + 30
        while not any("everything is seen" in command for command in commands):
            assert time.monotonic() < until
            time.sleep(0.05)
    client.delete("everything is seen")
    client.close()


def served(commands: list[str]) -> list[str]:
    """The requests in the order in which a worker took them."""
    return [result[1] for command in commands if (result := FIRST.match(command))]


def arrived(commands: list[str]) -> list[str]:
    """The requests in the order in which they came into the queue."""
    result = [command.split()[1] for command in commands if command.startswith("SET generation:request:")]
    return [key.rpartition(":")[2] for key in result]


def many(url: str, person: Person) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=person.key, max_retries=0, timeout=240)


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def waiting(person: Person) -> int:
    return int(redis_client.client().zcard(generation_queue.line_of(person.owner)))


async def test_fifty_chats_at_once_from_one_key_are_all_answered_in_order(
    generating: Any, people: dict[str, Person]
):
    async with many(generating.url, people["alice"]) as client:
        with watched_redis() as commands:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="starter", messages=ASK, max_tokens=8)
                    for _ in range(50)
                ),
                return_exceptions=True,
            )
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert not refused, f"{len(refused)} of 50: {refused[:3]}"
    assert len(arrived(commands)) == 50
    assert served(commands) == arrived(commands)


async def test_people_take_turns_whoever_came_first(
    generating: Any, people: dict[str, Person], paused: Callable[[], None]
):
    async with many(generating.url, people["alice"]) as hers, many(generating.url, people["bob"]) as his:
        with watched_redis() as commands:

            def request_once(client: openai.AsyncOpenAI) -> asyncio.Task[Any]:
                return asyncio.create_task(
                    client.chat.completions.create(model="starter", messages=ASK, max_tokens=2)
                )

            asked = [request_once(hers) for _ in range(20)]
            await until(lambda: waiting(people["alice"]) == 20)
            asked.append(request_once(his))
            await until(lambda: waiting(people["bob"]) == 1)
            paused()
            await asyncio.gather(*asked)
    his_rid = arrived(commands)[-1]
    assert served(commands).index(his_rid) < 2  # one of hers at most stood before it
    hers_in_order = [rid for rid in served(commands) if rid != his_rid]
    assert hers_in_order == arrived(commands)[:-1]


async def test_who_leaves_frees_the_place_and_who_comes_too_late_is_told_when_to_come(
    generating: Any, people: dict[str, Person], paused: Callable[[], None]
):
    alice = people["alice"]
    async with many(generating.url, alice) as client:

        def request_once() -> asyncio.Task[Any]:
            return asyncio.create_task(
                client.chat.completions.create(model="starter", messages=ASK, max_tokens=2)
            )

        redis_client.client().set("generation:seconds", "1.0")
        asked = [request_once() for _ in range(generation_queue.MAX_WAITING_OF_ONE)]
        await until(lambda: waiting(alice) == len(asked))
        with pytest.raises(openai.RateLimitError) as refusal:
            await request_once()
        assert int(refusal.value.response.headers["retry-after"]) == 32  # 64 of a second each, two at a time
        asked.pop(3).cancel()  # the client hangs up
        await until(lambda: waiting(alice) == len(asked))
        asked.append(request_once())
        await until(lambda: waiting(alice) == len(asked))
        paused()
        answers = await asyncio.gather(*asked)
    assert len(answers) == generation_queue.MAX_WAITING_OF_ONE


async def test_a_web_holds_more_connections_than_its_system_allows_at_first(
    generating: Any, people: dict[str, Person], paused: Callable[[], None]
):
    """Each chat that waits holds two; many systems begin with 1,024 files for a process."""
    from tests.conftest import Studio
    from tests.services import free_port

    other = Studio(f"http://localhost:{free_port()}", generating.folder / "few")
    other.folder.mkdir(exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard))  # what it starts inherits this
    try:
        process = other.start("web", "llmtuner", "web")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        await until(lambda: answers(other.url) or process.poll() is not None)
        async with many(other.url, people["alice"]) as client:
            asked = [
                asyncio.create_task(
                    client.chat.completions.create(model="starter", messages=ASK, max_tokens=1)
                )
                for _ in range(60)
            ]
            await until(lambda: waiting(people["alice"]) == len(asked))
            paused()
            assert len(await asyncio.gather(*asked)) == 60
    finally:
        other.stop()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/healthz", timeout=2)
        return True
    return False


async def test_two_webs_and_two_workers_share_one_queue(generating: Any, people: dict[str, Person]):
    from tests.conftest import Studio
    from tests.services import free_port

    other = Studio(f"http://localhost:{free_port()}", generating.folder / "other")
    other.folder.mkdir(exist_ok=True)
    other.start_web()
    other.start("second", "llmtuner", "worker", "inference")
    try:
        async with many(generating.url, people["alice"]) as one, many(other.url, people["alice"]) as two:

            def crowd(count: int) -> Any:
                return asyncio.gather(
                    *(
                        client.chat.completions.create(model="starter", messages=ASK, max_tokens=4)
                        for client in (one, two)
                        for _ in range(count)
                    )
                )

            await until(lambda: "ready" in other.log("second") or other.processes["second"].poll() is None)
            with watched_redis() as commands:
                assert len(await crowd(20)) == 40
        assert served(commands) == arrived(commands)
    finally:
        other.stop()
