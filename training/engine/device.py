"""The device: number format, speed, memory, random state, and what must be the same for identical bits."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.engine.memory import peak_rss
from training.plan.catalog import cpu_has_bf16
from training.plan.config import Settings


@dataclass(frozen=True)
class Device:
    """Where a run computes, and in which number format."""

    device: torch.device
    dtype: torch.dtype  # of weights and activations; master weights, gradients and moments are always fp32
    deterministic: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Bytes: of the GPU if there is one, otherwise of this process."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else peak_rss()

    def environment(self) -> dict[str, Any]:
        """Everything that determines the bits of a result. Another machine can resume a run, but reports
        that it is not exact."""
        values: dict[str, Any] = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "deterministic": self.deterministic,
        }
        if self.on_gpu:
            values |= {
                "gpu": torch.cuda.get_device_name(),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "tf32": torch.backends.cuda.matmul.allow_tf32,
            }
        return values


def pick(settings: Settings) -> Device:
    """The GPU (one per local process) or else the CPU, with the number format that the settings and the
    hardware allow."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    # bf16 if requested, or automatically on GPUs with native support
    half = settings.precision == "bf16" or (
        settings.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    dtype = torch.bfloat16 if half and (on_gpu or cpu_has_bf16()) else torch.float32
    if on_gpu:
        torch.cuda.set_device(device)
    # cuBLAS needs a fixed workspace to be deterministic:
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return Device(device, dtype, settings.deterministic)


# ---- memory --------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that memory ran out, on the CPU or a GPU."""
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words)
    )


# ---- speed -------------------------------------------------------------------------------------------------


def gemm_rate(device: Device) -> float:
    """FLOP/s of a plain matrix product on this device: the best of five, with the shape of a GPT-2 block."""
    rows, repeats, best = 8192 if device.on_gpu else 512, 20 if device.on_gpu else 1, 0.0
    # not random: drawing would change the random state
    a = torch.ones(rows, 768, device=device.device, dtype=device.dtype)
    b = torch.ones(768, 3072, device=device.device, dtype=device.dtype)
    out = torch.mm(a, b)
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):  # a single product is too short to time on a GPU
            torch.mm(a, b, out=out)
        device.synchronize()
        best = max(best, repeats * 2 * rows * 768 * 3072 / (time.perf_counter() - start))
    return best


def flop_counter(model: Any, lora: bool) -> Callable[[list[int], int], float]:
    """Returns a function (lengths of the documents, trained tokens) -> useful floating-point operations of a
    step.

    6 per weight and token: 2 for the forward pass and 4 for the backward pass (Kaplan et al., arXiv
    2001.08361, appendix B). Plus causal attention, which is half of the full square, and the head for
    trained tokens only. Frozen weights (LoRA) need no gradient: 4 instead of 6."""
    # The head counts separately: it is computed for trained tokens only.
    head = model.head()
    vocabulary = int(head.numel()) if head is not None else 0
    # A token embedding of its own has the head's shape. It is looked up, as are position embeddings.
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    inner = sum(
        p.numel()
        for name, p in matrices.items()
        if not name.endswith("wpe.weight") and (head is None or p.shape != head.shape)
    )
    width, layers = model.attention_width, model.layers
    factor = 4 if lora else 6

    def count(lengths: list[int], trained: int) -> float:
        # per layer 2 products of n(n + 1)/2 pairs and D features, each 2 operations, three times for forward
        # and backward
        attention = sum(6 * layers * width * n * (n + 1) for n in lengths)
        return float(factor * inner * sum(lengths) + attention + factor * vocabulary * trained)

    return count


# ---- randomness --------------------------------------------------------------------------------------------


def random_state() -> dict[str, Tensor]:
    """The state of every random generator that could matter, as tensors."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        # Python's Mersenne Twister: version, 624 words and a position; its cached Gaussian separately, inf
        # for None
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([float("inf") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.asarray(keys).astype(np.int64)),
        "numpy_place": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def generator_state(device: Device) -> Tensor:
    """State of the generator that dropout uses here, on the device, so that processes can exchange it."""
    state = torch.cuda.get_rng_state() if device.on_gpu else torch.get_rng_state()
    return state.to(device.device)


def restore_random_state(state: dict[str, Tensor], device: Device, rank: int = 0) -> None:
    """Restores `random_state`. Processes other than the first have their own generator under
    `process.<rank>`."""
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(internal), None if gauss == float("inf") else gauss))
    at, has_gauss = state["numpy_place"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, at, has_gauss, float(state["numpy_gauss"])))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{i}"], i)
    if rank and f"process.{rank}" in state:
        own = state[f"process.{rank}"]
        torch.cuda.set_rng_state(own) if device.on_gpu else torch.set_rng_state(own)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
