"""Small makers of things with plain arguments."""

from __future__ import annotations

import secrets
from typing import Any

PASSWORD = "correct-horse-battery-9"


def make_user(name: str, **fields: Any):
    """A person with a verified e-mail address, unique per call so that DynamoDB rows of other tests never mix in."""
    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model

    email = f"{name}-{secrets.token_hex(4)}@example.com"
    user = get_user_model().objects.create_user(email=email, password=PASSWORD, **fields)
    EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
    return user
