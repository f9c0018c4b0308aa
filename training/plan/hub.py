"""Locates a base model: the bundled starter, a local folder, or the Hugging Face Hub (with the usual
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE), from which it is downloaded once. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from training.plan import catalog
from training.plan.events import Failure, reason_of

# Safetensors weights and plain text files; no code, no other formats, no subfolders but that of chat templates.
WANTED = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE",
    "USE_POLICY.md",
]
UNWANTED = [
    "*/*.safetensors",
    "*/*.safetensors.index.json",
    "LICEN[CS]E*/*",
    "additional_chat_templates/*/*",
    "consolidated*",  # a second copy of the weights in Mistral's models
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def is_wanted(file: str) -> bool:
    """Whether `fetch` downloads this file."""
    return any(fnmatchcase(file, p) for p in WANTED) and not any(fnmatchcase(file, p) for p in UNWANTED)


def config_refusal(name: str, config: Mapping[str, Any]) -> str:
    """Why a model with this config.json cannot be a base; empty if nothing in it speaks against that."""
    if config.get("auto_map"):
        return f"{name} needs custom code, which is never run here. Choose another model."
    if quantization := config.get("quantization_config"):
        how = quantization.get("quant_method") if isinstance(quantization, dict) else ""
        return (
            f"The weights of {name} are quantized{f' ({how})' if how else ''} and cannot be trained. "
            "Choose the original model."
        )
    listed = config.get("architectures")
    architectures = [str(each) for each in listed] if isinstance(listed, list) else []
    if not any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in architectures):
        what = (
            f"it is {', '.join(architectures)[:100]}"
            if architectures
            else "its config.json names no architecture"
        )
        return f"{name} is not a causal language model: {what}. Choose one that generates text."
    return ""


def locate(base: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model, downloaded if necessary. Raises Failure("base_model")."""
    base = str(base)
    if base == catalog.STARTER:
        return catalog.STARTER_FOLDER
    if os.path.isabs(base) or Path(base).is_dir():
        return check(Path(base).absolute())
    return check(fetch(base, revision))


def fetch(name: str, revision: str | None = None, *, with_token: bool = True, only: str = "all") -> Path:
    """Downloads what is missing of a Hub model to the local cache. Returns its folder. Raises
    Failure("base_model").

    `with_token=False` requests it anonymously. `only="tokenizer"` skips the weights."""
    from huggingface_hub import snapshot_download  # late: only Hub models need it
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    options: dict[str, Any] = {} if with_token else {"token": False}
    unwanted = UNWANTED + (WEIGHTS if only == "tokenizer" else [])
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=WANTED, ignore_patterns=unwanted, **options
            )
        )
    except HFValidationError as error:
        raise Failure("base_model", f"{name!r} is not a valid model name on the Hub.") from error
    except GatedRepoError as error:
        advice = "Accept its license on the Hub, and set HF_TOKEN to a token with access to it."
        raise Failure(
            "base_model",
            f"The model {name} is available only to users who have accepted its license.",
            advice,
        ) from error
    except RevisionNotFoundError as error:
        raise Failure("base_model", f"The model {name} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        advice = "Check the spelling. For private models, set HF_TOKEN."
        raise Failure("base_model", f"The Hub has no model named {name}.", advice) from error
    except LocalEntryNotFoundError as error:
        advice = (
            "Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or use the folder of a model on this machine."
        )
        raise Failure(
            "base_model", f"The Hub cannot be reached, and {name} has not been downloaded before.", advice
        ) from error
    except Exception as error:  # the many errors of httpx and the library for an interrupted download
        if isinstance(error, OSError) and (reason := reason_of(error)):
            raise Failure(reason) from error
        raise Failure("base_model", f"The model {name} could not be downloaded: {error}") from error


def check(folder: Path) -> Path:
    """Checks that a folder can be a base model: config.json, safetensors, no custom code. Raises
    Failure("base_model")."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure("base_model", f"There is no readable config.json in {folder}.") from error
    if not isinstance(config, dict) or config.get("auto_map"):
        raise Failure("base_model", f"The model in {folder} needs custom code, which is never run.")
    if not any(folder.glob("*.safetensors")):
        raise Failure(
            "base_model",
            f"There are no safetensors weights in {folder}.",
            "Convert the model to safetensors first.",
        )
    return folder
