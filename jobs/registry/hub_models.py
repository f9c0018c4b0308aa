"""Whether a model of the Hugging Face Hub can be a base, decided from the Hub's description before anything is fetched.

Any signed-in user can name a model, so HF_TOKEN is sent only for models that HUB_MODELS lists. The following are refused:
private and gated models (unless listed), pickles, custom code, anything but causal language models, quantized models, and
models larger than HUB_MAX_GB. All requests have a deadline. This module does not import torch.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from django.conf import settings

from jobs.store.errors import Refused
from training.plan import catalog, hub
from training.plan.catalog import BaseModel

# owner/name, as on the Hub. It cannot be mistaken for a local path or lead out of a URL.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
PUBLIC = "public"  # in HUB_MODELS: every public model
DEADLINE_S = 8.0  # limit for all requests about one model
MAX_RESPONSE = 4 << 20
MAX_CONCURRENT = 4  # concurrent checks in this process, each of which needs a thread
REFUSAL_CACHE_S = 60.0  # so that repeated requests do not reach the Hub

_slots = threading.BoundedSemaphore(MAX_CONCURRENT)
_refused: dict[str, tuple[float, Refused]] = {}


def unavailable(message: str, *, temporary: bool = False) -> Refused:
    """The model cannot be used as a base. The message says why and what to do."""
    return Refused(message, field="base", code="model_not_available", temporary=temporary)


@dataclass(frozen=True)
class HubDescription:
    """The Hub's description of a model, and its revision."""

    model: BaseModel
    revision: str


def is_id(name: str) -> bool:
    return ID.fullmatch(name) is not None and ".." not in name


def is_listed(name: str) -> bool:
    """Whether a pattern in HUB_MODELS matches. The administrator then trusts the model, so the token is sent."""
    return any(fnmatchcase(name.lower(), p.lower()) for p in settings.HUB_MODELS if p != PUBLIC)


def check_allowed(name: str) -> None:
    """Raises Refused unless the administrator allows this model."""
    if PUBLIC not in settings.HUB_MODELS and not is_listed(name):
        allowed = ", ".join(settings.HUB_MODELS) or "those in the list"
        raise unavailable(
            f"The administrator does not allow this model, only {allowed}. Choose another base model."
        )


def fetch_description(name: str) -> HubDescription:
    """Gets the description of `name` from the Hub. Raises Refused."""
    if not is_id(name):
        raise unavailable(
            f"{name[:100]!r} is not a model ID. Enter owner/name, for example Qwen/Qwen2.5-0.5B."
        )
    check_allowed(name)
    at, known = _refused.get(name, (0.0, None))
    if known is not None and time.monotonic() - at < REFUSAL_CACHE_S:
        raise known
    if not _slots.acquire(blocking=False):
        raise unavailable("Too many models are being checked. Try again in a few seconds.", temporary=True)
    try:
        return _fetch_description(name)
    except Refused as refused:
        if not refused.temporary:
            while len(_refused) >= 1000:
                _refused.pop(next(iter(_refused)))
            _refused[name] = (time.monotonic(), refused)
        raise
    finally:
        _slots.release()


def _fetch_description(name: str) -> HubDescription:
    deadline = time.monotonic() + DEADLINE_S
    token = str(settings.HF_TOKEN) if is_listed(name) else ""
    description = _get_json(name, f"api/models/{name}?blobs=true", token, deadline)
    real = str(description.get("id") or name)
    if real != name:  # renamed, or spelled differently
        if not is_id(real):
            raise unavailable(
                f"The Hub has renamed {name} to a name that cannot be used here. Choose another model."
            )
        check_allowed(real)
    _check_access(real, description)
    size = _check_files(real, description)
    revision = str(description.get("sha") or "")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise unavailable(
            f"The Hub reports no revision of {real}, so it could change unnoticed. Choose another model."
        )
    config = _get_json(name, f"{name}/resolve/{revision}/config.json", token, deadline)
    return HubDescription(
        replace(_describe(real, description, config), id=real, name=real, download=size), revision
    )


# ---- reasons to refuse -------------------------------------------------------------------------------------------------


def _check_access(name: str, description: Mapping[str, Any]) -> None:
    if description.get("disabled"):
        raise unavailable(f"The Hub has disabled {name}. Choose another model.")
    restriction = ""
    if description.get("private"):
        restriction = "private"
    elif description.get("gated"):
        restriction = "gated: available only to users who accepted its license"
    if restriction and not is_listed(name):
        raise unavailable(
            f"{name} is {restriction}. The administrator can allow it by adding it to HUB_MODELS and setting HF_TOKEN."
        )


