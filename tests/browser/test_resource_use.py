"""Resource use of the running web process: none per open stream, none per downloaded byte."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.store import blobs, tables
from jobs.store.tables import TunedModel
from tests.factories import browser_of, make_user
from tests.jobs.views.makers import make_job, metric

pytestmark = pytest.mark.slow
GIGABYTE = 10**9


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def sql_connections(pid: int) -> int:
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(fd.readlink()).endswith("db.sqlite3")
        except OSError:
            continue
    return count


def peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def test_300_open_streams_use_no_threads_and_no_sql_connections(web: Any, transactional_db: None) -> None:
    pid, port = web.processes["web"].pid, int(web.url.rsplit(":", 1)[1])
    watched = []
    for n in range(15):
        user = make_user(f"watcher{n}")
        job = make_job(user.owner_id, lines=[metric(1), metric(2)])
        watched.append((f"/jobs/{job.job_id}/stream", browser_of(user).cookies["session"].value))

    async def watch(path: str, cookie: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # Each page from its own IP address, as from different clients.
        source = f"127.0.0.{2 + [path for path, _ in watched].index(path)}"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: session={cookie}\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"id: 2"), 60)
        return reader, writer

    async def run() -> tuple[int, int]:
        first = await watch(*watched[0])  # so that what the first stream starts is not counted
        opened = [first]
        before = threads(pid), sql_connections(pid)
        for path, cookie in watched:
            opened += await asyncio.gather(
                *(watch(path, cookie) for _ in range(19 if opened[1:] == [] else 20))
            )
        assert len(opened) == 300
        after = threads(pid), sql_connections(pid)
        for _, writer in opened:
            writer.close()
        return after[0] - before[0], after[1] - before[1]

    more_threads, more_connections = asyncio.run(run())
    assert more_threads <= 12  # the few helper threads of asyncio, independent of the number of streams
    assert more_connections <= 1


def test_downloading_a_gigabyte_takes_at_most_32_mb_of_memory(web: Any, transactional_db: None) -> None:
    user, prefix = make_user("downloader"), "models/gigabyte"
    path = blobs.local_path(f"{prefix}/model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(GIGABYTE)  # a sparse file
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    files = [{"name": "model.safetensors", "bytes": GIGABYTE, "sha256": digest}]
    model = TunedModel(user.owner_id, "ft:starter:big:x:1", prefix=prefix, files=files, bytes=GIGABYTE)
    tables.put_new(model)
    cookie = browser_of(user).cookies["session"].value
    pid, port = web.processes["web"].pid, int(web.url.rsplit(":", 1)[1])
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # reset the peak
    before = peak_memory(pid)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "GET",
        f"/models/{model.model_id}/download.zip",
        headers={"Host": "localhost", "Cookie": f"session={cookie}"},
    )
    response, size = connection.getresponse(), 0
    assert response.status == 200
    while block := response.read(1 << 20):
        size += len(block)
    assert size > GIGABYTE
    assert peak_memory(pid) - before <= 32 * 2**20
