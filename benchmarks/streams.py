"""Many who watch: `bin/bench streams`.

A thousand watchers of one job at one event a second, with raw sockets as clients on the same machine: how long an event
takes from the moment it happens to the client, none missing or doubled, and how fast other pages are meanwhile. Then
10,000 streams of two people that break off at random moments, each person's events carrying a secret of their own:
nobody ever sees the other's, and nothing stays open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Scores, quantile, request_of, visit

EVENT = re.compile(rb'^id: (\d+)\nevent: event\ndata: .*?"time": ([\d.]+)', re.MULTILINE)
CONNECTING = 40  # at once


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench streams", description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60, help="watched, after all have come")
    parser.add_argument("--drops", type=int, default=10_000, help="streams that break off")
    parser.add_argument("--only", choices=["watch", "drops"], help="one of the two")
    options = parser.parse_args()
    os.environ["JOBS_MAX_STREAMS_PER_OWNER"] = "5000"
    os.environ["WEB_MAX_CONNECTIONS_PER_ADDRESS"] = "0"  # all watchers are on this machine

    from tests.faults import environment as env

    env.prepare_environment()
    environment = env.start_environment()
    try:
        scores = Scores()
        people = [environment.person(), environment.person("user-other")]
        environment.start_web()
        if options.only in (None, "watch"):
            asyncio.run(watch(scores, environment, people[0], options.watchers, options.seconds))
        if options.only in (None, "drops"):
            asyncio.run(drop(scores, environment, people, options.drops))
        return scores.end()
    finally:
        environment.stop()


# ---- who writes --------------------------------------------------------------------------------------------


def running_job(owner: str) -> str:
    from tests.faults import environment as env

    return env.submit(env.ready_dataset(owner), owner)


def write(owner: str, job_id: str, word: str, every: float, stop: Any) -> None:
    """A process: holds the job and lets an event happen each `every` seconds, as a runner does."""
    import django

    django.setup()
    from jobs.events import event_log
    from jobs.lifecycle import transitions
    from jobs.store import tables

    job = tables.get(tables.Job, owner, job_id)
    assert job
    claim = transitions.claim(job, transitions.this_worker())
    assert claim
    number, due = 1, time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        due += every
        event = {"t": "metric", "step": number, "loss": 1.5, "word": word, "time": round(time.time(), 4)}
        event_log.append(claim, event_log.Batch(number, (json.dumps(event),)))
        claim.heartbeat(
            {"step": number, "total_steps": 100_000}, {"loss": 1.5}, number, number, phase="training"
        )
        event_log.announce(job_id, number)
        number += 1
    claim.finish("failed")


@dataclass
class Writers:
    """Processes that write until the end of the block."""

    context: Any = field(default_factory=lambda: multiprocessing.get_context("spawn"))

    def __post_init__(self) -> None:
        self.stop = self.context.Event()
        self.running: list[Any] = []

    def start(self, owner: str, job_id: str, word: str, every: float) -> None:
        writer = self.context.Process(target=write, args=(owner, job_id, word, every, self.stop))
        writer.start()
        self.running.append(writer)

    def end(self) -> None:
        self.stop.set()
        for writer in self.running:
            writer.join(30)


# ---- a thousand watchers -----------------------------------------------------------------------------------


@dataclass
class Watcher:
    seen: list[int] = field(default_factory=list)
    delays: list[tuple[float, float]] = field(default_factory=list)  # when it came, how long it took
    ended: str = ""

    async def follow(self, port: int, job_id: str, session: str, gate: asyncio.Semaphore) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
            writer.write(request_of(f"/jobs/{job_id}/stream", session))
            first = await reader.read(1 << 16)
        rest = self.take(first)
        while data := await reader.read(1 << 16):
            rest = self.take(rest + data)
        self.ended = "closed"
        writer.close()

    def take(self, data: bytes) -> bytes:
        """Whole fields; returns what is left."""
        whole, mark, rest = data.rpartition(b"\n\n")
        now = time.time()
        for number, happened in EVENT.findall(whole):
            self.seen.append(int(number))
            self.delays.append((now, now - float(happened)))
        return rest if mark else data


async def watch(scores: Scores, environment: Any, person: Any, count: int, seconds: int) -> None:
    from jobs.store import tables
    from tests.faults import environment as env

    pid, writers = environment.workers["web"].pid, Writers()
    job_id = running_job(env.OWNER)
    writers.start(env.OWNER, job_id, "watched", 1.0)
    env.wait_until(job_id, lambda job: job.last_seq >= 2)
    gate, watchers = asyncio.Semaphore(CONNECTING), [Watcher() for _ in range(count)]
    began = time.time()
    following = [
        asyncio.create_task(watcher.follow(env.web_port(), job_id, person.session, gate))
        for watcher in watchers
    ]
    while not all(watcher.seen for watcher in watchers):
        await asyncio.sleep(0.2)
        broken = [task for task in following if task.done() and task.exception()]
        if broken or time.time() - began > 180:
            raise RuntimeError(f"{sum(not w.seen for w in watchers)} watchers never came: {broken[:1]}")
    scores.note(f"{count} watchers came within {time.time() - began:.0f} s")
    await asyncio.sleep(3)
    began = time.time()
    until = time.monotonic() + seconds
    paths = ["/jobs/", f"/jobs/{job_id}/", "/datasets/", "/models/"]
    pages = await visit(env.web_port(), person.session, paths, lambda: time.monotonic() > until)
    ended = time.time()
    await asyncio.to_thread(writers.end)
    await asyncio.wait(following, timeout=30)
    delays = sorted(delay for w in watchers for at, delay in w.delays if began <= at <= ended)
    row = tables.get(tables.Job, env.OWNER, job_id)
    assert row
    right = [w for w in watchers if w.seen == list(range(1, int(row.last_seq) + 2))]
    for watcher in [w for w in watchers if w not in right][:3]:
        scores.note(f"one saw {len(watcher.seen)} of {row.last_seq + 1}: {watcher.seen[-5:]} {watcher.ended}")
    scores.note(f"median {quantile(delays, 0.5):.3f} s, worst {delays[-1]:.3f} s, {len(delays):,} deliveries")
    scores.add("event to client, p99 s", quantile(delays, 0.99), 1.0, 1.0, less_is_better=True)
    scores.add("watchers who saw all, once", len(right), count, 1.0)
    scores.note(f"other pages: {len(pages)}, median {quantile(pages, 0.5):.3f} s, worst {pages[-1]:.3f} s")
    scores.add("other pages, p99 s", quantile(pages, 0.99), 0.3, 1.0, less_is_better=True)
    scores.add("web's memory, MiB", memory(pid), 400, 1.0, less_is_better=True)


def memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


# ---- ten thousand that break off ---------------------------------------------------------------------------


@dataclass
class Drops:
    port: int
    words: list[bytes]
    sessions: list[str]
    jobs: list[str]
    opened: int = 0
    heard: int = 0
    foreign: int = 0
    refused: list[bytes] = field(default_factory=list)

    async def one(self, who: int, seconds: float) -> None:
        """A stream of person `who` that breaks off after so long."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_of(f"/jobs/{self.jobs[who]}/stream", self.sessions[who]))
        got, until = b"", time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0:
                data = await asyncio.wait_for(reader.read(1 << 16), left)
                got += data
                if not data:
                    break
        except TimeoutError:
            pass
        writer.transport.abort()
        self.opened += 1
        self.heard += self.words[who] in got
        self.foreign += self.words[1 - who] in got or self.jobs[1 - who].encode() in got
        if got and not got.startswith(b"HTTP/1.1 200"):
            self.refused.append(got[:60])


