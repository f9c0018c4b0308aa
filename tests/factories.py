"""Factories with plain arguments."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both need the settings, which are not loaded yet when pytest imports this
    from django.test import Client

    from accounts.models import User

PASSWORD = "correct-horse-battery-9"


def make_user(name: str, **fields: Any) -> User:
    """A user with a verified email address. The address is unique, so that users of different tests never share rows.
    Without `password=` the user has no password: hashing one takes longer than most tests."""
    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model

    email = f"{name}-{secrets.token_hex(4)}@example.com"
    user: User = get_user_model().objects.create_user(email=email, **fields)
    EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
    return user


def browser_of(user: User) -> Client:
    """Django's test client, signed in as this user."""
    from django.test import Client

    client = Client()
    client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client