def _check_files(name: str, description: Mapping[str, Any]) -> int:
    """Returns the number of bytes to fetch."""
    siblings = description.get("siblings")
    files = {
        str(file.get("rfilename")): file.get("size")
        for file in (siblings if isinstance(siblings, list) else [])
        if isinstance(file, dict)
    }
    wanted = {file: size for file, size in files.items() if hub.is_wanted(file)}
    if not any(file.endswith(".safetensors") for file in wanted):
        raise unavailable(
            f"{name} has no safetensors weights. Other formats can execute code when they are loaded. "
            "Choose a model in safetensors format."
        )
    if "config.json" not in wanted:
        raise unavailable(f"{name} has no config.json, so its architecture is unknown. Choose another model.")
    if "tokenizer.json" not in wanted and not {"vocab.json", "merges.txt"} <= set(wanted):
        raise unavailable(f"{name} has no tokenizer.json. Choose another model.")
    if not all(isinstance(size, int) and size >= 0 for size in wanted.values()):
        raise unavailable(f"The Hub does not report the size of {name}. Choose another model.")
    size = sum(int(size or 0) for size in wanted.values())
    if size > settings.HUB_MAX_GB * 1e9:
        raise unavailable(
            f"{name} is {size / 1e9:,.1f} GB in size. The limit is {settings.HUB_MAX_GB:g} GB (HUB_MAX_GB). "
            "Choose a smaller one."
        )
    return size


def _describe(name: str, description: Mapping[str, Any], config: Mapping[str, Any]) -> BaseModel:
    if refusal := hub.config_refusal(name, config):
        raise unavailable(refusal)
    try:
        model = catalog.from_config(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise unavailable(f"{name} cannot be used: {error}. Choose another model.") from error
    weights = description.get("safetensors")
    total = weights.get("total") if isinstance(weights, dict) else None
    return replace(
        model,
        parameters=total if isinstance(total, int) and total > 0 else model.parameters,
        licence=_license(description),
        languages=_languages(description),
    )


def _card(description: Mapping[str, Any]) -> Mapping[str, Any]:
    card = description.get("cardData")
    return card if isinstance(card, dict) else {}


def _license(description: Mapping[str, Any]) -> str:
    card = _card(description)
    license = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(license or "unknown")[:60]


def _languages(description: Mapping[str, Any]) -> str:
    language = _card(description).get("language")
    codes = [language] if isinstance(language, str) else language if isinstance(language, list) else []
    names = [LANGUAGE_NAMES.get(str(code), str(code)[:20]) for code in codes]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more or "unknown"


LANGUAGE_NAMES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "zh": "Chinese",
}


# ---- requests --------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but sends the token only to the Hub, and never leaves HTTP(S)."""

    max_redirections = 3

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target, source = urllib.parse.urlsplit(newurl), urllib.parse.urlsplit(req.full_url)
        if target.scheme not in ("http", "https") or (source.scheme == "https" and target.scheme != "https"):
            return None
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and (target.scheme, target.netloc) != (source.scheme, source.netloc):
            new.remove_header("Authorization")
        return new


_opener = urllib.request.build_opener(_Redirects)


def _get_json(name: str, path: str, token: str, deadline: float) -> dict[str, Any]:
    # The administrator sets the endpoint, and IDs consist of safe characters (see ID).
    request = urllib.request.Request(f"{settings.HF_ENDPOINT.rstrip('/')}/{path}")  # noqa: S310
    request.add_header("User-Agent", "llmtuner")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with _opener.open(request, timeout=max(0.1, min(5.0, deadline - time.monotonic()))) as response:
            content = json.loads(_read(response, deadline))
    except urllib.error.HTTPError as error:
        error.close()
        raise _for_status(name, error.code) from None
    except (OSError, ValueError, RecursionError) as error:
        raise unavailable(
            f"The Hub could not be reached for {name}. Try again in a moment, or choose a model from the list.",
            temporary=True,
        ) from error
    if not isinstance(content, dict):
        raise unavailable(f"The Hub's description of {name} is not valid. Choose another model.")
    return content


def _read(response: Any, deadline: float) -> bytes:
    """The whole response. Raises ValueError if it exceeds the deadline or the size limit, so that a slow server is cut off."""
    blocks, size = [], 0
    while block := response.read1(1 << 16):
        size += len(block)
        if size > MAX_RESPONSE or time.monotonic() > deadline:
            raise ValueError("the response is too long or too slow")
        blocks.append(block)
    return b"".join(blocks)


def _for_status(name: str, status: int) -> Refused:
    if status in (401, 403, 404):
        return unavailable(
            f"The Hub has no public model {name}. Check the spelling. The administrator must add a private or gated model to "
            "HUB_MODELS."
        )
    if status == 429:
        return unavailable("The Hub's rate limit is reached. Try again in a few minutes.", temporary=True)
    return unavailable(f"The Hub returned status {status} for {name}. Try again in a moment.", temporary=True)
