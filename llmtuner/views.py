"""The start page, which belongs to neither of the two apps."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_safe


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    return redirect("jobs:jobs" if request.user.is_authenticated else "account_login")
