"""Base models to choose from, the memory each needs, and whether it fits on a machine. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from training.plan.config import ALL_LINEAR, ATTENTION, FIELDS

STARTER = "starter"
STARTER_FOLDER = Path(__file__).parent.parent / "starter" / "model"
SAMPLE_FOLDER = Path(__file__).parent.parent / "starter" / "sample"


@dataclass(frozen=True)
class BaseModel:
    """What users need to know about a base model before choosing it. Sizes in bytes."""

    id: str
    name: str
    parameters: int
    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    licence: str = "unknown"
    languages: str = "unknown"
    download: int = 0
    about: str = ""
    architecture: str = "gpt2"
    folder: str = ""  # on this machine; empty = downloaded from the Hub
    # Inputs and outputs of all linear layers but the head, added up: an adapter has `rank` numbers for each. 0 = unknown.
    linear_features: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def source(self) -> str:
        """The `base` of a run file: a folder, or a model name on the Hub."""
        return self.folder or self.id


@dataclass(frozen=True)
class Machine:
    """The hardware of a worker. `memory` in bytes: of the GPU, or of the machine if there is none."""

    device: str = "cpu"  # cpu | cuda
    name: str = "processor"
    memory: int = 8 << 30
    cores: int = 1
    count: int = 1
    bf16: bool = False  # has bf16 units
    rate: float = 0.0  # operations per second of a plain matrix product on all cores; 0 = not measured


@dataclass(frozen=True)
class Fit:
    """Whether a base model can be trained on a machine, and why."""

    fits: bool
    needs: int  # bytes
    why: str


def _gpt2(
    id: str, name: str, parameters: int, layers: int, width: int, heads: int, download: int
) -> BaseModel:
    return BaseModel(
        id=id,
        name=name,
        parameters=parameters,
        layers=layers,
        width=width,
        heads=heads,
        context=1024,
        vocab=50257,
        licence="MIT",
        languages="English",
        download=download,
        linear_features=layers * 16 * width,
        about="OpenAI's GPT-2, trained on web pages. Downloaded from the Hugging Face Hub on first use.",
    )


GPT2_FAMILY: tuple[BaseModel, ...] = (
    replace(_gpt2("distilgpt2", "DistilGPT-2", 81_912_576, 6, 768, 12, 352_824_413), licence="Apache-2.0"),
    _gpt2("gpt2", "GPT-2 small", 124_439_808, 12, 768, 12, 548_105_171),
    _gpt2("gpt2-medium", "GPT-2 medium", 354_823_168, 24, 1024, 16, 1_519_984_962),
    _gpt2("gpt2-large", "GPT-2 large", 774_030_080, 36, 1280, 20, 3_247_159_078),
    _gpt2("gpt2-xl", "GPT-2 XL", 1_557_611_200, 48, 1600, 25, 6_431_829_964),
)


def base_models() -> list[BaseModel]:
    """The catalog, smallest model first."""
    return [starter(), *GPT2_FAMILY]


def starter() -> BaseModel:
    """The bundled model, which needs no network."""
    model = describe(STARTER_FOLDER, id=STARTER)
    return replace(
        model,
        name="Starter",
        licence="Apache-2.0 (text: WordNet License)",
        languages="English",
        about="A tiny GPT-2 included with LLM Tuner, trained from scratch on dictionary English. Good for first experiments, not for real answers.",
    )


def find(id: str) -> BaseModel | None:
    """A model of the catalog by its id; None for any other Hub name or folder (see `describe`)."""
    aliases = {"openai-community/gpt2": "gpt2", "distilbert/distilgpt2": "distilgpt2"} | {
        f"openai-community/{m.id}": m.id for m in GPT2_FAMILY if m.id.startswith("gpt2")
    }
    wanted = aliases.get(id, id)
    if wanted == STARTER:
        return starter()
    return next((model for model in GPT2_FAMILY if model.id == wanted), None)


@lru_cache(maxsize=64)
def _described(folder: str, stamp: int) -> BaseModel:
    return from_config(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")), folder=folder)


def describe(folder: str | Path, id: str = "") -> BaseModel:
    """The model in a folder of Hugging Face files, by its config.json. Raises OSError or ValueError."""
    folder = Path(folder).absolute()
    model = _described(str(folder), (folder / "config.json").stat().st_mtime_ns)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    return replace(model, id=id or folder.name, name=model.name or folder.name, download=size)


def from_config(config: Mapping[str, Any], *, id: str = "", folder: str = "") -> BaseModel:
    """The model of a Hugging Face config.json, whose names differ between architectures. Raises
    ValueError."""

    def first(*names: str, default: int = 0) -> int:
        # Impossible numbers are treated as missing, because an untrusted file must not make the computations below overflow.
        values = (config.get(name) for name in names)
        return next((n for n in values if isinstance(n, int) and 0 < n < 10**9), default)

    width, layers = (
        first("n_embd", "hidden_size", "d_model"),
        first("n_layer", "num_hidden_layers", "num_layers"),
    )
    heads = first("n_head", "num_attention_heads", default=1)
    vocab = first("vocab_size")
    inner = first("n_inner", "intermediate_size", "ffn_dim", default=4 * width)
    context = first("n_positions", "n_ctx", "max_position_embeddings", default=1024)
    if not (width and layers and vocab):
        raise ValueError(
            "config.json does not give the number of layers, the width or the vocabulary size, so this is not a supported language model"
        )
    kind = str(config.get("model_type", "gpt2"))
    if kind == "gpt2":
        # attention, MLP, biases and two norms
        each = 4 * width * width + 2 * width * inner + 9 * width + inner
        parameters = vocab * width + context * width + layers * each + 2 * width
        features = 4 * width + 2 * width + 2 * (width + inner)
    else:
        size = first("head_dim", default=width // heads)
        queries, shared = heads * size, first("num_key_value_heads", default=heads) * size
        gated = str(config.get("hidden_act") or config.get("hidden_activation")) in (
            "silu",
            "gelu_pytorch_tanh",
            "swiglu",
        )
        up = 2 if gated else 1
        experts = first("num_experts", "num_local_experts", default=1)
        inner = first("moe_intermediate_size", default=inner) if experts > 1 else inner
        tied = 1 if config.get("tie_word_embeddings", False) else 2
        attention, mlp = 2 * width * (queries + shared), experts * (up + 1) * width * inner
        parameters = tied * vocab * width + layers * (attention + mlp)
        # each matrix has an adapter of its own; those of all experts of a layer are one parameter
        matrices = up if experts == 1 else 1
        features = 2 * (width + queries) + 2 * (width + shared)
        features += experts * (matrices * width + up * inner + inner + width)
    return BaseModel(
        id,
        "",
        parameters,
        layers,
        width,
        heads,
        context,
        vocab,
        architecture=kind,
        folder=folder,
        linear_features=layers * features,
    )


# --- memory ---------------------------------------------------------------------------------------


def training_memory(
    base: BaseModel, adapter: str = "none", tokens: int = 2048, checkpointing: bool = False
) -> int:
    """Peak bytes of training: weights, optimizer, and activations of `tokens` tokens computed at once.

    Full fine-tuning: weight, gradient and AdamW's two moments, 4 bytes each. LoRA: the frozen weights plus
    its adapters."""
    trained = base.parameters if adapter == "none" else lora_parameters(base, FIELDS["lora_rank"].default)
    state = 4 * base.parameters + 12 * trained
    own = 300 << 20  # of Python and torch themselves
    return int(state + activation_memory(base, tokens, checkpointing) + own)


def activation_memory(base: BaseModel, tokens: int, checkpointing: bool = False) -> int:
    """Bytes kept for the backward pass of `tokens` tokens, and the logits that are in memory at once."""
    per_layer = 2 * base.width if checkpointing else 17 * base.width  # floats
    return 4 * tokens * (base.layers * per_layer + 8 * base.width) + 4 * min(tokens, 1024) * base.vocab * 2


def lora_parameters(base: BaseModel, rank: int, targets: tuple[str, ...] | None = ALL_LINEAR) -> int:
    """Numbers in the adapters of all linear layers but the head, or of query and value only. For layers given by
    name, of which only the model itself knows the sizes, at most this."""
    if targets == ATTENTION:
        return base.layers * rank * 4 * base.width
    return rank * (base.linear_features or base.layers * 16 * base.width)


def fits(base: BaseModel, machine: Machine, adapter: str = "none", tokens: int = 2048) -> Fit:
    """Whether a model can be trained on a machine, using at most 90% of its memory."""
    needs = training_memory(base, adapter, tokens)
    have = machine.memory * 9 // 10
    if needs <= have:
        return Fit(True, needs, f"needs about {gib(needs)} of {gib(machine.memory)}")
    other = " LoRA would fit." if adapter == "none" and training_memory(base, "lora", tokens) <= have else ""
    return Fit(
        False, needs, f"needs about {gib(needs)}, but this machine has only {gib(machine.memory)}.{other}"
    )


def gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """The hardware of this machine, detected without torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _gpu(cores) or Machine("cpu", f"{cores} cores", _cgroup_limit(memory), cores, bf16=cpu_has_bf16())


def measure(machine: Machine) -> Machine:
    """The machine with the measured rate of a plain matrix product with the shape of a GPT-2 block, on its
    CPU. Takes a fifth of a second. GPUs cannot be measured without torch."""
    if machine.device != "cpu":
        return machine
    a, b = np.ones((512, 768), np.float32), np.ones((768, 3072), np.float32)
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return replace(machine, rate=2.0 * 512 * 768 * 3072 / best)


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 units, according to Linux. With them, matrix products are twice as fast as
    in fp32; without, sixty times slower (measured)."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", known, re.MULTILINE))


def _cgroup_limit(memory: int) -> int:
    """The memory limit of the container, if that is less than the machine's memory."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def _gpu(cores: int) -> Machine | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        output = subprocess.run(
            [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split(", ") for line in output.splitlines() if line.count(", ") == 2]
    if not lines:
        return None
    name, memory, capability = lines[0]
    return Machine("cuda", name, int(memory) << 20, cores, len(lines), float(capability) >= 8)
