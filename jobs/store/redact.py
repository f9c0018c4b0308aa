"""Makes program output safe to display: no secrets, no terminal codes, no endless lines."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from urllib.parse import unquote, urlsplit

MAX_CHARS = 4096
HIDDEN = "[hidden]"

# Every pattern takes linear time: long runs are possessive or bounded, and none begins with an unbounded run.
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*+\x07|[\x00-\x08\x0b-\x1f\x7f]")
_SECRETS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{16,}                              # Hugging Face
    | \bsk-[A-Za-z0-9_-]{16,}                            # OpenAI and others
    | \bwhsec_[A-Za-z0-9+/=]{16,}                        # webhooks
    | \bgh[pousr]_[A-Za-z0-9]{20,}                       # GitHub
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                      # AWS key ids
    | \beyJ[A-Za-z0-9_-]{8,2000}+\.[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]*  # JSON web tokens
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*           # keys
    | (?<=://)[^\s/@:]*+:[^\s/@]++(?=@)                  # user:password@ in addresses
    """,
    re.VERBOSE,
)
_NAMED = re.compile(
    r"(?i)((?:password|passwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|hf[_-]?token|credential)[a-z0-9_-]{0,64}+[\"']?\s*[=:]\s*)"
    r"[\"']?[^\s\"',;]{4,}"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_SECRET_NAMES = re.compile(r"SECRET|PASSWORD|TOKEN|API_KEY|ACCESS_KEY", re.IGNORECASE)


def redact(text: str) -> str:
    """The text without anything that looks like a secret or is one of ours."""
    text = _TERMINAL.sub("", text[: MAX_CHARS * 4])
    for secret in our_secrets():
        text = text.replace(secret, HIDDEN)
    text = _SECRETS.sub(HIDDEN, text)
    text = _NAMED.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + "… (cut)"


@lru_cache(maxsize=1)
def our_secrets() -> tuple[str, ...]:
    """Secret values in this process's environment and settings, longest first."""
    from django.conf import settings

    values = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    values |= {settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS}
    for url in (settings.REDIS_URL, settings.DATABASE_URL, settings.EMAIL_URL):
        password = urlsplit(url).password or ""
        values |= {password, unquote(password)}
    return tuple(sorted((value for value in values if len(value) >= 8), key=len, reverse=True))
