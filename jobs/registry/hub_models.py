"""May a model of the Hugging Face Hub be a base here? Told from the Hub's own description, before a worker fetches a byte.

Anybody who is signed in may name a model, so nothing of the operator's is lent for it: HF_TOKEN goes along only for models
that HUB_MODELS names. What is refused: private and gated models (unless named), pickles, code of their own, what is no
causal language model, what is quantised, and more than HUB_MAX_GB. Short calls with a deadline; imports no torch.
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

from training.plan import catalog, hub
from training.plan.catalog import BaseModel

# owner/name, as the Hub has them. Nothing that could be read as a path of this machine or lead out of an address.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
PUBLIC = "public"  # the word in HUB_MODELS for everything that anybody may read
DEADLINE_S = 8.0  # for all that is asked about one model
MAX_ANSWER = 4 << 20
AT_ONCE = 4  # checks of this process; each holds a thread
REMEMBERED_S = 60.0  # a refusal: asking again and again costs the Hub nothing

_places = threading.BoundedSemaphore(AT_ONCE)
_refused: dict[str, tuple[float, Refused]] = {}


class Refused(Exception):
    """The model can't be a base here; the message says why and what to do. `passing` ones may be asked again."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        self.passing = passing
        super().__init__(message)


@dataclass(frozen=True)
class Found:
    """What the Hub says of a model, and the revision it says it of."""

    model: BaseModel
    revision: str


def is_id(name: str) -> bool:
    return ID.fullmatch(name) is not None and ".." not in name


def is_listed(name: str) -> bool:
    """Does HUB_MODELS name it (by a pattern)? Then the operator vouches for it, and the token is lent."""
    return any(fnmatchcase(name.lower(), p.lower()) for p in settings.HUB_MODELS if p != PUBLIC)


def check_allowed(name: str) -> None:
    """Raises Refused where the operator allows no such model, whatever it is."""
    if PUBLIC not in settings.HUB_MODELS and not is_listed(name):
        allowed = ", ".join(settings.HUB_MODELS) or "those of the list"
        raise Refused(f"This studio takes no such model of the Hub, only {allowed}. Choose another base.")


def look_up(name: str) -> Found:
    """Asks the Hub about `name`. Raises Refused."""
    if not is_id(name):
        raise Refused(
            f"{name[:100]!r} is no id of the Hub. Write owner/name, for instance Qwen/Qwen2.5-0.5B."
        )
    check_allowed(name)
    at, known = _refused.get(name, (0.0, None))
    if known is not None and time.monotonic() - at < REMEMBERED_S:
        raise known
    if not _places.acquire(blocking=False):
        raise Refused("Too many models are being checked just now. Try again in a few seconds.", passing=True)
    try:
        return _look_up(name)
    except Refused as refused:
        if not refused.passing:
            while len(_refused) >= 1000:
                _refused.pop(next(iter(_refused)))
            _refused[name] = (time.monotonic(), refused)
        raise
    finally:
        _places.release()


def _look_up(name: str) -> Found:
    until = time.monotonic() + DEADLINE_S
    token = str(settings.HF_TOKEN) if is_listed(name) else ""
    told = _ask(name, f"api/models/{name}?blobs=true", token, until)
    real = str(told.get("id") or name)
    if real != name:  # it was renamed, or another spelling
        if not is_id(real):
            raise Refused(f"The Hub calls {name} by a name that can't be used here.")
        check_allowed(real)
    _check_access(real, told)
    size = _check_files(real, told)
    revision = str(told.get("sha") or "")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise Refused(
            f"The Hub names no revision of {real}, so it could change unseen. Choose another model."
        )
    config = _ask(name, f"{name}/resolve/{revision}/config.json", token, until)
    return Found(replace(_describe(real, told, config), id=real, name=real, download=size), revision)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_access(name: str, told: Mapping[str, Any]) -> None:
    if told.get("disabled"):
        raise Refused(f"The Hub has disabled {name}. Choose another model.")
    kept = "private" if told.get("private") else "gated: only for those who accepted its licence" if told.get("gated") else ""  # fmt: skip
    if kept and not is_listed(name):
        raise Refused(
            f"{name} is {kept}. The operator can allow it by naming it in HUB_MODELS and setting HF_TOKEN."
        )


