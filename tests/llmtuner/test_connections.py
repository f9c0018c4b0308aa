"""Slow clients and many connections, against a started web process: a client that sends headers or a body too slowly is
disconnected, connections are limited per address, and everybody else is served meanwhile."""

from __future__ import annotations

import socket
import time
import urllib.request
from typing import Any

import pytest

from llmtuner.processes import raise_open_files_limit
from tests.factories import browser_of
from tests.jobs.views.makers import make_job

UNFINISHED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
COMPLETE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
pytestmark = pytest.mark.slow
TIMEOUT_S = 90  # only ends a test that would wait forever


def connect(port: int, first: bytes = b"") -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    s.sendall(first)
    return s


def health(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=TIMEOUT_S) as response:
        return int(response.status)


def is_closed(s: socket.socket) -> bool:
    """Whether the server has closed the connection. Reads what it has sent before."""
    s.setblocking(False)
    try:
        while s.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        s.setblocking(True)
    return True


def send_a_little(s: socket.socket, more: bytes = b"x") -> bool:
    """Sends a little more, as a slow client does. False if the connection has been closed."""
    try:
        s.send(more)
    except OSError:
        return False
    return not is_closed(s)


def test_thousands_of_unfinished_requests_are_closed_while_others_are_served(start_web: Any):
    """More than web serves at the same time (4,000), each kept alive by a byte per second, with the default timeouts."""
    raise_open_files_limit()
    port = start_web(WEB_MAX_CONNECTIONS_PER_ADDRESS="0")
    slow = [connect(port, UNFINISHED) for _ in range(4100)]
    deadline = time.monotonic() + TIMEOUT_S
    while slow and time.monotonic() < deadline:
        assert health(port) == 200
        still_open = [s for s in slow if send_a_little(s)]
        for s in set(slow) - set(still_open):
            s.close()
        slow = still_open
        time.sleep(1)
    assert slow == []


def test_a_silent_connection_is_closed(start_web: Any):
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    assert connect(port).recv(100) == b""


def test_an_unfinished_request_gets_408(start_web: Any):
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    s = connect(port, UNFINISHED)
    assert s.recv(100).startswith(b"HTTP/1.1 408 ")
    s.settimeout(TIMEOUT_S)
    while s.recv(4096):
        pass


def test_empty_lines_do_not_keep_a_connection_open(start_web: Any):
    """Between two requests the parser skips them, and each could restart the timeout."""
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    s = connect(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert s.recv(4096).startswith(b"HTTP/1.1 200 ")
    deadline = time.monotonic() + TIMEOUT_S
    while send_a_little(s, b"\r\n") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not send_a_little(s, b"\r\n")


def test_a_stalled_body_closes_its_connection(start_web: Any):
    port = start_web(WEB_BODY_TIMEOUT_S="1")
    s = connect(port, POST + b"half of the body")
    while s.recv(4096):
        pass


def test_a_slow_body_is_read_completely(start_web: Any):
    """In total it takes longer than both timeouts, but each pause is shorter than either."""
    port = start_web(WEB_BODY_TIMEOUT_S="8", WEB_HEADER_TIMEOUT_S="5")
    s = connect(port, POST)
    for _ in range(20):
        s.sendall(b"x" * 50)
        time.sleep(0.5)
    assert s.recv(100).startswith(b"HTTP/1.1 4")  # 401 or 400 from the view: the request reached it


def test_the_connection_limit_is_per_address(start_web: Any):
    port = start_web(WEB_MAX_CONNECTIONS_PER_ADDRESS="20", WEB_HEADER_TIMEOUT_S="600")
    connections = [connect(port, UNFINISHED) for _ in range(20)]
    assert serves_another_address(port)  # and the 20 were accepted before this one
    refused = connect(port)
    assert refused.recv(100).startswith(b"HTTP/1.1 429 ")
    connections.pop().close()
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:  # there is room again once the server notices that one was closed
        s = connect(port)
        try:
            s.sendall(COMPLETE)
            if s.recv(100).startswith(b"HTTP/1.1 200 "):
                return
        except ConnectionError:
            pass
        time.sleep(0.1)
    raise AssertionError("the closed connection still counts")


def test_oversized_headers_are_refused(start_web: Any):
    s = connect(start_web(WEB_HEADER_TIMEOUT_S="600"), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
    try:
        for _ in range(20):
            s.sendall(b"X-A: " + b"a" * 10_000 + b"\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 431 ")
    except ConnectionError:
        pass  # the reset can arrive before the response


@pytest.mark.django_db(transaction=True)
def test_an_event_stream_is_not_cut_off(start_web: Any, alice: Any):
    port = start_web(WEB_BODY_TIMEOUT_S="5", WEB_HEADER_TIMEOUT_S="5")
    job = make_job(alice.owner_id)
    session = browser_of(alice).cookies["session"].value
    request = (
        f"GET /jobs/{job.job_id}/stream HTTP/1.1\r\nHost: localhost\r\nCookie: session={session}\r\n\r\n"
    )
    s = connect(port, request.encode())
    received = b""
    while b": ping\n" not in received:  # sent after 15 seconds without events
        data = s.recv(4096)
        assert data, received[-1000:]
        received += data
    assert received.startswith(b"HTTP/1.1 200 ")


def test_connections_are_limited_by_default_except_behind_a_trusted_proxy(start_web: Any):
    refused = {}
    for proxies in ("0", "1"):
        port = start_web(TRUSTED_PROXY_COUNT=proxies, WEB_HEADER_TIMEOUT_S="600")
        connections = [connect(port, UNFINISHED) for _ in range(300)]
        assert serves_another_address(port)  # connections are accepted in order, so all of the 300 were
        refused[proxies] = sum(is_closed(s) for s in connections)
    assert refused == {"0": 300 - 256, "1": 0}


def serves_another_address(port: int) -> bool:
    s = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0), timeout=TIMEOUT_S)
    s.sendall(COMPLETE)
    return s.recv(100).startswith(b"HTTP/1.1 200 ")
