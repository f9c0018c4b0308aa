"""What every request passes first. Each works without a thread under ASGI: a held stream must cost none."""

from __future__ import annotations

import gzip
import logging
import re
import secrets
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.conf import settings
from django.db import DataError
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.cache import patch_vary_headers
from django.utils.decorators import sync_and_async_middleware
from whitenoise.middleware import WhiteNoiseMiddleware

from llmtuner import errors

log = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], HttpResponseBase]

# ---- request ids -------------------------------------------------------------------------------

current_request_id: ContextVar[str] = ContextVar("request_id", default="-")


def around(wrap: Callable[[HttpRequest, HttpResponseBase], None], get_response: Handler) -> Handler:
    """A middleware that only looks at the answer, in both worlds."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            response = await get_response(request)
            wrap(request, response)
            return response

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        wrap(request, response)
        return response

    return middleware


@sync_and_async_middleware
def request_id(get_response: Handler) -> Handler:
    """A number for each request: in its answer, in its log lines, on the page that says something broke."""

    def begin(request: HttpRequest) -> None:
        request.request_id = "req_" + secrets.token_hex(12)
        current_request_id.set(request.request_id)

    def end(request: HttpRequest, response: HttpResponseBase) -> None:
        response.headers.setdefault("X-Request-ID", request.request_id)

    inner = around(end, get_response)
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            begin(request)
            return await inner(request)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        begin(request)
        return inner(request)

    return middleware


class RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = current_request_id.get()
        return True


class OneLine(logging.Formatter):
    """Line ends inside a message are written out, so that nobody can forge a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


# ---- headers -----------------------------------------------------------------------------------

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # daisyUI draws its ticks as data: images
        "connect-src 'self' {bucket}",
        "font-src 'self'",
        # Browsers also apply form-action to where the answer to a form redirects: the Google button is such a form.
        "form-action 'self' {google}",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "manifest-src 'self'",
    ]
)


def _google_origin() -> str:
    authorize = settings.GOOGLE_ENDPOINTS.get("AUTHORIZE_URL")
    return "/".join(authorize.split("/")[:3]) if authorize else "https://accounts.google.com"


@lru_cache(maxsize=1)
def _bucket_origin() -> str:
    """Where the page with the upload may send parts of files: the bucket, if there is one."""
    from jobs.store import blobs

    try:
        return blobs.direct_origin()
    except Exception:  # without credentials nothing is signed, and the parts go through us
        logging.getLogger(__name__).warning("uploads can't go straight to the bucket", exc_info=True)
        return ""


@sync_and_async_middleware
def security_headers(get_response: Handler) -> Handler:
    google = _google_origin()

    def add(request: HttpRequest, response: HttpResponseBase) -> None:
        bucket = _bucket_origin() if request.path_info == "/datasets/" else ""
        policy = CONTENT_SECURITY_POLICY.format(google=google, bucket=bucket)
        response.headers.setdefault("Content-Security-Policy", policy.replace(" ;", ";"))
        response.headers.setdefault(
            "Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"
        )
        response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        if not request.path_info.startswith(settings.STATIC_URL):
            # Pages belong to one person: no cache may keep them, not even the browser's once signed out.
            response.headers.setdefault("Cache-Control", "no-store, private")

    return around(add, get_response)


# ---- a store that does not answer ----------------------------------------------------------------


@sync_and_async_middleware
def unreachable_stores(get_response: Handler) -> Handler:
    """Says with 503 that a store is away, or set up incorrectly, instead of that something broke."""

    def process_exception(request: HttpRequest, exception: Exception) -> HttpResponse | None:
        from jobs.store import (
            errors as store_errors,  # late: logging imports this module before there are settings
        )

        state = store_errors.outage(exception)
        if state is None:
            return None
        log.error("a store is %s: %s", state, exception)
        problem = errors.MISCONFIGURED if state == store_errors.MISCONFIGURED else None
        return errors.respond(request, 503, problem=problem)

    middleware = around(lambda request, response: None, get_response)
    middleware.process_exception = process_exception  # type: ignore[attr-defined]  # Django looks for it there
    return middleware


# ---- what nobody can read ------------------------------------------------------------------------


@sync_and_async_middleware
def unreadable_input(get_response: Handler) -> Handler:
    """Says 400 where a number is too long or JSON too deep for Python: Django and allauth do not expect that of a body, and
    no exception of its own tells either."""

    def process_exception(request: HttpRequest, exception: Exception) -> HttpResponse | None:
        words = str(exception)
        if (
            (isinstance(exception, ValueError) and "integer string conversion" in words)
            or (isinstance(exception, RecursionError) and "decoding a JSON" in words)
            or (isinstance(exception, OverflowError) and "too large to convert" in words)  # SQLite
            or (isinstance(exception, DataError) and "out of range" in words)  # PostgreSQL
        ):
            return errors.respond(request, 400)
        return None

    middleware = around(lambda request, response: None, get_response)
    middleware.process_exception = process_exception  # type: ignore[attr-defined]  # Django looks for it there
    return middleware


# ---- static files ------------------------------------------------------------------------------

_TEXT = re.compile(r"\.(css|js|svg|json|txt)$")


@sync_and_async_middleware
def static_files(get_response: Handler) -> Handler:
    """WhiteNoise finds the file; we answer it whole, because its streamed answer would need a thread under ASGI."""
    with warnings.catch_warnings():
        if not settings.PRODUCTION:
            warnings.simplefilter("ignore")  # nothing is collected there, and need not be
        noise = WhiteNoiseMiddleware(lambda request: None)

    def serve(request: HttpRequest) -> HttpResponse | None:
        path = request.path_info
        file = noise.find_file(path) if noise.autorefresh else noise.files.get(path)
        if file is None:
            return None
        found = file.get_response(request.method, request.META)
        body = b""
        if found.file is not None:
            with found.file:
                body = found.file.read()
        answer = HttpResponse(body, status=int(found.status), headers=dict(found.headers))
        if found.status == 200 and _TEXT.search(path) and not answer.has_header("Content-Encoding"):
            patch_vary_headers(answer, ["Accept-Encoding"])
            if "gzip" in request.headers.get("Accept-Encoding", "") and body:
                answer.content = _compressed(body)
                answer["Content-Encoding"] = "gzip"
                answer["Content-Length"] = str(len(answer.content))
        return answer

    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            if request.path_info.startswith(settings.STATIC_URL):
                found = await sync_to_async(serve, thread_sensitive=False)(request)
                if found is not None:
                    return found
            return await get_response(request)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        found = serve(request) if request.path_info.startswith(settings.STATIC_URL) else None
        return found or get_response(request)

    return middleware


@lru_cache(maxsize=64)
def _compressed(body: bytes) -> bytes:
    return gzip.compress(body, 6, mtime=0)
