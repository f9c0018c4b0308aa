"""Workers do not use SQL: started with an unreachable database, they check a dataset and send the email about a job."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from email import message_from_string
from typing import Any

import pytest
from django.urls import reverse

from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.store import access, tables
from jobs.store.tables import WebhookDelivery
from tests.conftest import Studio
from tests.factories import browser_of, make_user
from tests.jobs.views.makers import make_dataset
from tests.services import wait_until

pytestmark = pytest.mark.slow
NOWHERE = "postgres://nobody:nothing@127.0.0.1:1/none"  # nothing listens on port 1


class SmtpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SmtpHandler)
        self.received: list[str] = []


class SmtpHandler(socketserver.StreamRequestHandler):
    """The part of SMTP that a client needs to deliver a message."""

    server: SmtpServer

    def handle(self) -> None:
        self.wfile.write(b"220 mail.example\r\n")
        while line := self.rfile.readline():
            word = line[:4].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                message = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.received.append(message.decode())
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
            if word == b"QUIT":
                return


@pytest.fixture
def mail_server() -> Iterator[SmtpServer]:
    with SmtpServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def workers(stores, folder, monkeypatch, mail_server) -> Iterator[Studio]:
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    monkeypatch.setenv("EMAIL_URL", f"smtp://127.0.0.1:{mail_server.server_address[1]}")
    studio = Studio(os.environ["PUBLIC_URL"], folder)
    for queue in ("checks", "notifications"):
        studio.start(f"{queue}-without-sql", "llmtuner", "worker", queue)
    yield studio
    studio.stop()


def wait_for(studio: Studio, condition: Callable[[], Any]) -> None:
    wait_until(condition, 120, lambda: "\n".join(studio.log(name)[-2000:] for name in studio.processes))


def test_a_worker_without_sql_checks_files_and_sends_mail(workers: Studio, mail_server, db):
    alice = make_user("alice")
    browser_of(alice).post(
        reverse("jobs:new_job"),
        {"dataset": make_dataset(alice.owner_id).dataset_id, "base": "starter", "name": "Orders"},
    )
    (job,) = access.list_jobs(alice.owner_id).rows
    transitions.set_desired(alice.owner_id, job.job_id, "cancel")
    wait_for(workers, lambda: mail_server.received)
    message = message_from_string(mail_server.received[0])
    assert message["To"] == alice.email
    assert job.job_id in mail_server.received[0]

    def delivery_status() -> str:
        row = tables.get(WebhookDelivery, alice.owner_id, f"{job.job_id}#cancelled#email")
        return row.status if row else ""

    wait_for(workers, lambda: delivery_status() == "sent")
    dataset = datasets.receive(
        alice.owner_id, "a.jsonl", iter([b'{"prompt": "a", "completion": "b"}\n' * 20])
    )
    wait_for(workers, lambda: access.get_dataset_for(alice.owner_id, dataset.dataset_id).status == "ready")
    assert len(mail_server.received) == 1
