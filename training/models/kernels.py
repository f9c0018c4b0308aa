"""The few operations that make training fast, each next to the plain formula it equals
(tests/training/engine/test_engine.py).

Shapes: T tokens of a packed row, N of them trained, D the width of the model, H heads of size d = D / H, V
the vocabulary. A document is rows s to e of a packed row, t = e - s.

What they share: each trained parameter owns `main_grad`, a view of one flat fp32 buffer (see
engine/optimizer.py), and the backward pass adds to it in place. No gradient tensor is allocated, summed and
copied; autograd carries only activations. Megatron-LM calls this gradient accumulation fusion. With a sharded
model, gradients must go through autograd after all: engine/fsdp.py sets `by_autograd`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """torch's, with a typed `apply`."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any: ...

else:
    Function = torch.autograd.Function


def main_grad(p: Tensor) -> Tensor:
    """The buffer that collects the gradient of a parameter: fp32, same shape as p."""
    grad: Tensor | None = getattr(p, "main_grad", None)
    if grad is None:
        grad = p.main_grad = torch.zeros_like(p, dtype=torch.float32)  # type: ignore[attr-defined]  # ours
    return grad


by_autograd = False  # True: backward returns gradients to autograd instead of adding them to main_grad


def accumulate_grad(p: Tensor, grad: Tensor) -> Tensor | None:
    """Adds a gradient to `main_grad`. The return value goes to autograd: None, unless `by_autograd`."""
    if by_autograd:
        return grad
    main_grad(p).add_(grad)
    return None


