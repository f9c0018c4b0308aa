"""Webhooks and emails about jobs: signed, retried until they are delivered, and never sent to private addresses."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from django.core import mail
from django.core.mail.backends.base import BaseEmailBackend

from jobs.lifecycle import finalize
from jobs.notifications import webhooks
from jobs.store import outbox, quotas, tables
from jobs.store.tables import WebhookDelivery, WebhookEndpoint
from tests.jobs.makers import make_claim, make_job, make_owner, result

pytestmark = pytest.mark.usefixtures("stores")


@pytest.fixture
def receiver(settings):
    """A local server with configurable response statuses. It keeps the requests it receives."""
    settings.WEBHOOKS_ALLOW_PRIVATE = True
    requests, statuses = [], [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.requests, server.statuses = requests, statuses
    server.url = f"http://127.0.0.1:{server.server_port}/hook?x=1"
    yield server
    server.shutdown()


def ended_job(owner, url):
    endpoint = webhooks.add_endpoint(owner, url)
    claim = make_claim(make_job(owner))
    claim.finish("succeeded", result=result(claim))
    finalize.after_end(owner, claim.job_id)
    return claim, endpoint, f"{claim.job_id}#succeeded#{endpoint.endpoint_id}"


def delivery_of(owner, id):
    return tables.get(WebhookDelivery, owner, id)


def make_due(owner, id):
    WebhookDelivery(owner, id).update(actions=[WebhookDelivery.next_at.set(0)])


def test_the_official_client_accepts_our_signature(receiver):
    claim, endpoint, id = ended_job(make_owner(), receiver.url)
    assert webhooks.deliver(claim.owner, id)
    headers, body = receiver.requests[0]
    client = openai.OpenAI(api_key="x", webhook_secret=endpoint.secret)
    event = client.webhooks.unwrap(body.decode(), headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", claim.job_id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.decode().replace("succeeded", "cancelled"), headers)


def test_a_failed_delivery_is_sent_again_with_the_same_id(receiver):
    receiver.statuses[:] = [500, 302, 200]
    claim, _, id = ended_job(make_owner(), receiver.url)
    for wait in (5, 300):
        before = time.time()
        assert not webhooks.deliver(claim.owner, id)
        after = time.time()
        assert before + wait <= delivery_of(claim.owner, id).next_at <= after + wait
        if wait == 300:
            assert not webhooks.deliver(claim.owner, id)  # not yet due
        make_due(claim.owner, id)
    assert webhooks.deliver(claim.owner, id)
    assert len(receiver.requests) == 3  # redirects are not followed
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1
    assert delivery_of(claim.owner, id).status == "sent"


def stored_endpoint(owner, url):
    """An endpoint that was added before such URLs were refused."""
    endpoint = WebhookEndpoint(owner, tables.new_id("hook"), url=url, secret="whsec_" + "A" * 40)
    tables.put_new(endpoint)
    return endpoint


def put_delivery(endpoint, **fields):
    id = f"ftjob-1#succeeded#{endpoint.endpoint_id}"
    tables.put_new(WebhookDelivery(endpoint.owner, id, event="x", job_id="ftjob-1", payload="{}", **fields))
    return id


@pytest.mark.parametrize(
    "url", [f"https://{'a' * 300}/", "https://..../", "https://example.com/\0", "https://[x/"]
)
def test_an_invalid_stored_url_ends_the_try(url):
    endpoint = stored_endpoint(make_owner(), url)
    id = put_delivery(endpoint)
    assert not webhooks.deliver(endpoint.owner, id)
    row = delivery_of(endpoint.owner, id)
    assert (row.tries, row.status, row.last_result) == (1, "pending", "the address could not be reached")


def test_an_unexpected_exception_ends_the_try(receiver, monkeypatch):
    endpoint = webhooks.add_endpoint(make_owner(), receiver.url)
    id = put_delivery(endpoint)

    def fail(*args, **options):
        raise RuntimeError("resolver error")

    monkeypatch.setattr(webhooks.socket, "getaddrinfo", fail)
    assert not webhooks.deliver(endpoint.owner, id)
    assert delivery_of(endpoint.owner, id).last_result == "the address could not be reached"


def test_a_delivery_is_given_up_before_anything_is_posted(receiver):
    """Otherwise a worker that dies after each post would post forever."""
    endpoint = webhooks.add_endpoint(make_owner(), receiver.url)
    id = put_delivery(endpoint, tries=len(webhooks.SCHEDULE_S), last_result="answered 500")
    assert webhooks.deliver(endpoint.owner, id)
    row = delivery_of(endpoint.owner, id)
    assert (row.status, row.tries, row.last_result) == ("given up", len(webhooks.SCHEDULE_S), "answered 500")
    assert receiver.requests == []


def test_a_test_delivery_is_not_retried(receiver):
    receiver.statuses[:] = [500]
    endpoint = webhooks.add_endpoint(make_owner(), receiver.url)
    webhooks.send_test(endpoint)
    (row,) = tables.rows(WebhookDelivery, endpoint.owner)
    assert webhooks.deliver(endpoint.owner, row.delivery_id)
    row = delivery_of(endpoint.owner, row.delivery_id)
    assert (row.status, row.last_result) == ("given up", "responded with status 500")


def test_test_deliveries_are_limited(settings, receiver, monkeypatch):
    settings.JOBS = settings.JOBS | {"max_webhook_tests_per_owner": 3}
    endpoint = webhooks.add_endpoint(make_owner(), receiver.url)
    for _ in range(3):
        webhooks.send_test(endpoint)
    with pytest.raises(quotas.OverQuota, match="Wait a minute"):
        webhooks.send_test(endpoint)
    assert len(list(tables.rows(WebhookDelivery, endpoint.owner))) == 3
    webhooks.send_test(webhooks.add_endpoint(make_owner(), receiver.url))  # the limit is per owner
    monkeypatch.setattr(webhooks, "TESTS_S", -1)  # a minute later
    webhooks.send_test(endpoint)
    assert len(quotas.held(endpoint.owner, "tests")) == 1


def test_status_410_deactivates_the_endpoint(receiver):
    receiver.statuses[:] = [410]
    claim, endpoint, id = ended_job(make_owner(), receiver.url)
    assert webhooks.deliver(claim.owner, id)
    assert not tables.get(WebhookEndpoint, claim.owner, endpoint.endpoint_id).active


def test_a_delivery_is_given_up_after_all_tries(receiver):
    receiver.statuses[:] = [500]
    claim, _, id = ended_job(make_owner(), receiver.url)
    for _ in webhooks.SCHEDULE_S:
        make_due(claim.owner, id)
        finished = webhooks.deliver(claim.owner, id)
    assert finished
    assert delivery_of(claim.owner, id).status == "given up"
    assert len(receiver.requests) == len(webhooks.SCHEDULE_S)


def test_each_end_is_delivered_once_however_often_its_steps_run(receiver):
    claim, _, id = ended_job(make_owner(), receiver.url)
    outbox.run("deliver", claim.owner, id, "")
    for _ in range(3):
        finalize.after_end(claim.owner, claim.job_id)
        assert webhooks.deliver(claim.owner, id)
    assert len(receiver.requests) == 1


def test_the_body_is_small_and_contains_only_the_job_id(receiver):
    claim, _, id = ended_job(make_owner(), receiver.url)
    body = json.loads(delivery_of(claim.owner, id).payload)
    assert body["data"] == {"id": claim.job_id}
    assert len(delivery_of(claim.owner, id).payload) < 1000


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "ftp://example.com/", "file:///etc/passwd", "gopher://x/", "https://", "//x", "x",
        "https://user@example.com/", "https://a@b@c/", "https://exa\\mple.com/", "https://example.com:0/",
        "https://example.com:99999/", "https://exämple.com/", "https://x/\r\nHost: y", "https://x y/",
        "javascript:alert(1)", "https://[::1", "", "https://..../", "https://a..b/", "https://.example.com/",
        f"https://{'a' * 300}/", f"https://{'a.' * 130}example/", "https://example.com/\0", "https://exa\0mple.com/",
        "https://example.com/\x7f", "https://example.com/?\x01",
    ],
)  # fmt: skip
def test_malformed_urls_are_refused(url):
    with pytest.raises(webhooks.BadAddress):
        webhooks.add_endpoint(make_owner(), url)


def test_posting_to_an_accepted_url_raises_only_expected_errors(monkeypatch):
    """Random URLs: each is refused when it is added, or can be requested."""
    resolve = socket.getaddrinfo  # numeric only, so that no name server is queried

    def numeric(host, port, **options):
        return resolve(host, port, flags=socket.AI_NUMERICHOST, **options)

    monkeypatch.setattr(webhooks.socket, "getaddrinfo", numeric)
    rng, accepted = random.Random(3), 0
    parts = [
        "a",
        "b.",
        ".",
        "..",
        ":",
        "/",
        "?",
        "#",
        "%",
        "%00",
        "[",
        "]",
        "::1",
        "1",
        "-",
        "_",
        "é",
        "\0",
        "~",
        "x" * 64,
    ]
    for _ in range(5000):
        url = "https://" + "".join(rng.choices(parts, k=rng.randrange(1, 8)))
        try:
            webhooks.split(url)
        except webhooks.BadAddress:
            continue
        accepted += 1
        with pytest.raises((webhooks.BadAddress, OSError)):
            webhooks.post(url, b"", {})
    assert accepted > 100


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "localhost", "localhost.", "[::]",
        "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.1.1",
        "100.64.0.1", "198.18.0.1", "[fd00::1]", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1",
        "255.255.255.255", "[ff02::1]", "240.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_never_connected_to(host, monkeypatch):
    monkeypatch.setattr(
        webhooks.socket, "create_connection", lambda *args, **options: pytest.fail("connected")
    )
    with pytest.raises((webhooks.BadAddress, OSError)):
        webhooks.post(f"https://{host}/", b"", {})


def test_a_name_with_a_private_address_is_refused_and_only_the_checked_address_is_used(monkeypatch):
    connected = []

    def connect(address, **options):
        connected.append(address)
        raise OSError

    addresses = {"inside": ["93.184.216.34", "10.0.0.1"], "outside": ["93.184.216.34"]}
    resolve = lambda host, port, **options: [(0, 0, 0, "", (ip, port)) for ip in addresses[host]]  # noqa: E731
    monkeypatch.setattr(webhooks.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(webhooks.socket, "create_connection", connect)
    with pytest.raises(webhooks.BadAddress):
        webhooks.post("https://inside/", b"", {})
    with pytest.raises(OSError):  # noqa: PT011  raised by connect above
        webhooks.post("https://outside/", b"", {})
    assert connected == [("93.184.216.34", 443)]


def test_a_response_that_never_ends_is_given_up(settings, monkeypatch):
    """It would occupy a worker thread."""
    settings.WEBHOOKS_ALLOW_PRIVATE = True
    monkeypatch.setattr(webhooks, "DEADLINE_S", 0.5)
    done = threading.Event()

    def drip(server):
        with suppress(OSError):
            connection, _ = server.accept()
            while not done.wait(0.05):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        with pytest.raises((OSError, http.client.HTTPException)):  # while the server is still sending
            webhooks.post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"", {})
        done.set()


def test_connecting_has_a_shorter_timeout_than_the_response(settings, monkeypatch):
    """The test only ends if connecting has its own timeout."""
    assert webhooks.CONNECT_S == 5
    settings.WEBHOOKS_ALLOW_PRIVATE = True
    monkeypatch.setattr(webhooks, "CONNECT_S", 0.2)
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 3600)
    with socket.socket() as full:  # its backlog is full, so the kernel accepts no connection
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with ExitStack() as clients:
            while True:
                client = clients.enter_context(socket.socket())
                client.settimeout(0.5)
                try:
                    client.connect(full.getsockname())
                except TimeoutError:
                    break
            with pytest.raises(TimeoutError):
                webhooks.post(f"http://127.0.0.1:{full.getsockname()[1]}/", b"", {})


def test_the_tls_handshake_has_the_same_short_timeout(settings, monkeypatch):
    settings.WEBHOOKS_ALLOW_PRIVATE = True
    monkeypatch.setattr(webhooks, "CONNECT_S", 0.2)
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 3600)
    monkeypatch.setattr(webhooks, "DEADLINE_S", 3600)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        webhooks.post(f"https://127.0.0.1:{silent.getsockname()[1]}/", b"", {})


class BlockedDeliveries:
    """Deliveries that block until `finish` is set, and a count of how many ran at the same time."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running = self.max_running = 0
        self.order = []
        self.started = threading.Semaphore(0)
        self.finish = threading.Event()

    def delivery(self, name):
        def run():
            with self.lock:
                self.running += 1
                self.max_running = max(self.max_running, self.running)
                self.order.append(name)
            self.started.release()
            assert self.finish.wait(60)
            with self.lock:
                self.running -= 1

        return run


