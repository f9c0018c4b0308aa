"""Only the LoRA adapter, to load on top of the base model with peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.export import export_check
from training.export.interface import Description
from training.models.causal_lm import CausalLM
from training.models.interface import LanguageModel
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

USAGE = "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"


def write(model: LanguageModel, folder: Path, base: Path, dtype: str, details: Mapping[str, Any]) -> None:
    if model.lora is None:
        raise Failure(
            "bad_settings",
            "Every weight of this model was trained, so there is no adapter to export.",
            "Export it as safetensors.",
        )
    model.save_adapter(folder, str(details.get("base") or base))


def verify(model: LanguageModel, folder: Path, base: Path) -> dict[str, Any]:
    """Compares through peft, which sums in another order: close, but not equal bit for bit."""
    import peft
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, use_safetensors=True
    )
    merged = peft.PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    return export_check.compare(model, CausalLM(merged), Tokenizer.load(folder), "float32")


def describe(dtype: str) -> Description:
    return Description("peft", ("lora",), USAGE, f"adapter, {dtype}, safetensors")
