"""The web server's connections: how slow, and how many, one sender may be.

uvicorn waits for ever for the headers of a request and for its body, so a few thousand half requests would keep everybody
else out. This is its HTTP protocol with limits:

- the headers of a request must be complete WEB_HEADER_TIMEOUT_S after the connection was made, or after the first byte
  that follows an answer, and are bounded in size;
- while a body is awaited, no WEB_BODY_TIMEOUT_S may pass without a byte of it;
- an address has at most WEB_MAX_CONNECTIONS_PER_ADDRESS connections.

None of them applies while we answer: the stream of a live page stays open as long as its page.
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
TICKS = 10  # how often in WEB_BODY_TIMEOUT_S a silent body is looked at
_open: Counter[str] = Counter()  # connections by address


class BoundedProtocol(HttpToolsProtocol):
    """Given to uvicorn by `--http`."""

    _address = ""
    _header_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _heard = False  # a byte came since the body timer last looked
    _silent_ticks = 0

    # ---- how many ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        address = _counted_as(self.client)
        most = settings.WEB_MAX_CONNECTIONS_PER_ADDRESS
        if address and most:
            if _open[address] >= most:
                self._refuse(429, "Too many connections from your address.")
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

    # ---- how slow ----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._heard = True
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # no request whose headers are complete
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, "The request's headers are too large.")
                return
            self._start_header_timer()
        elif self.cycle.more_body and self._body_timer is None:
            self._silent_ticks = 0
            self._next_body_tick()

    def on_headers_complete(self) -> None:
        self._stop_header_timer()
        self._header_bytes = 0
        # Also when there are too many connections, a machine that asks how we are gets an answer.
        self.limit_concurrency = None if self.url in PROBES else self.config.limit_concurrency
        super().on_headers_complete()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(settings.WEB_HEADER_TIMEOUT_S, self._headers_are_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        if self._header_bytes:
            self._refuse(408, "The request's headers took too long.")
        else:  # a browser's spare connection: an answer that nobody asked for would be taken for the next one
            self.transport.close()

    def _next_body_tick(self) -> None:
        self._body_timer = self.loop.call_later(settings.WEB_BODY_TIMEOUT_S / TICKS, self._look_at_body)

    def _look_at_body(self) -> None:
        self._body_timer = None
        if self.transport.is_closing() or not self.cycle.more_body or self.cycle.response_complete:
            return
        # What we don't read, or haven't asked for yet, isn't late.
        if self._heard or self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
        self._heard = False
        if self._silent_ticks > TICKS:
            self.transport.close()  # the application hears that its sender has left
        else:
            self._next_body_tick()

    def _refuse(self, status: int, words: str) -> None:
        """Answers in place of the application, and closes."""
        body = words.encode()
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()


def _counted_as(client: tuple[str, int] | None) -> str:
    """An IPv4 address; of an IPv6 address its /64, of which a single machine may use every address."""
    if client is None:  # a Unix socket
        return ""
    address = ipaddress.ip_address(client[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
