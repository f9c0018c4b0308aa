"""What people and programs see when something is wrong. Needs no database and no session: those may be what broke."""

from __future__ import annotations

import json
from dataclasses import dataclass

from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string


@dataclass(frozen=True)
class Problem:
    title: str
    advice: str
    kind: str  # of the OpenAI error shape


PROBLEMS = {
    400: Problem(
        "That request cannot be read", "Go back, reload the page and try again.", "invalid_request_error"
    ),
    403: Problem("This page is not for you", "Sign in with another account, or go back.", "permission_error"),
    404: Problem(
        "There is nothing here",
        "It may have been deleted, or it belongs to somebody else.",
        "invalid_request_error",
    ),
    429: Problem("Too many tries", "Wait a few minutes, then try again.", "rate_limit_error"),
    500: Problem(
        "Something broke on our side", "It has been written down. Try again in a moment.", "server_error"
    ),
    503: Problem(
        "A part of the studio is not reachable", "Try again in a moment.", "service_unavailable_error"
    ),
}

MISCONFIGURED = Problem(
    "A part of the studio is set up incorrectly",
    "Trying again will not help. Tell the person who runs this studio.",
    "service_unavailable_error",
)


def respond(
    request: HttpRequest, status: int, advice: str = "", problem: Problem | None = None
) -> HttpResponse:
    problem = problem or PROBLEMS[status]
    advice = advice or problem.advice
    # Only where it helps to find the cause: a 404 must look the same for what never was and what is not yours.
    request_id = getattr(request, "request_id", "") if status >= 500 else ""
    if request.path_info.startswith(("/v1/", "/_allauth/")):
        body = {"error": {"message": f"{problem.title}.", "type": problem.kind, "param": None, "code": None}}
        return HttpResponse(json.dumps(body), status=status, content_type="application/json")
    context = {"problem": problem, "advice": advice, "status": status, "request_id": request_id}
    # No request goes in: context processors would ask the session, and with it the database.
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
    return respond(
        request, 403, "The form was too old or came from another site. Reload the page and send it again."
    )
