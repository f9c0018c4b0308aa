"""Slow and many connections, against a started web process: whoever sends headers or a body too slowly is cut off,
one address has only so many connections, and everybody else is served meanwhile."""

from __future__ import annotations

import socket
import time
import urllib.request
from typing import Any

import pytest

from llmtuner.processes import raise_open_files_limit
from tests.factories import browser_of
from tests.jobs.views.makers import make_job

HALF = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
pytestmark = pytest.mark.slow
LONGEST_S = 90  # a verdict is about what is closed and what isn't; this only ends a test that waits in vain


def connect(port: int, first: bytes = b"") -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=LONGEST_S)
    s.sendall(first)
    return s


def health(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=LONGEST_S) as answer:
        return int(answer.status)


def is_closed(s: socket.socket) -> bool:
    """Whether the server has closed it, now; what it said before is read."""
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


def dripped_on(s: socket.socket, more: bytes = b"x") -> bool:
    """Sends a little more, as a slow client does. False when the connection has ended."""
    try:
        s.send(more)
    except OSError:
        return False
    return not is_closed(s)


def test_thousands_of_unfinished_requests_are_closed_while_others_are_served(start_web: Any):
    """More than web serves at once (4,000), each kept alive by a byte now and then, with the default limits."""
    raise_open_files_limit()
    port = start_web(WEB_MAX_CONNECTIONS_PER_ADDRESS="0")
    slow = [connect(port, HALF) for _ in range(4100)]
    deadline = time.monotonic() + LONGEST_S
    while slow and time.monotonic() < deadline:
        assert health(port) == 200
        slow = [s for s in slow if dripped_on(s) or s.close()]
        time.sleep(1)
    assert slow == []


def test_a_silent_connection_is_closed(start_web: Any):
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    assert connect(port).recv(100) == b""


def test_an_unfinished_request_gets_408(start_web: Any):
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    s = connect(port, HALF)
    assert s.recv(100).startswith(b"HTTP/1.1 408 ")
    s.settimeout(LONGEST_S)
    while s.recv(4096):
        pass


def test_empty_lines_do_not_keep_a_connection_open(start_web: Any):
    """Between two requests the parser skips them, and each would begin the wait anew."""
    port = start_web(WEB_HEADER_TIMEOUT_S="1")
    s = connect(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert s.recv(4096).startswith(b"HTTP/1.1 200 ")
    deadline = time.monotonic() + LONGEST_S
    while dripped_on(s, b"\r\n") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not dripped_on(s, b"\r\n")


def test_a_stalled_body_closes_its_connection(start_web: Any):
    port = start_web(WEB_BODY_TIMEOUT_S="1")
    s = connect(port, POST + b"half of the body")
    while s.recv(4096):
        pass


def test_a_slow_body_is_read_completely(start_web: Any):
    """Longer than both limits in all, and never silent for as long as one of them."""
    port = start_web(WEB_BODY_TIMEOUT_S="8", WEB_HEADER_TIMEOUT_S="5")
    s = connect(port, POST)
    for _ in range(20):
        s.sendall(b"x" * 50)
        time.sleep(0.5)
    assert s.recv(100).startswith(b"HTTP/1.1 4")  # 401 of the view or 400: it was asked


def test_the_connection_limit_is_per_address(start_web: Any):
    port = start_web(WEB_MAX_CONNECTIONS_PER_ADDRESS="20", WEB_HEADER_TIMEOUT_S="600")
    open_ones = [connect(port, HALF) for _ in range(20)]
    assert answers_another_address(port)  # and the 20 were accepted before it
    refused = connect(port)
    assert refused.recv(100).startswith(b"HTTP/1.1 429 ")
    open_ones.pop().close()
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:  # a place is free again once the server sees that one left
        s = connect(port)
        try:
            s.sendall(WHOLE)
            if s.recv(100).startswith(b"HTTP/1.1 200 "):
                return
        except ConnectionError:
            pass
        time.sleep(0.1)
    raise AssertionError("no place became free")


def test_oversized_headers_are_refused(start_web: Any):
    s = connect(start_web(WEB_HEADER_TIMEOUT_S="600"), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
    try:
        for _ in range(20):
            s.sendall(b"X-A: " + b"a" * 10_000 + b"\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 431 ")
    except ConnectionError:
        pass  # the end of the connection can arrive before the words


@pytest.mark.django_db(transaction=True)
def test_an_event_stream_is_not_cut_off(start_web: Any, alice: Any):
    port = start_web(WEB_BODY_TIMEOUT_S="5", WEB_HEADER_TIMEOUT_S="5")
    job = make_job(alice.owner_id)
    session = browser_of(alice).cookies["session"].value
    request = (
        f"GET /jobs/{job.job_id}/stream HTTP/1.1\r\nHost: localhost\r\nCookie: session={session}\r\n\r\n"
    )
    s = connect(port, request.encode())
    said = b""
    while b": ping\n" not in said:  # sent after 15 silent seconds
        piece = s.recv(4096)
        assert piece, said[-1000:]
        said += piece
    assert said.startswith(b"HTTP/1.1 200 ")


def test_connections_are_limited_by_default_except_behind_a_trusted_proxy(start_web: Any):
    refused = {}
    for proxies in ("0", "1"):
        port = start_web(TRUSTED_PROXY_COUNT=proxies, WEB_HEADER_TIMEOUT_S="600")
        many = [connect(port, HALF) for _ in range(300)]
        assert answers_another_address(port)  # connections are accepted in order, so all of the 300 were
        refused[proxies] = sum(is_closed(s) for s in many)
    assert refused == {"0": 300 - 256, "1": 0}


def answers_another_address(port: int) -> bool:
    s = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0), timeout=LONGEST_S)
    s.sendall(WHOLE)
    return s.recv(100).startswith(b"HTTP/1.1 200 ")
