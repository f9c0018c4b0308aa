"""The few operations that make the loop fast, each beside the plain formula it equals (tests/training/test_engine.py).

What they share: a trained parameter owns `main_grad`, a piece of one flat buffer (see `optimizer.py`), and backward
adds into it in place. No gradient tensor is made, summed and copied; autograd only carries activations. (Where a model
is spread over processes, gradients go through autograd after all: sharded.py switches `by_autograd` on.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def main_grad(p: Tensor) -> Tensor:
    """Where the gradient of a parameter is collected: fp32, shape of p."""
    grad = getattr(p, "main_grad", None)
    if grad is None:
        grad = p.main_grad = torch.zeros_like(p, dtype=torch.float32)  # type: ignore[attr-defined]  # ours
    return grad


by_autograd = False


def give(p: Tensor, grad: Tensor) -> Tensor | None:
    """Collects a gradient. What is returned goes to autograd: nothing, as a rule."""
    if by_autograd:
        return grad
    main_grad(p).add_(grad)
    return None


def give_product(p: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor | None:
    """The same for the gradient scale * a @ b."""
    if by_autograd:
        return (a @ b).mul_(scale)
    add_product(main_grad(p), a, b, scale)
    return None


def add_product(grad: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """grad += scale * a @ b, in the multiplication itself where the types allow it."""
    if grad.dtype == a.dtype:
        grad.addmm_(a, b, alpha=scale)
    else:
        grad.add_(a @ b, alpha=scale)


_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_ONEDNN_FROM = 512  # rows and columns of the weight; below, compiling for each new T costs what it gains


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w + b.  x (T, in), w (in, out) in either order of memory, b (out,).

    In fp32 torch takes MKL; oneDNN reads the weight where it lies and is a
    tenth faster (GPT-2's shapes, one thread: 86-103 and 104-109 GFLOP/s)."""
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and min(w.shape) >= _ONEDNN_FROM:
        return torch.ops.mkldnn._linear_pointwise(x, w.t(), b, "none", [], "")
    return x @ w if b is None else torch.addmm(b, x, w)


class Linear(torch.autograd.Function):
    """y = x @ w + b.  x (T, in), w (in, out) as GPT-2 stores it, b (out,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.w, ctx.b = w, b
        ctx.save_for_backward(x if w.requires_grad else None)  # a frozen weight needs no memory of its input
        return product(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x,), w, b = grads, ctx.saved_tensors, ctx.w, ctx.b
        dw = db = None
        if w.requires_grad:
            dw = give_product(w, x.t(), dy)
            db = give(b, dy.sum(0, dtype=torch.float32))
        return product(dy, w.t()) if ctx.needs_input_grad[0] else None, dw, db


class LayerNorm(torch.autograd.Function):
    """y = (x - mean) / std * w + b over the last dimension.  x (T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, w.shape, w, b, eps)
        ctx.w, ctx.b = w, b
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, mean, rstd), w, b = grads, ctx.saved_tensors, ctx.w, ctx.b
        wanted = [ctx.needs_input_grad[0], w.requires_grad, w.requires_grad]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, x, w.shape, mean, rstd, w, b, wanted)
        if w.requires_grad:
            dw, db = give(w, dw), give(b, db)
        return dx, dw, db, None


class Embedding(torch.autograd.Function):
    """Token and position vectors: wte[ids] + wpe[positions].  (T,), (T,) -> (T, D)."""

    @staticmethod
    def forward(ctx: Any, wte: Tensor, wpe: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        ctx.wte, ctx.wpe = wte, wpe
        ctx.save_for_backward(ids, positions)
        return wte[ids].add_(wpe[positions])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dx,), (ids, positions) = grads, ctx.saved_tensors
        given: list[Tensor | None] = []
        for p, rows in ((ctx.wte, ids), (ctx.wpe, positions)):
            grad = torch.zeros_like(p, dtype=torch.float32) if by_autograd else main_grad(p)
            grad.index_add_(0, rows, dx.float())
            given.append(grad if by_autograd else None)
        return *given, None, None


# ---- attention -----------------------------------------------------------------------------------------------------


