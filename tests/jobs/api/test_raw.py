"""Requests as no client of good will writes them: one answer each, and nothing after it is taken for a second request."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from tests.jobs.api.conftest import Person

SECOND = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"

WRONG = {
    "length and chunks": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + SECOND,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + SECOND,
    "two lengths in one": POST + b"Content-Length: 0, 44\r\n\r\n" + SECOND,
    "a signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + SECOND,
    "a length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "another encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two encodings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "an encoding behind a tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a folded header": GET + b"X-A: one\r\n two\r\nTransfer-Encoding\r\n : chunked\r\n\r\n",
    "a header without a colon": GET + b"nonsense\r\n\r\n",
    "a null in a header": GET + b"X-A: a\x00b\r\n\r\n",
    "a bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "a negative chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "another host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "an absolute address": b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "a header of 100 KB": GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "10,000 headers": GET + b"".join(b"X-%d: a\r\n" % i for i in range(10_000)) + b"\r\n",
    "an unknown protocol": b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no protocol": b"GET /v1/models\r\n\r\n",
    "a lower-case verb": b"get /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}


def answers(web: Any, raw: bytes) -> tuple[list[int], bytes]:
    """The statuses of all answers on one connection, and all that was said."""
    port = int(web.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        output = b""
        try:
            s.sendall(raw.replace(b"Host: localhost", b"Host: localhost:%d" % port, 1))
            while piece := s.recv(65536):
                output += piece
                s.settimeout(0.7)  # a second answer would follow at once
        except (TimeoutError, ConnectionError):
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", output)], output


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_once(web: Any, name: str):
    statuses, output = answers(web, WRONG[name])
    assert len(statuses) <= 1, output[:2000]
    assert set(statuses) <= {400, 401, 404, 405, 411, 413, 431, 501, 505}
    assert b"smuggled" not in output
    assert b"Traceback" not in output


@pytest.mark.parametrize("header", ["Authorization", "authorization", "AUTHORIZATION"])
def test_a_header_counts_in_any_case(web: Any, people: dict[str, Person], header: str):
    credential = f"{header}: Bearer {people['alice'].reader}\r\nConnection: close\r\n\r\n"
    assert answers(web, GET + credential.encode())[0] == [200]


@pytest.mark.parametrize(
    "header", ["X_Api_Key", "X-Forwarded-Authorization", "Proxy-Authorization", "X-Authorization"]
)
def test_a_header_like_it_does_not(web: Any, people: dict[str, Person], header: str):
    credential = f"{header}: Bearer {people['alice'].reader}\r\nConnection: close\r\n\r\n"
    assert answers(web, GET + credential.encode())[0] == [401]
