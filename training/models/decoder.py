"""Generating one token after another, fast: the key/value cache, weights laid out for reading, and sampling.

Shapes: B sequences, N tokens read or written in a pass, D width, H query heads and G key/value heads of size d,
I width of the MLP, V vocabulary.
Each step reads every weight once, so its speed is limited by memory bandwidth. On a CPU the weights are
repacked for oneDNN (measured on 2 cores, one row: an MLP matrix takes 0.28 ms as stored, 0.08 ms repacked;
GPT-2's head 11.7 ms and 6.1 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.architecture import Architecture
from training.models.attention import Heads, plain_attention
from training.models.kernels import rms_norm, rotate

Linear = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class Decoder(Protocol):
    """What generation needs from a model. A cache belongs to one sequence; a step advances several
    sequences at once."""

    context: int

    def prefill(self, ids: Sequence[int], room: int, all_tokens: bool = False) -> tuple[Any, Tensor]:
        """Reads a prompt into a new cache with room for `room` tokens.

        Returns (cache, logits): the last token's logits, (V,), or those of all tokens, (T, V), if
        `all_tokens`."""
        ...

    def fork(self, cache: Any) -> Any:
        """Copies a cache, for another sequence that starts from the same prompt."""
        ...

    def step(self, caches: Sequence[Any], ids: Sequence[int]) -> Tensor:
        """Appends one token to each sequence. Returns the logits of the next ones, (B, V)."""
        ...


def linear(weight: Tensor, bias: Tensor | None, act: str = "none", pack: bool = True) -> Linear:
    """x (N, in) -> act(x @ weight.T + bias) (N, out), for weight (out, in); `act` is "none" or "gelu"
    (tanh form)."""
    if (
        pack
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        # The operators that torch.compile emits for frozen weights. The repacked copy replaces the plain
        # weight.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        run = torch.ops.mkldnn._linear_pointwise
        algorithm = "tanh" if act == "gelu" else ""
        return lambda x: run(x, packed, bias, act, [], algorithm)
    if act == "gelu":
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return lambda x: F.linear(x, weight, bias)


@dataclass
class Cache:
    """Keys and values of one sequence: one tensor (room, 2, G, d) per layer, of which `length` tokens are
    filled."""

    layers: list[Tensor]
    length: int


@dataclass
class Layer:
    """The weights of one block, ready to be applied."""

    heads: Heads
    rotated: bool
    attention_norm: Norm
    qkv: Linear  # (N, D) -> (N, (H + 2G) * d)
    qk_norms: tuple[Norm, Norm] | None
    attention_out: Linear
    mlp_norm: Norm
    mlp: Linear


class TransformerDecoder:
    """Generates with models/transformer.py's architectures, from their Hugging Face weights by name.

    pack=True copies the weights for speed, for models that generate a lot. pack=False reads them in place,
    so a model in training can generate samples without extra memory."""

    @torch.inference_mode()
    def __init__(self, a: Architecture, weights: Mapping[str, Tensor], pack: bool = True) -> None:
        prefix = f"{a.names.trunk}."
        self.w = w = {name.removeprefix(prefix): tensor.detach() for name, tensor in weights.items()}
        self.a, self.context, self.pack = a, a.context, pack
        self.embedding = w[f"{a.names.embedding}.weight"]  # (V, D)
        self.head = linear(self.embedding if a.tied else w["lm_head.weight"], None, pack=pack)
        self.norm = self._norm(a.names.norm)
        self.layers = [self._layer(i) for i in range(a.layers)]

    def _layer(self, i: int) -> Layer:
        a, names = self.a, self.a.names
        at = f"{names.layers}.{i}"
        attention = f"{at}.{names.attention}"
        return Layer(
            heads=Heads.of(a, i),
            rotated=a.rotary is not None and i not in a.unrotated,
            attention_norm=self._norm(f"{at}.{names.attention_norm}"),
            qkv=self._linear([f"{attention}.{name}" for name in names.qkv]),
            qk_norms=(self._norm(f"{attention}.q_norm"), self._norm(f"{attention}.k_norm"))
            if a.qk_norm
            else None,
            attention_out=self._linear([f"{attention}.{names.attention_out}"]),
            mlp_norm=self._norm(f"{at}.{names.mlp_norm}"),
            mlp=self._mlp(f"{at}.{names.mlp}"),
        )

    def _norm(self, name: str) -> Norm:
        weight, eps = self.w[f"{name}.weight"], self.a.eps
        if self.a.norm == "rms":
            return lambda x: rms_norm(x, weight, eps)[0]
        bias = self.w[f"{name}.bias"]
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)

    def _linear(self, names: Sequence[str], act: str = "none") -> Linear:
        """One function for layers that read the same input: their outputs side by side."""
        weights = [self.w[f"{name}.weight"] for name in names]
        weights = weights if self.a.out_in else [weight.t() for weight in weights]
        biases = [self.w.get(f"{name}.bias") for name in names]
        if len(names) == 1:
            return linear(weights[0], biases[0], act, self.pack)
        if self.pack:
            bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
            return linear(torch.cat(weights), bias, act)
        parts = [linear(weight, bias, act, False) for weight, bias in zip(weights, biases, strict=True)]
        return lambda x: torch.cat([part(x) for part in parts], -1)

    def _mlp(self, name: str) -> Linear:
        names, inner = self.a.names, self.a.inner
        up = self._linear([f"{name}.{n}" for n in names.up], "gelu" if self.a.mlp == "gelu" else "none")
        down = self._linear([f"{name}.{names.down}"])
        if self.a.mlp == "gelu":
            return lambda x: down(up(x))

        def swiglu(x: Tensor) -> Tensor:
            gate, value = up(x).split(inner, -1)
            return down(F.silu(gate).mul_(value))

        return swiglu

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], room: int, all_tokens: bool = False) -> tuple[Cache, Tensor]:
        # Memory for the whole sequence at once: growing the cache would copy it at every step.
        room = min(max(room, len(ids)), self.context)
        shape = (room, 2, self.a.kv_heads, self.a.head_size)
        cache = Cache([self.embedding.new_empty(shape) for _ in self.layers], 0)
        tokens = torch.tensor(ids, device=self.embedding.device)
        # All T tokens of the prompt in one pass; only generated tokens go one at a time.
        x = self._run(tokens, torch.arange(len(ids), device=tokens.device), [cache], len(ids))  # (T, D)
        logits = self.head(x if all_tokens else x[-1:])
        return cache, logits if all_tokens else logits[0]

    @torch.inference_mode()
    def fork(self, cache: Cache) -> Cache:
        return Cache([layer.clone() for layer in cache.layers], cache.length)

    @torch.inference_mode()
    def step(self, caches: Sequence[Cache], ids: Sequence[int]) -> Tensor:
        device = self.embedding.device
        positions = torch.tensor([cache.length for cache in caches], device=device)
        return self.head(self._run(torch.tensor(ids, device=device), positions, caches, 1))  # (B, V)

    def _run(self, ids: Tensor, positions: Tensor, caches: Sequence[Cache], new: int) -> Tensor:
        """Runs `new` tokens for each cache, the rows of one cache after those of another: ids (B * new,) ->
        (B * new, D).

        The same pre-norm blocks as models/transformer.py, without dropout. The linear layers see all
        sequences as one matrix; only attention goes sequence by sequence."""
        a = self.a
        x = self.embedding[ids]  # (B * new, D)
        x = x if a.rotary else x + self.w[f"{a.names.positions}.weight"][positions]
        x = x if a.embedding_scale == 1 else x * a.embedding_scale
        rotation = a.rotary.tables(positions, x.dtype) if a.rotary else None
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(x))  # (B * new, (H + 2G) * d)
            y = self._attend(self._positioned(qkv, layer, rotation), i, caches, new)
            x = torch.add(x, layer.attention_out(y), alpha=a.residual_scale)
            x = torch.add(x, layer.mlp(layer.mlp_norm(x)), alpha=a.residual_scale)
        for cache in caches:
            cache.length += new
        states = self.norm(x)
        return states if a.logit_scale == 1 else states * a.logit_scale

    def _positioned(self, qkv: Tensor, layer: Layer, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries and keys normalized and rotated, where the architecture does that, in place."""
        queries, keys, _ = layer.heads.split(qkv)
        if layer.qk_norms:
            for part, norm in zip((queries, keys), layer.qk_norms, strict=True):
                part.copy_(norm(part))
        if layer.rotated and rotation is not None:
            both = qkv.view(len(qkv), -1, self.a.head_size)[:, : -self.a.kv_heads]  # (N, H + G, d)
            rotate(both.clone(), *rotation, both)
        return qkv

    def _attend(self, qkv: Tensor, layer: int, caches: Sequence[Cache], new: int) -> Tensor:
        """Each sequence attends to its own past, so different lengths need no padding and no mask. (N, (H +
        2G) * d) -> (N, H * d)"""
        heads, outs = self.layers[layer].heads, []
        queries, keys, values = heads.split(qkv)
        for b, cache in enumerate(caches):
            rows, end = slice(b * new, (b + 1) * new), cache.length + new
            past = cache.layers[layer]
            past[cache.length : end, 0] = keys[rows]
            past[cache.length : end, 1] = values[rows]
            if new > 1:  # the tokens of a prompt see only their predecessors
                outs.append(plain_attention(qkv[rows], [(0, new)], heads))
                continue
            # A single new token may see everything before it, so the queries of a group are like rows.
            first = max(0, end - heads.window) if heads.window else 0
            k, v = past[first:end].permute(1, 2, 0, 3).unsqueeze(1).unbind(0)  # (1, G, n, d) each
            q = queries[b].view(1, heads.keys, heads.shared, heads.size)
            outs.append(F.scaled_dot_product_attention(q, k, v, scale=heads.scale).reshape(1, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858) on logits (V,): every token seen before becomes less
    likely.

    As in transformers, positive logits are divided by `penalty` and negative ones multiplied."""
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: float, min_p: float = 0.0
) -> int:
    """Draws a token from logits (V,) by inverting the cumulative distribution at `uniform` (0 ≤ u < 1).

    At temperature 0 it is the first of the most likely tokens. The filters apply in the order of
    transformers: top_k (Fan et al., arXiv 1805.04833), then top_p (nucleus sampling, arXiv 1904.09751),
    then min_p (arXiv 2407.01082), which is relative to the most likely token's probability."""
    if temperature <= 0 or top_p <= 0:
        return int(logits.argmax())
    logits = logits.float() / temperature
    size = logits.numel()
    if top_k <= 0 and top_p >= 1 and min_p <= 0:
        return _pick(torch.softmax(logits, -1), uniform)
    # log of the softmax denominator over the whole vocabulary, so that a top-k alone gives true probabilities
    total = torch.logsumexp(logits, -1)
    # sorting all 50,257 would cost more than the model's head
    wanted = min(top_k, size) if top_k > 0 else min(512, size)
    while True:
        values, ids = torch.topk(logits, wanted)
        # After top_k, probabilities are renormalized over what is left, as transformers does.
        probs = torch.softmax(values, -1) if top_k > 0 else (values - total).exp()
        mass = torch.cumsum(probs.double(), 0)
        # Without top_k, take more tokens until the nucleus is complete or the rest is below min_p.
        nucleus = top_p < 1 and float(mass[-1]) >= top_p
        unlikely = min_p > 0 and float(probs[-1]) < min_p * float(probs[0])
        if top_k > 0 or nucleus or unlikely or wanted == size:
            break
        wanted = min(size, wanted * 8)
    if top_p < 1:
        keep = int(torch.searchsorted(mass, torch.tensor(top_p, dtype=mass.dtype, device=mass.device))) + 1
        probs = probs[:keep]
    if min_p > 0:
        probs = probs[probs >= min_p * probs[0]]  # sorted: the first ones
    return int(ids[_pick(probs, uniform)])


def _pick(weights: Tensor, uniform: float) -> int:
    """The index at which the cumulative sum of `weights` passes `uniform` times their total. Summed in
    fp64."""
    mass = torch.cumsum(weights.double(), 0)
    point = torch.as_tensor(uniform * float(mass[-1]), dtype=mass.dtype, device=mass.device)
    return min(int(torch.searchsorted(mass, point, right=True)), weights.numel() - 1)
