"""Loads a model folder with the implementation that supports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.models.architecture import is_supported
from training.models.config_json import read_config
from training.models.interface import LanguageModel
from training.models.transformer import Transformer
from training.plan.config import Settings
from training.plan.events import Failure


def _with_transformers(folder: str | Path) -> LanguageModel:
    from training.models.causal_lm import CausalLM  # late: importing transformers takes seconds

    return CausalLM.load(folder)


class Implementation(NamedTuple):
    supports: Callable[[dict[str, Any]], bool]
    """Whether it can run the model of this config.json."""
    load: Callable[[str | Path], LanguageModel]
    """Reads a folder of Hugging Face files, fp32 on the CPU."""


IMPLEMENTATIONS = {  # by the name in checkpoints; the first one that supports a model is used
    "native": Implementation(is_supported, Transformer.load),
    "transformers": Implementation(lambda config: True, _with_transformers),
}


def implementation_of(config: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None) -> str:
    """The name of the implementation that runs the model of a config.json.

    A run keeps the one it began with: another rounds differently and names the parameters differently.
    `checkpoint` is the manifest of one of its checkpoints."""
    values = dict(config)
    if checkpoint is None:
        return next(name for name, each in IMPLEMENTATIONS.items() if each.supports(values))
    # Manifests did not record it while GPT-2 was the only native model.
    former = "native" if values.get("model_type") == "gpt2" and is_supported(values) else "transformers"
    return str(checkpoint.get("implementation", former))


def load_model(folder: str | Path, implementation: str | None = None) -> LanguageModel:
    """The model of a folder of Hugging Face files, fp32 on the CPU. Raises Failure("base_model")."""
    name = implementation or implementation_of(read_config(folder))
    if name not in IMPLEMENTATIONS:
        raise Failure(
            "base_model", f"This version has no implementation named {name}, which the run began with."
        )
    return IMPLEMENTATIONS[name].load(folder)


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
