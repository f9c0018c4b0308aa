"""What all responses under `/v1` share, including those that the framework makes itself: OpenAI's error format, no cookies."""

from __future__ import annotations

import re

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import Resolver404, resolve
from django.utils.decorators import sync_and_async_middleware

from jobs.api import errors
from llmtuner.middleware import Handler

PREFIX = "/v1/"
# What OpenAI's API has and ours does not, by the start of the path, with what to use instead.
UNSUPPORTED = {
    "/v1/fine-tunes": "Use /v1/fine_tuning/jobs.",
    "/v1/engines": "Use /v1/models.",
    "/v1/edits": "Use /v1/chat/completions.",
    "/v1/responses": "Use /v1/chat/completions.",
    "/v1/assistants": "Use /v1/chat/completions.",
    "/v1/threads": "Use /v1/chat/completions.",
    "/v1/batches": "Batches are not supported. Send each request to /v1/chat/completions.",
    "/v1/embeddings": "Embeddings are not supported.",
    "/v1/moderations": "Moderation is not supported.",
    "/v1/images": "Models here generate text only.",
    "/v1/audio": "Models here generate text only.",
}


@sync_and_async_middleware
def api_shell(get_response: Handler) -> Handler:
    """Middleware that comes before sessions and sign-in, so that they never see the cookies of an API call."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            if _lacks_prefix(request):
                return unknown_url(request)
            _drop_cookies(request)
            response = await get_response(request)
            return _as_api_response(request, response)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        if _lacks_prefix(request):
            return unknown_url(request)
        _drop_cookies(request)
        return _as_api_response(request, get_response(request))

    return middleware


# ---- unknown URLs ---------------------------------------------------------------


def is_call_without_prefix(path: str) -> bool:
    """Whether this would be one of OpenAI's paths with `/v1` in front of it."""
    path = _normalize(path)
    return _resolves(path) or bool(_unsupported(path))


def _lacks_prefix(request: HttpRequest) -> bool:
    """Whether the caller is a program whose base_url lacks `/v1`. Pages use some of the same paths (`/models/`), so it must be
    recognized: it sends a key, or it requests a path that is not a page and does not accept HTML."""
    path = request.path_info
    if path.startswith(PREFIX):
        return False
    has_key = request.headers.get("Authorization", "").startswith("Bearer ")
    wants_page = "text/html" in request.headers.get("Accept", "") or _resolves(path)
    return (has_key or not wants_page) and is_call_without_prefix(path)


def unknown_url(request: HttpRequest) -> HttpResponse:
    return errors.respond(unknown_url_error(request.method or "", request.path_info))


def unknown_url_error(method: str, path: str) -> errors.ApiError:
    message = f"Unknown request URL: {method} {path[:200]}. {_suggestion(path)}"
    return errors.ApiError(404, message, code="unknown_url")


def _suggestion(path: str) -> str:
    normal = _normalize(path)
    if not path.startswith(PREFIX) and is_call_without_prefix(path):
        return f"The API is under /v1: set base_url to {settings.PUBLIC_URL}/v1."
    if normal != path and _resolves(normal):
        return f"Use {normal}."
    return _unsupported(normal) or f"All endpoints are listed at {settings.PUBLIC_URL}/v1/docs."


def _normalize(path: str) -> str:
    """The path with exactly one `/v1` prefix, single slashes and no trailing slash."""
    path = re.sub("/{2,}", "/", f"{PREFIX}{path}").rstrip("/")
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    return path


def _unsupported(path: str) -> str:
    return next((message for start, message in UNSUPPORTED.items() if f"{path}/".startswith(f"{start}/")), "")


def _resolves(path: str) -> bool:
    try:
        resolve(path)
    except Resolver404:
        return False
    return True


# ---- responses ----------------------------------------------------------------------


def _drop_cookies(request: HttpRequest) -> None:
    if _is_call(request):
        request.META.pop("HTTP_COOKIE", None)  # a browser session must not authenticate an API call


def _is_call(request: HttpRequest) -> bool:
    # The docs are a page that shows who is signed in.
    path = str(request.path_info)
    return path.startswith(PREFIX) and path != f"{PREFIX}docs"


def _as_api_response(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    if not _is_call(request):
        return response
    match = request.resolver_match
    if response.status_code == 404 and (match is None or match.url_name == "api-root"):
        return unknown_url(request)
    kind = response.headers.get("Content-Type", "")
    if response.status_code >= 400 and not kind.startswith("application/json"):
        response = _as_json_error(request, response)
    response.headers.pop("Vary", None)
    return response


def _as_json_error(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    message, code = response.reason_phrase, None
    if response.status_code == 405:
        allowed = " or ".join(sorted(response.headers.get("Allow", "").split(", ")))
        message = f"{request.method} {request.path_info[:200]} is not allowed. Use {allowed}."
        code = "method_not_allowed"
    error = errors.respond(errors.ApiError(response.status_code, message, code=code))
    for name, value in response.headers.items():
        if name not in {"Content-Type", "Content-Length"}:
            error[name] = value
    return error