def test_slow_deliveries_of_one_owner_leave_threads_for_others():
    """With the threads for two owners, eight blocked deliveries of one owner leave room for the other."""
    deliveries, alices, bobs = webhooks.PerOwner(), BlockedDeliveries(), BlockedDeliveries()
    with ThreadPoolExecutor(2 * webhooks.AT_ONCE) as threads:
        futures = [threads.submit(deliveries.run, "alice", str(n), alices.delivery(n)) for n in range(8)]
        for _ in range(webhooks.AT_ONCE):
            assert alices.started.acquire(timeout=60)
        bobs.finish.set()
        threads.submit(deliveries.run, "bob", "b", bobs.delivery("b")).result(60)
        assert bobs.order == ["b"]
        assert (
            len(alices.order) == webhooks.AT_ONCE
        )  # Bob's delivery is done while Alice's first ones still block
        alices.finish.set()
        for future in futures:
            future.result(60)
    assert alices.max_running == webhooks.AT_ONCE
    assert sorted(alices.order) == list(range(8))


def test_a_waiting_delivery_is_kept_once_however_often_it_is_enqueued():
    deliveries, blocked = webhooks.PerOwner(), BlockedDeliveries()
    with ThreadPoolExecutor(webhooks.AT_ONCE) as threads:
        futures = [
            threads.submit(deliveries.run, "alice", str(n), blocked.delivery(n))
            for n in range(webhooks.AT_ONCE)
        ]
        for _ in futures:
            assert blocked.started.acquire(timeout=60)
        for _ in range(5):
            deliveries.run("alice", "later", blocked.delivery("later"))
        blocked.finish.set()
        for future in futures:
            future.result(60)
    assert blocked.order.count("later") == 1


