"""How answers are scored: which metric is shown for which task, and what each of them computes.

Pure functions of texts. `training.engine.scores` generates the answers; pages and the API take names and
meanings from here.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from training.text.call_forms import Call, CallForm

# Bounds of what is generated for one score, so that its cost is known beforehand.
ANSWER_TOKENS = 128  # rows with a longer answer are not scored
MAX_ANSWERS = 100
MAX_TOKENS = 4096  # over all answers
GROUP = 8  # micro-batches whose tokens are generated together: keys and values take under a tenth of the activations
ROOM = 8  # tokens beyond the longest expected answer, so that one that does not end is not taken for equal


class Answer(NamedTuple):
    expected: str
    generated: str


@dataclass(frozen=True)
class Metric:
    label: str
    meaning: str  # for a page

    @property
    def in_text(self) -> str:
        return self.label[0].lower() + self.label[1:]


METRICS: dict[str, Metric] = {
    "label_accuracy": Metric("Label accuracy", "Answers that are exactly the right label"),
    "tool_call_match": Metric(
        "Tool-call match", "Answers that call the right functions with equal arguments"
    ),
    "exact_match": Metric("Exact match", "Answers equal to the expected text"),
    "token_f1": Metric("Token F1", "Words in common with the expected answer"),
    "valid_json": Metric("Valid JSON", "Answers that can be read as JSON"),
}

# task -> its metrics, the most important first. `valid_json` is shown where the training answers are JSON.
# Plain text has no answers; its held-out loss says what can be said.
METRICS_OF: dict[str, tuple[str, ...]] = {
    "chat": ("token_f1", "valid_json"),
    "instruction": ("exact_match", "token_f1", "valid_json"),
    "classification": ("label_accuracy",),
    "tools": ("tool_call_match",),
    "text": (),
}


def answers_scored(available: int, longest: int) -> int:
    """How many answers are generated, if `available` could be and the longest expected one has `longest`
    tokens."""
    return min(available, MAX_ANSWERS, MAX_TOKENS // (longest + ROOM))


def scores(
    task: str,
    answers: Sequence[Answer],
    *,
    labels: Collection[str] = (),
    form: CallForm | None = None,
    json_answers: bool = False,
) -> dict[str, float]:
    """The task's metrics, each from 0 to 1. `labels`: those of the training data. `form`: how the model
    writes tool calls; without it, none can be read. `json_answers`: whether the training answers are JSON."""
    score_of: dict[str, Callable[[Answer], float]] = {
        "label_accuracy": lambda a: label_match(a.expected, a.generated, labels),
        "exact_match": lambda a: exact_match(a.expected, a.generated),
        "token_f1": lambda a: token_f1(a.expected, a.generated),
    }
    if json_answers:
        score_of["valid_json"] = lambda a: is_json(a.generated)
    if form is not None:
        score_of["tool_call_match"] = lambda a: tool_call_match(
            form.parse(a.expected)[1], form.parse(a.generated)[1]
        )
    if not answers:
        return {}
    return {
        name: sum(map(score_of[name], answers)) / len(answers)
        for name in METRICS_OF[task]
        if name in score_of
    }


def exact_match(expected: str, generated: str) -> float:
    """1 if the texts are equal but for white space around them, otherwise 0. Stricter than SQuAD's exact
    match, which also ignores case, punctuation and articles."""
    return float(expected.strip() == generated.strip())


def token_f1(expected: str, generated: str) -> float:
    """The harmonic mean of precision and recall over words, from 0 to 1, as SQuAD defines it (Rajpurkar et
    al., arXiv 1606.05250; its evaluate-v2.0.py): case, punctuation and the articles a, an and the do not
    count, and repeated words count as often as in both. Without any word, 1 if both have none."""
    right, given = _words(expected), _words(generated)
    if not right or not given:
        return float(right == given)
    common = (Counter(right) & Counter(given)).total()
    return 2 * common / (len(right) + len(given))


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def label_match(expected: str, generated: str, labels: Collection[str]) -> float:
    """1 if the answer is the expected label and one that the training data has, otherwise 0. So the mean is
    the accuracy of a classifier, where any other text counts as a wrong answer."""
    return float(generated.strip() == expected.strip() and generated.strip() in labels)


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array (RFC 8259: NaN and Infinity are not JSON)."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict | list)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def tool_call_match(expected: Sequence[Call], generated: Sequence[Call]) -> float:
    """1 if the same functions are called with equal arguments, in any order, otherwise 0. As the AST match
    of the Berkeley Function Calling Leaderboard with one right answer, except that no value is converted:
    1 equals 1.0, as in JSON, but not "1" or true."""
    return float(sorted(map(_canonical, expected)) == sorted(map(_canonical, generated)))


def _canonical(call: Call) -> str:
    return json.dumps([call.name, _plain(call.arguments)], sort_keys=True)


def _plain(value: Any) -> Any:
    """Whole numbers as integers, so that 1 and 1.0 are written alike."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ---- for pages -----------------------------------------------------------------------------------


def table(result: Any) -> list[tuple[str, str, float | None, float]]:
    """(label, meaning, of the base model if known, of the tuned model) of each metric in a stored result, in
    the order of METRICS. Unknown names are left out."""
    if not isinstance(result, dict):
        return []
    base, tuned = result.get("base") or {}, result.get("tuned") or {}
    return [
        (metric.label, metric.meaning, base.get(name), tuned[name])
        for name, metric in METRICS.items()
        if tuned.get(name) is not None
    ]
