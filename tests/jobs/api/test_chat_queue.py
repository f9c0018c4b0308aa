"""Many concurrent chats: they wait in a queue, first come, first served, and users take turns, so that the many
requests of one user do not hold up the single request of another."""

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
from tests.jobs.api.conftest import ApiUser

pytestmark = pytest.mark.slow
MESSAGES: Any = [{"role": "user", "content": "colour?"}]
FIRST_TOKEN = re.compile(r"XADD tokens:(\w+) 1-0 ")


@pytest.fixture
def resume_worker(web_with_inference: Any) -> Iterator[Callable[[], None]]:
    """Suspends the inference worker; calling the fixture resumes it."""
    process = web_with_inference.processes["inference"]
    process.send_signal(signal.SIGSTOP)
    yield lambda: process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def recorded_redis_commands() -> Iterator[list[str]]:
    """Every command that Redis runs inside the block, in order."""
    commands: list[str] = []
    # Without a timeout: on a busy machine Redis may run no command for a long time.
    # Separate clients: the monitor's connection is still being read when the monitor is closed.
    recorder = redis.Redis.from_url(settings.REDIS_URL, decode_responses=True, socket_timeout=None)
    client = redis.Redis.from_url(settings.REDIS_URL)
    with recorder.monitor() as monitor:

        def record() -> None:
            with contextlib.suppress(redis.exceptions.ConnectionError, ValueError, OSError):
                for entry in monitor.listen():
                    commands.append(entry["command"])

        threading.Thread(target=record, daemon=True).start()
        yield commands
        client.set("end of recording", 1)
        deadline = time.monotonic() + 30
        while not any("end of recording" in command for command in commands):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    client.delete("end of recording")
    client.close()


def served_requests(commands: list[str]) -> list[str]:
    """The requests in the order in which workers took them."""
    return [result[1] for command in commands if (result := FIRST_TOKEN.match(command))]


def queued_requests(commands: list[str]) -> list[str]:
    """The requests in the order in which they entered the queue."""
    result = [command.split()[1] for command in commands if command.startswith("SET generation:request:")]
    return [key.rpartition(":")[2] for key in result]


def async_client(url: str, user: ApiUser) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=user.key, max_retries=0, timeout=240)


async def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def waiting_count(user: ApiUser) -> int:
    return int(redis_client.client().zcard(generation_queue.line_of(user.owner)))


async def test_fifty_concurrent_chats_with_one_key_are_all_answered_in_order(
    web_with_inference: Any, users: dict[str, ApiUser]
) -> None:
    async with async_client(web_with_inference.url, users["alice"]) as client:
        with recorded_redis_commands() as commands:
            responses = await asyncio.gather(
                *(
                    client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=8)
                    for _ in range(50)
                ),
                return_exceptions=True,
            )
    errors = [response for response in responses if isinstance(response, BaseException)]
    assert not errors, f"{len(errors)} of 50: {errors[:3]}"
    assert len(queued_requests(commands)) == 50
    assert served_requests(commands) == queued_requests(commands)


async def test_users_take_turns_regardless_of_who_came_first(
    web_with_inference: Any, users: dict[str, ApiUser], resume_worker: Callable[[], None]
) -> None:
    async with (
        async_client(web_with_inference.url, users["alice"]) as alice_client,
        async_client(web_with_inference.url, users["bob"]) as bob_client,
    ):
        with recorded_redis_commands() as commands:

            def start_chat(client: openai.AsyncOpenAI) -> asyncio.Task[Any]:
                return asyncio.create_task(
                    client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=2)
                )

            tasks = [start_chat(alice_client) for _ in range(20)]
            await wait_until(lambda: waiting_count(users["alice"]) == 20)
            tasks.append(start_chat(bob_client))
            await wait_until(lambda: waiting_count(users["bob"]) == 1)
            resume_worker()
            await asyncio.gather(*tasks)
    bobs_request = queued_requests(commands)[-1]
    # At most one of Alice's requests was served before it.
    assert served_requests(commands).index(bobs_request) < 2
    alices_requests = [request_id for request_id in served_requests(commands) if request_id != bobs_request]
    assert alices_requests == queued_requests(commands)[:-1]


async def test_a_disconnect_frees_its_place_and_a_full_queue_sends_retry_after(
    web_with_inference: Any, users: dict[str, ApiUser], resume_worker: Callable[[], None]
) -> None:
    alice = users["alice"]
    async with async_client(web_with_inference.url, alice) as client:

        def start_chat() -> asyncio.Task[Any]:
            return asyncio.create_task(
                client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=2)
            )

        redis_client.client().set("generation:seconds", "1.0")
        tasks = [start_chat() for _ in range(generation_queue.MAX_WAITING_OF_ONE)]
        await wait_until(lambda: waiting_count(alice) == len(tasks))
        with pytest.raises(openai.RateLimitError) as excinfo:
            await start_chat()
        # 64 requests of one second each, two at a time
        assert int(excinfo.value.response.headers["retry-after"]) == 32
        tasks.pop(3).cancel()  # the client hangs up
        await wait_until(lambda: waiting_count(alice) == len(tasks))
        tasks.append(start_chat())
        await wait_until(lambda: waiting_count(alice) == len(tasks))
        resume_worker()
        responses = await asyncio.gather(*tasks)
    assert len(responses) == generation_queue.MAX_WAITING_OF_ONE


async def test_web_raises_its_limit_of_open_files(
    web_with_inference: Any, users: dict[str, ApiUser], resume_worker: Callable[[], None]
) -> None:
    """Each waiting chat holds two connections, and many systems allow a process 1,024 open files at first."""
    from tests.conftest import Studio
    from tests.services import free_port

    other = Studio(f"http://localhost:{free_port()}", web_with_inference.folder / "few")
    other.folder.mkdir(exist_ok=True)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard_limit))  # inherited by the process started below
    try:
        process = other.start("web", "llmtuner", "web")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
    try:
        await wait_until(lambda: is_healthy(other.url) or process.poll() is not None)
        async with async_client(other.url, users["alice"]) as client:
            tasks = [
                asyncio.create_task(
                    client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=1)
                )
                for _ in range(60)
            ]
            await wait_until(lambda: waiting_count(users["alice"]) == len(tasks))
            resume_worker()
            assert len(await asyncio.gather(*tasks)) == 60
    finally:
        other.stop()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/healthz", timeout=2)
        return True
    return False


async def test_two_web_processes_and_two_workers_share_one_queue(
    web_with_inference: Any, users: dict[str, ApiUser]
) -> None:
    from tests.conftest import Studio
    from tests.services import free_port

    other = Studio(f"http://localhost:{free_port()}", web_with_inference.folder / "other")
    other.folder.mkdir(exist_ok=True)
    other.start_web()
    other.start("second", "llmtuner", "worker", "inference")
    try:
        async with (
            async_client(web_with_inference.url, users["alice"]) as first_client,
            async_client(other.url, users["alice"]) as second_client,
        ):

            def send_from_both(count: int) -> Any:
                return asyncio.gather(
                    *(
                        client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=4)
                        for client in (first_client, second_client)
                        for _ in range(count)
                    )
                )

            await wait_until(
                lambda: "ready" in other.log("second") or other.processes["second"].poll() is None
            )
            with recorded_redis_commands() as commands:
                assert len(await send_from_both(20)) == 40
        assert served_requests(commands) == queued_requests(commands)
    finally:
        other.stop()
