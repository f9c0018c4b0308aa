"""A chaos proxy between our processes and a store, which makes their connections fail.

    python -m tests.faults.proxy LISTEN_PORT TARGET_PORT

Commands are lines on its standard input: `pass`, `latency 0.2`, `blackhole` (accept, never respond), `reset` (close all
connections and refuse new ones), `drop 0.3` (let a request through, but close before its response, with this
probability), `rate 50000` (bytes per second), `status 503 0.5` (respond with this status, with this probability).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys

from tests import services


class Proxy:
    def __init__(self, target: int) -> None:
        self.target = target
        self.mode, self.value = "pass", 0.0
        self.open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "reset":
            writer.transport.abort()
            return
        self.open.add(writer)
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self.open.add(target_writer)
        directions = [self.pump(reader, target_writer, writer), self.pump(target_reader, writer)]
        tasks = [asyncio.create_task(direction) for direction in directions]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for each in (writer, target_writer):
            self.open.discard(each)
            each.transport.abort()

    async def pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamWriter | None = None,
    ) -> None:
        """`back`: the writer to the client if `reader` reads requests; None for responses."""
        while data := await reader.read(1 << 16):
            while self.mode == "blackhole":  # noqa: ASYNC110  polling is good enough for a test
                await asyncio.sleep(0.05)
            if self.mode == "latency":
                await asyncio.sleep(self.value)
            if self.mode == "rate":
                await asyncio.sleep(len(data) / self.value)
            if self.mode == "drop" and back is None and random.random() < self.value:
                return
            if (
                self.mode.startswith("status")
                and back is not None
                and is_request(data)
                and random.random() < self.value
            ):
                await self.refuse(reader, back)
                return
            writer.write(data)
            await writer.drain()

    async def refuse(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        """Responds instead of the store, after the whole request has arrived."""
        with contextlib.suppress(TimeoutError):
            while await asyncio.wait_for(reader.read(1 << 16), 0.1):
                pass
        back.write(
            f"HTTP/1.1 {self.mode.split()[1]} Chaos\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        await back.drain()

    def order(self, line: str) -> None:
        self.mode, _, value = line.strip().rpartition(" ")
        if not self.mode:
            self.mode, value = value, "0"
        self.value = float(value)
        if self.mode == "reset":
            for writer in list(self.open):
                writer.transport.abort()


def is_request(data: bytes) -> bool:
    return data.split(b" ", 1)[0] in {b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"}


async def main(listen: int, target: int) -> None:
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", listen)
    async with server:
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            proxy.order(line)


class Chaos:
    """A proxy as a child process, for tests: `chaos.order("drop 0.3")`."""

    def __init__(self, target: int) -> None:
        self.port = services.free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.proxy", str(self.port), str(target)],
            cwd=services.ROOT,
            stdin=subprocess.PIPE,
            preexec_fn=services._die_with_parent,
        )

    def order(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
