"""What each export format is: a module with these three functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.models.interface import LanguageModel


@dataclass(frozen=True)
class Description:
    """What the model card says about the format."""

    library: str  # the Hugging Face library that opens it
    tags: tuple[str, ...]
    usage: str  # lines of Python
    weights: str  # "adapter, fp32, safetensors"


class Format(Protocol):
    def write(
        self, model: LanguageModel, folder: Path, base: Path, dtype: str, details: Mapping[str, Any]
    ) -> None:
        """Writes weights and configuration into an empty folder. `base` is the folder of the base model.

        Raises Failure if the model cannot be exported in this format."""
        ...

    def verify(self, model: LanguageModel, folder: Path, base: Path) -> dict[str, Any]:
        """Reads the folder back and compares it with the model in memory; see export_check.compare."""
        ...

    def describe(self, dtype: str) -> Description: ...
