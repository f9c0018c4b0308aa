"""Oversight in Django's admin: its list and detail are views of ours, fed from DynamoDB partitions."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest
from django.urls import URLPattern, path

from jobs.models import OverseenJob
from jobs.views import oversight


@admin.register(OverseenJob)
class OverseenJobAdmin(admin.ModelAdmin):
    """Names as Django's own, so that the admin's index links here."""

    def get_urls(self) -> list[URLPattern]:
        def guarded(view):  # type: ignore[no-untyped-def]  # a view in, a view out
            def inner(request: HttpRequest, **kwargs: str):  # type: ignore[no-untyped-def]
                request.current_app = self.admin_site.name
                return view(request, site=self.admin_site, **kwargs)

            return self.admin_site.admin_view(inner)

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
