"""`bin/bench upload`: a large file from the upload on the page to its report, while another user opens pages.

    bin/bench upload [--gigabytes 1]

The file is uploaded in parts as the page's script does it (three at a time), combined, and checked by a worker with the
starter model's tokenizer.
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

AT_ONCE = 3  # parts in parallel, as in static/js/upload.js
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
    """Sends the requests of the page's script."""

    port: int
    session: str

    def send(self, method: str, path: str, body: bytes, **headers: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        cookies = f"session={self.session}; csrf={CSRF}"
        own = {"Host": "localhost", "Cookie": cookies, "X-CSRFToken": CSRF, "Accept": "application/json"}
        connection.request(method, path, body, own | {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        assert response.status < 300, (path, response.status, content[:300])
        payload: dict[str, Any] = json.loads(content)
        return payload

    def post(self, path: str, **fields: object) -> dict[str, Any]:
        return self.send(
            "POST", path, urlencode(fields).encode(), Content_Type="application/x-www-form-urlencoded"
        )

    def upload(self, path: Path) -> str:
        """Returns the id of the dataset."""
        created = self.post("/datasets/uploads/", name=path.name, bytes=path.stat().st_size, mark="")

        def part(number: int) -> None:
            with path.open("rb") as file:
                file.seek((number - 1) * created["part_bytes"])
                data = file.read(created["part_bytes"])
            digest = hashlib.sha256(data).hexdigest()
            kind = "application/octet-stream"
            self.send("PUT", f"{created['url']}{number}/", data, Content_Type=kind, X_Part_Sha256=digest)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(part, range(1, -(-path.stat().st_size // created["part_bytes"]) + 1)))
        address = self.post(created["complete"])["url"]
        return address.strip("/").rpartition("/")[2]


async def measure(scores: Scores, environment: Any, browser: Browser, other: str, path: Path) -> None:
    from jobs.store import tables
    from jobs.store.tables import Dataset
    from tests.faults.environment import OWNER

    pid = environment.workers["web"].pid
    await visit(browser.port, other, PAGES, done=after(3))  # what the first page views load does not count
    before = resident(pid)
    reset_peak(pid)
    started = time.monotonic()
    times: dict[str, float] = {}

    def whole() -> Dataset:
        dataset_id = browser.upload(path)
        times["uploaded"] = time.monotonic() - started
        while True:
            dataset = tables.get(Dataset, OWNER, dataset_id)
            assert dataset
            if dataset.status != "checking":
                times["reported"] = time.monotonic() - started
                return dataset
            time.sleep(0.5)

    work = asyncio.create_task(asyncio.to_thread(whole))
    pages = await visit(browser.port, other, PAGES, work.done)
    dataset = await work
    with path.open("rb") as file:
        same = dataset.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    scores.note(
        f"{dataset.bytes / 1e9:.2f} GB: uploaded and combined in {times['uploaded']:.1f} s, reported after {times['reported']:.1f} s; "
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


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident(pid: int, what: str = "VmRSS") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
