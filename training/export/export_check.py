"""Checks that an export is the model that was trained: reads it back, runs both models on the same prompts
and compares all logits.

fp32 must be equal bit for bit, since the same numbers go through the same operations. Half precision and
adapters (which sum in another order) must be close; the result says how close.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.models.batch import pack
from training.models.interface import LanguageModel
from training.text.tokenizer import Tokenizer

PROMPTS = (
    "The quick brown fox",
    "Once upon a time",
    "User:\nWhat is it?\n\nAssistant:\n",
    "1 + 1 =",
    "def main():",
)
# largest difference, relative to the largest logit
CLOSE = {
    "float32": 1e-4,
    "float16": 3e-2,
    "bfloat16": 2e-1,
}


def compare(
    model: LanguageModel,
    opened: LanguageModel,
    tokenizer: Tokenizer,
    dtype: str,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:
    """Compares the trained `model` in memory with the export that was `opened` again. `dtype` is that of the
    export.

    Returns {"exact": equal bit for bit, "close", "max_difference", "logits": how many, "prompts": how
    many, "sha256": of the export's logits, "dtype"}."""
    batches = [ids for ids in map(tokenizer.encode, prompts) if ids]
    trained = model.merged()
    digest, count, worst, largest, exact = hashlib.sha256(), 0, 0.0, 0.0, True
    with _evaluating(trained), _evaluating(opened):
        for ids in batches:
            ours, theirs = logits_of(trained, ids), logits_of(opened, ids)  # (T, V)
            exact = exact and torch.equal(ours, theirs)
            worst = max(worst, float((ours - theirs).abs().max()))
            largest = max(largest, float(ours.abs().max()))
            digest.update(theirs.contiguous().numpy().tobytes())
            count += theirs.numel()
    return {
        "exact": exact,
        "close": exact or worst <= CLOSE.get(dtype, 1e-4) * max(largest, 1e-9),
        "max_difference": worst,
        "logits": count,
        "prompts": len(batches),
        "sha256": digest.hexdigest(),
        "dtype": dtype,
    }


@torch.no_grad()
def logits_of(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """fp32 logits of every token of one document, (T, V), on the CPU."""
    tokens = torch.tensor(ids[: model.context])
    batch = pack([(tokens.numpy(), torch.ones(len(tokens)).numpy())])
    device = next(model.parameters()).device
    states, head = model.hidden(batch.to(device), all_tokens=True), model.head()
    logits: Tensor = states if head is None else states @ head.t()
    return logits.float().cpu()


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Switches a model to eval mode and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
