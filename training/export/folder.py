"""Writes a model folder in any format: weights, configuration, tokenizer, licenses, model card and a list of
its files.

It is written atomically: to a temporary folder first, then renamed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from training.export.card import card
from training.export.interface import Format
from training.models.interface import LanguageModel
from training.plan.events import Failure
from training.plan.export_formats import FORMATS
from training.text.tokenizer import TOOL_USE, Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


def write_folder(
    model: LanguageModel,
    to: str | Path,
    *,
    base: str | Path,
    format: str = "safetensors",
    dtype: str = "fp32",
    details: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Writes `model` to the folder `to`, which is created or replaced. Returns its files: [{"name", "bytes",
    "sha256"}].

    `base` is the folder of the base model, whose tokenizer is copied. `details` is for the model card:
    job, base, settings, examples, tokens, steps, metrics, fidelity; whatever is missing is left out. The
    list of files is also written to manifest.json. Raises Failure if the model cannot be exported in this
    format."""
    to, base, details = Path(to), Path(base), details or {}
    module = _module(format)
    if dtype not in FORMATS[format].dtypes:
        raise Failure(
            "bad_settings",
            f"{FORMATS[format].label} cannot be written as {dtype}.",
            f"Choose one of: {', '.join(FORMATS[format].dtypes)}.",
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        draft.chmod(0o755)
        module.write(model, draft, base, dtype, details)
        write_tokenizer(base, draft)
        for name in LICENCE_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, draft / name)
        (draft / "README.md").write_text(card(details, module.describe(dtype)), encoding="utf-8")
        files = list_files(draft)
        (draft / "manifest.json").write_text(json.dumps({"files": files}, indent=1) + "\n")
        _sync(draft)
        if to.exists():
            shutil.rmtree(to)
        draft.rename(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return files


def verify(
    model: LanguageModel, folder: str | Path, *, base: str | Path, format: str = "safetensors"
) -> dict[str, Any]:
    """Reads an exported folder back and compares it with the trained model; see export_check.compare."""
    return _module(format).verify(model, Path(folder), Path(base))


def _module(format: str) -> Format:
    module: Any = importlib.import_module(f"training.export.{FORMATS[format].module}")
    return cast(Format, module)


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file of a folder."""
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": digest})
    return files


def write_tokenizer(base: Path, to: Path) -> None:
    """Copies the base model's tokenizer, and writes the chat template that the model was trained with into
    its config."""
    tokenizer = Tokenizer.load(base)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, to / name)
    if not (to / "tokenizer.json").is_file():  # only GPT-2's older two files: tokenizer.json holds both
        tokenizer.backend.save(str(to / "tokenizer.json"))
    path = to / "tokenizer_config.json"
    config = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    config.pop("auto_map", None)  # code that comes with a model is never run or passed on
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if name not in config and name in tokenizer.config:
            config[name] = tokenizer.config[name]
    config["chat_template"] = tokenizer.full_template
    if tokenizer.named_templates:
        templates = {**tokenizer.named_templates, "default": tokenizer.full_template}
        if TOOL_USE in templates:
            templates[TOOL_USE] = tokenizer.full_tool_template
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
