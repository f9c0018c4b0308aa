"""The whole model with adapters merged in, for Hugging Face's transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.export import export_check
from training.export.interface import Description
from training.models.interface import LanguageModel
from training.models.load import load_model
from training.text.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
USAGE = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)"


def write(model: LanguageModel, folder: Path, base: Path, dtype: str, details: Mapping[str, Any]) -> None:
    model.save(folder, DTYPES[dtype])
    _write_generation_config(folder, base)


def verify(model: LanguageModel, folder: Path, base: Path) -> dict[str, Any]:
    dtype = str(json.loads((folder / "config.json").read_text()).get("dtype", "float32"))
    return export_check.compare(model, load_model(folder), Tokenizer.load(folder), dtype)


def describe(dtype: str) -> Description:
    return Description("transformers", (), USAGE, f"{dtype}, safetensors")


def _write_generation_config(to: Path, base: Path) -> None:
    """Defaults for transformers' generate: those of the base, and every token at which an answer ends."""
    tokenizer = Tokenizer.load(base)
    path = to / "generation_config.json"
    if not path.is_file() and (base / path.name).is_file():
        shutil.copyfile(base / path.name, path)
    values = json.loads(path.read_text()) if path.is_file() else {}
    ends = tokenizer.ends.ids
    values["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    values.setdefault("pad_token_id", tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id)
    values.setdefault("bos_token_id", tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id)
    path.write_text(json.dumps(values, indent=2) + "\n")
