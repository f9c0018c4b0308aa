"""People and their keys: the only things of ours in SQL."""

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
    """The name under which DynamoDB and the object store know a person. Random: it tells nothing about them."""
    return "user-" + "".join(secrets.choice(CROCKFORD) for _ in range(26))


class UserManager(BaseUserManager["User"]):
    use_in_migrations = True

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> User:
        if not email:
            raise ValueError("a user needs an e-mail address")
        user = self.model(email=email.strip().lower(), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:
        return self.create_user(email, password, **{**fields, "is_staff": True, "is_superuser": True})


class User(AbstractUser):
    """A person, known by e-mail address. `owner_id` never changes, whatever the address becomes."""

    username = None  # removes the inherited field
    first_name = None  # likewise: we ask for no names
    last_name = None
    email = models.EmailField("e-mail address", unique=True)
    owner_id = models.CharField(max_length=64, unique=True, default=new_owner_id, editable=False)
    # In the names of the person's models: ft:<base>:<slug>:…
    slug = models.SlugField(max_length=32, unique=True, editable=False)
    notify_by_email = models.BooleanField("e-mail when a job ends", default=True)

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []
    objects: ClassVar[UserManager] = UserManager()

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self.slug:
            self.slug = self._new_slug()
        super().save(*args, **kwargs)

    def _new_slug(self) -> str:
        """Random at its end for everybody: were it so only where the name is taken, it would tell who has an account."""
        name = slugify(self.email.partition("@")[0])[:24].strip("-_") or "user"
        return f"{name}-{secrets.token_hex(3)}"

    def __str__(self) -> str:
        return self.email

    @property
    def notification_email(self) -> str:
        """Where mail about jobs goes: the verified address, of somebody who wants it. Else empty."""
        from allauth.account.models import EmailAddress  # it needs this model

        mine = EmailAddress.objects.filter(user=self, verified=True, email__iexact=self.email)
        return self.email if self.is_active and self.notify_by_email and mine.exists() else ""

    def get_full_name(self) -> str:
        return self.email

    def get_short_name(self) -> str:
        return self.email.partition("@")[0]

    @property
    def initials(self) -> str:
        """Two letters for the round button in the corner."""
        parts = [part for part in slugify(self.get_short_name().replace(".", "-")).split("-") if part]
        if len(parts) > 1:
            return (parts[0][0] + parts[-1][0]).upper()
        return (parts[0][:2] if parts else "?").upper()


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def alive(self) -> ApiKeyQuerySet:
        now = timezone.now()
        return self.filter(Q(expires_at=None) | Q(expires_at__gt=now), revoked_at=None)


class ApiKey(models.Model):
    """A key for `/v1`. The key itself is shown once and never stored; see accounts/api_keys.py."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=12, unique=True)
    digest = models.CharField(max_length=64)
    scopes = models.CharField(max_length=120)  # words separated by spaces
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
    def alive(self) -> bool:
        return self.revoked_at is None and (self.expires_at is None or timezone.now() < self.expires_at)
