"""Jobs in Django's admin. The list and detail pages are our own views, because jobs are in DynamoDB."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path

from jobs.models import OverseenJob
from jobs.views import oversight


@admin.register(OverseenJob)
class OverseenJobAdmin(admin.ModelAdmin):
    """Uses Django's URL names, so that the admin index links here."""

    def get_urls(self) -> list[URLPattern]:
        def guarded(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
            def inner(request: HttpRequest, **kwargs: str) -> HttpResponse:
                request.current_app = self.admin_site.name
                return view(request, site=self.admin_site, **kwargs)

            guarded_view: Callable[..., HttpResponse] = self.admin_site.admin_view(inner)
            return guarded_view

        return [
            path("", guarded(oversight.index), name="jobs_overseenjob_changelist"),
            path("<str:owner>/<str:job_id>/", guarded(oversight.detail), name="jobs_overseenjob_detail"),
            path(
                "<str:owner>/<str:job_id>/cancel/", guarded(oversight.cancel), name="jobs_overseenjob_cancel"
            ),
            path(
                "<str:owner>/<str:job_id>/priority/",
                guarded(oversight.prioritise),
                name="jobs_overseenjob_priority",
            ),
        ]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False
