"""The hyperparameters. One class, Settings, drives the form, the API and the command line.

Imports no torch: pages validate with it. A field that is missing, None or "auto" takes its default. If the
default is None, `training.plan.auto_settings.resolve` chooses the value from the data, the base model and the
machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from training.plan.tasks import TASKS


class ConfigError(Exception):
    """A setting that cannot be used. `field` names it ("" = the whole file); the message says what to
    change."""

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


def setting(
    default: Any,
    kind: Literal["int", "float", "bool", "choice", "list"],
    help: str,
    label: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    group: Literal["basic", "advanced"] = "advanced",
) -> Any:
    """A field of Settings with everything that the form, the API and the command line need to know about
    it."""
    spec = Field(default, kind, help, label, minimum, maximum, choices, group)
    return field(default=default, metadata={"spec": spec})


ALL_LINEAR = ("all-linear",)  # `lora_targets`: every linear layer but the head. The word is peft's.
ATTENTION = ("attention",)  # `lora_targets`: those of peft for the architecture, mostly query and value


@dataclass(frozen=True)
class Settings:
    """Hyperparameters. None = automatic, still to be resolved."""

    objective: str = setting(
        "supervised",
        "choice",
        "What training optimizes. Supervised: the likelihood of the answers in the examples.",
        "Objective",
        choices=("supervised",),
    )
    task: str | None = setting(
        None,
        "choice",
        "What the rows teach the model to do. It decides how its answers are scored.",
        "Task",
        choices=tuple(TASKS),
    )
    adapter: str = setting(
        "none",
        "choice",
        "Full fine-tuning updates every weight. LoRA trains small adapters next to frozen weights and needs less memory.",
        "Adapter",
        choices=("none", "lora"),
        group="basic",
    )
    epochs: float | None = setting(
        None, "float", "How many times each example is seen.", "Epochs", 0.01, 1000, group="basic"
    )
    max_steps: int | None = setting(
        None,
        "int",
        "Stop after this many optimizer steps instead of a number of epochs.",
        "Steps",
        1,
        10_000_000,
    )
    batch_size: int | None = setting(
        None, "int", "Examples per optimizer step.", "Batch size", 1, 65_536, group="basic"
    )
    batch_tokens: int | None = setting(
        None,
        "int",
        "Fill each optimizer step with this many tokens instead of a number of examples.",
        "Batch size in tokens",
        16,
        16_777_216,
    )
    micro_batch_tokens: int | None = setting(
        None,
        "int",
        "Tokens processed at once. The gradients of a step are accumulated over micro-batches, so this changes memory use, not results.",
        "Micro-batch size in tokens",
        16,
        16_777_216,
    )
    learning_rate: float | None = setting(
        None,
        "float",
        "How far each optimizer step changes the weights.",
        "Learning rate",
        1e-8,
        10.0,
        group="basic",
    )
    schedule: str = setting(
        "linear",
        "choice",
        "How the learning rate decays after warmup: linearly to zero, along a cosine, not at all, or only at the end (wsd: warmup, stable, decay).",
        "Schedule",
        choices=("linear", "cosine", "constant", "wsd"),
    )
    warmup: float = setting(
        0.05,
        "float",
        "The learning rate rises from zero over this fraction of the steps (0–0.5), or over this number of steps (1 or more).",
        "Warmup",
        0,
        1_000_000,
    )
    weight_decay: float = setting(
        0.01, "float", "Pulls weights toward zero. Not applied to biases and norms.", "Weight decay", 0, 1
    )
    clip_norm: float = setting(
        1.0, "float", "Largest gradient norm allowed; 0 = no clipping.", "Gradient clipping norm", 0, 1e6
    )
    beta1: float = setting(0.9, "float", "AdamW's decay rate for the mean of gradients.", "Beta 1", 0, 0.9999)
    beta2: float = setting(
        0.999, "float", "AdamW's decay rate for the mean of squared gradients.", "Beta 2", 0, 0.999999
    )
    eps: float = setting(1e-8, "float", "Keeps AdamW from dividing by zero.", "Epsilon", 1e-15, 1e-2)
    dropout: float | None = setting(
        None,
        "float",
        "Fraction of activations dropped during training to reduce overfitting.",
        "Dropout",
        0,
        0.9,
    )
    sequence_length: int | None = setting(
        None,
        "int",
        "Maximum length of an example in tokens. Longer examples are cut.",
        "Sequence length",
        8,
        1_048_576,
    )
    lora_rank: int = setting(16, "int", "Rank of the adapter matrices.", "LoRA rank", 1, 1024)
    lora_alpha: float = setting(
        32.0,
        "float",
        "Strength of the adapters: their output is scaled by alpha / rank, with rsLoRA by alpha / √rank.",
        "LoRA alpha",
        0.01,
        4096,
    )
    lora_dropout: float = setting(
        0.0, "float", "Dropout on the input of the adapters.", "LoRA dropout", 0, 0.9
    )
    lora_targets: tuple[str, ...] | None = setting(
        ALL_LINEAR,
        "list",
        "Names of the layers that get adapters. `all-linear`: all linear layers except the head. `attention`: query and value only, for models where peft knows their names.",
        "LoRA targets",
    )
    use_dora: bool = setting(
        False,
        "bool",
        "Also train the length of each output's weights (DoRA). Learns more with small ranks, but each step takes longer.",
        "DoRA",
    )
    use_rslora: bool = setting(
        False,
        "bool",
        "Scale adapters by alpha / √rank (rsLoRA), so that large ranks are not scaled down to nothing.",
        "rsLoRA",
    )
    gradient_checkpointing: bool = setting(
        False,
        "bool",
        "Recompute activations in the backward pass instead of keeping them: about a third slower, far less memory.",
        "Gradient checkpointing",
    )
    eval_every: int = setting(
        0, "int", "Steps between evaluations; 0 = at the end of each epoch.", "Evaluate every", 0, 10_000_000
    )
    early_stopping_patience: int = setting(
        0,
        "int",
        "Stop after this many evaluations in a row without a better held-out loss; 0 = never.",
        "Early stopping",
        0,
        1000,
    )
    keep_best: bool = setting(
        True,
        "bool",
        "Keep the weights with the lowest held-out loss instead of the final weights.",
        "Keep the best weights",
    )
    checkpoint_every_s: float = setting(
        300.0,
        "float",
        "Seconds between checkpoints; 0 = no checkpoints by time.",
        "Checkpoint every (s)",
        0,
        86_400,
    )
    checkpoint_every_steps: int = setting(
        0,
        "int",
        "Steps between checkpoints; 0 = no checkpoints by steps.",
        "Checkpoint every (steps)",
        0,
        10_000_000,
    )
    sample_every: int = setting(
        0, "int", "Steps between sample answers; 0 = at each evaluation.", "Sample every", 0, 10_000_000
    )
    seed: int = setting(
        0, "int", "Determines the order of examples and everything random.", "Seed", 0, 2**31 - 1
    )
    precision: str = setting(
        "auto",
        "choice",
        "Number format to compute in. Automatic: bf16 on GPUs that support it. On CPUs with bf16 units, both are measured before training, and bf16 is used if it is at least 1.2 times as fast with the same loss. Otherwise fp32.",
        "Precision",
        choices=("auto", "fp32", "bf16"),
    )
    deterministic: bool = setting(
        False,
        "bool",
        "Use only operations that give identical results on the same machine. On a CPU this is always so. On a GPU it is slower.",
        "Deterministic",
    )
    shard: bool = setting(
        False,
        "bool",
        "Shard the weights over all processes of a run (FSDP2). On automatically when the model does not fit into one process. Has no effect with a single process.",
        "Shard the model",
    )
    validation_fraction: float | None = setting(
        None,
        "float",
        "Fraction of the examples held out for evaluation when there is no validation file.",
        "Held out",
        0,
        0.5,
    )
    train_on: str = setting(
        "completion",
        "choice",
        "Compute the loss on the answers only, or on the prompts too.",
        "Train on",
        choices=("completion", "all"),
        group="basic",
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `parse` reads them."""
        values = asdict(self)
        if self.lora_targets is not None:
            values["lora_targets"] = list(self.lora_targets)
        return values

    def stored(self) -> dict[str, Any]:
        """As stored in rows, events and checkpoints; `parse` reads these too.

        So that programs of the first release can read it, the adapter is stored as `method`, its name there,
        ATTENTION, its only automatic value there, is null, and its only objective and settings added since are
        left out where they have their defaults."""
        values = stored_names(self.as_dict())
        if self.lora_targets == ATTENTION:
            values["lora_targets"] = None
        added = {name for name in ADDED if values.get(name) == FIELDS[name].default}
        return {name: value for name, value in values.items() if name not in added}