async def drop(scores: Scores, environment: Any, people: list[Any], count: int) -> None:
    from tests.faults import environment as env

    pid, writers = environment.workers["web"].pid, Writers()
    owners = [env.OWNER, "user-other"]
    words = [secrets.token_hex(16) for _ in owners]
    jobs = [running_job(owner) for owner in owners]
    for owner, job_id, word in zip(owners, jobs, words, strict=True):
        writers.start(owner, job_id, word, 0.5)
        env.wait_until(job_id, lambda job: job.last_seq >= 2, owner=owner)
    drops = Drops(env.web_port(), [w.encode() for w in words], [p.session for p in people], jobs)
    # What as many at once as will come start in the process stays: connections to the stores in their pools.
    await asyncio.gather(*(drops.one(n % 2, 2) for n in range(2 * CONNECTING)))
    await asyncio.sleep(8)
    before, began, some = len(os.listdir(f"/proc/{pid}/fd")), time.monotonic(), random.Random(1)  # noqa: S311
    left = iter(range(count))

    async def browser() -> None:
        for n in left:
            await drops.one(
                n % 2, some.choice([some.uniform(0, 0.02), some.uniform(0, 0.3), some.uniform(0, 1.5)])
            )

    drops.opened = drops.heard = 0
    await asyncio.gather(*(browser() for _ in range(CONNECTING)))
    scores.note(
        f"{drops.opened:,} streams in {time.monotonic() - began:.0f} s, {drops.heard:,} heard an event"
    )
    until = time.monotonic() + 10
    while (open_now := len(os.listdir(f"/proc/{pid}/fd"))) > before and time.monotonic() < until:  # noqa: ASYNC110  no event tells
        await asyncio.sleep(0.5)
    await asyncio.to_thread(writers.end)
    if drops.refused:
        scores.note(f"{len(drops.refused)} were refused: {drops.refused[:3]}")
    scores.add("streams dropped", drops.opened - len(drops.refused), count, 1.0)
    scores.add("saw another's data", drops.foreign, 0, 1.0, less_is_better=True)
    scores.add("files open after, beyond before", max(0, open_now - before), 0, 1.0, less_is_better=True)


if __name__ == "__main__":
    sys.exit(main())
