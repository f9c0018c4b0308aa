"""`bin/bench upload`: a large file from a page's upload to its report, while other pages are looked at.

    bin/bench upload [--gigabytes 1]

The file goes up in parts as the page's script sends them (three at once), is put together, and is checked with the
starter's tokenizer by a worker. Meanwhile another person looks at pages.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.check import write_chats
from benchmarks.common import Scores, quantile, visit

AT_ONCE = 3  # as static/js/upload.js
CSRF = "a" * 32
PAGES = ["/jobs/", "/jobs/new/", "/datasets/", "/models/"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench upload", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()

    from tests.faults import environment as env

    env.prepare_environment()
    environment, scores = env.start_environment(), Scores()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(folder) / "chats.jsonl"
            write_chats(path, int(options.gigabytes * 1e9))
            uploader, reader = environment.person(), environment.person("user-other")
            environment.start_web()
            environment.start_worker("checks", "checks")
            asyncio.run(
                measure(scores, environment, Browser(env.web_port(), uploader.session), reader.session, path)
            )
        return scores.end()
    finally:
        environment.stop()


@dataclass
class Browser:
    """What the page's script does, over HTTP."""

    port: int
    session: str

    def send(self, method: str, path: str, body: bytes, **headers: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        cookies = f"session={self.session}; csrf={CSRF}"
        own = {"Host": "localhost", "Cookie": cookies, "X-CSRFToken": CSRF, "Accept": "application/json"}
        connection.request(method, path, body, own | {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        reply = answer.read()
        connection.close()
        assert answer.status < 300, (path, answer.status, reply[:300])
        found: dict[str, Any] = json.loads(reply)
        return found

    def ask(self, path: str, **fields: object) -> dict[str, Any]:
        return self.send(
            "POST", path, urlencode(fields).encode(), Content_Type="application/x-www-form-urlencoded"
        )

    def upload(self, path: Path) -> str:
        """The id of the dataset."""
        created = self.ask("/datasets/uploads/", name=path.name, bytes=path.stat().st_size, mark="")

        def part(number: int) -> None:
            with path.open("rb") as file:
                file.seek((number - 1) * created["part_bytes"])
                data = file.read(created["part_bytes"])
            digest = hashlib.sha256(data).hexdigest()
            kind = "application/octet-stream"
            self.send("PUT", f"{created['url']}{number}/", data, Content_Type=kind, X_Part_Sha256=digest)

        with ThreadPoolExecutor(AT_ONCE) as lanes:
            list(lanes.map(part, range(1, -(-path.stat().st_size // created["part_bytes"]) + 1)))
        address = self.ask(created["complete"])["url"]
        return address.strip("/").rpartition("/")[2]


async def measure(scores: Scores, environment: Any, browser: Browser, other: str, path: Path) -> None:
    from jobs.store import tables
    from jobs.store.tables import Dataset
    from tests.faults.environment import OWNER

    pid = environment.workers["web"].pid
    await visit(browser.port, other, PAGES, enough=after(3))  # what the first views load is there before
    before = resident(pid)
    forget_peak(pid)
    began = time.monotonic()
    times: dict[str, float] = {}

    def whole() -> Dataset:
        dataset_id = browser.upload(path)
        times["uploaded"] = time.monotonic() - began
        while True:
            dataset = tables.get(Dataset, OWNER, dataset_id)
            assert dataset
            if dataset.status != "checking":
                times["reported"] = time.monotonic() - began
                return dataset
            time.sleep(0.5)

    work = asyncio.create_task(asyncio.to_thread(whole))
    pages = await visit(browser.port, other, PAGES, work.done)
    dataset = await work
    with path.open("rb") as file:
        same = dataset.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    scores.note(
        f"{dataset.bytes / 1e9:.2f} GB: uploaded and put together in {times['uploaded']:.1f} s, reported after {times['reported']:.1f} s; "
        f"{dataset.summary.get('rows', 0):,} rows, {dataset.summary.get('tokens', 0):,} tokens"
    )
    scores.note(f"pages: {len(pages)}, median {quantile(pages, 0.5):.3f} s, worst {pages[-1]:.3f} s")
    scores.add("stored as sent, and ready", float(same and dataset.status == "ready"), 1, 1.0)
    grown = (resident(pid, "VmHWM") - before) / 2**20
    scores.add("web's memory grown, MB", max(grown, 0.1), 64, 1.0, less_is_better=True)
    scores.add("other pages, p99 s", quantile(pages, 0.99), 0.3, 1.0, less_is_better=True)


def after(seconds: float) -> Any:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident(pid: int, what: str = "VmRSS") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
