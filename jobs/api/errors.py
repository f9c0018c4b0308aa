"""The errors of `/v1`: translates exceptions to OpenAI's error format, in one place."""

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
# OpenAI's client retries a POST up to twice on 409, 429 and 5xx. Retrying cannot help with these errors.
PERMANENT_STATUSES, PERMANENT_CODES = {409, 413, 501}, {"quota_exceeded", "misconfigured"}
# The names that pydantic gives to the branches of a union in an error's location.
_BRANCH = re.compile(r"(function-|constrained-|(literal|list|dict|union|nullable)\[)|(str|int|float|bool)$")
# Our field names and the `/v1` parameters they come from.
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
    """An error with its HTTP status, the parameter that caused it, and a code that programs can check."""

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
    """The same response whether an object never existed or belongs to someone else."""
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
    if error.status in PERMANENT_STATUSES or error.code in PERMANENT_CODES:
        response["x-should-retry"] = "false"
    return response


def translate(exc: Exception) -> ApiError:
    """Translates exceptions of our modules, the framework and the stores to ApiError."""
    match exc:
        case ApiError():
            return exc
        case AuthenticationError():
            return ApiError(401, "Incorrect API key or token provided.", code="invalid_api_key")
        case TwoCredentials():
            return bad(
                "Send exactly one credential, in the Authorization header.",
                "authorization",
                "two_credentials",
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
        case store_errors.Refused():
            param = PARAMS.get(exc.field, f"llmtuner.{exc.field}") if exc.field else None
            return bad(exc.message, param, exc.code)
        case transitions.LostRace():
            return ApiError(
                503,
                "Another request changed this object at the same time. Try again.",
                code="busy",
                retry_after=1,
            )
        case generation.Unavailable():
            return ApiError(503, str(exc), code="unavailable", retry_after=exc.retry_after)
        case generation.Busy():
            return ApiError(
                429,
                str(exc) or "All inference workers are busy. Try again in a moment.",
                code="busy",
                retry_after=exc.retry_after,
            )
        case RequestDataTooBig() | blobs.TooLarge():
            return too_large()
        case blobs.Missing():
            log.warning("missing object: %s", exc)
            return ApiError(
                404, "The content of this file no longer exists. Upload it again.", code="not_found"
            )
        case MultiPartParserError() | SuspiciousOperation():
            return bad("The request body could not be parsed.", None, "invalid_body")
        case HttpError():
            cause = exc.__cause__
            return cause if isinstance(cause, ApiError) else ApiError(exc.status_code, str(exc))
    if state := store_errors.outage(exc):
        return _store_error(exc, state)
    log.exception("unexpected error in /v1", exc_info=exc)
    return ApiError(
        500,
        "Something went wrong on our side. Give the administrator the request ID (x-request-id) of this response.",
    )


def _store_error(exc: Exception, state: str) -> ApiError:
    log.warning("a store is %s: %s", state, exc)
    what = "object storage" if isinstance(exc, blobs.StorageError) else "store"
    if state == store_errors.MISCONFIGURED:
        message = f"The {what} is misconfigured. Only the administrator can fix this."
        return ApiError(503, message, code="misconfigured")
    return ApiError(503, f"The {what} is unavailable. Try again soon.", code="unavailable", retry_after=5)


def too_large(limit: int | None = None) -> ApiError:
    limit_note = f" The limit is {limit:,} bytes." if limit else ""
    return ApiError(413, f"The request body is too large.{limit_note}", code="request_too_large")


def _invalid(exc: ValidationError) -> ApiError:
    """The first error, with the parameter's name as the caller wrote it.

    For a union, pydantic lists the errors of every branch. The caller most likely meant the branch that got deepest into
    the value, and among those, one whose type matched."""
    located = [(_path(error["loc"]), error) for error in exc.errors]
    first = located[0][0]
    nested = [(path, error) for path, error in located if path[: len(first)] == first]
    depth = max(len(path) for path, _ in nested)
    deepest = next(path for path, _ in nested if len(path) == depth)
    branches = [error for path, error in nested if path == deepest]
    meant = min(branches, key=_type_mismatch)
    message = str(meant["msg"]).removeprefix("Value error, ")
    literals = [error["ctx"]["expected"] for error in branches if error["type"] == "literal_error"]
    if literals and meant["type"] != "literal_error":
        message += f", or {literals[0]}"
    param = ".".join(deepest) or None
    return bad(f"Invalid '{param}': {message}." if param else f"{message}.", param, str(meant["type"]))


def _path(loc: tuple[Any, ...]) -> tuple[str, ...]:
    """The location without ninja's (source, argument) and without pydantic's names for the branches of a union."""
    keys = [str(key) for key in loc]
    keys = keys[2:] if keys[0] == "body" and len(keys) > 2 else keys[1:]
    return tuple(key for key in keys if not _BRANCH.match(key))


def _type_mismatch(error: dict[str, Any]) -> int:
    """Sorts union branches: 0 if the type matched, 1 if not, and 2 for a literal, which is the least likely to be meant."""
    type_ = str(error["type"])
    return 2 if type_ == "literal_error" else 1 if type_.endswith("_type") else 0


def handle(request: HttpRequest, exc: Exception) -> HttpResponse:
    return respond(translate(exc))
