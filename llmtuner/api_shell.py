"""What every answer under `/v1` shares, also where the framework answers by itself: OpenAI's error shape, no cookies."""

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
# What OpenAI has and this studio has not, by the beginning of its address.
MISSING = {
    "/v1/fine-tunes": "Use /v1/fine_tuning/jobs.",
    "/v1/engines": "Use /v1/models.",
    "/v1/edits": "Use /v1/chat/completions.",
    "/v1/responses": "Use /v1/chat/completions.",
    "/v1/assistants": "Use /v1/chat/completions.",
    "/v1/threads": "Use /v1/chat/completions.",
    "/v1/batches": "This studio has no batches: send each request to /v1/chat/completions.",
    "/v1/embeddings": "This studio has no embeddings.",
    "/v1/moderations": "This studio has no moderation.",
    "/v1/images": "The models of this studio write text only.",
    "/v1/audio": "The models of this studio write text only.",
}


@sync_and_async_middleware
def api_shell(get_response: Handler) -> Handler:
    """Stands before sessions and sign-in, so that these never see a cookie of an API call."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            if _lacks_prefix(request):
                return unknown_url(request)
            _forget_cookies(request)
            response = await get_response(request)
            return _in_shape(request, response)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        if _lacks_prefix(request):
            return unknown_url(request)
        _forget_cookies(request)
        return _in_shape(request, get_response(request))

    return middleware


# ---- addresses that do not exist ---------------------------------------------------------------


def is_call_without_prefix(path: str) -> bool:
    """Would this address be one of OpenAI's with `/v1` before it?"""
    path = _tidy(path)
    return _resolves(path) or bool(_missing(path))


def _lacks_prefix(request: HttpRequest) -> bool:
    """A program whose base_url lacks `/v1`. Pages share a few addresses (`/models/`), so the caller must be a program:
    it sends a key, or asks for an address that is no page without wanting HTML."""
    path = request.path_info
    if path.startswith(PREFIX):
        return False
    with_key = request.headers.get("Authorization", "").startswith("Bearer ")
    for_page = "text/html" in request.headers.get("Accept", "") or _resolves(path)
    return (with_key or not for_page) and is_call_without_prefix(path)


def unknown_url(request: HttpRequest) -> HttpResponse:
    return errors.respond(unknown_url_error(request.method or "", request.path_info))


def unknown_url_error(method: str, path: str) -> errors.ApiError:
    message = f"Unknown request URL: {method} {path[:200]}. {_instead(path)}"
    return errors.ApiError(404, message, code="unknown_url")


def _instead(path: str) -> str:
    tidy = _tidy(path)
    if not path.startswith(PREFIX) and is_call_without_prefix(path):
        return f"The API is under /v1: set base_url to {settings.PUBLIC_URL}/v1."
    if tidy != path and _resolves(tidy):
        return f"Use {tidy}."
    return _missing(tidy) or f"All calls are listed at {settings.PUBLIC_URL}/v1/docs."


def _tidy(path: str) -> str:
    """With one `/v1` before it, single slashes and none at the end."""
    path = re.sub("/{2,}", "/", f"{PREFIX}{path}").rstrip("/")
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    return path


def _missing(path: str) -> str:
    return next((words for start, words in MISSING.items() if f"{path}/".startswith(f"{start}/")), "")


def _resolves(path: str) -> bool:
    try:
        resolve(path)
    except Resolver404:
        return False
    return True


# ---- the shape of answers ----------------------------------------------------------------------


def _forget_cookies(request: HttpRequest) -> None:
    if _is_call(request):
        request.META.pop("HTTP_COOKIE", None)  # a session never speaks for a program


def _is_call(request: HttpRequest) -> bool:
    # The docs are a page: they show who is signed in.
    return request.path_info.startswith(PREFIX) and request.path_info != f"{PREFIX}docs"


def _in_shape(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    if not _is_call(request):
        return response
    match = request.resolver_match
    if response.status_code == 404 and (match is None or match.url_name == "api-root"):
        return unknown_url(request)
    kind = response.headers.get("Content-Type", "")
    if response.status_code >= 400 and not kind.startswith("application/json"):
        response = _retold(request, response)
    response.headers.pop("Vary", None)
    return response


def _retold(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    message, code = response.reason_phrase, None
    if response.status_code == 405:
        allowed = " or ".join(sorted(response.headers.get("Allow", "").split(", ")))
        message = f"{request.method} {request.path_info[:200]} is not allowed. Use {allowed}."
        code = "method_not_allowed"
    told = errors.respond(errors.ApiError(response.status_code, message, code=code))
    for name, value in response.headers.items():
        if name not in {"Content-Type", "Content-Length"}:
            told[name] = value
    return told
