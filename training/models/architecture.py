"""What tells one decoder family from another: the shape of a model and the names of its weights.

models/transformer.py trains any of these architectures and models/decoder.py generates with them. A config.json
that asks for anything else, in whatever key, is left to transformers (models/causal_lm.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Config = dict[str, Any]  # of a config.json


@dataclass(frozen=True)
class Names:
    """The names of a family's weights in Hugging Face's files."""

    trunk: str
    embedding: str
    positions: str  # learned position embeddings
    layers: str
    norm: str
    # of a layer
    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str
    # of its attention
    qkv: tuple[str, ...]  # one layer for all three, or one for each
    attention_out: str
    # of its MLP
    up: tuple[str, ...]  # one layer, or gate and up
    down: str


GPT2_NAMES = Names(
    trunk="transformer",
    embedding="wte",
    positions="wpe",
    layers="h",
    norm="ln_f",
    attention_norm="ln_1",
    attention="attn",
    mlp_norm="ln_2",
    mlp="mlp",
    qkv=("c_attn",),
    attention_out="c_proj",
    up=("c_fc",),
    down="c_proj",
)
LLAMA_NAMES = Names(
    trunk="model",
    embedding="embed_tokens",
    positions="",
    layers="layers",
    norm="norm",
    attention_norm="input_layernorm",
    attention="self_attn",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    qkv=("q_proj", "k_proj", "v_proj"),
    attention_out="o_proj",
    up=("gate_proj", "up_proj"),
    down="down_proj",
)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings: how far a pair of features turns from one position to the next."""

    frequencies: tuple[float, ...]  # (d / 2,), radians per position, fp32 values
    factor: float = 1.0  # cos and sin are multiplied by it (YaRN)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each token, (T, 1, d / 2) each. positions (T,)."""
        steps = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = (positions.float()[:, None] * steps)[:, None]  # fp32 also for bf16 models
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


@dataclass(frozen=True)
class Architecture:
    """A decoder: D wide, H query heads and G key/value heads of size d, MLP I wide."""

    names: Names
    vocabulary: int  # V
    context: int  # the longest document, in tokens
    width: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # G
    head_size: int  # d
    inner: int  # I
    norm: Literal["layer", "rms"]
    eps: float
    mlp: Literal["gelu", "swiglu"]
    rotary: Rotary | None = None  # None: learned position embeddings
    unrotated: frozenset[int] = frozenset()  # layers without position information (NoPE, arXiv 2305.19466)
    windows: tuple[int | None, ...] = ()  # of each layer: tokens it sees, itself included; None = all
    out_in: bool = True  # weights of linear layers are (out, in); GPT-2's are (in, out)
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of queries and keys
    tied: bool = True  # the head is the token embedding
    initial_std: float = 0.02  # of random weights
    # multipliers (muP, as in Granite)
    attention_scale: float = 0.0  # of the scores; 0 = d ** -0.5
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # the dropout probabilities that its config.json has, and where they apply
    dropouts: tuple[tuple[str, str], ...] = (("attention_dropout", "attention"),)


def architecture_of(config: Config) -> Architecture | None:
    """The architecture of a config.json, or None if models/transformer.py does not implement it exactly."""
    read = FAMILIES.get(str(config.get("model_type")))
    foreign = {"auto_map", "quantization_config"} & {key for key, value in config.items() if value}
    try:
        return None if read is None or foreign else read(config)
    except (_Unsupported, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def is_supported(config: Config) -> bool:
    return architecture_of(config) is not None


class _Unsupported(Exception):
    """A value that models/transformer.py does not implement."""


def _need(holds: object) -> None:
    if not holds:
        raise _Unsupported


# ---- families ----------------------------------------------------------------------------------------------


def _gpt2(config: Config) -> Architecture:
    """Radford et al., "Language Models are Unsupervised Multitask Learners" (2019)."""
    _need(config.get("activation_function", "gelu_new") in ("gelu_new", "gelu_pytorch_tanh"))
    _need(config.get("scale_attn_weights", True) and config.get("tie_word_embeddings", True))
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        _need(not config.get(option))
    values = gpt2_config(**config)
    D, H = int(values["n_embd"]), int(values["n_head"])
    _need(D % H == 0)
    return Architecture(
        names=GPT2_NAMES,
        vocabulary=int(values["vocab_size"]),
        context=int(values["n_positions"]),
        width=D,
        layers=int(values["n_layer"]),
        heads=H,
        kv_heads=H,
        head_size=D // H,
        inner=int(values["n_inner"] or 4 * D),
        norm="layer",
        eps=float(values["layer_norm_epsilon"]),
        mlp="gelu",
        out_in=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        dropouts=(("embd_pdrop", "embedding"), ("attn_pdrop", "attention"), ("resid_pdrop", "residual")),
    )


def gpt2_config(**values: Any) -> Config:
    """A config.json of GPT-2 with these values under Hugging Face's names, the others as in GPT-2 small. Files of
    the Hub leave some out; ours name all of them."""
    return GPT2_SMALL | values


GPT2_SMALL: Config = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
}


