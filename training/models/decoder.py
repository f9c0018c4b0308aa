"""Generating one token after another, fast: the key/value cache, weights laid out for reading, and sampling.

Shapes: B sequences, N tokens read or written in a pass, D width, H heads of size d, V vocabulary, C context.
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

Linear = Callable[[Tensor], Tensor]


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
    """Keys and values of one sequence: one tensor (room, 2, H, d) per layer, of which `length` tokens are
    filled."""

    layers: list[Tensor]
    length: int


@dataclass
class Layer:
    """The weights of one block, ready to be applied: (scale, shift) of the norms, functions for the linear
    layers."""

    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    proj: Linear
    norm2: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


class GPT2Decoder:
    """GPT-2 from its Hugging Face weights by name (`wte.weight`, `h.0.attn.c_attn.weight` of shape (in, out),
    …).

    pack=True copies the weights for speed, for models that generate a lot. pack=False reads them in place,
    so a model in training can generate samples without extra memory."""

    @torch.inference_mode()
    def __init__(
        self, weights: Mapping[str, Tensor], heads: int, eps: float = 1e-5, pack: bool = True
    ) -> None:
        w = {name.removeprefix("transformer."): tensor.detach() for name, tensor in weights.items()}
        self.wte, self.wpe = w["wte.weight"], w["wpe.weight"]  # (V, D), (C, D)
        self.context, self.width = self.wpe.shape
        self.heads, self.eps = heads, eps
        self.norm = (w["ln_f.weight"], w["ln_f.bias"])
        self.head = linear(w.get("lm_head.weight", self.wte), None, pack=pack)

        def conv1d(name: str, act: str = "none") -> Linear:
            return linear(w[f"{name}.weight"].t(), w[f"{name}.bias"], act, pack)

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return w[f"{name}.weight"], w[f"{name}.bias"]

        # layers are counted by name: h.0, h.1, …
        count = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("h."))
        self.layers = [
            Layer(
                norm(f"h.{i}.ln_1"),
                conv1d(f"h.{i}.attn.c_attn"),
                conv1d(f"h.{i}.attn.c_proj"),
                norm(f"h.{i}.ln_2"),
                conv1d(f"h.{i}.mlp.c_fc", "gelu"),
                conv1d(f"h.{i}.mlp.c_proj"),
            )
            for i in range(count)
        ]

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], room: int, all_tokens: bool = False) -> tuple[Cache, Tensor]:
        # Memory for the whole sequence at once: growing the cache would copy it at every step.
        room = min(max(room, len(ids)), self.context)
        shape = (room, 2, self.heads, self.width // self.heads)
        cache = Cache([self.wte.new_empty(shape) for _ in self.layers], 0)
        tokens = torch.tensor(ids, device=self.wte.device)
        # All T tokens of the prompt in one pass; only generated tokens go one at a time.
        x = self._run(tokens, torch.arange(len(ids), device=self.wte.device), [cache], len(ids))  # (T, D)
        logits = self.head(x if all_tokens else x[-1:])
        return cache, logits if all_tokens else logits[0]

    @torch.inference_mode()
    def fork(self, cache: Cache) -> Cache:
        return Cache([layer.clone() for layer in cache.layers], cache.length)

    @torch.inference_mode()
    def step(self, caches: Sequence[Cache], ids: Sequence[int]) -> Tensor:
        device = self.wte.device
        positions = torch.tensor([cache.length for cache in caches], device=device)
        return self.head(self._run(torch.tensor(ids, device=device), positions, caches, 1))  # (B, V)

    def _run(self, ids: Tensor, positions: Tensor, caches: Sequence[Cache], new: int) -> Tensor:
        """Runs `new` tokens for each cache, the rows of one cache after those of another: ids (B * new,) ->
        (B * new, D).

        The same pre-norm blocks as models/gpt2.py, without dropout. The linear layers see all sequences as
        one matrix; only attention goes sequence by sequence."""
        x = self.wte[ids] + self.wpe[positions]  # (B * new, D)
        shape = (self.width,)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(F.layer_norm(x, shape, *layer.norm1, self.eps))  # (B * new, 3D)
            x = x + layer.proj(self._attend(qkv.view(len(x), 3, self.heads, -1), i, caches, new))
            x = x + layer.down(layer.up(F.layer_norm(x, shape, *layer.norm2, self.eps)))
        for cache in caches:
            cache.length += new
        return F.layer_norm(x, shape, *self.norm, self.eps)

    def _attend(self, qkv: Tensor, layer: int, caches: Sequence[Cache], new: int) -> Tensor:
        """Each sequence attends to its own past, so different lengths need no padding and no mask. (N, 3,
        H, d) -> (N, D)"""
        outs = []
        for b, cache in enumerate(caches):
            rows, end = qkv[b * new : (b + 1) * new], cache.length + new
            past = cache.layers[layer]
            past[cache.length : end] = rows[:, 1:]  # keys and values, (new, 2, H, d)
            k, v = past[:end].permute(1, 2, 0, 3).unsqueeze(1).unbind(0)  # (1, H, end, d) each
            q = rows[:, 0].transpose(0, 1).unsqueeze(0)  # (1, H, new, d)
            # A single new token may see everything before it; the tokens of a prompt only their predecessors.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=new > 1)
            outs.append(out[0].transpose(0, 1).reshape(new, self.width))
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
