"""Warnings before a job starts. Errors are different: they prevent the start.

Each check covers one thing and is an entry of CHECKS. Pages and the API show the same warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.data.summary import Summary
from training.plan.catalog import BaseModel, Machine, fits
from training.plan.config import Settings
from training.plan.estimate import bf16_speedup

ENOUGH_TO_HOLD_OUT = 40  # examples from which automatic settings hold some out
MANY_EPOCHS = 20


@dataclass(frozen=True)
class Warning:
    title: str
    text: str


@dataclass(frozen=True)
class Planned:
    """A job as it would start, with resolved settings."""

    settings: Settings
    base: BaseModel
    machine: Machine
    summary: Summary
    validation_rows: int = 0  # of the validation file; 0 = there is none
    leaked: int = 0  # those of them that are also in the training dataset


def warnings(planned: Planned) -> list[Warning]:
    return [warning for check in CHECKS if (warning := check(planned)) is not None]


def cut(p: Planned) -> Warning | None:
    length = p.settings.sequence_length
    if not length or p.summary.longest <= length or p.summary.kind == "text":
        return None
    return Warning(
        f"The longest example has {p.summary.longest:,} tokens and is cut to {length:,}",
        "An example that is cut off teaches the model not to finish. Raise the sequence length, or shorten the long rows.",
    )


def answers_cut(p: Planned) -> Warning | None:
    length, every = p.settings.sequence_length or 0, p.summary.every_answer
    if not 0 < length < every or every_answer_cut(p.settings, p.summary):
        return None
    return Warning(
        "Some answers are cut off whole",
        f"Their prompts alone fill {length:,} tokens, so these rows are left out of training. Every answer begins within {every:,} tokens.",
    )


def every_answer_cut(settings: Settings, summary: Summary) -> str:
    """Why nothing could be learned with the sequence length that was chosen; empty if something can. Such a
    job is refused."""
    length, first = settings.sequence_length or 0, summary.first_answer
    if not 0 < length < first or settings.train_on == "all":
        return ""
    return (
        f"Every answer is cut off: the prompts alone fill the {length:,} tokens of the sequence length. "
        f"The first answer begins at token {first:,}. Choose a longer one, or leave it automatic."
    )


def does_not_fit(p: Planned) -> Warning | None:
    fit = fits(p.base, p.machine, p.settings.adapter)
    if fit.fits:
        return None
    how = "LoRA" if p.settings.adapter == "lora" else "Full fine-tuning"
    return Warning(
        f"{p.base.name} does not fit in the worker's memory",
        f"{how} {fit.why.rstrip('.')}. The job would fail before training. Choose LoRA or a smaller model.",
    )


def bf16_is_missing(p: Planned) -> Warning | None:
    if p.settings.precision != "bf16" or p.machine.device != "cpu" or p.machine.bf16:
        return None
    return Warning(
        "The worker's CPU has no bf16 units",
        "On this CPU, bf16 would be far slower than fp32, so fp32 is used.",
    )


def bf16_is_slower(p: Planned) -> Warning | None:
    if bf16_speedup(p.base, p.settings, p.machine) >= 1:
        return None
    return Warning(
        f"{p.base.name} is slower in bf16",
        "The model is too small to benefit from bf16 on this CPU. Leave precision automatic to use fp32.",
    )


def nothing_held_out(p: Planned) -> Warning | None:
    if p.settings.validation_fraction != 0 or p.validation_rows or p.summary.examples < ENOUGH_TO_HOLD_OUT:
        return None
    return Warning(
        "Nothing is held out",
        "Without held-out examples there is no held-out loss, no best checkpoint and no verdict, so you cannot tell learning from memorizing.",
    )


def no_early_stopping(p: Planned) -> Warning | None:
    if not p.settings.early_stopping_patience or p.settings.validation_fraction != 0 or p.validation_rows:
        return None
    return Warning(
        "Early stopping has no effect",
        "It compares evaluations of held-out examples, and nothing is held out. Hold out some, or choose a validation file.",
    )


def validation_is_trained_on(p: Planned) -> Warning | None:
    if not p.validation_rows or p.leaked < p.validation_rows:
        return None
    return Warning(
        "Every validation row is also in the training dataset",
        "Identical rows are left out of evaluations, and other answers to the same prompts make the result look better than it is. Choose a file with other rows.",
    )


def many_epochs(p: Planned) -> Warning | None:
    epochs = p.settings.epochs
    if not epochs or epochs <= MANY_EPOCHS or p.summary.examples < ENOUGH_TO_HOLD_OUT:
        return None
    return Warning(
        f"Each example is seen {epochs:g} times",
        "After this many epochs, a model usually only repeats its examples. Watch the held-out loss, or set early stopping.",
    )


def large_batch(p: Planned) -> Warning | None:
    return batch_larger_than_data(p.settings, p.summary.examples, p.summary.tokens)


def batch_larger_than_data(settings: Settings, examples: int, tokens: int) -> Warning | None:
    """Also for the trainer, which knows how many examples are left to train on."""
    size, data, unit = settings.batch_size or 0, examples, "examples"
    if settings.batch_tokens:
        size, data, unit = settings.batch_tokens, tokens, "tokens"
    if size <= data:
        return None
    return Warning(
        "The batch is larger than the data",
        f"A batch has {size:,} {unit}, and the dataset {data:,}, so each step sees the data more than once and few steps are left. Lower the batch size.",
    )


def nothing_to_learn(p: Planned) -> Warning | None:
    if not p.summary.untrained:
        return None
    return Warning(
        "1 example has nothing to train on"
        if p.summary.untrained == 1
        else f"{p.summary.untrained:,} examples have nothing to train on",
        "Empty answers take time, and the model learns nothing from them.",
    )


CHECKS: tuple[Callable[[Planned], Warning | None], ...] = (
    cut,
    answers_cut,
    does_not_fit,
    bf16_is_missing,
    bf16_is_slower,
    nothing_held_out,
    no_early_stopping,
    validation_is_trained_on,
    many_epochs,
    large_batch,
    nothing_to_learn,
)
