"""Tiny random models of the architectures that users tune, made from transformers' own configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = SHAPE | IDS | {"num_key_value_heads": 1, "head_dim": 16}
WINDOW: dict[str, Any] = GROUPED | {"sliding_window": 20}
KINDS = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2: dict[str, Any] = {"expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 16}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**GROUPED),
    "mistral": lambda: t.MistralConfig(**WINDOW),
    "qwen2": lambda: t.Qwen2Config(**SHAPE, **IDS, num_key_value_heads=1),
    "qwen2_window": lambda: t.Qwen2Config(
        **SHAPE, **IDS, num_key_value_heads=1, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: t.Qwen3Config(**GROUPED),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**GROUPED, **EXPERTS),
    "qwen3_5": lambda: t.Qwen3_5TextConfig(
        **GROUPED, **LINEAR_ATTENTION, layer_types=["linear_attention", "full_attention"]
    ),
    "gemma2": lambda: t.Gemma2Config(**WINDOW),
    "gemma3": lambda: t.Gemma3TextConfig(**WINDOW, layer_types=KINDS),
    "gemma4": lambda: t.Gemma4TextConfig(
        **WINDOW,
        layer_types=KINDS,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
    ),
    "phi3": lambda: t.Phi3Config(**GROUPED),
    "smollm3": lambda: t.SmolLM3Config(**GROUPED),
    "granite": lambda: t.GraniteConfig(**GROUPED),
    "olmo2": lambda: t.Olmo2Config(**GROUPED),
    "olmo3": lambda: t.Olmo3Config(**WINDOW, layer_types=KINDS),
    "lfm2": lambda: t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "falcon_h1": lambda: t.FalconH1Config(
        **GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16
    ),
    "ministral3": lambda: t.Ministral3Config(**GROUPED),
    "ernie4_5": lambda: t.Ernie4_5Config(**GROUPED),
    "hunyuan": lambda: t.HunYuanDenseV1Config(**GROUPED),
    "exaone4": lambda: t.Exaone4Config(**WINDOW, sliding_window_pattern=2, layer_types=KINDS),
    "gpt_oss": lambda: t.GptOssConfig(
        **WINDOW, num_local_experts=4, num_experts_per_tok=2, layer_types=KINDS
    ),
    "mamba": lambda: t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS),
    "mamba2": lambda: t.Mamba2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, **MAMBA2, **IDS
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**SHAPE, **IDS),
    "bloom": lambda: t.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2, **IDS),
    "opt": lambda: t.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        **IDS,
    ),
}


def causal_lm(name: str) -> Any:
    """The model as transformers makes it, with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    lm = t.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for p in lm.parameters():
        p.data.normal_(0, 0.2)
    return lm.eval()
