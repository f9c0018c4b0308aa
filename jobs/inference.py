"""Text from a model, token by token: the playground and /v1 both call `stream`.

The request goes as a Celery message to an inference worker, which relays it to its one `python -m training serve`
child. What that says comes back on the Redis stream `tokens:<request id>`; a reader that leaves sets
`cancel:<request id>`. Nothing here is kept: streams expire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GenerateRequest:
    """What to write and how. Exactly one of `prompt` and `messages`."""

    model: str  # a tuned model's id or alias, a checkpoint's model id, or a base model's id
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False


class Busy(Exception):
    """Too many requests are waiting; ask again in `retry_after` seconds."""

    def __init__(self, retry_after: int, message: str = "") -> None:
        self.retry_after = retry_after
        super().__init__(message or f"The models are busy. Try again in {retry_after} s.")


class Failed(Exception):
    """The request was taken but could not be answered; the message says why. `code` is the server's word for it."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


async def stream(owner: str, request: GenerateRequest) -> AsyncIterator[dict[str, Any]]:
    """Yields the serve protocol's lines: {"t": "start", "prompt_tokens"}, {"t": "token", "index", "text", …} … and last
    {"t": "done", "choices", "usage"}. Closing the generator cancels the request within 2 s.

    Raises, before the first line, access.NotFound for a model that isn't the owner's and Busy when the queue is full
    or the owner has two running; Failed at any time."""
    raise NotImplementedError
    yield {}


@dataclass(frozen=True)
class Completion:
    """The whole answer: `texts[i]` of choice i, its finish reasons, tokens (as the serve protocol has them) and usage."""

    texts: list[str]
    finish_reasons: list[str]
    tokens: list[list[dict[str, Any]]]
    usage: dict[str, int]


async def complete(owner: str, request: GenerateRequest) -> Completion:
    """All of `stream`, gathered."""
    raise NotImplementedError
