"""Loads a model folder with the implementation that supports it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from training.models.config_json import read_config
from training.models.gpt2 import GPT2, is_plain_gpt2
from training.models.interface import LanguageModel
from training.plan.config import Settings


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


def add_lora(model: LanguageModel, s: Settings) -> None:
    """Adds the adapters of some settings to a model, in place. Raises Failure("bad_settings")."""
    model.add_lora(
        s.lora_rank,
        s.lora_alpha,
        s.lora_dropout,
        s.lora_targets,
        use_dora=s.use_dora,
        use_rslora=s.use_rslora,
    )
