"""Attention inside each document of a packed row, for models that transformers runs.

transformers looks its attention up by name in a table, where `install` puts ours. Instead of a (T, T) mask the
model gets the offsets of the documents, (1, 1, 1, documents + 1) int32: transformers passes a mask with four
dimensions on to every layer as it is. Any other mask means that the model reads whole sequences, for example
with a cache: they go to the implementation that transformers had chosen.

Shapes: T tokens, H query heads, K key and value heads, d their size; a document has n tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.models.attention import varlen, visible

BLOCK = 256  # queries whose scores are in memory at once where no kernel of torch supports the layer
NAMES = {"sdpa": "documents_sdpa", "eager": "documents_eager"}  # transformers' implementation -> ours


def install(lm: Any) -> None:
    """Makes a model of transformers use `attention`, in place, if its architecture looks attention up."""
    former = lm.config._attn_implementation
    if former in NAMES and lm._can_set_attn_implementation():
        lm.set_attn_implementation(NAMES[former])


def mask(offsets: Tensor) -> Tensor:
    """What to pass as attention_mask: (documents + 1,) -> (1, 1, 1, documents + 1), int32."""
    return offsets.view(1, 1, 1, -1)


def _attention_over(former: str) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,  # (1, H, T, d)
        key: Tensor,  # (1, K, T, d)
        value: Tensor,  # (1, K, T, d)
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is None or attention_mask.dtype != torch.int32:
            whole = ALL_ATTENTION_FUNCTIONS.get(former)
            if whole is None:  # the plain formula of the architecture, which may differ in each
                whole = sys.modules[type(module).__module__].eager_attention_forward
            result: tuple[Tensor, Tensor | None] = whole(module, query, key, value, attention_mask, **options)
            return result
        return documents(query, key, value, attention_mask.flatten(), **options), None

    return attention


for _former, _name in NAMES.items():
    AttentionInterface.register(_name, _attention_over(_former))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_former])


def documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention in each document: (1, H, T, d), (1, K, T, d) twice, (documents + 1,) -> (1, T, H, d).

    `sliding_window`: a token attends to so many tokens, itself included (Mistral, arXiv 2310.06825). `softcap`:
    scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118). `s_aux` (H,): a score of each
    head that takes part in the softmax and has no value, an attention sink (gpt-oss)."""
    plain = softcap is None and s_aux is None
    if plain and query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or K, d)
        longest = len(q)  # an upper bound: the longest document is not known here without waiting
        return varlen(q, k, v, offsets, longest, dropout, scaling, sliding_window)[None]
    # split, not slices: the gradients of slices are whole rows of zeros, one for each document
    lengths = offsets.diff().tolist()
    outs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        n = q.shape[2]
        window = sliding_window if sliding_window and sliding_window < n else None
        if not plain:
            outs.append(_by_formula(q, k, v, dropout, scaling, window, softcap, s_aux))
        elif window:
            outs.append(_in_windows(q, k, v, dropout, scaling, window))
        else:
            outs.append(
                F.scaled_dot_product_attention(
                    q, k, v, None, dropout, True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outs, 2).transpose(1, 2)


def _in_windows(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int
) -> Tensor:
    """Attention to the last `window` tokens, in blocks of as many queries: (n, window) scores, not (n, n)."""
    outs = []
    for start in range(0, q.shape[2], window):
        block = q[:, :, start : start + window]
        first, end = max(0, start - window + 1), start + block.shape[2]
        seen = visible(start, end, first, window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                block,
                k[:, :, first:end],
                v[:, :, first:end],
                seen,
                dropout,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outs, 2)


def _by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention by the plain formula, which has soft caps and sinks, in blocks of queries.

    The scores of a block are computed again in the backward pass, so that those of one block are in memory."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling

    def block(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, first: int) -> Tensor:
        shared, heads, t = k.shape[1], q.shape[1], end - start
        grouped = q.view(1, shared, -1, t, q.shape[-1]) * scale  # (1, K, H / K, t, d)
        scores = grouped @ k[:, :, None].transpose(-1, -2)  # (1, K, H / K, t, keys)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible(start, end, first, window, q.device), float("-inf"))
        if sinks is not None:
            sink = sinks.view(1, shared, -1, 1, 1).expand(-1, -1, -1, t, 1)
            scores = torch.cat([scores, sink.to(scores.dtype)], -1)
        probs = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
        probs = F.dropout(probs, dropout, dropout > 0)
        return (probs @ v[:, :, None]).reshape(1, heads, t, -1)

    outs = []
    for start in range(0, q.shape[2], BLOCK):
        end = min(start + BLOCK, q.shape[2])
        first = max(0, start - window + 1) if window else 0
        parts = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], start, end, first)
        outs.append(checkpoint(block, *parts, use_reentrant=False))
    return torch.cat(outs, 2)
