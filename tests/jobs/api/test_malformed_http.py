"""Malformed HTTP requests: each gets at most one response, and trailing bytes are never treated as a second request."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from tests.jobs.api.conftest import ApiUser

SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"

MALFORMED = {
    "Content-Length, then chunked": POST
    + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked, then Content-Length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + SMUGGLED,
    "two lengths in one header": POST + b"Content-Length: 0, 44\r\n\r\n" + SMUGGLED,
    "a length with a plus sign": POST + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "a length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "an unknown transfer encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two transfer encodings": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a vertical tab before the encoding": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a folded header": GET + b"X-A: one\r\n two\r\nTransfer-Encoding\r\n : chunked\r\n\r\n",
    "a header without a colon": GET + b"nonsense\r\n\r\n",
    "a null in a header": GET + b"X-A: a\x00b\r\n\r\n",
    "a bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "a negative chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "another host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "an absolute URL of another host": b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "a header of 100 KB": GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "10,000 headers": GET + b"".join(b"X-%d: a\r\n" % i for i in range(10_000)) + b"\r\n",
    "an unknown protocol": b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no protocol": b"GET /v1/models\r\n\r\n",
    "a lowercase method": b"get /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}


def send_raw(web: Any, raw: bytes) -> tuple[list[int], bytes]:
    """The statuses of all responses on one connection, and all bytes received."""
    port = int(web.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        output = b""
        try:
            connection.sendall(raw.replace(b"Host: localhost", b"Host: localhost:%d" % port, 1))
            while received := connection.recv(65536):
                output += received
                connection.settimeout(0.7)  # a second response would follow at once
        except (TimeoutError, ConnectionError):
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", output)], output


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_at_most_one_response(web: Any, name: str) -> None:
    statuses, output = send_raw(web, MALFORMED[name])
    assert len(statuses) <= 1, output[:2000]
    assert set(statuses) <= {400, 401, 404, 405, 411, 413, 431, 501, 505}
    assert b"smuggled" not in output
    assert b"Traceback" not in output


@pytest.mark.parametrize("header", ["Authorization", "authorization", "AUTHORIZATION"])
def test_header_names_are_case_insensitive(web: Any, users: dict[str, ApiUser], header: str) -> None:
    credential = f"{header}: Bearer {users['alice'].reader}\r\nConnection: close\r\n\r\n"
    assert send_raw(web, GET + credential.encode())[0] == [200]


@pytest.mark.parametrize(
    "header", ["X_Api_Key", "X-Forwarded-Authorization", "Proxy-Authorization", "X-Authorization"]
)
def test_similar_headers_do_not_authenticate(web: Any, users: dict[str, ApiUser], header: str) -> None:
    credential = f"{header}: Bearer {users['alice'].reader}\r\nConnection: close\r\n\r\n"
    assert send_raw(web, GET + credential.encode())[0] == [401]