FIELDS: dict[str, Field] = {f.name: f.metadata["spec"] for f in fields(Settings)}

_METHODS = {"none": "full", "lora": "lora"}  # adapter -> its stored name


# The version of the settings' schema, incremented whenever a setting is added or a default changes. Jobs and
# checkpoints keep the version they were made with.
SCHEMA = 2
PRECISION_CHOSEN_ONCE = 2  # with earlier settings, automatic precision is that of the machine at each attempt

# name -> (the schema that introduced the current default, the default before it)
FORMER_DEFAULTS: dict[str, tuple[int, Any]] = {
    "lora_rank": (2, 8),
    "lora_alpha": (2, 16.0),
    "lora_targets": (2, ATTENTION),
}

# name -> the schema that added the setting; settings not listed are in the first
ADDED: dict[str, int] = {"task": 2, "use_dora": 2, "use_rslora": 2}


def _default(name: str, schema: int) -> Any:
    changed, former = FORMER_DEFAULTS.get(name, (0, None))
    return former if schema < changed else FIELDS[name].default


def defaults(schema: int) -> dict[str, Any]:
    """What a setting is if it is missing in settings of a schema."""
    return {name: _default(name, schema) for name in FIELDS}


def parse(values: Mapping[str, Any], schema: int | None = None) -> Settings:
    """Settings from a form, the API or a file. Raises ConfigError with the field and what to change.

    `schema` is the version they were submitted with: missing fields take the defaults of that version."""
    values = current_names(values)
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ConfigError(
            unknown[0], f"There is no setting with this name. The settings are: {', '.join(FIELDS)}."
        )
    settings = Settings(**{name: _value(name, values.get(name), schema or SCHEMA) for name in FIELDS})
    _check_together(settings)
    return settings


