"""The registry of export formats: the choices of `python -m training export --format`. Pages and API do not list
them: a finished job is exported as safetensors.

A new format is an entry here and a module of training/export/ with `write`, `verify` and `describe` (see
training/export/interface.py). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportFormat:
    label: str
    help: str
    dtypes: tuple[str, ...]
    """Number formats it can be written in. The first is the default."""
    module: str
    """Name of its module in training/export/."""


FORMATS: dict[str, ExportFormat] = {
    "safetensors": ExportFormat(
        "Hugging Face folder",
        "The whole model with adapters merged in, for transformers.",
        ("fp32", "fp16"),
        "huggingface",
    ),
    "merged": ExportFormat(
        "Merged weights",
        "Same as safetensors: adapters are merged into the base model.",
        ("fp32", "fp16"),
        "huggingface",
    ),
    "adapter": ExportFormat(
        "LoRA adapter", "Only the adapter, to load on top of the base model with peft.", ("fp32",), "adapter"
    ),
}
