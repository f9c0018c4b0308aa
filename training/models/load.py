"""Loads a model folder with the implementation that supports it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from training.models.config_json import read_config
from training.models.gpt2 import GPT2, is_plain_gpt2
from training.models.interface import LanguageModel


def _with_transformers(folder: str | Path) -> LanguageModel:
    from training.models.causal_lm import CausalLM  # late: importing transformers takes seconds

    return CausalLM.load(folder)


class Implementation(NamedTuple):
    supports: Callable[[dict[str, Any]], bool]
    """Whether it can run the model of this config.json."""
    load: Callable[[str | Path], LanguageModel]
    """Reads a folder of Hugging Face files, fp32 on the CPU."""


IMPLEMENTATIONS = (  # the first one that supports a model is used
    Implementation(is_plain_gpt2, GPT2.load),
    Implementation(lambda config: True, _with_transformers),
)


def load_model(folder: str | Path) -> LanguageModel:
    """The model of a folder of Hugging Face files, fp32 on the CPU. Raises Failure("base_model")."""
    config = read_config(folder)
    return next(each for each in IMPLEMENTATIONS if each.supports(config)).load(folder)