def parse_stored(values: Mapping[str, Any]) -> Settings:
    """What `Settings.stored` returned, in this or an earlier release: complete, so that a missing or null value
    is a default of the first release. Raises ConfigError."""
    return parse(values, 1)


def as_of_today(values: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """Settings submitted with an earlier schema, for a request with the present one: defaults that have changed
    since are written out."""
    former = {name: default for name, (since, default) in FORMER_DEFAULTS.items() if schema < since}
    if "lora" not in (values.get("adapter"), values.get("method")):  # without adapters, theirs mean nothing
        former = {name: default for name, default in former.items() if not name.startswith("lora_")}
    given = {name: value for name, value in values.items() if value not in (None, "", "auto")}
    return {**values, **former, **given}


def stored_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Some settings under their stored names: the adapter as `method`. See Settings.stored."""
    stored = current_names(values)
    if stored.get("adapter") in _METHODS:
        stored["method"] = _METHODS[stored.pop("adapter")]
    if stored.get("objective") == "supervised":
        stored.pop("objective")
    if stored.get("task") in (None, "", "auto"):
        stored.pop("task", None)
    return stored


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Some settings under the names of FIELDS: `adapter` was called `method` in the first release.

    Raises ConfigError if both are given and differ."""
    renamed = dict(values)
    method = renamed.pop("method", None)
    if method in (None, "", "auto"):
        return renamed
    adapters = {stored: adapter for adapter, stored in _METHODS.items()}
    if method not in adapters:
        raise ConfigError("method", f"Choose one of {', '.join(adapters)}.")
    if renamed.get("adapter") not in (None, "", "auto", adapters[method]):
        raise ConfigError(
            "method",
            "`method` is the former name of `adapter`, and the two values differ. Give only one of them.",
        )
    return renamed | {"adapter": adapters[method]}


def _value(name: str, raw: Any, schema: int) -> Any:
    spec = FIELDS[name]
    if raw is None or raw == "" or (raw == "auto" and "auto" not in spec.choices):
        return _default(name, schema)
    if spec.kind == "choice":
        if raw not in spec.choices:
            raise ConfigError(name, f"Choose one of {', '.join(spec.choices)}.")
        return raw
    if spec.kind == "bool":
        return _boolean(name, raw)
    if spec.kind == "list":
        return _names(name, raw) or _default(name, schema)
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
    raise ConfigError(name, "Enter true or false.")


def _names(name: str, raw: Any) -> tuple[str, ...]:
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(name, "Enter a list of layer names.")
    return tuple(part.strip() for part in parts if part.strip())


def _number(name: str, spec: Field, raw: Any) -> int | float:
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(name, "Enter a number.") from None
    if isinstance(raw, bool) or not math.isfinite(number):
        raise ConfigError(name, "Enter a number.")
    if spec.kind == "int" and number != int(number):
        raise ConfigError(name, "Enter a whole number.")
    if spec.minimum is not None and number < spec.minimum:
        raise ConfigError(name, f"Must be at least {spec.minimum:g}.")
    if spec.maximum is not None and number > spec.maximum:
        raise ConfigError(name, f"Must be at most {spec.maximum:g}.")
    return int(number) if spec.kind == "int" else number


def _check_together(s: Settings) -> None:
    if s.batch_size is not None and s.batch_tokens is not None:
        raise ConfigError(
            "batch_tokens",
            "Set the batch size either in examples or in tokens. Clear batch_size or batch_tokens.",
        )
    if s.batch_tokens and s.micro_batch_tokens and s.micro_batch_tokens > s.batch_tokens:
        raise ConfigError(
            "micro_batch_tokens",
            "A micro-batch cannot be larger than the batch. Lower micro_batch_tokens, or raise batch_tokens.",
        )
    if 0.5 < s.warmup < 1 or (s.warmup > 1 and s.warmup != int(s.warmup)):
        raise ConfigError(
            "warmup", "Enter a fraction of the steps from 0 to 0.5, or a whole number of steps."
        )
    if s.max_steps is not None and s.warmup >= 1 and s.warmup >= s.max_steps:
        raise ConfigError(
            "warmup", "Warmup takes at least as many steps as training has. Shorten it, or raise max_steps."
        )


def check_held_out(s: Settings, validation_file: bool) -> None:
    """Raises ConfigError if early stopping would have nothing to evaluate."""
    if s.early_stopping_patience and s.validation_fraction == 0 and not validation_file:
        raise ConfigError(
            "early_stopping_patience",
            "Early stopping needs held-out examples. Set validation_fraction above 0, or choose a validation file.",
        )


# What may change between two attempts of a job: how much is computed at once and where, and when checkpoints
# are written.
UNHASHED = (
    "micro_batch_tokens",
    "gradient_checkpointing",
    "shard",
    "checkpoint_every_s",
    "checkpoint_every_steps",
)


def settings_hash(settings: Settings, schema: int | None = None) -> str:
    """Identifies the settings of a run: a checkpoint made with other settings belongs to another run.

    With an earlier schema, settings added later count only if they differ from their default."""
    schema = schema or SCHEMA
    values = {
        name: value
        for name, value in settings.stored().items()
        if name not in UNHASHED and (ADDED.get(name, 1) <= schema or value != FIELDS[name].default)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
