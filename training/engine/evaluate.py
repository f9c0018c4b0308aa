"""Evaluates a model on held-out examples: loss, perplexity, token accuracy, exact match, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.engine.packing import Examples, split
from training.models.batch import Batch, pack
from training.models.interface import LanguageModel
from training.models.kernels import head_loss

SHORT_ANSWER = 64  # tokens: exact match is computed for answers up to this length
ROWS = 256  # tokens whose logits are in memory at once


class Interrupted(Exception):
    """The evaluation was stopped before its end."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of one pass over held-out examples. Losses are in nats per trained token."""

    loss: float  # nats per trained token, over all examples together
    accuracy: float  # fraction of trained tokens that argmax predicts
    examples: int
    exact_match: float | None  # fraction of the short answers predicted entirely; None without any
    losses: list[float]  # mean loss of each example, in their order

    @property
    def perplexity(self) -> float:
        """exp(loss), capped where a float would overflow."""
        return math.exp(min(self.loss, 700.0))

    def as_event(self) -> dict[str, Any]:
        """The fields of an `eval` event."""
        event = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "examples": self.examples,
        }
        return event | ({} if self.exact_match is None else {"exact_match": self.exact_match})


def batch_loss(model: LanguageModel, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """The loss of a packed row: cross-entropy summed over its N trained tokens, times `scale`, (); and how
    many of them argmax predicts, ()."""
    hidden = model.hidden(batch)  # (N, D), or logits (N, V) if the head is not a plain matrix product
    head = model.head()  # after `hidden`: a sharded model has just gathered it
    if head is not None:
        return head_loss(hidden, batch.targets, head, scale)
    logits = hidden.float()
    hits = (logits.argmax(1) == batch.targets).sum()
    return F.cross_entropy(logits, batch.targets, reduction="sum") * scale, hits


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    examples: Examples,
    tokens_at_once: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """One pass over all examples, without dropout. Raises Interrupted once `should_stop()` is true.

    Exact match needs no generation: greedy decoding writes the answer if and only if argmax predicts each
    of its tokens from the ones before it."""
    was_training = model.training
    model.eval()
    losses, hits = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    trained = examples.trained()
    try:
        for row in split(examples.lengths.tolist(), tokens_at_once):
            if should_stop():
                raise Interrupted
            batch = pack([examples[i] for i in row])
            token_loss, token_hits = _each_token(model, batch.to(device))
            document = np.repeat(row, trained[row])  # (N,): the example of each token
            np.add.at(losses, document, token_loss.double().cpu().numpy())
            np.add.at(hits, document, token_hits.cpu().numpy())
    finally:
        model.train(was_training)
    # answers after a prompt, short enough; plain text, trained from its second token on, is no answer
    short = (trained > 0) & (trained <= SHORT_ANSWER) & (examples.lengths > trained + 1)
    total = max(int(trained.sum()), 1)
    return Evaluation(
        loss=float(losses.sum()) / total,
        accuracy=float(hits.sum()) / total,
        examples=len(examples),
        exact_match=float((hits == trained)[short].mean()) if short.any() else None,
        losses=(losses / np.maximum(trained, 1)).tolist(),
    )


def _each_token(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss in nats and hit (0 or 1) of each trained token, (N,) and (N,)."""
    hidden = model.hidden(batch)
    head = model.head()
    losses, hits = [], []
    for h, y in zip(hidden.split(ROWS), batch.targets.split(ROWS), strict=True):
        logits = (h if head is None else h @ head.t()).float()  # (n, V)
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(1) == y)
    return torch.cat(losses), torch.cat(hits).long()


def verdict(before: list[float], after: list[float]) -> dict[str, Any]:
    """Decides whether training helped: the mean decrease of the held-out loss, with a 95% confidence interval.

    A paired bootstrap with 2,000 resamples (Efron, 1979): each example is compared with itself, so
    differences between easy and hard examples do not hide the effect. `before` and `after`: loss of each
    example, in nats per token."""
    fall = np.asarray(before) - np.asarray(after)
    rng = np.random.Generator(np.random.PCG64(0))
    means = fall[rng.integers(0, len(fall), (2000, len(fall)))].mean(1)
    low, high = (float(x) for x in np.quantile(means, [0.025, 0.975]))
    helped = "yes" if low > 0 else "no" if high < 0 else "unclear"
    words = {
        "yes": "Training helped: the loss on held-out examples fell by {fall:.3f} (95% confidence interval {low:.3f} to {high:.3f}).",
        "no": "Training made the model worse: the loss on held-out examples rose by {rise:.3f}. Lower the learning rate or the number of epochs.",
        "unclear": "No clear difference on {n} held-out examples (95% confidence interval {low:.3f} to {high:.3f}). More held-out examples would give a clearer answer.",
    }
    mean = float(fall.mean())
    sentence = words[helped].format(fall=mean, rise=-mean, low=low, high=high, n=len(fall))
    return {
        "helped": helped,
        "fall": mean,
        "low": low,
        "high": high,
        "examples": len(fall),
        "sentence": sentence,
    }
