"""What a trainer says: one JSON object a line, its exit codes, and the sentence a person reads for each reason.

Imports no torch: the web process and the workers read the same tables.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Phase = Literal["preparing", "rehearsing", "training", "evaluating", "exporting"]
PHASES: tuple[Phase, ...] = ("preparing", "rehearsing", "training", "evaluating", "exporting")

MAX_LINE_BYTES = 16 * 1024


class Line(TypedDict):
    t: str
    time: float  # unix seconds


class PhaseLine(Line):
    phase: Phase


class PlanLine(Line):
    total_steps: int
    examples: int  # training examples, held-out ones left out
    tokens: int  # tokens of one epoch
    trained_tokens: int  # those of them the loss is taken on
    settings: dict[str, Any]  # resolved: no field is None that the method needs
    reasons: dict[str, str]  # why an automatic value is what it is, by field
    parameters: int
    trainable: int


class MetricLine(Line):
    step: int
    loss: float  # nats per trained token of this step
    loss_hex: str  # the same number, exact
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # seen since the first step
    tokens_per_s: float
    epoch: float
    memory: int  # peak bytes
    accuracy: NotRequired[float]
    gemm_share: NotRequired[float]  # useful FLOPs over the matrix rate measured on this machine
    eta_s: NotRequired[float]


class EvalLine(Line):
    step: int  # 0 = the base model
    loss: float
    perplexity: float
    accuracy: float
    examples: int
    exact_match: NotRequired[float]  # of the examples whose answers are short


class SampleLine(Line):
    step: int  # 0 = the base model
    prompt: str
    text: str


class CheckpointLine(Line):
    step: int
    path: str
    bytes: int
    files: list[dict[str, Any]]
    sha256: str  # of manifest.json
    best: bool
    final: bool


class LogLine(Line):
    level: Literal["info", "warning", "error"]
    message: str


class ResumedLine(Line):
    step: int  # where this attempt goes on
    from_step: int  # what the pointer asked for
    exact: bool
    why: str


class EstimateLine(Line):
    seconds_p50: float
    seconds_p90: float
    step_s: float
    evaluation_s: float
    checkpoint_s: float
    peak_memory: int
    micro_batch_tokens: int


class FailedLine(Line):
    reason: str
    message: str
    advice: str


class DoneLine(Line):
    step: int
    path: str
    files: list[dict[str, Any]]
    metrics: dict[str, Any]
    fidelity: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Reason:
    exit: int
    sentence: str
    advice: str
    user_fault: bool = False  # never retried
    platform_fault: bool = False  # retried, and spends none of a job's attempts


# The closed list of why a trainer ends. 10–19 the user's fault, 20–29 the machine's, 75 asked to stop.
REASONS: dict[str, Reason] = {
    "bad_data": Reason(10, "The dataset cannot be read as training examples.", "Open the dataset's report: it names the lines to repair.", True),
    "bad_settings": Reason(11, "These settings cannot be trained with.", "Change the field that is named and start again.", True),
    "base_model": Reason(12, "The base model is missing or cannot be used.", "Choose another base model, or check its folder or its name on the Hub.", True),
    "not_finite": Reason(13, "The loss is no longer a finite number.", "Lower the learning rate (a third of it is a good try), lengthen the warm-up, or look for damaged rows.", True),
    "no_trained_token": Reason(14, "No example holds a token to learn from.", "Give completions that are not empty, or train on all tokens (train_on = all).", True),
    "too_long": Reason(15, "An example is longer than the model can read.", "Shorten the example, or let long examples be cut.", True),
    "tokenizer": Reason(16, "The tokenizer does not fit the base model.", "Use the tokenizer that came with the model.", True),
    "disk_full": Reason(20, "The disk is full.", "Free some space; training goes on from the last good checkpoint.", platform_fault=True),
    "out_of_memory": Reason(21, "Memory ran out.", "Lower micro_batch_tokens or sequence_length, or switch gradient checkpointing on."),
    "checkpoint_unreadable": Reason(22, "No checkpoint could be verified.", "Start the job again from its beginning."),
    "not_writable": Reason(23, "The work folder cannot be written.", "Give the trainer's user the right to write there.", platform_fault=True),
    "unexpected": Reason(29, "Something unexpected happened in the trainer.", "The log holds the details; the job will be tried again."),
    "stopped": Reason(75, "Stopped as asked, after a checkpoint.", "Resume it when you like."),
}  # fmt: skip

EXIT: dict[str, int] = {"done": 0} | {code: reason.exit for code, reason in REASONS.items()}
REASON_OF_EXIT: dict[int, str] = {reason.exit: code for code, reason in REASONS.items()}


def reason_of(error: OSError) -> str:
    """The reason that an error of the operating system stands for; "" for one that may mean anything."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk_full"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "not_writable"
    return ""


class Failure(Exception):
    """Training cannot go on. `reason` is a key of REASONS; `message` says what exactly, for a person."""

    def __init__(self, reason: str, message: str = "", advice: str = "") -> None:
        self.reason = reason
        self.message = message or REASONS[reason].sentence
        self.advice = advice or REASONS[reason].advice
        super().__init__(self.message)
