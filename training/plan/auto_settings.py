"""Values for automatic settings, each with a reason that users can check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from training.data.summary import Summary
from training.plan.catalog import BaseModel, Machine, training_memory
from training.plan.config import Settings

GPT2_SIZE = 124e6  # parameters of the model the rules were made for

# Named starting points. The user's own values override them.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"epochs": 1.0},
    "balanced": {},
    "thorough": {"early_stopping_patience": 3},
}


def resolve(
    settings: Settings, summary: Summary, base: BaseModel, machine: Machine
) -> tuple[Settings, dict[str, str]]:
    """Fills every field that is None. Returns the settings and a reason for each field filled here."""
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        current = getattr(settings, name)
        if current is not None:
            return current
        values[name], reasons[name] = value, reason
        return value

    length = choose("sequence_length", *_length(summary, base))
    choose("validation_fraction", *_held_out(summary))
    batch = _batch(summary)[0] if settings.batch_tokens else choose("batch_size", *_batch(summary))
    if settings.max_steps is None:
        choose("epochs", *_epochs(summary, base))
    choose("learning_rate", *learning_rate(settings.adapter, base))
    choose("dropout", *_dropout(summary, base))
    choose("micro_batch_tokens", *_micro(settings, summary, base, machine, length, batch))
    return replace(settings, **values), reasons


def _length(summary: Summary, base: BaseModel) -> tuple[int, str]:
    if summary.longest > base.context:
        return (
            base.context,
            f"{base.context:,}, the full context of {base.name or base.id}; longer examples are cut",
        )
    length = min(base.context, max(32, -(-summary.longest // 16) * 16))
    return length, f"{length:,}, because the longest example has {summary.longest:,} tokens"


def _held_out(summary: Summary) -> tuple[float, str]:
    n = summary.examples
    if n < 40:
        return 0.0, "none, because there are fewer than 40 examples"
    fraction = round(min(0.1, 200 / n), 4)
    return fraction, f"{100 * fraction:.3g}% of {_examples(n)}, to distinguish learning from memorizing"


def _batch(summary: Summary) -> tuple[int, str]:
    n = summary.examples
    batch = 4 if n < 200 else 8 if n < 2000 else 16 if n < 20_000 else 32
    return batch, f"{batch}, for {_examples(n)}"


def _epochs(summary: Summary, base: BaseModel) -> tuple[float, str]:
    """Three, as in OpenAI's cookbook; more for few examples, fewer for many. Models far smaller than GPT-2
    need up to twice as many: the starter solves its sample task after five epochs, not after three."""
    n = max(1, summary.examples)
    epochs, why = 3, f"for {_examples(n)}"
    if 3 * n < 100:
        epochs, why = min(25, 100 // n), "because there are fewer than 34 examples"
    elif 3 * n > 25_000:
        epochs, why = max(1, 25_000 // n), f"because {_examples(n)} are many"
    factor = min(2.0, max(1.0, (GPT2_SIZE / max(1, base.parameters)) ** 0.25))
    more = round(epochs * factor) if 3 * n <= 25_000 else epochs
    if more > epochs:
        why += f"; small models need more epochs, and this one has {_millions(base)}"
    return float(min(more, 50)), f"{min(more, 50)}, {why}"


def learning_rate(adapter: str, base: BaseModel) -> tuple[float, str]:
    """Smaller models tolerate larger steps, and adapters ten times larger ones than full fine-tuning (as
    found by "LoRA Without Regret", Thinking Machines, 2025)."""
    rate = 1e-4 * (GPT2_SIZE / max(1, base.parameters)) ** 0.5
    if adapter == "lora":
        rate *= 10
    rate = float(f"{min(rate, 3e-3):.1e}")
    return rate, f"{rate:g}, for {_millions(base)}" + (" with LoRA" if adapter == "lora" else "")


def _examples(number: int) -> str:
    return "1 example" if number == 1 else f"{number:,} examples"


def _millions(base: BaseModel) -> str:
    return f"{base.parameters / 1e6:,.0f} million parameters"


def _dropout(summary: Summary, base: BaseModel) -> tuple[float, str]:
    return 0.0, "0, because fine-tuning is short and held-out examples show overfitting"


def _micro(
    settings: Settings, summary: Summary, base: BaseModel, machine: Machine, length: int, batch: int
) -> tuple[int, str]:
    """As many tokens at once as fit into half of the memory, but no more than a step has."""
    checkpointing = settings.gradient_checkpointing
    tokens = 1 << 15 if machine.device == "cuda" else 4096
    while (
        tokens > length
        and training_memory(base, settings.adapter, tokens, checkpointing) > machine.memory // 2
    ):
        tokens //= 2
    tokens = max(length, min(tokens, settings.batch_tokens or batch * length))
    return tokens, f"{tokens:,} tokens at once, which fits this machine's memory"
