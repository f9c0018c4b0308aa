"""A webhook that never responds delays nothing but its own deliveries, in a studio started by bin/up."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.journeys.local_stack import LocalStack

pytestmark = pytest.mark.slow

# Ten deliveries to the silent endpoint wait before a dataset is uploaded. How many of them have been tried once the dataset
# is checked, and once a delivery of another owner has arrived?
SCRIPT = """
import json, time
from jobs.store import access, tables
from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.notifications import webhooks
from jobs.store.tables import Job, WebhookDelivery, new_id

def wait(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise SystemExit("timed out")

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
def silent() -> Iterator[str]:
    """The URL of a server that accepts connections and never responds."""
    connections: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connections.append(server.accept()[0])

    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
    for connection in connections:
        connection.close()


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


def test_a_dataset_is_checked_while_a_webhook_hangs(local_stack: LocalStack, silent: str, prompt: str):
    """Tested by order: in one queue with the ten deliveries, the check and the other owner's delivery would come last."""
    local_stack.env["WEBHOOKS_ALLOW_PRIVATE"] = "1"
    local_stack.start()
    check_s, tries_at_check, tries_at_delivery = local_stack.run_script(
        SCRIPT.format(silent=silent, prompt=prompt)
    )
    print(
        json.dumps(
            {
                "the check took": check_s,
                "tries by then": tries_at_check,
                "tries by the other delivery": tries_at_delivery,
            }
        )
    )
    assert tries_at_check.count(0) > 0
    assert tries_at_delivery.count(0) > 0
