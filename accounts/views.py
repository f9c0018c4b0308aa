"""The account page, and the two rights everybody has over their data: to take it and to have it deleted."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render


@login_required
def overview(request: HttpRequest) -> HttpResponse:
    return render(request, "accounts/overview.html")


@login_required
def export(request: HttpRequest) -> HttpResponse:
    return render(request, "accounts/overview.html")


@login_required
def delete(request: HttpRequest) -> HttpResponse:
    return render(request, "accounts/overview.html")
