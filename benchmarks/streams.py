"""Many open event streams: `bin/bench streams`.

A thousand watchers of one job at one event per second, with raw sockets as clients on the same machine: the delay from
the event to the client, that no event is missing or doubled, and how fast other pages load at the same time. Then 10,000
streams of two users that disconnect at random moments, where each user's events carry a secret marker: neither user ever
receives the other's, and no connection stays open.
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
CONNECTING = 40  # connections opened at once


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench streams", description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60, help="how long to watch after all are connected")
    parser.add_argument("--drops", type=int, default=10_000, help="streams that disconnect")
    parser.add_argument("--only", choices=["watch", "drops"], help="one of the two")
    options = parser.parse_args()
    os.environ["JOBS_MAX_STREAMS_PER_OWNER"] = "5000"
    os.environ["WEB_MAX_CONNECTIONS_PER_ADDRESS"] = "0"  # all watchers connect from this machine

    from tests.faults import environment as env

    env.prepare_environment()
    environment = env.start_environment()
    try:
        scores = Scores()
        users = [environment.person(), environment.person("user-other")]
        environment.start_web()
        if options.only in (None, "watch"):
            asyncio.run(watch(scores, environment, users[0], options.watchers, options.seconds))
        if options.only in (None, "drops"):
            asyncio.run(drop(scores, environment, users, options.drops))
        return scores.end()
    finally:
        environment.stop()


# ---- writers -----------------------------------------------------------------------------------------------


def running_job(owner: str) -> str:
    from tests.faults import environment as env

    return env.submit(env.ready_dataset(owner), owner)


def write(owner: str, job_id: str, marker: str, every: float, stop: Any) -> None:
    """The body of a process: claims the job and appends an event every `every` seconds, as a runner does."""
    import django

    django.setup()
    from jobs.events import event_log
    from jobs.lifecycle import transitions
    from jobs.store import tables
    from jobs.store.states import JobStatus

    job = tables.get(tables.Job, owner, job_id)
    assert job
    claim = transitions.claim(job, transitions.this_worker())
    assert claim
    number, due = 1, time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        due += every
        event = {"t": "metric", "step": number, "loss": 1.5, "marker": marker, "time": round(time.time(), 4)}
        event_log.append(claim, event_log.Batch(number, (json.dumps(event),)))
        claim.heartbeat(
            {"step": number, "total_steps": 100_000}, {"loss": 1.5}, number, number, phase="training"
        )
        event_log.announce(job_id, number)
        number += 1
    claim.finish(JobStatus.FAILED)


@dataclass
class Writers:
    """Processes that write events until `end` is called."""

    context: Any = field(default_factory=lambda: multiprocessing.get_context("spawn"))

    def __post_init__(self) -> None:
        self.stop = self.context.Event()
        self.running: list[Any] = []

    def start(self, owner: str, job_id: str, marker: str, every: float) -> None:
        writer = self.context.Process(target=write, args=(owner, job_id, marker, every, self.stop))
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
    delays: list[tuple[float, float]] = field(default_factory=list)  # (time of arrival, delay)
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
        """Records the complete events. Returns the incomplete rest."""
        whole, separator, rest = data.rpartition(b"\n\n")
        now = time.time()
        for number, happened in EVENT.findall(whole):
            self.seen.append(int(number))
            self.delays.append((now, now - float(happened)))
        return rest if separator else data


async def watch(scores: Scores, environment: Any, person: Any, count: int, seconds: int) -> None:
    from jobs.store import tables
    from tests.faults import environment as env

    pid, writers = environment.workers["web"].pid, Writers()
    job_id = running_job(env.OWNER)
    writers.start(env.OWNER, job_id, "watched", 1.0)
    env.wait_until(job_id, lambda job: job.last_seq >= 2)
    gate, watchers = asyncio.Semaphore(CONNECTING), [Watcher() for _ in range(count)]
    started = time.time()
    following = [
        asyncio.create_task(watcher.follow(env.web_port(), job_id, person.session, gate))
        for watcher in watchers
    ]
    while not all(watcher.seen for watcher in watchers):
        await asyncio.sleep(0.2)
        broken = [task for task in following if task.done() and task.exception()]
        if broken or time.time() - started > 180:
            raise RuntimeError(f"{sum(not w.seen for w in watchers)} watchers received nothing: {broken[:1]}")
    scores.note(f"{count} watchers connected within {time.time() - started:.0f} s")
    await asyncio.sleep(3)
    started = time.time()
    until = time.monotonic() + seconds
    paths = ["/jobs/", f"/jobs/{job_id}/", "/datasets/", "/models/"]
    pages = await visit(env.web_port(), person.session, paths, lambda: time.monotonic() > until)
    ended = time.time()
    await asyncio.to_thread(writers.end)
    await asyncio.wait(following, timeout=30)
    delays = sorted(delay for w in watchers for at, delay in w.delays if started <= at <= ended)
    row = tables.get(tables.Job, env.OWNER, job_id)
    assert row
    right = [w for w in watchers if w.seen == list(range(1, int(row.last_seq) + 2))]
    for watcher in [w for w in watchers if w not in right][:3]:
        scores.note(
            f"one watcher received {len(watcher.seen)} of {row.last_seq + 1} events: {watcher.seen[-5:]} {watcher.ended}"
        )
    scores.note(f"median {quantile(delays, 0.5):.3f} s, worst {delays[-1]:.3f} s, {len(delays):,} deliveries")
    scores.add("event to client, p99 s", quantile(delays, 0.99), 1.0, 1.0, less_is_better=True)
    scores.add("watchers who saw all, once", len(right), count, 1.0)
    scores.note(f"other pages: {len(pages)}, median {quantile(pages, 0.5):.3f} s, worst {pages[-1]:.3f} s")
    scores.add("other pages, p99 s", quantile(pages, 0.99), 0.3, 1.0, less_is_better=True)
    scores.add("web's memory, MiB", memory(pid), 400, 1.0, less_is_better=True)


def memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


# ---- ten thousand disconnects ------------------------------------------------------------------------------


@dataclass
class Drops:
    port: int
    markers: list[bytes]
    sessions: list[str]
    jobs: list[str]
    opened: int = 0
    received: int = 0
    foreign: int = 0
    refused: list[bytes] = field(default_factory=list)

    async def one(self, user: int, seconds: float) -> None:
        """A stream of user number `user` that disconnects after this many seconds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_of(f"/jobs/{self.jobs[user]}/stream", self.sessions[user]))
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
        self.received += self.markers[user] in got
        self.foreign += self.markers[1 - user] in got or self.jobs[1 - user].encode() in got
        if got and not got.startswith(b"HTTP/1.1 200"):
            self.refused.append(got[:60])


