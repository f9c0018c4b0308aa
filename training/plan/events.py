"""What a trainer writes: one JSON object per line, its exit codes, and a sentence for users for each reason.

Every line has `t` (its kind) and `time` (Unix seconds). Numbers are finite or left out.

    phase       phase
    plan        total_steps, examples (held-out ones left out), held_out, tokens (of one epoch), trained_tokens,
                settings (resolved), reasons (why an automatic value is what it is), parameters, trainable,
                task (name, automatic, text; see plan/tasks.py), implementation (of the model: native or transformers)
    estimate    seconds_p50, seconds_p90, step_s, evaluation_s, checkpoint_s, peak_memory, micro_batch_tokens
    metric      step, loss (nats per trained token), loss_hex (the same, exact), lr, grad_norm (before clipping), tokens
                (since the first step), tokens_per_s, epoch, accuracy, memory (peak bytes), eta_s, gemm_share
    eval        step (0 = the base model), loss, perplexity, accuracy, examples, exact_match
    sample      step, prompt, text
    checkpoint  step, path, bytes, files, sha256 (of manifest.json), best, final
    resumed     step (where this attempt continues), from_step (what was requested), exact, why
    log         level (info, warning, error), message
    verdict     helped, fall, low, high, examples, sentence
    done        step, kept_step (of the exported weights), early (stopped early), path, files, metrics (of the
                exported weights; with `scores`, see engine/scores.py), fidelity
    failed      reason, message, advice

Imports no torch: the web process and the workers read the same tables.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

Phase = Literal["preparing", "rehearsing", "training", "evaluating", "exporting"]
PHASES: tuple[Phase, ...] = ("preparing", "rehearsing", "training", "evaluating", "exporting")

MAX_LINE_BYTES = 16 * 1024


@dataclass(frozen=True)
class Reason:
    exit: int
    sentence: str
    advice: str
    user_fault: bool = False  # never retried
    platform_fault: bool = False  # retried without counting as one of the job's attempts


# All reasons why a trainer ends. 10–19: the user's fault, 20–29: the machine's, 75: stopped on request.
REASONS: dict[str, Reason] = {
    "bad_data": Reason(
        10,
        "The dataset cannot be read as training examples.",
        "Open the dataset's report, which lists the lines to fix.",
        True,
    ),
    "bad_settings": Reason(
        11, "Training cannot use these settings.", "Change the named field and start again.", True
    ),
    "base_model": Reason(
        12,
        "The base model is missing or cannot be used.",
        "Choose another base model, or check its folder or its Hub name.",
        True,
    ),
    "not_finite": Reason(
        13,
        "The loss is no longer a finite number.",
        "Lower the learning rate (try a third of it), use a longer warmup, or look for damaged rows.",
        True,
    ),
    "no_trained_token": Reason(
        14,
        "No example has a token to train on.",
        "Add answers that are not empty, or train on all tokens (train_on = all).",
        True,
    ),
    "too_long": Reason(
        15,
        "An example is longer than the model's context.",
        "Shorten the example, or set a sequence length so that long examples are cut.",
        True,
    ),
    "tokenizer": Reason(
        16, "The tokenizer does not fit the base model.", "Use the tokenizer that came with the model.", True
    ),
    "disk_full": Reason(
        20,
        "The disk is full.",
        "Free some space. Training continues from the last good checkpoint.",
        platform_fault=True,
    ),
    "out_of_memory": Reason(
        21,
        "Out of memory.",
        "Lower micro_batch_tokens or sequence_length, or turn on gradient checkpointing.",
    ),
    "checkpoint_unreadable": Reason(
        22, "No checkpoint could be verified.", "Start the job again from the beginning."
    ),
    "not_writable": Reason(
        23,
        "The work folder is not writable.",
        "Give the trainer's user permission to write there.",
        platform_fault=True,
    ),
    "unexpected": Reason(29, "The trainer failed unexpectedly.", "See the end of the log, then try again."),
    "stopped": Reason(75, "Stopped on request, after saving a checkpoint.", "Resume it at any time."),
}

EXIT: dict[str, int] = {"done": 0} | {code: reason.exit for code, reason in REASONS.items()}
REASON_OF_EXIT: dict[int, str] = {reason.exit: code for code, reason in REASONS.items()}


def reason_of(error: OSError) -> str:
    """The reason for an error of the operating system; "" if it could mean anything."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk_full"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "not_writable"
    return ""


class Failure(Exception):
    """Training cannot continue. `reason` is a key of REASONS; `message` and `advice` are for users."""

    def __init__(self, reason: str, message: str = "", advice: str = "") -> None:
        self.reason = reason
        self.message = message or REASONS[reason].sentence
        self.advice = advice or REASONS[reason].advice
        super().__init__(self.message)
