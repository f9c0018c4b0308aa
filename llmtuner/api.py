"""`/v1`: the API that OpenAI's clients already speak, put together.

`api.urls` is the door, `ApiShell` (a middleware) what every answer under it shares: a request id, no caching, no
cookies in either direction, and OpenAI's error shape also where the framework answers by itself.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction, markcoroutinefunction
from typing import Any

from django.http import HttpRequest, HttpResponseBase
from ninja import NinjaAPI

from jobs.api import bodies, chat, errors, files, fine_tuning, models, uploads
from llmtuner.api_docs import Docs

DESCRIPTION = """Files, uploads, fine-tuning jobs, models, completions and chat completions, as OpenAI's clients expect them.
Set `base_url` to this address and `api_key` to a key from your account's page. What this studio knows beyond that
stands under `llmtuner`, in requests and in answers."""


class Api(NinjaAPI):
    def on_exception(self, request: HttpRequest, exc: Any) -> Any:
        return errors.handle(request, exc)


api = Api(
    title="LLM Tuner",
    version="1.0.0",
    description=DESCRIPTION,
    urls_namespace="v1",
    docs=Docs(),
    parser=bodies.StrictParser(),
    renderer=bodies.Renderer(),
    openapi_extra={"info": {"license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}},
)
api.add_router("/files", files.router, tags=["Files"])
api.add_router("/uploads", uploads.router, tags=["Uploads"])
api.add_router("/fine_tuning/jobs", fine_tuning.router, tags=["Fine-tuning"])
api.add_router("/models", models.router, tags=["Models"])
api.add_router("", chat.router, tags=["Generation"])

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PREFIX = "/v1/"


class ApiShell:
    """Put first in MIDDLEWARE: other paths pass straight through."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if iscoroutinefunction(self):
            return self._async(request)
        if not request.path_info.startswith(PREFIX):
            return self.get_response(request)
        refusal = self._before(request)
        return self._after(request, refusal or self.get_response(request))

    async def _async(self, request: HttpRequest) -> HttpResponseBase:
        if not request.path_info.startswith(PREFIX):
            return await self.get_response(request)
        refusal = self._before(request)
        return self._after(request, refusal or await self.get_response(request))

    def _before(self, request: HttpRequest) -> HttpResponseBase | None:
        request.META.pop("HTTP_COOKIE", None)  # a session never speaks for a program
        given = request.headers.get("x-client-request-id", "")
        request.META["llmtuner.request_id"] = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        limit = bodies.limit_of(request)
        if int(request.META.get("CONTENT_LENGTH") or 0) > limit:
            return errors.respond(errors.too_large(limit))
        return None

    def _after(self, request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
        kind = response.headers.get("Content-Type", "")
        is_page = request.path_info in (f"{PREFIX}docs", f"{PREFIX}openapi.json")
        if response.status_code >= 400 and not kind.startswith("application/json"):
            response = _in_our_words(request, response)
        response["x-request-id"] = request.META["llmtuner.request_id"]
        if not is_page:
            response["Cache-Control"] = "no-store"
            response.headers.pop("Vary", None)
        return response


def _in_our_words(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    words = {
        404: f"Unknown request URL: {request.method} {request.path_info}. See /v1/docs.",
        405: f"{request.method} is not allowed here.",
    }
    message = words.get(response.status_code, response.reason_phrase)
    made = errors.respond(errors.ApiError(response.status_code, message, code="unknown_url" if response.status_code == 404 else None))
    if "Allow" in response.headers:
        made["Allow"] = response["Allow"]
    return made


def document() -> str:
    return json.dumps(api.get_openapi_schema(), indent=2)
