"""Forms about people that are not allauth's own."""

from __future__ import annotations

from allauth.account.forms import SignupForm as AllauthSignupForm


class SignupForm(AllauthSignupForm):
    """E-mail and one password, which can be shown while it is typed."""
