"""All URLs, except the live stream `/jobs/<id>/stream` (asgi.py) and `/healthz` and `/readyz` (health.py)."""

from __future__ import annotations

from allauth.account.decorators import secure_admin_login
from django.contrib import admin
from django.urls import include, path

from llmtuner import errors, views
from llmtuner.api import api

# The admin uses the ordinary sign-in page, with its rate limits and second factor.
admin.autodiscover()
admin.site.login = secure_admin_login(admin.site.login)  # as allauth documents it
admin.site.site_header = admin.site.site_title = "LLM Tuner"
admin.site.index_title = "Oversight"

urlpatterns = [
    path("", views.home, name="home"),
    path("admin/", admin.site.urls),
    path("accounts/", include("allauth.urls")),
    path("account/", include("accounts.urls")),
    # Sign-in by phone is not supported, and allauth's view for it responds with 500 if nobody is signed in.
    path("_allauth/app/v1/account/phone", errors.not_found, name="no_phone"),
    path("_allauth/", include("allauth.headless.urls")),
    path("v1/", api.urls),
    path("", include("jobs.urls")),
]

handler400 = "llmtuner.errors.bad_request"
handler403 = "llmtuner.errors.forbidden"
handler404 = "llmtuner.errors.not_found"
handler500 = "llmtuner.errors.server_error"
