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
    """y = x @ w + b.  x (T, in), b (out,) or None -> (T, out).

    GPT-2 stores w as (in, out). With `out_in` it is (out, in), as in every later family, and y = x @ w.T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, out_in: bool) -> Tensor:
        ctx.w, ctx.b, ctx.out_in = w, b, out_in
        ctx.save_for_backward(x if w.requires_grad else None)  # dW needs x; a frozen weight has no dW
        return affine(x, w.t() if out_in else w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x,), w, b = grads, ctx.saved_tensors, ctx.w, ctx.b
        dw = db = None
        if w.requires_grad:
            # dW = x.T @ dy, (in, out), or its transpose dy.T @ x; db = sum of dy over tokens, (out,)
            dw = accumulate_grad_product(w, *((dy.t(), x) if ctx.out_in else (x.t(), dy)))
            db = None if b is None else accumulate_grad(b, dy.sum(0, dtype=torch.float32))
        # dx = dy @ W.T, (T, in); not needed below the first trained layer
        dx = affine(dy, w if ctx.out_in else w.t()) if ctx.needs_input_grad[0] else None
        return dx, dw, db, None


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


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x ** 2) + eps) * w, (…, D), and what x was multiplied by, (…, 1), fp32.

    The mean and the division are fp32, as in transformers. Three passes over x; torch's own rms_norm takes a
    dozen on a CPU (1,024 rows of 576: 0.25 ms and 2.7 ms)."""
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).to(x.dtype).mul_(w), rstd


class RMSNorm(Function):
    """y = x / sqrt(mean(x ** 2) + eps) * w over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    x (…, D) -> (…, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm(x, w, eps)
        ctx.w = w
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, rstd), w = grads, ctx.saved_tensors, ctx.w
        dy, wide = dy.float(), x.float()
        # With n = x * rstd: dx = rstd * (dy * w - n * mean(dy * w * n)), and dw = sum of dy * n over rows.
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy * w
            share = torch.linalg.vecdot(dx, wide)[..., None] * rstd.pow(3) / x.shape[-1]  # (…, 1)
            dx = dx.mul_(rstd).addcmul_(wide, share, value=-1).to(x.dtype)
        if w.requires_grad:
            dw = accumulate_grad(w, rstd.flatten() @ (dy * wide).flatten(0, -2))
        return dx, dw, None


class Embedding(Function):
    """Token vectors wte[ids], plus the learned position vectors wpe[positions] of models that have them.
    (T,), (T,) -> (T, D)."""

    @staticmethod
    def forward(ctx: Any, wte: Tensor, wpe: Tensor | None, ids: Tensor, positions: Tensor) -> Tensor:
        ctx.wte, ctx.wpe = wte, wpe
        ctx.save_for_backward(ids, positions)
        return wte[ids] if wpe is None else wte[ids].add_(wpe[positions])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dx,), (ids, positions) = grads, ctx.saved_tensors
        given: list[Tensor | None] = []
        for p, rows in ((ctx.wte, ids), (ctx.wpe, positions)):
            if p is None:
                given.append(None)
                continue
            grad = torch.zeros_like(p, dtype=torch.float32) if by_autograd else main_grad(p)
            # A row of the table gets the sum of the gradients of every token that looked it up.
            grad.index_add_(0, rows, dx.float())
            given.append(grad if by_autograd else None)
        return *given, None, None


class Rotary(Function):
    """Rotary position embeddings (Su et al., arXiv 2104.09864) on queries and keys, which are then joined with the
    values as attention.py reads them.

    q (T, H * d), k (T, G * d), v (T, G * d), cos and sin (T, 1, d / 2) -> (T, (H + 2G) * d). As in transformers, the
    pairs that are rotated together are the features i and i + d / 2."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        T, d = len(q), 2 * cos.shape[-1]
        H, G = q.shape[1] // d, k.shape[1] // d
        joined = q.new_empty(T, H + 2 * G, d)
        rotate(q.view(T, H, d), cos, sin, joined[:, :H])
        rotate(k.view(T, G, d), cos, sin, joined[:, H:-G])
        joined[:, -G:].copy_(v.view(T, G, d))
        ctx.save_for_backward(cos, sin)
        ctx.heads = H, G
        return joined.view(T, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (cos, sin), (H, G) = grads, ctx.saved_tensors, ctx.heads
        T, d = len(dy), 2 * cos.shape[-1]
        dy = dy.view(T, H + 2 * G, d)
        dq, dk = dy.new_empty(T, H, d), dy.new_empty(T, G, d)
        # the inverse of a rotation is the rotation back
        rotate(dy[:, :H], cos, -sin, dq)
        rotate(dy[:, H:-G], cos, -sin, dk)
        return dq.view(T, -1), dk.view(T, -1), dy[:, -G:].reshape(T, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """x (T, n, d), cos and sin (T, 1, d / 2), written into out (T, n, d)."""
    (a, b), (first, second) = x.chunk(2, -1), out.chunk(2, -1)  # the two halves of each head
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)


class SwiGLU(Function):
    """y = silu(gate) * up (Shazeer, arXiv 2002.05202).  (T, I), (T, I) -> (T, I). silu(gate) is computed again
    in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (gate, up) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


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