def accumulate_grad_product(p: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor | None:
    """The same for the gradient scale * a @ b, without allocating the product."""
    if by_autograd:
        return (a @ b).mul_(scale)
    accumulate_product(main_grad(p), a, b, scale)
    return None


def accumulate_product(grad: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """grad += scale * a @ b. One GEMM with beta = 1 where the dtypes match; bf16 products are added to the
    fp32 buffer."""
    if grad.dtype == a.dtype:
        grad.addmm_(a, b, alpha=scale)
    else:
        grad.add_(a @ b, alpha=scale)


# torch offers oneDNN only for inference and torch.compile; these are the same operators, called directly.
_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_ONEDNN_FROM = 512  # rows and columns of the weight; below, compiling for each new T costs what it gains


def affine(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w + b.  x (T, in), w (in, out), row-major or column-major, b (out,) -> (T, out).

    In fp32 torch calls MKL. oneDNN needs no copy of a transposed weight and is about a tenth faster
    (GPT-2's shapes, one thread: 86-103 GFLOP/s with MKL, 104-109 with oneDNN)."""
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and min(w.shape) >= _ONEDNN_FROM:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w.t(), b, "none", [], "")
        return y
    return x @ w if b is None else torch.addmm(b, x, w)


class Linear(Function):
    """y = x @ w + b.  x (T, in), w (in, out) as GPT-2 stores it, b (out,) -> (T, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.w, ctx.b = w, b
        ctx.save_for_backward(x if w.requires_grad else None)  # dW needs x; a frozen weight has no dW
        return affine(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x,), w, b = grads, ctx.saved_tensors, ctx.w, ctx.b
        dw = db = None
        if w.requires_grad:
            # dW = x.T @ dy, (in, out); db = sum of dy over tokens, (out,)
            dw = accumulate_grad_product(w, x.t(), dy)
            db = accumulate_grad(b, dy.sum(0, dtype=torch.float32))
        # dx = dy @ W.T, (T, in); not needed below the first trained layer
        return affine(dy, w.t()) if ctx.needs_input_grad[0] else None, dw, db


class LayerNorm(Function):
    """y = (x - mean) / std * w + b over the last dimension (Ba et al., arXiv 1607.06450).

    x (T, D) -> (T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        # mean and 1 / std of each row, (T, 1): kept so that backward need not recompute them
        y, mean, rstd = torch.native_layer_norm(x, w.shape, w, b, eps)
        ctx.w, ctx.b = w, b
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, mean, rstd), w, b = grads, ctx.saved_tensors, ctx.w, ctx.b
        # (dx, dw, db): what is not wanted comes back as None and costs nothing
        wanted = [ctx.needs_input_grad[0], w.requires_grad, w.requires_grad]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, x, w.shape, mean, rstd, w, b, wanted)
        if w.requires_grad:
            dw, db = accumulate_grad(w, dw), accumulate_grad(b, db)
        return dx, dw, db, None


class Embedding(Function):
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
            # A row of the table gets the sum of the gradients of every token that looked it up.
            grad.index_add_(0, rows, dx.float())
            given.append(grad if by_autograd else None)
        return *given, None, None


# ---- attention ---------------------------------------------------------------------------------------------


def attention(
    qkv: Tensor, bounds: list[tuple[int, int]], offsets: Tensor, longest: int, heads: int, dropout: float
) -> Tensor:
    """Causal attention inside each document of a packed row.  qkv (T, 3D) -> (T, D).

    bounds: (start, end) of each document; offsets: the same as (documents + 1,) int32 on the device;
    longest: tokens of the longest document. No mask and no padding: documents never see each other because
    each has its own call (or, on a GPU, its own segment of FlashAttention's variable-length kernel; Dao et
    al., arXiv 2205.14135)."""
    T, D = qkv.shape[0], qkv.shape[1] // 3
    if qkv.device.type == "cpu":
        if dropout:
            out: Tensor = DropoutAttention.apply(qkv, bounds, heads, dropout)
        else:
            out = DocumentAttention.apply(qkv, bounds, heads)
        return out
    q, k, v = qkv.view(T, 3, heads, D // heads).unbind(1)  # (T, H, d) each
    if qkv.dtype == torch.float32:  # the variable-length kernel supports half precision only
        outs = []
        for s, e in bounds:
            one, two, three = (t[s:e].transpose(0, 1)[None] for t in (q, k, v))  # (1, H, t, d)
            o = F.scaled_dot_product_attention(one, two, three, dropout_p=dropout, is_causal=True)
            outs.append(o[0].transpose(0, 1))
        return torch.cat(outs).reshape(T, D)
    # The operator behind torch.nn.attention.varlen, called directly because its public function takes no
    # dropout.
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, dropout, True, False
    )[0]
    return out.reshape(T, D)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DocumentAttention(Function):
    """One call of torch's CPU flash kernel per document. Queries, keys and values are strided views of
    qkv: no copies."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: int) -> Tensor:
        T, D = qkv.shape[0], qkv.shape[1] // 3
        # (T, 3, H, d): [:, 0] queries, [:, 1] keys, [:, 2] values
        z = qkv.view(T, 3, heads, D // heads)
        out, kept = qkv.new_empty(T, D), []
        for s, e in bounds:
            q, k, v = (z[s:e, j].transpose(0, 1)[None] for j in range(3))  # (1, H, t, d)
            # o (1, H, t, d); lse (1, H, t) is the log of each softmax denominator, all that backward needs of
            # the scores
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
            # g: dq, dk and dv, (1, H, t, d) each, written straight into their places in dqkv
            for j, g in enumerate(_flash_backward(d, q, k, v, o, lse, 0.0, True)):
                dz[s:e, j].copy_(g[0].transpose(0, 1))
        ctx.kept = None
        return dqkv, None, None


class DropoutAttention(Function):
    """The same with dropout on the attention probabilities, which torch's CPU flash kernel does not support.

    The plain algorithm with the (H, t, t) scores of one document at a time. Instead of probabilities and a
    mask it keeps one number per pair of tokens: the probability, with a minus sign where it was dropped."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: list[tuple[int, int]], heads: int, p: float) -> Tensor:
        T, D = qkv.shape[0], qkv.shape[1] // 3
        z = qkv.view(T, 3, heads, D // heads)
        out, kept = qkv.new_empty(T, D), []
        for s, e in bounds:
            q, k, v = (z[s:e, j].transpose(0, 1) for j in range(3))  # (H, t, d)
            # softmax(q @ k.T / sqrt(d)), with the future masked out
            scores = torch.bmm(q * (D // heads) ** -0.5, k.transpose(1, 2))  # (H, t, t)
            scores.masked_fill_(_causal_mask(e - s), float("-inf"))
            probs = torch.softmax(scores, -1)
            signed = torch.where(keep_mask(probs.shape, p), probs, -probs)
            # Dropped probabilities are negative, so clamp sets them to 0; the rest are scaled up by 1 / (1 -
            # p).
            o = torch.bmm(signed.clamp(min=0), v).mul_(1 / keep_probability(p))
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
            # dv = dropped(P).T @ do
            dropped = signed.clamp(min=0).mul_(1 / keep_probability(p))
            dz[s:e, 2].copy_(torch.bmm(dropped.transpose(1, 2), d).transpose(0, 1))
            # Backward of softmax: ds = P * (dP - sum(dP * P)). The sum equals sum(do * o) over d
            # (FlashAttention, appendix B).
            ds = torch.bmm(d, v.transpose(1, 2)).mul_(dropped)  # gradient of the scores: dP * P - P * delta
            ds.addcmul_(signed.abs(), delta[:, s:e, None], value=-1).mul_(scale)
            # dq = ds @ k and dk = ds.T @ q
            dz[s:e, 0].copy_(torch.bmm(ds, k).transpose(0, 1))
            dz[s:e, 1].copy_(torch.bmm(ds.transpose(1, 2), q).transpose(0, 1))
        ctx.kept = None
        return dqkv, None, None, None


def _causal_mask(t: int) -> Tensor:
    """(t, t) bool: True where the key comes after its query and must not be seen."""
    return torch.ones(t, t, dtype=torch.bool).triu_(1)


# ---- dropout -----------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout. On a CPU five times faster, and the saved mask has one byte per number instead of four."""
    if not p:
        return x
    return Dropout.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x.shape, p), 1 / keep_probability(p)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), None


# a decision takes 16 random bits, four to a draw of the generator, where bernoulli_ takes a draw each
LEVELS = 1 << 16


def keep_mask(shape: Sequence[int], p: float) -> Tensor:
    """A bool tensor on the CPU: True with probability `keep_probability(p)`, drawn from torch's global
    generator."""
    count = math.prod(shape)
    # Each int64 draw is read as four int16 values, uniform over [-2**15, 2**15).
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[:count] >= round(p * LEVELS) - LEVELS // 2).view(tuple(shape))


def keep_probability(p: float) -> float:
    """1 - p, rounded to a multiple of 2**-16: the probability that `keep_mask` really uses."""
    return 1 - round(p * LEVELS) / LEVELS


# ---- head and loss -----------------------------------------------------------------------------------------

ROWS = 512  # tokens whose logits are in memory at once
COLUMNS = 4096  # vocabulary entries in a block, so that a block stays in the CPU's cache


def head_loss(h: Tensor, targets: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(h @ w.T), summed over tokens and times `scale`, and how many tokens argmax
    would hit.

    h (N, D), targets (N,), w (V, D) -> two scalars: the loss in nats, fp32, and the count, int64. Logits
    exist for 512 tokens at a time, (512, V) instead of (N, V), and the gradients are computed while they
    do, so `scale` must already include whatever the loss is divided by. The idea is that of Liger Kernel's
    fused linear cross-entropy (arXiv 2410.10989) and of cut cross-entropy (arXiv 2411.09009)."""
    learning = torch.is_grad_enabled()  # asked here: inside a Function it is always False
    result: tuple[Tensor, Tensor] = HeadLoss.apply(
        h, targets, w, scale, learning and h.requires_grad, learning and w.requires_grad
    )
    return result


class HeadLoss(Function):
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
        exact = h.dtype == torch.float32  # otherwise the products are bf16, and what is between them fp32
        rows, columns = (ROWS, COLUMNS) if h.device.type == "cpu" else (8 * ROWS, V)
        # equal blocks, so that the allocator reuses their memory
        rows = math.ceil(N / max(1, math.ceil(N / rows))) or 1
        blocks = [(v, min(V, v + columns)) for v in range(0, V, columns)]
        for s in range(0, N, rows):
            hc, yc = h[s : s + rows], targets[s : s + rows]
            n = hc.shape[0]
            # 1. Logits of the block, (n, V) in pieces; the largest of each row and the target's, both (n,).
            logits, top, own = [], hc.new_full((n,), float("-inf"), dtype=torch.float32), 0.0
            for v0, v1 in blocks:
                lg = affine(hc, w[v0:v1].t()).float()
                logits.append(lg)
                top = torch.maximum(top, lg.amax(1))
                place, inside = _local_targets(yc, v0, v1)
                own = own + lg.gather(1, place).squeeze(1) * inside
            # 2. exp(logit - largest) in place and the sum of each row: the loss is log(sum) + largest -
            # target's logit.
            total = 0.0
            for lg in logits:
                total = total + lg.sub_(top[:, None]).exp_().sum(1)
            assert isinstance(total, Tensor)
            loss += (total.log() + top - own).sum(dtype=torch.float64)
            hits += (own >= top).sum()
            if dh is None:
                continue
            # 3. d loss / d logits = softmax - onehot(target). The 1 is subtracted before the products; afterwards
            #    it would be lost in their rounding. exp / total is the probability, so total is subtracted at the target.
            weight = (scale / total)[:, None]  # (n, 1): turns exp into probability * scale
            # In fp32 the factor goes to the smaller side of each product, (n, D) instead of (n, V).
            scaled = hc * weight if exact else hc
            for (v0, v1), lg in zip(blocks, logits, strict=True):
                place, inside = _local_targets(yc, v0, v1)
                lg.scatter_add_(1, place, -(total * inside)[:, None])
                if not exact:  # bf16 has too few bits for the differences between unscaled exponentials
                    lg = lg.mul_(weight).to(h.dtype)
                accumulate_product(dh[s : s + rows], lg, w[v0:v1])
                if gw is not None:
                    accumulate_product(gw[v0:v1], lg.t(), scaled)
            if exact:
                dh[s : s + rows].mul_(weight)
        if dh is not None:
            dh = dh.to(h.dtype)
        ctx.save_for_backward(dh, gw if by_autograd else None)
        ctx.mark_non_differentiable(hits)
        return (loss * scale).float(), hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients exist already, so the incoming gradient is ignored: do not scale the loss after
        head_loss."""
        dh, dw = ctx.saved_tensors
        return dh, None, dw, None, None, None


def _local_targets(targets: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Index of each target within a block of the vocabulary, clamped, (n, 1), and whether it really is in
    it, (n,) as 0 or 1."""
    inside = (targets >= v0) & (targets < v1)
    return (targets - v0).clamp(0, v1 - v0 - 1)[:, None], inside.float()
