"""Account forms beyond allauth's."""

from __future__ import annotations

from typing import Any

from allauth.mfa.webauthn.forms import AddWebAuthnForm
from django import forms


class DeleteAccountForm(forms.Form):
    email = forms.CharField(
        label="Type your email address to confirm", widget=forms.TextInput({"autocomplete": "off"})
    )

    def __init__(self, *args: Any, email: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expected = email

    def clean_email(self) -> str:
        typed: str = self.cleaned_data["email"]
        if typed.strip().lower() != self.expected.lower():
            raise forms.ValidationError("This is not the email address of this account.")
        return typed


class AddPasskeyForm(AddWebAuthnForm):
    passwordless = forms.BooleanField(
        label="Use it to sign in without a password",
        required=False,
        initial=True,
        help_text="Your device will ask for your fingerprint, your face, or its PIN.",
    )