def _check_files(name: str, told: Mapping[str, Any]) -> int:
    """Bytes that would be fetched."""
    siblings = told.get("siblings")
    files = {
        str(one.get("rfilename")): one.get("size")
        for one in (siblings if isinstance(siblings, list) else [])
        if isinstance(one, dict)
    }
    wanted = {file: size for file, size in files.items() if hub.is_wanted(file)}
    if not any(file.endswith(".safetensors") for file in wanted):
        raise Refused(
            f"{name} has no safetensors weights. Other formats can run programs when they are read, so they never are; "
            "choose a model in safetensors."
        )
    if "config.json" not in wanted:
        raise Refused(f"{name} has no config.json, so nothing tells what it is. Choose another model.")
    if "tokenizer.json" not in wanted and not {"vocab.json", "merges.txt"} <= set(wanted):
        raise Refused(f"{name} has no tokenizer.json, which is needed to read text. Choose another model.")
    if not all(isinstance(size, int) and size >= 0 for size in wanted.values()):
        raise Refused(f"The Hub does not say how large {name} is. Choose another model.")
    size = sum(int(size or 0) for size in wanted.values())
    if size > settings.HUB_MAX_GB * 1e9:
        raise Refused(
            f"{name} has {size / 1e9:,.1f} GB; this studio takes models up to {settings.HUB_MAX_GB:g} GB (HUB_MAX_GB). "
            "Choose a smaller one."
        )
    return size


def _describe(name: str, told: Mapping[str, Any], config: Mapping[str, Any]) -> BaseModel:
    if config.get("auto_map"):
        raise Refused(f"{name} needs code of its own, which is never run here. Choose another model.")
    if quantised := config.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else ""
        raise Refused(
            f"The weights of {name} are quantised{f' ({how})' if how else ''} and can't be trained. "
            "Choose the model it was made from."
        )
    said = config.get("architectures")
    kinds = [str(kind) for kind in said] if isinstance(said, list) else []
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        what = f"it is {', '.join(kinds)[:100]}" if kinds else "its config.json names no architecture"
        raise Refused(f"{name} is no causal language model: {what}. Choose one that continues text.")
    try:
        found = catalog.of_config(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(f"{name} can't be used: {error}. Choose another model.") from error
    weights = told.get("safetensors")
    total = weights.get("total") if isinstance(weights, dict) else None
    return replace(
        found,
        parameters=total if isinstance(total, int) and total > 0 else found.parameters,
        licence=_licence(told),
        languages=_languages(told),
    )


def _card(told: Mapping[str, Any]) -> Mapping[str, Any]:
    card = told.get("cardData")
    return card if isinstance(card, dict) else {}


def _licence(told: Mapping[str, Any]) -> str:
    card = _card(told)
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(licence or "unknown")[:60]


def _languages(told: Mapping[str, Any]) -> str:
    said = _card(told).get("language")
    codes = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    names = [NAMES.get(str(code), str(code)[:20]) for code in codes]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more or "unknown"


NAMES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip


# ---- the calls -------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows, but the token goes to the Hub alone, and nothing but http is spoken."""

    max_redirections = 3

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        there, here = urllib.parse.urlsplit(newurl), urllib.parse.urlsplit(req.full_url)
        if there.scheme not in ("http", "https") or (here.scheme == "https" and there.scheme != "https"):
            return None
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and (there.scheme, there.netloc) != (here.scheme, here.netloc):
            new.remove_header("Authorization")
        return new


_opener = urllib.request.build_opener(_Redirects)


def _ask(name: str, path: str, token: str, until: float) -> dict[str, Any]:
    # The endpoint is the operator's; ids are made of plain letters (see ID).
    request = urllib.request.Request(f"{settings.HF_ENDPOINT.rstrip('/')}/{path}")  # noqa: S310
    request.add_header("User-Agent", "llmtuner")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with _opener.open(request, timeout=max(0.1, min(5.0, until - time.monotonic()))) as answer:
            told = json.loads(_read(answer, until))
    except urllib.error.HTTPError as error:
        error.close()
        raise _for_status(name, error.code) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"The Hub could not be asked about {name}. Try again in a moment, or choose a model of the list.",
            passing=True,
        ) from error
    if not isinstance(told, dict):
        raise Refused(f"What the Hub says of {name} can't be read. Choose another model.")
    return told


def _read(answer: Any, until: float) -> bytes:
    """Whole, within the deadline and the size; a server that drips is left."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        size += len(part)
        if size > MAX_ANSWER or time.monotonic() > until:
            raise ValueError("too long an answer")
        parts.append(part)
    return b"".join(parts)


def _for_status(name: str, status: int) -> Refused:
    if status in (401, 403, 404):
        return Refused(
            f"The Hub has no model {name} that anybody may read. Check the spelling; one that is private or gated must be "
            "named in HUB_MODELS by the operator."
        )
    if status == 429:
        return Refused("The Hub takes no more questions just now. Try again in a few minutes.", passing=True)
    return Refused(f"The Hub answered {status} when asked about {name}. Try again in a moment.", passing=True)
