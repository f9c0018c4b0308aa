"""Jobs and base models in Django's admin. The pages are our own views, because both are in DynamoDB."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path

from jobs.models import ImportedBase, OverseenJob
from jobs.views import imported_bases, oversight

View = Callable[..., HttpResponse]


class OwnViews(admin.ModelAdmin):
    """Uses Django's URL names, so that the admin index links here."""

    def guarded(self, view: View) -> View:
        def inner(request: HttpRequest, **kwargs: str) -> HttpResponse:
            request.current_app = self.admin_site.name
            return view(request, site=self.admin_site, **kwargs)

        guarded_view: View = self.admin_site.admin_view(inner)
        return guarded_view


@admin.register(OverseenJob)
class OverseenJobAdmin(OwnViews):
    def get_urls(self) -> list[URLPattern]:
        guarded = self.guarded
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


@admin.register(ImportedBase)
class ImportedBaseAdmin(OwnViews):
    def get_urls(self) -> list[URLPattern]:
        guarded = self.guarded
        return [
            path("", guarded(imported_bases.index), name="jobs_importedbase_changelist"),
            path("upload/", guarded(imported_bases.begin), name="jobs_importedbase_upload"),
            path("<str:name>/remove/", guarded(imported_bases.remove), name="jobs_importedbase_remove"),
        ]
