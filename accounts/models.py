"""Users and their API keys: our only SQL tables."""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser, BaseUserManager
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.text import slugify

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_owner_id() -> str:
    """A user's id in DynamoDB and the object store. It is random, so it reveals nothing about the user."""
    return "user-" + "".join(secrets.choice(CROCKFORD) for _ in range(26))


class UserManager(BaseUserManager["User"]):
    use_in_migrations = True

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> User:
        if not email:
            raise ValueError("a user must have an email address")
        user: User = self.model(email=email.strip().lower(), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:
        return self.create_user(email, password, **{**fields, "is_staff": True, "is_superuser": True})


class User(AbstractUser):
    """A user, identified by email address. `owner_id` never changes, even if the address does."""

    username = None  # removes the inherited field
    first_name = None  # likewise: we do not ask for names
    last_name = None
    email = models.EmailField("email address", unique=True)
    owner_id = models.CharField(max_length=64, unique=True, default=new_owner_id, editable=False)
    # Part of the ids of the user's models: ft:<base>:<slug>:…
    slug = models.SlugField(max_length=32, unique=True, editable=False)
    notify_by_email = models.BooleanField("email when a job ends", default=True)

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []
    objects: ClassVar[UserManager] = UserManager()

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self.slug:
            self.slug = self._new_slug()
        super().save(*args, **kwargs)

    def _new_slug(self) -> str:
        """A slug with a random ending. Everyone's has one: if only slugs that are already taken had one, this would reveal who
        has an account."""
        name = str(slugify(self.email.partition("@")[0]))[:24].strip("-_") or "user"
        return f"{name}-{secrets.token_hex(3)}"

    def __str__(self) -> str:
        return str(self.email)

    @property
    def notification_email(self) -> str:
        """The address for emails about jobs, or an empty string if it is not verified or the user wants none."""
        from allauth.account.models import EmailAddress  # imported late because it imports this model

        verified = EmailAddress.objects.filter(user=self, verified=True, email__iexact=self.email)
        return str(self.email) if self.is_active and self.notify_by_email and verified.exists() else ""

    def get_full_name(self) -> str:
        return str(self.email)

    def get_short_name(self) -> str:
        return str(self.email).partition("@")[0]

    @property
    def initials(self) -> str:
        """Two letters for the account button."""
        words = [word for word in slugify(self.get_short_name().replace(".", "-")).split("-") if word]
        if len(words) > 1:
            return str(words[0][0] + words[-1][0]).upper()
        return str(words[0][:2] if words else "?").upper()


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def valid(self) -> ApiKeyQuerySet:
        now = timezone.now()
        keys: ApiKeyQuerySet = self.filter(Q(expires_at=None) | Q(expires_at__gt=now), revoked_at=None)
        return keys


class ApiKey(models.Model):
    """A key for `/v1`. The key itself is shown once and never stored: see accounts/api_keys.py."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=12, unique=True)
    digest = models.CharField(max_length=64)
    scopes = models.CharField(max_length=120)  # separated by spaces
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)

    objects = ApiKeyQuerySet.as_manager()

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix})"

    @property
    def is_valid(self) -> bool:
        return self.revoked_at is None and (self.expires_at is None or timezone.now() < self.expires_at)