def attention(
    qkv: Tensor, bounds: list[tuple[int, int]], offsets: Tensor, longest: int, heads: int, dropout: float
) -> Tensor:
    """Causal attention inside each document of a packed row.  qkv (T, 3D) -> (T, D)."""
    T, D = qkv.shape[0], qkv.shape[1] // 3
    if qkv.device.type == "cpu":
        if dropout:
            return DroppedAttention.apply(qkv, bounds, heads, dropout)
        return DocumentAttention.apply(qkv, bounds, heads)
    q, k, v = qkv.view(T, 3, heads, D // heads).unbind(1)  # (T, H, d) each
    if qkv.dtype == torch.float32:  # the kernel for several documents knows half precision only
        outs = []
        for s, e in bounds:
            one, two, three = (t[s:e].transpose(0, 1)[None] for t in (q, k, v))  # (1, H, t, d)
            o = F.scaled_dot_product_attention(one, two, three, dropout_p=dropout, is_causal=True)
            outs.append(o[0].transpose(0, 1))
        return torch.cat(outs).reshape(T, D)
    # What torch.nn.attention.varlen calls, here with dropout, which its front does not take.
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, dropout, True, False
    )[0]
    return out.reshape(T, D)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DocumentAttention(torch.autograd.Function):
    """One flash kernel a document; reads queries, keys and values where the projection left them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: int) -> Tensor:
        T, D = qkv.shape[0], qkv.shape[1] // 3
        z = qkv.view(T, 3, heads, D // heads)
        out, kept = qkv.new_empty(T, D), []
        for s, e in bounds:
            q, k, v = (z[s:e, j].transpose(0, 1)[None] for j in range(3))  # (1, H, t, d)
            o, lse = _flash(q, k, v, 0.0, True)
            out[s:e].view(e - s, heads, D // heads).copy_(o[0].transpose(0, 1))
            kept.append((o, lse))
        ctx.save_for_backward(qkv)
        ctx.kept, ctx.bounds, ctx.heads = kept, bounds, heads
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (do,), (qkv,), heads = grads, ctx.saved_tensors, ctx.heads
        T, D = do.shape
        z, dqkv = qkv.view(T, 3, heads, D // heads), torch.empty_like(qkv)
        dz = dqkv.view(T, 3, heads, D // heads)
        for (s, e), (o, lse) in zip(ctx.bounds, ctx.kept, strict=True):
            q, k, v = (z[s:e, j].transpose(0, 1)[None] for j in range(3))
            d = do[s:e].view(e - s, heads, D // heads).transpose(0, 1)[None]
            for j, g in enumerate(_flash_backward(d, q, k, v, o, lse, 0.0, True)):
                dz[s:e, j].copy_(g[0].transpose(0, 1))
        ctx.kept = None
        return dqkv, None, None


class DroppedAttention(torch.autograd.Function):
    """The same with dropout on the probabilities, which the CPU's flash kernel does not know.

    Keeps one number a pair of tokens: the probability, negative where it was dropped."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: int, p: float) -> Tensor:
        T, D = qkv.shape[0], qkv.shape[1] // 3
        z = qkv.view(T, 3, heads, D // heads)
        out, kept = qkv.new_empty(T, D), []
        for s, e in bounds:
            q, k, v = (z[s:e, j].transpose(0, 1) for j in range(3))  # (H, t, d)
            scores = torch.bmm(q * (D // heads) ** -0.5, k.transpose(1, 2))  # (H, t, t)
            scores.masked_fill_(_future(e - s), float("-inf"))
            probs = torch.softmax(scores, -1)
            signed = torch.where(keep_mask(probs.shape, p), probs, -probs)
            o = torch.bmm(signed.clamp(min=0), v).mul_(1 / kept_share(p))
            out[s:e].view(e - s, heads, D // heads).copy_(o.transpose(0, 1))
            kept.append(signed)
        ctx.save_for_backward(qkv, out)
        ctx.kept, ctx.bounds, ctx.heads, ctx.p = kept, bounds, heads, p
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (do,), (qkv, out), heads, p = grads, ctx.saved_tensors, ctx.heads, ctx.p
        T, D = do.shape
        shape = (T, 3, heads, D // heads)
        z, dqkv = qkv.view(shape), torch.empty_like(qkv)
        dz = dqkv.view(shape)
        scale = (D // heads) ** -0.5
        delta = (do * out).view(T, heads, D // heads).sum(-1).t()  # (H, T): sum of dP * P over each row of P
        for (s, e), signed in zip(ctx.bounds, ctx.kept, strict=True):
            q, k, v = (z[s:e, j].transpose(0, 1) for j in range(3))  # (H, t, d)
            d = do[s:e].view(e - s, heads, D // heads).transpose(0, 1)
            dropped = signed.clamp(min=0).mul_(1 / kept_share(p))
            dz[s:e, 2].copy_(torch.bmm(dropped.transpose(1, 2), d).transpose(0, 1))
            ds = torch.bmm(d, v.transpose(1, 2)).mul_(dropped)  # gradient of the scores: dP * P - P * delta
            ds.addcmul_(signed.abs(), delta[:, s:e, None], value=-1).mul_(scale)
            dz[s:e, 0].copy_(torch.bmm(ds, k).transpose(0, 1))
            dz[s:e, 1].copy_(torch.bmm(ds.transpose(1, 2), q).transpose(0, 1))
        ctx.kept = None
        return dqkv, None, None, None


def _future(t: int) -> Tensor:
    """(t, t) True where a key stands after its query."""
    return torch.ones(t, t, dtype=torch.bool).triu_(1)


# ---- dropout -------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout; on a processor five times faster, and keeping one byte a number instead of four."""
    if not p:
        return x
    return Dropout.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x.shape, p), 1 / kept_share(p)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), None


LEVELS = (
    1 << 16
)  # a decision takes 16 random bits, four to a draw of the generator, where bernoulli_ takes a draw each


def keep_mask(shape: Sequence[int], p: float) -> Tensor:
    """Random True with probability `kept_share(p)`, on the processor."""
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[:count] >= round(p * LEVELS) - LEVELS // 2).view(tuple(shape))


def kept_share(p: float) -> float:
    """1 - p, as exactly as 16 bits say it."""
    return 1 - round(p * LEVELS) / LEVELS


# ---- head and loss -------------------------------------------------------------------------------------------------

ROWS = 512  # tokens whose logits exist at once
COLUMNS = 4096  # of the vocabulary, so that a block stays in the processor's cache


def head_loss(h: Tensor, targets: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(h @ w.T), summed over tokens and times `scale`, and how many tokens argmax would hit.

    h (N, D), targets (N,), w (V, D) -> two scalars. Logits exist for 512 tokens at a time; gradients are made at once,
    while they do, so `scale` must already hold whatever the loss is divided by."""
    learning = torch.is_grad_enabled()  # inside a Function it always reads False
    return HeadLoss.apply(h, targets, w, scale, learning and h.requires_grad, learning and w.requires_grad)


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, targets: Tensor, w: Tensor, scale: float, wants_dh: bool, wants_dw: bool
    ) -> tuple[Tensor, Tensor]:
        N, V = h.shape[0], w.shape[0]
        gw = None
        if wants_dw:
            gw = torch.zeros_like(w, dtype=torch.float32) if by_autograd else main_grad(w)
        dh = torch.zeros_like(h, dtype=torch.float32) if wants_dh else None
        loss = torch.zeros((), dtype=torch.float64, device=h.device)
        hits = torch.zeros((), dtype=torch.int64, device=h.device)
        exact = h.dtype == torch.float32  # half precision: the products are, what is between them is fp32
        rows, columns = (ROWS, COLUMNS) if h.device.type == "cpu" else (8 * ROWS, V)
        rows = math.ceil(N / max(1, math.ceil(N / rows))) or 1  # of one size: memory is used again
        blocks = [(v, min(V, v + columns)) for v in range(0, V, columns)]
        for s in range(0, N, rows):
            hc, yc = h[s : s + rows], targets[s : s + rows]
            n = hc.shape[0]
            # 1. logits, their largest and the target's
            logits, top, own = [], hc.new_full((n,), float("-inf"), dtype=torch.float32), 0.0
            for v0, v1 in blocks:
                lg = product(hc, w[v0:v1].t()).float()
                logits.append(lg)
                top = torch.maximum(top, lg.amax(1))
                place, inside = _place(yc, v0, v1)
                own = own + lg.gather(1, place).squeeze(1) * inside
            # 2. exp in place, the sum of each row
            total = 0.0
            for lg in logits:
                total = total + lg.sub_(top[:, None]).exp_().sum(1)
            assert isinstance(total, Tensor)
            loss += (total.log() + top - own).sum(dtype=torch.float64)
            hits += (own >= top).sum()
            if dh is None:
                continue
            # 3. gradients; p - 1 at the target before the products, or it would drown in their rounding
            weight = (scale / total)[:, None]  # turns exp into probability / count
            scaled = hc * weight if exact else hc
            for (v0, v1), lg in zip(blocks, logits, strict=True):
                place, inside = _place(yc, v0, v1)
                lg.scatter_add_(1, place, -(total * inside)[:, None])
                if not exact:  # bf16 cannot hold the large exponentials' differences
                    lg = lg.mul_(weight).to(h.dtype)
                add_product(dh[s : s + rows], lg, w[v0:v1])
                if gw is not None:
                    add_product(gw[v0:v1], lg.t(), scaled)
            if exact:
                dh[s : s + rows].mul_(weight)
        if dh is not None:
            dh = dh.to(h.dtype)
        ctx.save_for_backward(dh, gw if by_autograd else None)
        ctx.mark_non_differentiable(hits)
        return (loss * scale).float(), hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients are made; nobody may scale the loss afterwards (the weight's part is already added)."""
        dh, dw = ctx.saved_tensors
        return dh, None, dw, None, None, None


def _place(targets: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Where each target stands in a block of the vocabulary: a legal index (n, 1), and whether it is really there (n,)."""
    inside = (targets >= v0) & (targets < v1)
    return (targets - v0).clamp(0, v1 - v0 - 1)[:, None], inside.float()
