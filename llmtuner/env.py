"""Typed readers of the environment, for settings.py."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit, urlunsplit

Number = TypeVar("Number", int, float)


class BadEnvironment(Exception):
    """A variable has an invalid value; the message names it."""


def text(name: str, default: str = "") -> str:
    return os.environ.get(name, default).strip()


def flag(name: str, default: bool = False) -> bool:
    value = text(name).lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    if value:
        raise BadEnvironment(f"{name}={value!r}: use 1 or 0")
    return default


def words(name: str, default: list[str]) -> list[str]:
    """A comma-separated list."""
    value = text(name)
    return [word.strip() for word in value.split(",") if word.strip()] if value else default


def number(name: str, default: Number) -> Number:
    """A number of the same type as the default."""
    value = text(name)
    try:
        return type(default)(value) if value else default
    except ValueError as e:
        raise BadEnvironment(f"{name}={value!r} is not a valid {type(default).__name__}") from e


def pairs(name: str) -> dict[str, str]:
    """`a=b,c=d` as a mapping."""
    mapping = {}
    for word in words(name, []):
        key, separator, value = word.partition("=")
        if not separator:
            raise BadEnvironment(f"{name}: {word!r} must have the form NAME=VALUE")
        mapping[key.strip()] = value.strip()
    return mapping


def numbers(prefix: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Each default, or the value of the variable PREFIX_NAME if it is set."""
    return {name: number(f"{prefix}_{name.upper()}", value) for name, value in defaults.items()}


def stored_secret(path: Path) -> str:
    """A random secret, generated once and stored in a file that only this account can read.

    Several processes may start at once: the first to link its file wins, and all of them read that file.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_urlsafe(64))
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass  # another process was first
            finally:
                temporary.unlink()
        return path.read_text().strip()
    except OSError as e:
        raise BadEnvironment(
            f"Cannot create or read {path} ({e.strerror}). Make its folder writable, or set VAR_DIR to one that is"
        ) from e


def url(name: str, default: str, password: str) -> str:
    """The URL in a variable, with the password from a second variable if the URL has none. The second variable is taken
    literally, whereas many characters must be percent-encoded in a URL."""
    value = text(name, default)
    secret = os.environ.get(password, "")
    parts = _split(name, value, password)
    if not secret or not parts.hostname or parts.password is not None:
        return value
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(secret, safe='')}@{host}"))


def _split(name: str, url: str, password: str) -> SplitResult:
    """Refuses a URL whose password was not encoded. Cut off at a / or #, it would name a different host."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises ValueError if it is not a number
    except ValueError:
        parts = None
    if parts is None or parts.fragment or "@" in parts.path + parts.query:
        raise BadEnvironment(
            f"{name} is not a valid URL. Percent-encode @ : / # ? % and brackets in its password, or leave the password "
            f"out and set {password}."
        )
    return parts


def database(url: str) -> dict[str, Any]:
    """Django's DATABASES entry for sqlite:///path or postgres://user:password@host:port/name?option=value."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        # Writers wait for each other instead of failing; readers never wait (write-ahead log).
        options = {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        }
        name = unquote(parts.path).removeprefix("/")
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": name or ":memory:", "OPTIONS": options}
    if parts.scheme in {"postgres", "postgresql"}:
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": unquote(parts.path).strip("/"),
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": parts.hostname or "",
            "PORT": str(parts.port or ""),
            "OPTIONS": {"connect_timeout": "5"} | dict(parse_qsl(parts.query)),
            # No persistent connections: async views move between threads.
            "CONN_HEALTH_CHECKS": True,
        }
    raise BadEnvironment(
        f"DATABASE_URL must start with sqlite:// or postgres://, not {parts.scheme or 'nothing'}://"
    )


def mail(url: str) -> dict[str, Any]:
    """Django's EMAIL_* settings for smtp://, smtp+tls:// (STARTTLS) or smtp+ssl://user:password@host:port."""
    parts = urlsplit(url)
    if parts.scheme not in {"smtp", "smtp+tls", "smtp+ssl"} or not parts.hostname:
        raise BadEnvironment("EMAIL_URL must have the form smtp+tls://user:password@host:587")
    ports = {"smtp": 25, "smtp+tls": 587, "smtp+ssl": 465}
    return {
        "EMAIL_BACKEND": "django.core.mail.backends.smtp.EmailBackend",
        "EMAIL_HOST": parts.hostname,
        "EMAIL_PORT": parts.port or ports[parts.scheme],
        "EMAIL_HOST_USER": unquote(parts.username or ""),
        "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
        "EMAIL_USE_TLS": parts.scheme == "smtp+tls",
        "EMAIL_USE_SSL": parts.scheme == "smtp+ssl",
        "EMAIL_TIMEOUT": 10,
    }
