"""Objectives: what a run optimizes. A new one is an entry of OBJECTIVES.

An objective defines how the rows of a dataset become documents, what the loss of a packed row is, and which
figures are computed on held-out examples. Everything else (order, packing, optimizer, checkpoints, rehearsal)
is the same for all, and that limits what an objective can be today: each example is one document with a mask
of trained tokens, the loss is a sum over those tokens, and there is one model. The number of examples and
tokens must be those of the dataset's report, which encodes with `text.encode.examples` too.

A pairwise objective, such as DPO (arXiv 2305.18290), would also need a row shape with a chosen and a rejected
answer (data/row_schemas.py) that the report understands, examples of two documents that the packing keeps in
one row, a loss divided by pairs instead of tokens (engine/loop.py), and a frozen reference model, or its log
probabilities computed beforehand: with LoRA that is the model without its adapters, otherwise a second copy
of the weights, which the estimate (plan/catalog.py `fits`) must count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from training.engine.evaluate import Evaluation, batch_loss, evaluate
from training.models.batch import Batch
from training.models.interface import LanguageModel
from training.text.encode import Example, examples


@dataclass(frozen=True)
class Objective:
    encode: Callable[..., Iterator[Example]]
    """(path, tokenizer, wants, format, on_bad_row, on_row) -> the encoded examples of a file; see
    `text.encode.examples`."""

    loss: Callable[[LanguageModel, Batch, float], tuple[Tensor, Tensor]]
    """(model, row, scale) -> the loss summed over the row's N trained tokens times `scale`, (), and how
    many of them the model predicts right, ()."""

    evaluate: Callable[..., Evaluation]
    """(model, examples, tokens at once, device, stop) -> the figures of one pass over held-out examples."""


OBJECTIVES: dict[str, Objective] = {
    "supervised": Objective(encode=examples, loss=batch_loss, evaluate=evaluate),
}
