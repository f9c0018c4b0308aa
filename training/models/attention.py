"""Causal attention inside each document of a packed row, with grouped queries and sliding windows.

Shapes: T tokens of a packed row, H query heads and G key/value heads of size d, R = H / G query heads that share a
key/value head (grouped-query attention; Ainslie et al., arXiv 2305.13245). A document is rows s to e, t = e - s.
Queries, keys and values come as one tensor (T, (H + 2G) * d): the H query heads, the G key heads, the G value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.architecture import Architecture
from training.models.batch import Batch
from training.models.kernels import Function, keep_mask, keep_probability


@dataclass(frozen=True)
class Heads:
    """How one layer attends."""

    queries: int  # H
    keys: int  # G: heads of keys and of values
    size: int  # d
    scale: float  # what scores are multiplied by; usually d ** -0.5
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None = all before it

    @staticmethod
    def of(a: Architecture, layer: int) -> Heads:
        scale = a.attention_scale or a.head_size**-0.5
        return Heads(a.heads, a.kv_heads, a.head_size, scale, a.windows[layer] if a.windows else None)

    @property
    def shared(self) -> int:
        return self.queries // self.keys  # R

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, (H + 2G) * d) -> views (n, H, d), (n, G, d), (n, G, d)."""
        z = qkv.view(len(qkv), self.queries + 2 * self.keys, self.size)
        queries, keys, values = z.split((self.queries, self.keys, self.keys), 1)
        return queries, keys, values

    def grouped(self, queries: Tensor) -> Tensor:
        """(n, H, d) -> (G, R, n, d), a view: query heads next to each other share a key head."""
        split: Tensor = queries.unflatten(1, (self.keys, self.shared))
        return split.permute(1, 2, 0, 3)

    def repeated(self, keys: Tensor) -> Tensor:
        """(n, G, d) -> (G, R, n, d): a view that repeats each head without copying it."""
        return keys.transpose(0, 1)[:, None].expand(-1, self.shared, -1, -1)


