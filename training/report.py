"""Everything worth knowing about a dataset before a second of training is spent on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from training.encode import Example


@dataclass
class Summary:
    """Counts of what will be trained on, with the target tokenizer; the trainer's own counts must equal these."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest example, before any cut
    truncated: int = 0  # examples cut
    lost_tokens: int = 0
    untrained: int = 0  # examples with nothing to train
    kind: str = ""  # chat | completion | text
    histogram: list[int] = field(default_factory=list)  # examples of up to 16, 32, 64, … tokens

    def add(self, example: Example) -> None:
        length, trained = len(example.ids), example.trained
        self.examples += 1
        self.tokens += length
        self.trained_tokens += trained
        self.longest = max(self.longest, length + example.truncated)
        self.truncated += example.truncated > 0
        self.lost_tokens += example.truncated
        self.untrained += trained == 0
        bucket = max(0, (length - 1).bit_length() - 4)
        self.histogram += [0] * (bucket + 1 - len(self.histogram))
        self.histogram[bucket] += 1

    @classmethod
    def of(cls, examples: Iterable[Example], kind: str = "") -> Summary:
        summary = cls(kind=kind)
        for example in examples:
            summary.add(example)
        return summary

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """From a stored report; names it does not know are left aside."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
