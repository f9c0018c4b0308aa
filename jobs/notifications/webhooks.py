"""Notifies users that a job ended: signed webhooks (standardwebhooks.com) and email.

Each delivery is a row, which is stored before its message is enqueued. A sender increments `tries` before it posts, so after
a crash a notification may be sent twice, with the same `webhook-id`, but never skipped. Redirects are not followed, and the
connection is made to the address that was checked.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import SplitResult, urlsplit

from django.conf import settings
from django.core.mail import send_mail
from standardwebhooks import Webhook

from jobs.notifications.ip_ranges import is_public
from jobs.store import outbox, quotas, reasons, tables
from jobs.store.end_steps import step
from jobs.store.states import JobStatus
from jobs.store.tables import Job, WebhookDelivery, WebhookEndpoint, new_id

log = logging.getLogger(__name__)

SCHEDULE_S = (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
CONNECT_S = 5  # timeout for connecting, including TLS
TIMEOUT_S = 15  # timeout for each read of a response
DEADLINE_S = 30  # limit for the whole request, in case the response arrives slowly
MAX_ENDPOINTS = 10
EMAIL = "email"  # the ID of the endpoint for the owner's email address
AT_ONCE = 2  # concurrent deliveries per owner in a worker, which has 16 threads
TESTS_S = 60  # how long a test counts toward its owner's limit
EVENTS = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
EVENT_TYPES = tuple(f"fine_tuning.job.{status}" for status in EVENTS)
TEST_TYPE = "llmtuner.test"


class BadAddress(Exception):
    """The URL cannot be posted to. The message does not depend on the cause, so that it does not reveal which addresses have
    a server."""


# ---- endpoints -----------------------------------------------------------------------------------------------------


def add_endpoint(owner: str, url: str, name: str = "", events: tuple[str, ...] = ()) -> WebhookEndpoint:
    """Adds a webhook. Raises BadAddress. The secret is shown to the owner, who needs it to verify signatures."""
    split(url)
    if len(list_endpoints(owner)) >= MAX_ENDPOINTS:
        raise BadAddress(f"You already have {MAX_ENDPOINTS} webhooks. Delete one first.")
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    endpoint = WebhookEndpoint(owner, new_id("hook"), url=url, secret=secret, name=name, events=list(events))
    tables.put_new(endpoint)
    return endpoint


def list_endpoints(owner: str) -> list[WebhookEndpoint]:
    return [row for row in tables.rows(WebhookEndpoint, owner) if row.endpoint_id != EMAIL]


def find_endpoint(owner: str, endpoint_id: str) -> WebhookEndpoint | None:
    if not 0 < len(endpoint_id) <= 200 or endpoint_id == EMAIL:
        return None
    return tables.get(WebhookEndpoint, owner, endpoint_id)


def remove_endpoint(owner: str, endpoint_id: str) -> None:
    tables.remove(WebhookEndpoint, owner, endpoint_id)


def set_email(owner: str, address: str) -> None:
    """Sets the address for email about the owner's jobs; empty for none. It is stored with the webhooks because the workers
    that send email have no SQL database. It is set at every submission and whenever it changes in SQL."""
    url, active = f"mailto:{address}", bool(address)
    row = tables.get(WebhookEndpoint, owner, EMAIL)
    if row is None or (row.url, row.active) != (url, active):
        WebhookEndpoint(owner, EMAIL, url=url, secret="", active=active).save()


# ---- notify --------------------------------------------------------------------------------------------------------


@step(30)
def notify(job: Job) -> None:
    """Creates a delivery for each endpoint that wants the event. Idempotent."""
    if job.status not in EVENTS or job.deleted:
        return
    event = f"fine_tuning.job.{job.status}"
    body = {"id": f"evt-{job.job_id}-{job.status}", "object": "event", "type": event}
    payload = json.dumps(body | {"created_at": int(job.ended_at or 0), "data": {"id": job.job_id}})
    wanted = [endpoint.endpoint_id for endpoint in list_endpoints(job.owner) if _wants(endpoint, event)]
    for endpoint_id in [EMAIL, *wanted]:  # whether email is wanted is checked when it is sent
        _put(job.owner, f"{job.job_id}#{job.status}#{endpoint_id}", event, job.job_id, payload)


def send_test(endpoint: WebhookEndpoint) -> None:
    """Sends a signed test event, so that the owner can check the receiver. It belongs to no job and is sent only once. Raises
    OverQuota."""
    id = new_id("test")
    for old in quotas.held(endpoint.owner, "tests"):
        if time.time() - tables.time_of(old) > TESTS_S:
            quotas.release(endpoint.owner, "tests", old)
    try:
        quotas.take(endpoint.owner, "tests", id)
    except quotas.OverQuota:
        most = settings.JOBS["max_webhook_tests_per_owner"]
        raise quotas.OverQuota(
            f"You can send {most} test events a minute. Wait a minute, then try again."
        ) from None
    body = {"id": f"evt-{id}", "object": "event", "type": TEST_TYPE, "created_at": int(time.time())}
    payload = json.dumps(body | {"data": {"id": id}})
    _put(endpoint.owner, f"{id}#test#{endpoint.endpoint_id}", TEST_TYPE, "", payload)


def recent(owner: str, limit: int) -> list[WebhookDelivery]:
    """The last deliveries with their status, newest first."""
    rows = []
    for kind in ("ftjob-", "test-"):
        keys = WebhookDelivery.delivery_id.startswith(kind)
        rows += list(
            WebhookDelivery.query(owner, keys, scan_index_forward=False, limit=limit, consistent_read=True)
        )
    return sorted(rows, key=lambda row: float(row.created_at), reverse=True)[:limit]


def _wants(endpoint: WebhookEndpoint, event: str) -> bool:
    return endpoint.active and (not endpoint.events or event in endpoint.events)


def _put(owner: str, delivery_id: str, event: str, job_id: str, payload: str) -> None:
    delivery = WebhookDelivery(owner, delivery_id, event=event, job_id=job_id, payload=payload)
    outbox.put("deliver", owner, delivery_id)
    if tables.put_new(delivery):
        outbox.enqueue("deliver", owner, delivery_id)


class PerOwner:
    """Runs at most AT_ONCE deliveries per owner at a time. The others wait in order, without occupying a thread. If the
    process dies, the reconciler enqueues them again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: defaultdict[str, dict[str, Callable[[], None]]] = defaultdict(dict)

    def run(self, owner: str, name: str, work: Callable[[], None]) -> None:
        """Runs `work` and then the owner's waiting deliveries, or leaves it to a thread that is already running them. It waits
        under its name, so a repeated message does not add it twice."""
        with self._lock:
            if self._running[owner] >= AT_ONCE:
                self._waiting[owner][name] = work
                return
            self._running[owner] += 1
        following: Callable[[], None] | None = work
        while following:
            try:
                following()
            except Exception:
                log.exception("delivery for %s", owner)
            following = self._following(owner)

    def _following(self, owner: str) -> Callable[[], None] | None:
        with self._lock:
            if waiting := self._waiting.get(owner):
                return waiting.pop(next(iter(waiting)))
            self._waiting.pop(owner, None)
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            return None