def test_an_unexpected_failure_does_not_block_other_deliveries(monkeypatch):
    monkeypatch.setattr(webhooks, "AT_ONCE", 1)
    deliveries, done = webhooks.PerOwner(), []

    def fail():
        deliveries.run("alice", "later", lambda: done.append("later"))
        assert not done
        raise RuntimeError("the store is unavailable")

    deliveries.run("alice", "failing", fail)
    assert done == ["later"]
    deliveries.run("alice", "last", lambda: done.append("last"))
    assert done == ["later", "last"]


def test_the_owner_is_notified_by_email(alice):
    webhooks.set_email(alice.owner_id, alice.notification_email)
    claim = make_claim(make_job(alice.owner_id, name="orders\nBcc: x"))
    claim.finish("failed", "not_finite")
    finalize.after_end(alice.owner_id, claim.job_id)
    assert webhooks.deliver(alice.owner_id, f"{claim.job_id}#failed#email")
    (message,) = mail.outbox
    assert message.to == [alice.email]
    assert "failed" in message.subject
    assert "\n" not in message.subject
    assert "learning rate" in message.body
    assert claim.job_id in message.body


def test_without_an_address_no_email_is_sent():
    owner = make_owner()
    claim = make_claim(make_job(owner))
    claim.finish("failed", "bad_data")
    finalize.after_end(owner, claim.job_id)
    assert webhooks.deliver(owner, f"{claim.job_id}#failed#email")
    assert delivery_of(owner, f"{claim.job_id}#failed#email").last_result == "email is turned off"
    assert mail.outbox == []


class FailingBackend(BaseEmailBackend):
    def send_messages(self, messages):
        raise RuntimeError("mail server error")


def test_an_unexpected_email_exception_ends_the_try(settings):
    settings.EMAIL_BACKEND = f"{__name__}.FailingBackend"
    owner = make_owner()
    webhooks.set_email(owner, "alice@example.com")
    claim = make_claim(make_job(owner))
    claim.finish("failed", "bad_data")
    finalize.after_end(owner, claim.job_id)
    id = f"{claim.job_id}#failed#email"
    assert not webhooks.deliver(owner, id)
    row = delivery_of(owner, id)
    assert (row.status, row.tries, row.last_result) == ("pending", 1, "the mail server did not accept it")


def test_the_email_address_is_not_listed_as_a_webhook():
    owner = make_owner()
    webhooks.set_email(owner, "alice@example.com")
    assert webhooks.list_endpoints(owner) == []
    assert webhooks.find_endpoint(owner, "email") is None
