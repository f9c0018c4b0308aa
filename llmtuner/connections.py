"""Limits on the web server's connections: timeouts for slow clients, and a maximum per address.

uvicorn waits forever for a request's headers and body, so a few thousand incomplete requests could lock everyone else out.
This is its HTTP protocol with limits:

- a request's headers must be complete within WEB_HEADER_TIMEOUT_S of the connection, or of the first byte after the
  previous response, and their size is limited;
- while a body is expected, no more than WEB_BODY_TIMEOUT_S may pass without a byte;
- an address may have at most WEB_MAX_CONNECTIONS_PER_ADDRESS connections.

There is no timeout while the server responds, because the stream of a live page stays open as long as the page.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from typing import Any

from django.conf import settings
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024  # the parser itself has no limit
PROBES = {b"/healthz", b"/readyz"}
TICKS = 10  # how often a silent body is checked within WEB_BODY_TIMEOUT_S
_open: Counter[str] = Counter()  # connections by address


class LimitedProtocol(HttpToolsProtocol):
    """Passed to uvicorn with `--http`."""

    _address = ""
    _header_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _received = False  # whether a byte arrived since the last check of the body
    _silent_ticks = 0

    # ---- limit per address ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        address = _address_key(self.client)
        limit = settings.WEB_MAX_CONNECTIONS_PER_ADDRESS
        if address and limit:
            if _open[address] >= limit:
                self._refuse(429, "Too many connections from your IP address.")
                return
            self._address = address
            _open[address] += 1
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        if self._body_timer:
            self._body_timer.cancel()
        if self._address:
            _open[self._address] -= 1
            if not _open[self._address]:
                del _open[self._address]
            self._address = ""
        super().connection_lost(exc)

    # ---- timeouts ----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received = True
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # headers of the next request are incomplete
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, "The request headers are too large.")
                return
            self._start_header_timer()
        elif self.cycle.more_body and self._body_timer is None:
            self._silent_ticks = 0
            self._next_body_tick()

    def on_headers_complete(self) -> None:
        self._stop_header_timer()
        self._header_bytes = 0
        # Health checks are answered even when there are too many connections.
        self.limit_concurrency = None if self.url in PROBES else self.config.limit_concurrency
        super().on_headers_complete()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(settings.WEB_HEADER_TIMEOUT_S, self._headers_timed_out)

    def _stop_header_timer(self) -> None:
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_timed_out(self) -> None:
        if self._header_bytes:
            self._refuse(408, "The request headers took too long.")
        else:  # a browser's idle connection: a response here would be taken as the response to its next request
            self.transport.close()

    def _next_body_tick(self) -> None:
        self._body_timer = self.loop.call_later(settings.WEB_BODY_TIMEOUT_S / TICKS, self._check_body)

    def _check_body(self) -> None:
        self._body_timer = None
        if self.transport.is_closing() or not self.cycle.more_body or self.cycle.response_complete:
            return
        # A body cannot be late while we have paused reading, or before we have sent 100 Continue.
        if self._received or self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
        self._received = False
        if self._silent_ticks > TICKS:
            self.transport.close()  # the application receives a disconnect
        else:
            self._next_body_tick()

    def _refuse(self, status: int, message: str) -> None:
        """Responds instead of the application, and closes the connection."""
        body = message.encode()
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()


def _address_key(client: tuple[str, int] | None) -> str:
    """The key for counting connections: an IPv4 address, or the /64 network of an IPv6 address, because a single machine may
    own the whole network."""
    if client is None:  # a Unix socket
        return ""
    address = ipaddress.ip_address(client[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
