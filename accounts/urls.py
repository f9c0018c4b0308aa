"""The user's account pages. Sign-in, email addresses and second factors are allauth's, under /accounts/."""

from __future__ import annotations

from django.urls import path

from accounts import api_keys, views

app_name = "accounts"

urlpatterns = [
    path("", views.overview, name="overview"),
    path("keys/", api_keys.page, name="api_keys"),
    path("keys/<int:pk>/revoke/", api_keys.revoke_page, name="revoke_api_key"),
    path("devices/<int:pk>/sign-out/", views.sign_out_device, name="sign_out_device"),
    path("export/", views.export, name="export"),
    path("delete/", views.delete, name="delete"),
]
