"""What each export format is: a module with these three functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.models.interface import LanguageModel


@dataclass(frozen=True)
class Description:
    """What the model card says of the format."""

    library: str  # the Hugging Face library that opens it
    tags: tuple[str, ...]
    usage: str  # lines of Python
    weights: str  # "adapter, fp32, safetensors"


class Format(Protocol):
    def write(
        self, model: LanguageModel, folder: Path, base: Path, dtype: str, facts: Mapping[str, Any]
    ) -> None:
        """Writes the weights and their configuration into an empty folder. Raises Failure where the model cannot be
        exported so; `base` is the folder of the base model."""
        ...

    def verify(self, model: LanguageModel, folder: Path, base: Path) -> dict[str, Any]:
        """Reads the folder back and compares it with the model in memory: see export_check.compare."""
        ...

    def describe(self, dtype: str) -> Description: ...
