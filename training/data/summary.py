"""The counts of a dataset with one tokenizer: shown in the report, used for planning, and checked by the
trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

PREFERENCES = (
    "This file holds preference pairs (a better and a worse answer). Training on pairs is not supported."
)
ONE_ANSWER = "Use a file with one good answer for each prompt."


class Countable(Protocol):
    """An encoded example that can be counted, even before its tokens are listed (see
    `training.text.encode`)."""

    @property
    def length(self) -> int: ...
    @property
    def targets(self) -> tuple[int, int]: ...
    @property
    def truncated(self) -> int: ...


@dataclass
class Summary:
    """Counts of what will be trained on, with the target tokenizer. The trainer's own counts must be
    equal."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest example, before truncation
    truncated: int = 0  # examples that were cut
    lost_tokens: int = 0
    untrained: int = 0  # examples with nothing to train on
    # The shortest sequence length that leaves a token of any answer, and one of every answer; 0 = not known.
    first_answer: int = 0
    every_answer: int = 0
    kind: str = ""  # chat | completion | text | preference
    histogram: list[int] = field(default_factory=list)  # examples of up to 16, 32, 64, … tokens
    task_rows: dict[str, int] = field(default_factory=dict)  # what the task is guessed from (plan/tasks.py)

    def add(self, example: Countable) -> None:
        length, (trained, begins) = example.length, example.targets
        self.examples += 1
        self.tokens += length
        self.trained_tokens += trained
        self.longest = max(self.longest, length + example.truncated)
        self.truncated += example.truncated > 0
        self.lost_tokens += example.truncated
        self.untrained += trained == 0
        if begins:
            self.first_answer = min(self.first_answer or begins, begins)
            self.every_answer = max(self.every_answer, begins)
        bucket = max(0, (length - 1).bit_length() - 4)
        while len(self.histogram) <= bucket:
            self.histogram.append(0)
        self.histogram[bucket] += 1

    def join(self, other: Summary) -> None:
        for name in ("examples", "tokens", "trained_tokens", "truncated", "lost_tokens", "untrained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first_answer = min(filter(None, (self.first_answer, other.first_answer)), default=0)
        self.every_answer = max(self.every_answer, other.every_answer)
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        self.histogram = [mine + more for mine, more in pairs]

    @classmethod
    def of(cls, examples: Iterable[Countable], kind: str = "") -> Summary:
        summary = cls(kind=kind)
        for example in examples:
            summary.add(example)
        return summary

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """From a stored report. Unknown names are ignored."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
