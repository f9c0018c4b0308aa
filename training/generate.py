"""Writing text with a model: a prompt in, tokens out one by one.

One sequence or many go through the same three functions: `open_sequences` (prefill), `advance` (one token for every
sequence, one batched pass through the model) and `Sequence.take` (sampling, text, stopping). `generate` is the plain
loop over them; `serve` interleaves the sequences of several requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerateOptions:
    """How to write. Defaults are greedy, so that the same prompt gives the same text."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """One token as it is written. `text` may be empty while a character or a stop string is not yet decided."""

    index: int
    id: int
    token: str
    text: str
    logprob: float | None = None
    top: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Completion:
    """What became of one of the `n` sequences."""

    index: int
    text: str
    ids: list[int]
    finish_reason: FinishReason
    tokens: list[Token]


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[int],
    options: GenerateOptions,
    on_token: Callable[[Token], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Completion]:
    """Write `options.n` completions of `prompt_ids`; `on_token` hears of each token, `should_stop` ends it early."""
    raise NotImplementedError
