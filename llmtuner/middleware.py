"""Middleware for all requests. None of it needs a thread under ASGI, so that open streams do not hold one."""

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


def response_hook(hook: Callable[[HttpRequest, HttpResponseBase], None], get_response: Handler) -> Handler:
    """A sync and async middleware that only handles the response."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            response = await get_response(request)
            hook(request, response)
            return response

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        hook(request, response)
        return response

    return middleware


@sync_and_async_middleware
def request_id(get_response: Handler) -> Handler:
    """Gives each request an ID, which appears in its response, its log lines and its error page."""

    def begin(request: HttpRequest) -> None:
        request.request_id = "req_" + secrets.token_hex(12)
        current_request_id.set(request.request_id)

    def end(request: HttpRequest, response: HttpResponseBase) -> None:
        response.headers.setdefault("X-Request-ID", request.request_id)

    inner = response_hook(end, get_response)
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
    """Escapes line breaks in a message, so that nobody can forge a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


# ---- headers -----------------------------------------------------------------------------------

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # daisyUI draws check marks as data: images
        "connect-src 'self' {bucket}",
        "font-src 'self'",
        # Browsers also apply form-action to the redirect after a form, and the Google button is such a form.
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
    """The origin to which the upload page may send file parts directly: the bucket, if there is one."""
    from jobs.store import blobs

    try:
        return blobs.direct_origin()
    except Exception:  # without credentials no link can be signed, so parts are sent through this server
        log.warning("cannot upload directly to the bucket", exc_info=True)
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
            # Pages are private: no cache may store them, not even the browser's, where they would outlast signing out.
            response.headers.setdefault("Cache-Control", "no-store, private")

    return response_hook(add, get_response)


# ---- unavailable stores ----------------------------------------------------------------


@sync_and_async_middleware
def unreachable_stores(get_response: Handler) -> Handler:
    """Responds with 503, not 500, if a store is unreachable or misconfigured."""

    def process_exception(request: HttpRequest, exception: Exception) -> HttpResponse | None:
        # Imported late, because logging imports this module before the settings exist.
        from jobs.store import errors as store_errors

        state = store_errors.outage(exception)
        if state is None:
            return None
        log.error("a store is %s: %s", state, exception)
        problem = errors.MISCONFIGURED if state == store_errors.MISCONFIGURED else None
        return errors.respond(request, 503, problem=problem)

    middleware = response_hook(lambda request, response: None, get_response)
    middleware.process_exception = process_exception  # type: ignore[attr-defined]  # Django looks for it there
    return middleware


# ---- unparsable input ------------------------------------------------------------------------


@sync_and_async_middleware
def unreadable_input(get_response: Handler) -> Handler:
    """Responds with 400 if a number is too long or JSON is nested too deeply for Python. Django and allauth handle neither
    error, and Python has no separate exception classes for them."""

    def process_exception(request: HttpRequest, exception: Exception) -> HttpResponse | None:
        message = str(exception)
        if (
            (isinstance(exception, ValueError) and "integer string conversion" in message)
            or (isinstance(exception, RecursionError) and "decoding a JSON" in message)
            or (isinstance(exception, OverflowError) and "too large to convert" in message)  # SQLite
            or (isinstance(exception, DataError) and "out of range" in message)  # PostgreSQL
        ):
            return errors.respond(request, 400)
        return None

    middleware = response_hook(lambda request, response: None, get_response)
    middleware.process_exception = process_exception  # type: ignore[attr-defined]  # Django looks for it there
    return middleware


# ---- static files ------------------------------------------------------------------------------

_TEXT = re.compile(r"\.(css|js|svg|json|txt)$")


@sync_and_async_middleware
def static_files(get_response: Handler) -> Handler:
    """Sends static files. WhiteNoise finds the file, and we send it in one piece, because a streamed response would need a
    thread under ASGI."""
    with warnings.catch_warnings():
        if not settings.PRODUCTION:
            warnings.simplefilter("ignore")  # static files are not collected there
        whitenoise = WhiteNoiseMiddleware(lambda request: None)

    def serve(request: HttpRequest) -> HttpResponse | None:
        path = request.path_info
        file = whitenoise.find_file(path) if whitenoise.autorefresh else whitenoise.files.get(path)
        if file is None:
            return None
        served = file.get_response(request.method, request.META)
        body = b""
        if served.file is not None:
            with served.file:
                body = served.file.read()
        response = HttpResponse(body, status=int(served.status), headers=dict(served.headers))
        if served.status == 200 and _TEXT.search(path) and not response.has_header("Content-Encoding"):
            patch_vary_headers(response, ["Accept-Encoding"])
            if "gzip" in request.headers.get("Accept-Encoding", "") and body:
                response.content = _compressed(body)
                response["Content-Encoding"] = "gzip"
                response["Content-Length"] = str(len(response.content))
        return response

    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            if request.path_info.startswith(settings.STATIC_URL):
                response = await sync_to_async(serve, thread_sensitive=False)(request)
                if response is not None:
                    return response
            return await get_response(request)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = serve(request) if request.path_info.startswith(settings.STATIC_URL) else None
        return response or get_response(request)

    return middleware


@lru_cache(maxsize=64)
def _compressed(body: bytes) -> bytes:
    return gzip.compress(body, 6, mtime=0)
