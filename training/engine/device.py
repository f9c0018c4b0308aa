"""What we compute on: the device and its number format, its speed and memory, and what must be the same for exact bits."""

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
    device: torch.device
    dtype: torch.dtype  # of weights and activations; masters, gradients and means are always fp32
    deterministic: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Bytes: the GPU's where there is one, else this process's."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else peak_rss()

    def environment(self) -> dict[str, Any]:
        """What decides the bits of a result. Another machine may resume a run, but says that it is not exact."""
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "deterministic": self.deterministic,
        }
        if self.on_gpu:
            found |= {
                "gpu": torch.cuda.get_device_name(),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "tf32": torch.backends.cuda.matmul.allow_tf32,
            }
        return found


def pick(settings: Settings) -> Device:
    """The first GPU (its own for each local process), else the processor."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    half = settings.precision == "bf16" or (
        settings.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    dtype = torch.bfloat16 if half and (on_gpu or cpu_has_bf16()) else torch.float32
    if on_gpu:
        torch.cuda.set_device(device)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return Device(device, dtype, settings.deterministic)


# ---- speed ---------------------------------------------------------------------------------------------------------


def gemm_rate(device: Device) -> float:
    """Matrix-multiplication rate of this machine, FLOP/s: the best of a few products of a GPT-2 block's shape."""
    rows, repeats, best = 8192 if device.on_gpu else 512, 20 if device.on_gpu else 1, 0.0
    a = torch.ones(
        rows, 768, device=device.device, dtype=device.dtype
    )  # not random: a draw would move the generator
    b = torch.ones(768, 3072, device=device.device, dtype=device.dtype)
    out = torch.mm(a, b)
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):  # one product is over before a GPU has begun
            torch.mm(a, b, out=out)
        device.synchronize()
        best = max(best, repeats * 2 * rows * 768 * 3072 / (time.perf_counter() - start))
    return best


def flop_counter(model: Any, lora: bool) -> Callable[[list[int], int], float]:
    """A function (lengths of the documents, trained tokens) -> useful floating-point operations of a step.

    Weights, causal attention (half the square) and head; a frozen weight needs no gradient of its own: two thirds."""
    head = model.head()
    vocabulary = int(head.numel()) if head is not None else 0
    matrices: int = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    inner = matrices - vocabulary - _position_weights(model)
    width = int(head.shape[1]) if head is not None else int(getattr(model.config, "hidden_size", 0))
    layers = int(getattr(model.config, "n_layer", 0) or getattr(model.config, "num_hidden_layers", 0))
    factor = 4 if lora else 6

    def count(lengths: list[int], trained: int) -> float:
        attention = sum(6 * layers * width * n * (n + 1) for n in lengths)
        return factor * inner * sum(lengths) + attention + factor * vocabulary * trained

    return count


def _position_weights(model: Any) -> int:
    """Rows that are looked up, not multiplied with."""
    sizes: list[int] = [p.numel() for name, p in model.named_parameters() if name.endswith("wpe.weight")]
    return sum(sizes)


# ---- randomness ----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Tensor]:
    """The state of every generator that could matter, as tensors."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([float("inf") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.asarray(keys).astype(np.int64)),
        "numpy_place": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def generator_state(place: Device) -> Tensor:
    """State of the generator that drops activations here, on the device (so that processes can exchange it)."""
    state = torch.cuda.get_rng_state() if place.on_gpu else torch.get_rng_state()
    return state.to(place.device)


def restore_random_state(state: dict[str, Tensor], place: Device, rank: int = 0) -> None:
    """Takes over `random_state`; a process other than the first finds its own generator under `process.<rank>`."""
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
        torch.cuda.set_rng_state(own) if place.on_gpu else torch.set_rng_state(own)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
