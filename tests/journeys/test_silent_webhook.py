"""A webhook that accepts and never answers holds up nothing but itself, in a really started studio."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.journeys.test_studio import House

pytestmark = pytest.mark.slow

# Ten deliveries to the silent address wait before a file comes. When its check has ended, and a delivery of somebody
# else has arrived, what has become of the ten?
SCRIPT = """
import json, time
from jobs.store import access, tables
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.store.tables import Job, WebhookDelivery, new_id

def wait(is_so):
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.1)
    raise SystemExit("it never came")

def end_a_job(owner):
    job = Job(owner, new_id("ftjob"), status="cancelled", ended_at=time.time())
    tables.put_new(job)
    webhooks.notify(job)

def deliveries(owner):
    return [row for row in tables.rows(WebhookDelivery, owner) if not row.delivery_id.endswith("#email")]

silent, prompt = {silent!r}, {prompt!r}
for n in range(10):
    webhooks.add_endpoint("user-silent", f"{{silent}}?{{n}}")
webhooks.add_endpoint("user-prompt", prompt)
end_a_job("user-silent")
wait(lambda: any(row.tries for row in deliveries("user-silent")))
dataset = datasets.receive("user-silent", "a.jsonl", iter([b'{{"prompt": "a", "completion": "b"}}\\n' * 20]))
end_a_job("user-prompt")
began = time.monotonic()
wait(lambda: access.get_dataset_for("user-silent", dataset.dataset_id).status == "ready")
checked_s = time.monotonic() - began
begun = [int(row.tries) for row in deliveries("user-silent")]
wait(lambda: deliveries("user-prompt")[0].status == "sent")
print(json.dumps([checked_s, begun, [int(row.tries) for row in deliveries("user-silent")]]))
"""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    house.env["WEBHOOKS_ALLOW_PRIVATE"] = "1"
    yield house
    if house.process and house.process.poll() is None:
        os.killpg(house.process.pid, signal.SIGINT)
        try:
            house.process.wait(60)
        except subprocess.TimeoutExpired:
            house.kill()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    kept: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                kept.append(server.accept()[0])

    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
    for one in kept:
        one.close()


@pytest.fixture
def prompt() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_dataset_is_checked_while_a_webhook_hangs(house: House, silent: str, prompt: str):
    """Judged by order: in one line with the ten deliveries the check comes after them, and so does somebody else's."""
    house.start()
    checked_s, at_check, at_others = house.ask(SCRIPT.format(silent=silent, prompt=prompt))
    print(
        json.dumps(
            {"the check took": checked_s, "tries by then": at_check, "by the other's delivery": at_others}
        )
    )
    assert at_check.count(0) > 0
    assert at_others.count(0) > 0
