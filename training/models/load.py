"""Loads a model folder with the implementation that supports it, and makes a decoder for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.models.decoder import Decoder, GPT2Decoder
from training.models.gpt2 import GPT2, is_plain_gpt2, read_config


def load_model(folder: str | Path) -> Any:
    """GPT2 for plain GPT-2 models, CausalLM for all others. Weights are fp32 on the CPU. Raises
    Failure("base_model")."""
    if is_plain_gpt2(read_config(folder)):
        return GPT2.load(folder)
    from training.models.causal_lm import CausalLM  # late: importing transformers takes seconds

    return CausalLM.load(folder)


def decoder_for(model: Any, pack: bool = True) -> Decoder:
    """A decoder for either implementation of models/interface.py. `pack` copies the weights for speed."""
    own = getattr(model, "decoder", None)  # CausalLM has its own, based on transformers' cache
    if own is not None:
        decoder: Decoder = own()
        return decoder
    return GPT2Decoder(model.merged_weights(), model.config.n_head, model.config.layer_norm_epsilon, pack)