async def drop(scores: Scores, environment: Any, users: list[Any], count: int) -> None:
    from tests.faults import environment as env

    pid, writers = environment.workers["web"].pid, Writers()
    owners = [env.OWNER, "user-other"]
    markers = [secrets.token_hex(16) for _ in owners]
    jobs = [running_job(owner) for owner in owners]
    for owner, job_id, marker in zip(owners, jobs, markers, strict=True):
        writers.start(owner, job_id, marker, 0.5)
        env.wait_until(job_id, lambda job: job.last_seq >= 2, owner=owner)
    drops = Drops(env.web_port(), [m.encode() for m in markers], [p.session for p in users], jobs)
    # Warm-up: connections to the stores stay in their pools, so open as many as will ever be used at once.
    await asyncio.gather(*(drops.one(n % 2, 2) for n in range(2 * CONNECTING)))
    await asyncio.sleep(8)
    before, started, rng = len(os.listdir(f"/proc/{pid}/fd")), time.monotonic(), random.Random(1)  # noqa: S311
    left = iter(range(count))

    async def browser() -> None:
        for n in left:
            await drops.one(
                n % 2, rng.choice([rng.uniform(0, 0.02), rng.uniform(0, 0.3), rng.uniform(0, 1.5)])
            )

    drops.opened = drops.received = 0
    await asyncio.gather(*(browser() for _ in range(CONNECTING)))
    scores.note(
        f"{drops.opened:,} streams in {time.monotonic() - started:.0f} s, {drops.received:,} received an event"
    )
    until = time.monotonic() + 10
    while (open_now := len(os.listdir(f"/proc/{pid}/fd"))) > before and time.monotonic() < until:  # noqa: ASYNC110  nothing signals this
        await asyncio.sleep(0.5)
    await asyncio.to_thread(writers.end)
    if drops.refused:
        scores.note(f"{len(drops.refused)} were refused: {drops.refused[:3]}")
    scores.add("streams dropped", drops.opened - len(drops.refused), count, 1.0)
    scores.add("saw another's data", drops.foreign, 0, 1.0, less_is_better=True)
    scores.add("files open after, beyond before", max(0, open_now - before), 0, 1.0, less_is_better=True)


if __name__ == "__main__":
    sys.exit(main())