DELIVERIES = PerOwner()


@outbox.handler("deliver")
def deliver(owner: str, delivery_id: str) -> bool:
    """Tries once to deliver the notification, if it is due. Returns True if nothing is left to do."""
    delivery = tables.get(WebhookDelivery, owner, delivery_id)
    if delivery is None or delivery.status != "pending":
        return True
    if time.time() < delivery.next_at:
        return False
    # A test is tried only once, because its sender sees the result.
    most = 1 if delivery.event == TEST_TYPE else len(SCHEDULE_S)
    if delivery.tries >= most:  # the last try was interrupted
        return _record(delivery, "given up", delivery.last_result or "the delivery was interrupted")
    tries = int(delivery.tries) + 1
    wait = SCHEDULE_S[tries] if tries < most else 0
    actions = [WebhookDelivery.tries.set(tries), WebhookDelivery.next_at.set(time.time() + wait)]
    if not tables.update(delivery, actions, WebhookDelivery.tries == delivery.tries):
        return False  # another sender was first
    sent, result, final = _send(delivery)
    return _record(delivery, "sent" if sent else "given up" if final or tries >= most else "pending", result)


def _record(delivery: WebhookDelivery, status: str, result: str) -> bool:
    """Records the result of a try. Returns True if there will be no further tries."""
    actions = [WebhookDelivery.status.set(status), WebhookDelivery.last_result.set(result[:200])]
    tables.update(delivery, actions, WebhookDelivery.status == "pending")
    return status != "pending"


def _send(delivery: WebhookDelivery) -> tuple[bool, str, bool]:
    """(sent, the result, whether it is final)."""
    endpoint_id = delivery.delivery_id.rpartition("#")[2]
    endpoint = tables.get(WebhookEndpoint, delivery.owner, endpoint_id)
    if endpoint is None or not endpoint.active:
        return False, "email is turned off" if endpoint_id == EMAIL else "the webhook was removed", True
    if endpoint_id == EMAIL:
        return _mail(delivery, endpoint.url.removeprefix("mailto:"))
    try:
        status = post(endpoint.url, delivery.payload.encode(), signed(endpoint.secret, delivery))
    except Exception as error:  # an error caused by the receiver must end only this try
        log.info("webhook %s: %r", delivery.delivery_id, error)
        return _record_result(endpoint, False, "the address could not be reached", False)
    return _record_result(endpoint, 200 <= status < 300, f"responded with status {status}", status == 410)


