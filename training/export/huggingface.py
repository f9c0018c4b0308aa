"""The whole model with adapters merged in, for Hugging Face's transformers."""

from __future__ import annotations

import json
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
    """Defaults for transformers' generate, which otherwise would not know where an answer ends."""
    if (to / "generation_config.json").is_file():
        return
    tokenizer = Tokenizer.load(base)
    values = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id or tokenizer.eos_id}
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    (to / "generation_config.json").write_text(json.dumps({"bos_token_id": bos} | values, indent=2) + "\n")
