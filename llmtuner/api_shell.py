"""What every answer under `/v1` shares, also where the framework answers by itself: OpenAI's error shape, no cookies."""

from __future__ import annotations

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponseBase
from django.utils.decorators import sync_and_async_middleware

from jobs.api import errors
from llmtuner.middleware import Handler

PREFIX = "/v1/"


@sync_and_async_middleware
def api_shell(get_response: Handler) -> Handler:
    """Stands before sessions and sign-in, so that these never see a cookie of an API call."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            _forget_cookies(request)
            response = await get_response(request)
            return _in_shape(request, response)

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        _forget_cookies(request)
        return _in_shape(request, get_response(request))

    return middleware


def _forget_cookies(request: HttpRequest) -> None:
    if _is_call(request):
        request.META.pop("HTTP_COOKIE", None)  # a session never speaks for a program


def _is_call(request: HttpRequest) -> bool:
    # The docs are a page: they show who is signed in.
    return request.path_info.startswith(PREFIX) and request.path_info != f"{PREFIX}docs"


def _in_shape(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    if not _is_call(request):
        return response
    kind = response.headers.get("Content-Type", "")
    if response.status_code >= 400 and not kind.startswith("application/json"):
        response = _retold(request, response)
    response.headers.pop("Vary", None)
    return response


def _retold(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    words = {
        404: f"Unknown request URL: {request.method} {request.path_info}. See {PREFIX}docs.",
        405: f"{request.method} is not allowed here.",
    }
    message = words.get(response.status_code, response.reason_phrase)
    code = "unknown_url" if response.status_code == 404 else None
    told = errors.respond(errors.ApiError(response.status_code, message, code=code))
    for name, value in response.headers.items():
        if name not in {"Content-Type", "Content-Length"}:
            told[name] = value
    return told