def _record_result(endpoint: WebhookEndpoint, sent: bool, result: str, final: bool) -> tuple[bool, str, bool]:
    """Stores the result with the endpoint. An endpoint that responded 410 is disabled."""
    actions = [WebhookEndpoint.last_result.set(result)]
    if final:
        actions.append(WebhookEndpoint.active.set(False))
    tables.update(endpoint, actions, WebhookEndpoint.url.exists())
    return sent, result, final


def signed(secret: str, delivery: WebhookDelivery, now: float | None = None) -> dict[str, str]:
    """The three headers required by Standard Webhooks."""
    id = "msg_" + hashlib.sha256(delivery.delivery_id.encode()).hexdigest()[:32]
    seconds = int(time.time() if now is None else now)
    signature = Webhook(secret).sign(id, datetime.fromtimestamp(seconds, UTC), delivery.payload)
    return {"webhook-id": id, "webhook-timestamp": str(seconds), "webhook-signature": signature}


# ---- post ----------------------------------------------------------------------------------------------------------


def split(url: str) -> SplitResult:
    """Parses the URL once, for both the check and the connection. Raises BadAddress."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
        host.encode("idna")  # the resolver does this too; it refuses empty and overlong labels
    except ValueError:
        raise BadAddress("Webhooks cannot be sent to this address. Use a public https:// address.") from None
    schemes = {"https", "http"} if _allows_private() else {"https"}
    odd = any(not "!" <= letter <= "~" or letter in "\\@" for letter in url) or port == 0 or len(url) > 2000
    if parts.scheme not in schemes or not 0 < len(host) <= 253 or odd:
        raise BadAddress("Enter an https:// address without a username or password.")
    return parts


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    """Posts to the address that was checked; returns the status. Raises BadAddress, OSError."""
    parts = split(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = str(parts.hostname)
    sock = socket.create_connection((_checked_address(host, port), port), timeout=CONNECT_S)
    connection = http.client.HTTPConnection(host, port)
    deadline = threading.Timer(DEADLINE_S, lambda: _hang_up(sock))
    deadline.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()
        sock.settimeout(TIMEOUT_S)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        all_headers = {"Content-Type": "application/json", "User-Agent": "LLM-Tuner-Webhooks/1", **headers}
        connection.request("POST", path, body, all_headers)
        return connection.getresponse().status  # the body is not read
    finally:
        deadline.cancel()
        connection.close()
        sock.close()


def _hang_up(sock: socket.socket) -> None:
    """Ends the request of another thread that is waiting on the socket. It bypasses TLS, whose state belongs to that thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _checked_address(host: str, port: int) -> str:
    addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not addresses or not all(_allows_private() or is_public(address) for address in addresses):
        raise BadAddress("Webhooks cannot be sent to this address. Use a public https:// address.")
    return sorted(addresses)[0]


def _allows_private() -> bool:
    return bool(settings.WEBHOOKS_ALLOW_PRIVATE)


# ---- email ---------------------------------------------------------------------------------------------------------


def _mail(delivery: WebhookDelivery, address: str) -> tuple[bool, str, bool]:
    job = tables.get(Job, delivery.owner, delivery.job_id)
    if job is None or job.deleted:
        return False, "the job was deleted", True
    try:
        send_mail(_subject(job), _text(job), None, [address])
    except Exception as error:  # an error must end only this try
        log.warning("mail for %s: %r", delivery.delivery_id, error)
        return False, "the mail server did not accept it", False
    return True, "sent", True


def _subject(job: Job) -> str:
    words: dict[str, str] = {
        JobStatus.SUCCEEDED: "is ready",
        JobStatus.FAILED: "failed",
        JobStatus.CANCELLED: "was cancelled",
    }
    word = words[job.status]
    return " ".join(f"“{job.name}” {word}".split())


def _text(job: Job) -> str:
    lines = [_subject(job) + "."]
    if job.status == JobStatus.FAILED:
        lines += [job.message or reasons.sentence(job.reason), job.advice or reasons.advice(job.reason)]
    if job.status == JobStatus.SUCCEEDED:
        lines.append(f"Model: {job.model_id}")
    return "\n\n".join([*filter(None, lines), f"{settings.PUBLIC_URL}/jobs/{job.job_id}/"]) + "\n"
