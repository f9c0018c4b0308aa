"""The hyperparameters and the run file. One table, FIELDS, drives the form, the API and the command line.

Imports no torch: pages validate with it. A field left out, None or "auto" takes its default; where the default is
None the value is found by `training.plan.auto_settings.resolve` from the data, the base model and the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


class ConfigError(Exception):
    """A setting that cannot be used; `field` names it ("" = the file as a whole), the message says what to change."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(f"{field}: {message}" if field else message)


@dataclass(frozen=True)
class Field:
    default: Any  # None = automatic
    kind: Literal["int", "float", "bool", "choice", "list"]
    help: str
    label: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    group: Literal["basic", "advanced"] = "advanced"

    @property
    def automatic(self) -> bool:
        return self.default is None


LORA_TARGETS = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")

FIELDS: dict[str, Field] = {
    "method": Field("full", "choice", "Train every weight, or small adapters beside the frozen ones (LoRA: less memory).", "Method", choices=("full", "lora"), group="basic"),
    "epochs": Field(None, "float", "How often each example is seen.", "Epochs", 0.01, 1000, group="basic"),
    "max_steps": Field(None, "int", "Stop after so many optimizer steps instead.", "Steps", 1, 10_000_000),
    "batch_size": Field(None, "int", "Examples per optimizer step.", "Batch size", 1, 65_536, group="basic"),
    "batch_tokens": Field(None, "int", "Fill each step with so many tokens instead of a number of examples.", "Batch in tokens", 16, 16_777_216),
    "micro_batch_tokens": Field(None, "int", "Tokens computed at once; a step is the sum of such parts. Saves memory, changes nothing else.", "Micro-batch in tokens", 16, 16_777_216),
    "learning_rate": Field(None, "float", "Size of each update.", "Learning rate", 1e-8, 10.0, group="basic"),
    "schedule": Field("linear", "choice", "How the learning rate falls: to zero in a line, along a cosine, not at all, or level and then down at the end (wsd).", "Schedule", choices=("linear", "cosine", "constant", "wsd")),
    "warmup": Field(0.05, "float", "Learning rate rises over this share of the steps (0–0.5), or over so many steps (1 and more).", "Warm-up", 0, 1_000_000),
    "weight_decay": Field(0.01, "float", "Pulls weights to zero; not applied to biases and norms.", "Weight decay", 0, 1),
    "clip_norm": Field(1.0, "float", "Longest gradient allowed; 0 = no clipping.", "Clip gradients at", 0, 1e6),
    "beta1": Field(0.9, "float", "Memory of AdamW's mean of gradients.", "Beta 1", 0, 0.9999),
    "beta2": Field(0.999, "float", "Memory of AdamW's mean of squares.", "Beta 2", 0, 0.999999),
    "eps": Field(1e-8, "float", "Keeps AdamW from dividing by zero.", "Epsilon", 1e-15, 1e-2),
    "dropout": Field(None, "float", "Share of activations dropped while training, against overfitting.", "Dropout", 0, 0.9),
    "sequence_length": Field(None, "int", "Longest example in tokens; longer ones are cut.", "Sequence length", 8, 1_048_576),
    "lora_rank": Field(8, "int", "Width of the adapters.", "LoRA rank", 1, 1024),
    "lora_alpha": Field(16.0, "float", "Strength of the adapters: they count alpha / rank.", "LoRA alpha", 0.01, 4096),
    "lora_dropout": Field(0.0, "float", "Dropout before the adapters.", "LoRA dropout", 0, 0.9),
    "lora_targets": Field(None, "list", "Names of the layers that get adapters; automatic = the attention projections.", "LoRA targets"),
    "gradient_checkpointing": Field(False, "bool", "Compute activations twice to hold fewer of them: about a third slower, far less memory.", "Gradient checkpointing"),
    "eval_every": Field(0, "int", "Steps between evaluations; 0 = at the end of each epoch.", "Evaluate every", 0, 10_000_000),
    "early_stopping_patience": Field(0, "int", "Stop after so many evaluations without a better loss; 0 = never.", "Early stopping", 0, 1000),
    "keep_best": Field(True, "bool", "Keep the weights with the lowest held-out loss instead of the last ones.", "Keep the best"),
    "checkpoint_every_s": Field(300.0, "float", "Seconds between checkpoints; 0 = not by time.", "Checkpoint every (s)", 0, 86_400),
    "checkpoint_every_steps": Field(0, "int", "Steps between checkpoints; 0 = not by steps.", "Checkpoint every (steps)", 0, 10_000_000),
    "sample_every": Field(0, "int", "Steps between sample answers; 0 = at each evaluation.", "Sample every", 0, 10_000_000),
    "seed": Field(0, "int", "Decides the order of examples and all randomness.", "Seed", 0, 2**31 - 1),
    "precision": Field("auto", "choice", "Numbers to compute with; automatic = bf16 on GPUs that have it, else fp32. On a processor with bf16 units bf16 makes GPT-2 1.4 times as fast, and small models slower.", "Precision", choices=("auto", "fp32", "bf16")),
    "deterministic": Field(False, "bool", "Refuse every operation that could give other bits on the same machine. Processors: always so; GPUs: slower.", "Deterministic"),
    "shard": Field(False, "bool", "Spread the weights over all processes of a run (FSDP2). Done by itself where the model does not fit into one; alone it changes nothing.", "Spread the model"),
    "validation_fraction": Field(None, "float", "Share of the examples held out to evaluate on, where no validation file is given.", "Held out", 0, 0.5),
    "train_on": Field("completion", "choice", "Learn the answers only, or the prompts too.", "Learn", choices=("completion", "all"), group="basic"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Hyperparameters. None = automatic, still to be resolved. FIELDS explains each."""

    method: str = "full"
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    dropout: float | None = None
    sequence_length: int | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    eval_every: int = 0
    early_stopping_patience: int = 0
    keep_best: bool = True
    checkpoint_every_s: float = 300.0
    checkpoint_every_steps: int = 0
    sample_every: int = 0
    seed: int = 0
    precision: str = "auto"
    deterministic: bool = False
    shard: bool = False
    validation_fraction: float | None = None
    train_on: str = "completion"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `parse` takes them back."""
        values = asdict(self)
        if self.lora_targets is not None:
            values["lora_targets"] = list(self.lora_targets)
        return values


def parse(values: Mapping[str, Any]) -> Settings:
    """Settings from a form, the API or a file. Raises ConfigError with the field and what to change."""
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ConfigError(
            unknown[0], f"There is no setting of this name. The settings are: {', '.join(FIELDS)}."
        )
    settings = Settings(**{name: _value(name, values.get(name)) for name in FIELDS})
    _check_together(settings)
    return settings


def _value(name: str, raw: Any) -> Any:
    spec = FIELDS[name]
    if raw is None or raw == "" or (raw == "auto" and "auto" not in spec.choices):
        return spec.default
    if spec.kind == "choice":
        if raw not in spec.choices:
            raise ConfigError(name, f"Choose one of {', '.join(spec.choices)}.")
        return raw
    if spec.kind == "bool":
        return _boolean(name, raw)
    if spec.kind == "list":
        return _names(name, raw)
    return _number(name, spec, raw)


def _boolean(name: str, raw: Any) -> bool:
    words = {
        "true": True,
        "on": True,
        "yes": True,
        "1": True,
        "false": False,
        "off": False,
        "no": False,
        "0": False,
    }
    if isinstance(raw, bool):
        return raw
    if str(raw).strip().lower() in words:
        return words[str(raw).strip().lower()]
    raise ConfigError(name, "Say true or false.")


def _names(name: str, raw: Any) -> tuple[str, ...]:
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(name, "Give a list of layer names.")
    return tuple(part.strip() for part in parts if part.strip()) or FIELDS[name].default


def _number(name: str, spec: Field, raw: Any) -> int | float:
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(name, "Give a number.") from None
    if isinstance(raw, bool) or not math.isfinite(number):
        raise ConfigError(name, "Give a number.")
    if spec.kind == "int" and number != int(number):
        raise ConfigError(name, "Give a whole number.")
    if spec.minimum is not None and number < spec.minimum:
        raise ConfigError(name, f"Must be at least {spec.minimum:g}.")
    if spec.maximum is not None and number > spec.maximum:
        raise ConfigError(name, f"Must be at most {spec.maximum:g}.")
    return int(number) if spec.kind == "int" else number


def _check_together(s: Settings) -> None:
    if s.batch_size is not None and s.batch_tokens is not None:
        raise ConfigError(
            "batch_tokens",
            "Give the batch in examples or in tokens, not both: clear batch_size or batch_tokens.",
        )
    if s.batch_tokens and s.micro_batch_tokens and s.micro_batch_tokens > s.batch_tokens:
        raise ConfigError(
            "micro_batch_tokens", "A micro-batch is a part of the batch: lower it, or raise batch_tokens."
        )
    if 0.5 < s.warmup < 1 or (s.warmup > 1 and s.warmup != int(s.warmup)):
        raise ConfigError("warmup", "Give a share of the steps from 0 to 0.5, or a whole number of steps.")
    if s.max_steps is not None and s.warmup >= 1 and s.warmup >= s.max_steps:
        raise ConfigError("warmup", "The warm-up is as long as the training: shorten it, or raise max_steps.")
    if s.early_stopping_patience and s.validation_fraction == 0 and not s.eval_every:
        raise ConfigError(
            "early_stopping_patience",
            "Early stopping needs held-out examples: set validation_fraction above 0 or give a validation file.",
        )


@dataclass(frozen=True)
class Run:
    """What `python -m training train CONFIG.json` does: where things lie, and the settings."""

    base: str  # folder, or a name on the Hub
    train_file: str
    work_dir: str
    settings: Settings = field(default_factory=Settings)
    base_revision: str | None = None
    train_format: dict[str, Any] | None = None  # as the report found it; None = look
    validation_file: str | None = None
    validation_format: dict[str, Any] | None = None
    resume_from: str | None = None  # folder of the checkpoint the pointer names
    prompts: tuple[str, ...] = ()  # pinned prompts for samples
    expected: dict[str, int] | None = None  # {"examples", "tokens"} of the report, checked before training
    job: str | None = None
    epoch: int = 1  # of the lease: fences the folders of an attempt
    rehearse: bool = True

    @staticmethod
    def load(path: str | Path) -> Run:
        """Reads CONFIG.json. Raises ConfigError."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError("", f"The run file {path} cannot be read: {error}") from error
        return Run.parse(values)

    @staticmethod
    def parse(values: Any) -> Run:
        if not isinstance(values, dict):
            raise ConfigError("", "The run file must hold a JSON object.")
        known = {f.name for f in fields(Run)}
        for name in values:
            if name not in known:
                raise ConfigError(
                    name, f"The run file has no such entry. It takes: {', '.join(sorted(known))}."
                )
        for name in ("base", "train_file", "work_dir"):
            if not isinstance(values.get(name), str) or not values[name]:
                raise ConfigError(name, "This entry of the run file is needed.")
        settings = values.get("settings") or {}
        if not isinstance(settings, Mapping):
            raise ConfigError("settings", "Must be a JSON object.")
        given = {name: value for name, value in values.items() if value is not None}
        return Run(**given | {"settings": parse(settings), "prompts": tuple(values.get("prompts") or ())})

    def as_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"settings": self.settings.as_dict(), "prompts": list(self.prompts)}


# What may change between two attempts at one job: how much is computed at once and where, and when checkpoints are written.
UNHASHED = (
    "micro_batch_tokens",
    "gradient_checkpointing",
    "shard",
    "checkpoint_every_s",
    "checkpoint_every_steps",
)


def settings_hash(settings: Settings) -> str:
    """Names what was trained with: a checkpoint made under other settings is a stranger's."""
    values = {name: value for name, value in settings.as_dict().items() if name not in UNHASHED}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
