"""Error responses for people and programs. They use neither the database nor the session, which may be what failed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string


@dataclass(frozen=True)
class Problem:
    title: str
    advice: str
    type: str  # in OpenAI's error format


PROBLEMS = {
    400: Problem("Invalid request", "Go back, reload the page and try again.", "invalid_request_error"),
    403: Problem(
        "You cannot open this page", "Sign in with another account, or go back.", "permission_error"
    ),
    404: Problem(
        "Page not found",
        "It may have been deleted, or it may belong to someone else.",
        "invalid_request_error",
    ),
    429: Problem("Too many attempts", "Wait a few minutes, then try again.", "rate_limit_error"),
    500: Problem(
        "Something went wrong on our side",
        "The error has been logged. Try again in a moment.",
        "server_error",
    ),
    503: Problem("Part of the service is unavailable", "Try again in a moment.", "service_unavailable_error"),
}

MISCONFIGURED = Problem(
    "Part of the service is misconfigured",
    "Trying again will not help. Please tell the administrator.",
    "service_unavailable_error",
)

FORGED = Problem(
    "This form cannot be accepted",
    "It has expired or came from another site. Reload the page and submit it again.",
    "permission_error",
)


def respond(request: HttpRequest, status: int, problem: Problem | None = None) -> HttpResponse:
    problem = problem or PROBLEMS[status]
    # Only if it helps to find the cause: a 404 must look the same whether an object never existed or is someone else's.
    request_id = getattr(request, "request_id", "") if status >= 500 else ""
    if request.path_info.startswith(("/v1/", "/_allauth/")):
        body = {"error": {"message": f"{problem.title}.", "type": problem.type, "param": None, "code": None}}
        return HttpResponse(json.dumps(body), status=status, content_type="application/json")
    context = {"problem": problem, "status": status, "request_id": request_id}
    # Rendered without the request: context processors would read the session, and with it the database.
    return HttpResponse(render_to_string("problem.html", context), status=status)


def bad_request(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return respond(request, 400)


def forbidden(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return respond(request, 403)


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return respond(request, 404)


def server_error(request: HttpRequest) -> HttpResponse:
    return respond(request, 500)


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    return respond(request, 403, problem=FORGED)
