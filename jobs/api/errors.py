"""What `/v1` says when it says no: OpenAI's error shape, made in one place from our own exceptions."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.http import HttpRequest, HttpResponse
from django.http.multipartparser import MultiPartParserError
from ninja.errors import AuthenticationError, HttpError, Throttled, ValidationError

from accounts.auth import TwoCredentials
from jobs.datasets import datasets
from jobs.inference import generation
from jobs.lifecycle import transitions
from jobs.store import access, blobs, quotas
from jobs.store import errors as store_errors

log = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# The official client sends a POST up to twice more on 409, 429 and 5xx, which helps nobody when nothing will have changed.
FINAL_STATUS, FINAL_CODES = {409, 413, 501}, {"quota_exceeded", "misconfigured"}
# How pydantic names the kinds of a union in an error's place.
_KIND = re.compile(r"(function-|constrained-|(literal|list|dict|union|nullable)\[)|(str|int|float|bool)$")
# What our modules call a field, as callers know it.
PARAMS = {
    "dataset_id": "training_file",
    "validation_dataset_id": "validation_file",
    "base": "model",
    "suffix": "suffix",
    "name": "llmtuner.name",
    "status": "status",
    "idempotency_key": "idempotency-key",
}


class ApiError(Exception):
    """A refusal with its status, the parameter it is about and a code a program can test."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = (
            status,
            message,
            param,
            code,
            retry_after,
        )


def bad(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_found(kind: str) -> ApiError:
    """The same bytes for what never was and for what belongs to somebody else."""
    if kind == "model":
        message = "This model does not exist or you do not have access to it."
        return ApiError(404, message, param="model", code="model_not_found")
    return ApiError(404, f"There is no such {kind}.", param="id", code="not_found")


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(error: ApiError) -> HttpResponse:
    payload = json.dumps(body(error.message, error.status, error.param, error.code))
    response = HttpResponse(payload, status=error.status, content_type="application/json")
    if error.status == 401:
        response["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        response["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status in FINAL_STATUS or error.code in FINAL_CODES:
        response["x-should-retry"] = "false"
    return response


def translate(exc: Exception) -> ApiError:
    """Our exceptions, the framework's and the store's, as one kind."""
    match exc:
        case ApiError():
            return exc
        case AuthenticationError():
            return ApiError(401, "Incorrect API key or token provided.", code="invalid_api_key")
        case TwoCredentials():
            return bad(
                "Send one credential, in the Authorization header.", "authorization", "two_credentials"
            )
        case Throttled():
            return ApiError(
                429, "Too many requests. Try again soon.", code="rate_limit_exceeded", retry_after=exc.wait
            )
        case ValidationError():
            return _invalid(exc)
        case access.NotFound():
            return not_found("object")
        case datasets.Rejected():
            return bad(str(exc), "file", "invalid_file")
        case quotas.OverQuota():
            return ApiError(429, str(exc), code="quota_exceeded", retry_after=60)
        case transitions.Refused():
            return bad(exc.message, PARAMS.get(exc.field, f"llmtuner.{exc.field}"))
        case transitions.LostRace():
            return ApiError(
                503, "Something else changed this at the same moment. Try again.", code="busy", retry_after=1
            )
        case generation.Unavailable():
            return ApiError(503, str(exc), code="unavailable", retry_after=exc.retry_after)
        case generation.Busy():
            return ApiError(
                429, str(exc) or "All generators are busy.", code="busy", retry_after=exc.retry_after
            )
        case RequestDataTooBig() | blobs.TooLarge():
            return too_large()
        case blobs.Missing():
            log.warning("objects: %s", exc)
            return ApiError(
                404, "The file's bytes are not there any more. Upload it again.", code="not_found"
            )
        case MultiPartParserError() | SuspiciousOperation():
            return bad("The request's body could not be read.", None, "invalid_body")
        case HttpError():
            cause = exc.__cause__
            return cause if isinstance(cause, ApiError) else ApiError(exc.status_code, str(exc))
    if state := store_errors.outage(exc):
        return _store_error(exc, state)
    log.exception("unexpected error in /v1", exc_info=exc)
    return ApiError(500, "Something went wrong on our side. The request id tells the operator where to look.")


def _store_error(exc: Exception, state: str) -> ApiError:
    log.warning("a store is %s: %s", state, exc)
    what = "object storage" if isinstance(exc, blobs.StorageError) else "store"
    if state == store_errors.MISCONFIGURED:
        message = f"The {what} is set up incorrectly. Only the person who runs this studio can change that."
        return ApiError(503, message, code="misconfigured")
    return ApiError(503, f"The {what} is not reachable. Try again soon.", code="unavailable", retry_after=5)


def too_large(limit: int | None = None) -> ApiError:
    more = f" The limit is {limit:,} bytes." if limit else ""
    return ApiError(413, f"The request's body is too large.{more}", code="request_too_large")


def _invalid(exc: ValidationError) -> ApiError:
    """The first thing wrong, in words, with the name of the parameter as the caller wrote it.

    Of a field that takes several kinds, pydantic lists what each kind found wrong. Meant was the one that was followed
    furthest into the value, and among those the one whose type was right."""
    places = [(_place(error["loc"]), error) for error in exc.errors]
    first = places[0][0]
    within = [found for found in places if found[0][: len(first)] == first]
    depth = max(len(place) for place, _ in within)
    place = next(place for place, _ in within if len(place) == depth)
    branches = [error for found, error in within if found == place]
    meant = min(branches, key=_far_off)
    message = str(meant["msg"]).removeprefix("Value error, ")
    words = [error["ctx"]["expected"] for error in branches if error["type"] == "literal_error"]
    if words and meant["type"] != "literal_error":
        message += f", or {words[0]}"
    param = ".".join(place) or None
    return bad(f"Invalid '{param}': {message}." if param else f"{message}.", param, str(meant["type"]))


def _place(loc: tuple[Any, ...]) -> tuple[str, ...]:
    """Without ninja's (source, argument) and without the names that pydantic gives to the kinds of a union."""
    parts = [str(part) for part in loc]
    parts = parts[2:] if parts[0] == "body" and len(parts) > 2 else parts[1:]
    return tuple(part for part in parts if not _KIND.match(part))


def _far_off(error: dict[str, Any]) -> int:
    kind = str(error["type"])
    return 2 if kind == "literal_error" else 1 if kind.endswith("_type") else 0


def handle(request: HttpRequest, exc: Exception) -> HttpResponse:
    return respond(translate(exc))