def attention(qkv: Tensor, batch: Batch, heads: Heads, dropout: float) -> Tensor:
    """qkv (T, (H + 2G) * d) -> (T, H * d).

    No mask over the row and no padding: documents never see each other because each has its own call (or,
    on a GPU, its own segment of FlashAttention's variable-length kernel; Dao et al., arXiv 2205.14135)."""
    if qkv.device.type == "cpu":
        kernel = DropoutAttention if dropout else DocumentAttention
        out: Tensor = kernel.apply(qkv, batch.bounds, heads, dropout)
        return out
    if qkv.dtype == torch.float32:  # the variable-length kernel supports half precision only
        return plain_attention(qkv, batch.bounds, heads, dropout)
    out = varlen(*heads.split(qkv), batch.offsets, batch.longest, dropout, heads.scale, heads.window)
    return out.reshape(len(qkv), -1)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    longest: int,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """FlashAttention's variable-length kernel, for half precision on a GPU: (T, H, d), (T, G, d) twice -> (T, H, d).

    The operator behind torch.nn.attention.varlen, called directly because its public function takes no dropout.
    `longest`: tokens of the longest document, or more."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        offsets,
        offsets,
        longest,
        longest,
        dropout,
        True,
        False,
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[0]
    return out


def visible(start: int, end: int, first: int, window: int | None, device: torch.device | None) -> Tensor:
    """(end - start, end - first) bool: which of the keys from `first` the queries from `start` attend to."""
    back = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (back >= 0) & (back < window) if window else back >= 0


class Piece(NamedTuple):
    """Query rows `start` to `end`, which see keys from row `first` on."""

    start: int
    end: int
    first: int
    window: int | None  # None: each query sees all keys up to itself, and the first one is its own

    def hidden(self, device: torch.device | None = None) -> Tensor:
        """(queries, keys) bool: True where the key comes after its query or too far before it."""
        return ~visible(self.start, self.end, self.first, self.window, device)


def pieces(bounds: list[tuple[int, int]], window: int | None) -> list[Piece]:
    """One piece for each document. Those longer than the window are cut into pieces of that size, so that time
    and memory grow with t * window and not with t * t."""
    cut = []
    for s, e in bounds:
        if window is None or e - s <= window:
            cut.append(Piece(s, e, s, None))
        else:
            for start in range(s, e, window):
                first = max(s, start - window + 1)
                cut.append(Piece(start, min(start + window, e), first, None if start == s else window))
    return cut


def plain_attention(qkv: Tensor, bounds: list[tuple[int, int]], heads: Heads, dropout: float = 0.0) -> Tensor:
    """The same by torch's scaled_dot_product_attention, on any device and in any number format."""
    outs = []
    for piece in pieces(bounds, heads.window):
        start, end, first, window = piece
        queries, keys, values = heads.split(qkv)
        out = F.scaled_dot_product_attention(
            heads.grouped(queries[start:end]),
            heads.repeated(keys[first:end]),
            heads.repeated(values[first:end]),
            attn_mask=~piece.hidden(qkv.device) if window else None,
            dropout_p=dropout,
            is_causal=not window,
            scale=heads.scale,
        )  # (G, R, t, d)
        outs.append(out.permute(2, 0, 1, 3).reshape(end - start, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DocumentAttention(Function):
    """One call of torch's CPU flash kernel per document. Queries, keys and values are strided views of
    qkv: no copies. The kernel has no grouped queries, so each group is an item of its batch."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: Heads, dropout: float = 0.0
    ) -> Tensor:
        queries, keys, values = heads.split(qkv)
        out, kept = qkv.new_empty(len(qkv), heads.queries * heads.size), []
        for piece in pieces(bounds, heads.window):
            start, end, first, window = piece
            q = heads.grouped(queries[start:end])
            k, v = heads.repeated(keys[first:end]), heads.repeated(values[first:end])
            mask = _additive(piece, qkv.dtype) if window else None
            # o (G, R, t, d); lse (G, R, t) is the log of each softmax denominator, all that backward needs of
            # the scores
            o, lse = _flash(q, k, v, 0.0, not window, attn_mask=mask, scale=heads.scale)
            heads.grouped(out[start:end].view(end - start, heads.queries, heads.size)).copy_(o)
            kept.append((o, lse))
        ctx.save_for_backward(qkv)
        ctx.kept, ctx.bounds, ctx.heads = kept, bounds, heads
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (do,), (qkv,), heads = grads, ctx.saved_tensors, ctx.heads
        windowed = any(e - s > (heads.window or e) for s, e in ctx.bounds)
        dqkv = torch.zeros_like(qkv) if windowed else torch.empty_like(qkv)
        queries, keys, values = heads.split(qkv)
        dqueries, dkeys, dvalues = heads.split(dqkv)
        for piece, (o, lse) in zip(pieces(ctx.bounds, heads.window), ctx.kept, strict=True):
            start, end, first, window = piece
            q = heads.grouped(queries[start:end])
            k, v = heads.repeated(keys[first:end]), heads.repeated(values[first:end])
            d = heads.grouped(do[start:end].view(end - start, heads.queries, heads.size))
            mask = _additive(piece, qkv.dtype) if window else None
            dq, dk, dv = _flash_backward(
                d, q, k, v, o, lse, 0.0, not window, attn_mask=mask, scale=heads.scale
            )
            # Written straight into their places in dqkv; heads that shared keys add up.
            heads.grouped(dqueries[start:end]).copy_(dq)
            for place, g in ((dkeys, dk), (dvalues, dv)):
                g = (g[:, 0] if heads.shared == 1 else g.sum(1)).transpose(0, 1)  # (t, G, d)
                if windowed:  # a key is seen from two pieces
                    place[first:end].add_(g)
                else:
                    place[first:end].copy_(g)
        ctx.kept = None
        return dqkv, None, None, None


def _additive(piece: Piece, dtype: torch.dtype) -> Tensor:
    hidden = piece.hidden()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


class DropoutAttention(Function):
    """The same with dropout on the attention probabilities, which torch's CPU flash kernel does not support.

    The plain algorithm with the (G, R * t, t) scores of one document at a time. Instead of probabilities and
    a mask it keeps one number per pair of tokens: the probability, with a minus sign where it was dropped."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: Heads, p: float) -> Tensor:
        queries, keys, values = heads.split(qkv)
        out, kept = qkv.new_empty(len(qkv), heads.queries * heads.size), []
        for piece in pieces(bounds, heads.window):
            start, end, first, _ = piece
            q = heads.grouped(queries[start:end]).flatten(1, 2)  # (G, R * t, d); a copy if R > 1
            k, v = (x[first:end].transpose(0, 1) for x in (keys, values))  # (G, t, d)
            # softmax(q @ k.T * scale), with the future masked out
            scores = torch.bmm(q * heads.scale, k.transpose(1, 2))
            scores.unflatten(1, (heads.shared, -1)).masked_fill_(piece.hidden(), float("-inf"))
            probs = torch.softmax(scores, -1)
            signed = torch.where(keep_mask(probs.shape, p), probs, -probs)
            # Dropped probabilities are negative, so clamp sets them to 0; the rest are scaled up by 1 / (1 -
            # p).
            o = torch.bmm(signed.clamp(min=0), v).mul_(1 / keep_probability(p))
            place = heads.grouped(out[start:end].view(end - start, heads.queries, heads.size))
            place.copy_(o.unflatten(1, (heads.shared, -1)))
            kept.append(signed)
        ctx.save_for_backward(qkv, out)
        ctx.kept, ctx.bounds, ctx.heads, ctx.p = kept, bounds, heads, p
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (do,), (qkv, out), heads, p = grads, ctx.saved_tensors, ctx.heads, ctx.p
        dqkv = torch.zeros_like(qkv)
        queries, keys, values = heads.split(qkv)
        dqueries, dkeys, dvalues = heads.split(dqkv)
        # (H, T): sum of dP * P over each row of P
        delta = (do * out).view(len(do), heads.queries, heads.size).sum(-1).t()
        for piece, signed in zip(pieces(ctx.bounds, heads.window), ctx.kept, strict=True):
            start, end, first, _ = piece
            q = heads.grouped(queries[start:end]).flatten(1, 2)  # (G, R * t, d)
            k, v = (x[first:end].transpose(0, 1) for x in (keys, values))  # (G, t, d)
            d = heads.grouped(do[start:end].view(end - start, heads.queries, heads.size)).flatten(1, 2)
            # dv = dropped(P).T @ do
            dropped = signed.clamp(min=0).mul_(1 / keep_probability(p))
            dvalues[first:end].add_(torch.bmm(dropped.transpose(1, 2), d).transpose(0, 1))
            # Backward of softmax: ds = P * (dP - sum(dP * P)). The sum equals sum(do * o) over d
            # (FlashAttention, appendix B).
            ds = torch.bmm(d, v.transpose(1, 2)).mul_(dropped)  # gradient of the scores: dP * P - P * delta
            sums = delta[:, start:end].unflatten(0, (heads.keys, heads.shared)).flatten(1, 2)
            ds.addcmul_(signed.abs(), sums[..., None], value=-1).mul_(heads.scale)
            # dq = ds @ k and dk = ds.T @ q
            heads.grouped(dqueries[start:end]).copy_(torch.bmm(ds, k).unflatten(1, (heads.shared, -1)))
            dkeys[first:end].add_(torch.bmm(ds.transpose(1, 2), q).transpose(0, 1))
        ctx.kept = None
        return dqkv, None, None, None