def _llama(config: Config) -> Architecture:
    """Llama 2 (arXiv 2307.09288) and 3 (2407.21783), SmolLM2 (2502.02737): what the families below vary."""
    D, H = int(config["hidden_size"]), int(config["num_attention_heads"])
    d, G = int(config.get("head_dim") or D // H), int(config.get("num_key_value_heads") or H)
    layers = int(config["num_hidden_layers"])
    classes = config.get("architectures") or ["ForCausalLM"]
    _need(len(classes) == 1 and str(classes[0]).endswith("ForCausalLM"))
    _need(config.get("hidden_act", "silu") == "silu")
    _need(H % G == 0 and d % 2 == 0 and (config.get("head_dim") or D % H == 0))
    _need(config.get("partial_rotary_factor") in (None, 1, 1.0))
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        names=LLAMA_NAMES,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        width=D,
        layers=layers,
        heads=H,
        kv_heads=G,
        head_size=d,
        inner=int(config["intermediate_size"]),
        norm="rms",
        eps=float(config["rms_norm_eps"]),
        mlp="swiglu",
        rotary=_rotary(config, d),
        windows=(None,) * layers,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
        initial_std=float(config.get("initializer_range", 0.02)),
    )


def _mistral(config: Config) -> Architecture:
    """Mistral (arXiv 2310.06825): a sliding window in every layer."""
    _need("layer_types" not in config and not config.get("attention_bias") and not config.get("mlp_bias"))
    window = config.get("sliding_window")
    plain = _llama(config)
    return replace(plain, windows=(int(window) if window else None,) * plain.layers)


def _qwen2(config: Config) -> Architecture:
    """Qwen2 (arXiv 2407.10671) and 2.5: biases on queries, keys and values."""
    _need(not config.get("mlp_bias") and not config.get("head_dim"))
    return replace(_windowed(_llama(config), config), qkv_bias=True, attention_out_bias=False)


def _qwen3(config: Config) -> Architecture:
    """Qwen3 (arXiv 2505.09388): a norm on each head of queries and keys."""
    _need(not config.get("mlp_bias"))
    return replace(_windowed(_llama({"head_dim": 128} | config), config), qk_norm=True)


def _windowed(plain: Architecture, config: Config) -> Architecture:
    """Qwen's windows: in the layers that `layer_types` names, or in those from `max_window_layers` on."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "sliding_attention" if window and i >= config.get("max_window_layers", 28) else "full_attention"
        for i in range(plain.layers)
    ]
    _need(len(kinds) == plain.layers and set(kinds) <= {"full_attention", "sliding_attention"})
    _need(window or "sliding_attention" not in kinds)
    windows = tuple(int(window) if kind == "sliding_attention" and window else None for kind in kinds)
    return replace(plain, windows=windows)


def _granite(config: Config) -> Architecture:
    """Granite 3: Llama with multipliers (muP; Yang et al., arXiv 2203.03466)."""
    return replace(
        _llama(config),
        attention_scale=float(config.get("attention_multiplier", 1.0)),
        embedding_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1 / float(config.get("logits_scaling", 1.0)),
    )


def _smollm3(config: Config) -> Architecture:
    """SmolLM3: every fourth layer has no rotary embedding."""
    plain = _llama({"rope_theta": 2e6, "tie_word_embeddings": True} | config)
    every = int(config.get("no_rope_layer_interval", 4))
    rotated = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(plain.layers)]
    _need(len(rotated) == plain.layers and not config.get("use_sliding_window"))
    _need(set(config.get("layer_types") or ["full_attention"]) == {"full_attention"})
    return replace(plain, unrotated=frozenset(i for i, on in enumerate(rotated) if not on))


FAMILIES: dict[str, Callable[[Config], Architecture]] = {  # model_type of config.json
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "granite": _granite,
    "smollm3": _smollm3,
}


# ---- rotary frequencies ------------------------------------------------------------------------------------


def _rotary(config: Config, d: int) -> Rotary:
    """The frequencies of a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files.

    The formulas are those of transformers' modeling_rope_utils.py, in fp32 like there."""
    scaling: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    _need(scaling.get("partial_rotary_factor") in (None, 1, 1.0))
    _need(not any(isinstance(value, dict) for value in scaling.values()))  # one kind for each kind of layer
    # on the CPU even while a model without memory is made
    powers = base ** (torch.arange(0, d, 2, device="cpu").float() / d)  # (d / 2,)
    plain = 1.0 / powers
    if kind == "default" or kind == "dynamic":  # dynamic changes only what lies beyond the context
        return Rotary(tuple(plain.tolist()))
    if kind == "linear":
        return Rotary(tuple((plain / float(scaling["factor"])).tolist()))
    if kind == "llama3":
        return Rotary(tuple(_llama3_frequencies(plain, scaling).tolist()))
    _need(kind == "yarn")
    return _yarn(powers, base, scaling)


def _llama3_frequencies(plain: Tensor, scaling: Config) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, and those between are blended."""
    factor, trained = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > trained / low, plain / factor, plain)
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, base: float, scaling: Config) -> Rotary:
    """YaRN (Peng et al., arXiv 2309.00071)."""
    _need(not any(scaling.get(key) for key in ("mscale", "mscale_all_dim")))
    _need(scaling.get("truncate", True))
    factor, trained = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    pairs = len(powers)

    def pair_with(rotations: float) -> float:
        """The pair of features that turns this often within the trained context."""
        return pairs * math.log(trained / (rotations * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_with(scaling.get("beta_fast") or 32)), 0)
    last = min(math.ceil(pair_with(scaling.get("beta_slow") or 1)), 2 * pairs - 1)
    ramp = (torch.arange(pairs, device="cpu").float() - first) / (last - first if last != first else 0.001)
    kept = 1 - ramp.clamp(0, 1)  # 1: as trained; 0: stretched
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    attention = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotary(tuple(frequencies.tolist()), float(attention))
