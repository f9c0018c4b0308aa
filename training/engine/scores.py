"""Scores a model's answers to held-out prompts with the metrics of the run's task, before and after training.

The prompts and the expected answers are those of the held-out examples, token by token, so the model sees
exactly what it is trained on. Answers are generated greedily, which draws no random numbers, and no weight
changes, so scoring does not change the training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from training.engine.evaluate import Interrupted
from training.engine.packing import Examples, split
from training.engine.setup import Session
from training.models.generate import GenerateOptions, TextSequence, TextStream, advance, open_sequences
from training.plan.metrics import (
    ANSWER_TOKENS,
    GROUP,
    METRICS,
    METRICS_OF,
    ROOM,
    Answer,
    answers_scored,
    is_json,
    scores,
)
from training.text.tool_calls import call_form

EXAMPLES = 2000  # searched for answers to score
JSON_ANSWERS = 50  # training answers that must be JSON for the answers to be expected to be

Scores = dict[str, float]


class Question(NamedTuple):
    """A trained answer and what comes before it, as token ids."""

    prompt: list[int]
    answer: list[int]  # without the end token


class Scorer:
    """Scores the answers of a run's model. Without held-out answers, or for a task without metrics, there is
    nothing to score."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.base: Scores = {}
        self.seconds = 0.0  # that the last scoring took
        self.task: str = session.data.task["name"]
        self.form = call_form(session.data.tokenizer) if self.task == "tools" else None
        # Samples are not shown for sharded models either: every process would have to take part.
        here = session.processes.is_main and not session.optimizer.sharded
        self.questions = self._chosen() if here and METRICS_OF[self.task] else []
        self.labels: set[str] = set()
        self.json_answers = False
        if self.questions:
            self._read_training_answers()

    def _chosen(self) -> list[Question]:
        """Questions spread evenly over the held-out examples, as many as the bounds of plan/metrics.py allow."""
        held_out = self.session.data.held_out
        short = [q for q in self._questions(_some(held_out, EXAMPLES)) if len(q.answer) <= ANSWER_TOKENS]
        if self.form is not None:
            short = [q for q in short if self.form.parse(self._text(q.prompt, q.answer))[1]]
        elif self.task == "tools":
            return []  # the base's calls cannot be read
        longest = max((len(q.answer) for q in short), default=0)
        return [short[i] for i in _evenly(len(short), answers_scored(len(short), longest))]

    def _read_training_answers(self) -> None:
        train = self.session.data.train
        if self.task == "classification":
            different = {tuple(q.answer): q for q in self._questions(train)}
            self.labels = {self._text(q.prompt, q.answer).strip() for q in different.values()}
        else:
            some = list(self._questions(_some(train, JSON_ANSWERS)))
            self.json_answers = bool(some) and all(is_json(self._text(q.prompt, q.answer)) for q in some)

    def _questions(self, examples: Examples) -> Iterator[Question]:
        """Every trained answer that follows a prompt and is whole. Where prompts are trained on too
        (train_on = all), and in plain text, answers cannot be told apart and there is none."""
        ends = self.session.data.tokenizer.ends.ids
        for i in range(len(examples)):
            ids, mask = examples[i]
            changes = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
            for begin, end in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
                cut = end == len(ids) and int(ids[-1]) not in ends
                answer = ids[begin:end].tolist()
                while answer and answer[-1] in ends:
                    answer.pop()
                if begin > 1 and answer and not cut:
                    yield Question(ids[:begin].tolist(), answer)

    def _text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """An answer as the server returns it; calls with their markup."""
        data = self.session.data
        stream = TextStream(data.tokenizer, prompt, data.stop, self.form.markup if self.form else ())
        return "".join(stream.push(id) for id in answer) + stream.finish()

    # ---- scoring -------------------------------------------------------------------------------------------

    def score_base(self) -> None:
        """Scores the base model, before training. Without its scores, if a stop is requested."""
        with suppress(Interrupted):
            self.base = self.score()

    def compare(self) -> dict[str, Any]:
        """Scores the trained model. Returns what is stored with it: {"task", "answers" (how many), "labels" (how
        many), "base", "tuned"}; empty if there is nothing to score. Raises Interrupted."""
        tuned = self.score()
        if not tuned:
            return {}
        labels = {"labels": len(self.labels)} if self.labels else {}
        base = {"base": self.base} if self.base else {}
        result = {"task": self.task, "answers": len(self.questions), **labels, **base, "tuned": tuned}
        self.session.emit("log", level="info", message=sentence(result))
        return result

    def score(self) -> Scores:
        """The task's metrics with the present weights; empty if there is nothing to score. Raises Interrupted
        once a stop is requested."""
        if not self.questions:
            return {}
        session, begun = self.session, time.perf_counter()
        session.emit("phase", phase="evaluating")
        was_training = session.model.training
        session.model.eval()
        try:
            answers = self._answers()
        finally:
            session.model.train(was_training)
        self.seconds = time.perf_counter() - begun
        return scores(self.task, answers, labels=self.labels, form=self.form, json_answers=self.json_answers)

    def _answers(self) -> list[Answer]:
        """Generates in groups that need less memory than a packed row of training."""
        session = self.session
        most = max(len(q.answer) for q in self.questions) + ROOM
        lengths = [len(q.prompt) + most for q in self.questions]
        options = GenerateOptions(max_tokens=most, stop=session.data.stop)
        decoder = session.model.decoder(pack=False)
        answers: dict[int, Answer] = {}
        for group in split(lengths, GROUP * session.micro_batch):
            opened = [
                open_sequences(decoder, session.data.tokenizer, self.questions[i].prompt, options)[0]
                for i in group
            ]
            while live := [s for s in opened if s.finish_reason is None]:
                if session.stop():
                    raise Interrupted
                advance(decoder, live, _ignore)
            for i, sequence in zip(group, opened, strict=True):
                prompt, expected = self.questions[i]
                answers[i] = Answer(self._text(prompt, expected), self._text(prompt, sequence.ids))
        return [answers[i] for i in range(len(self.questions))]


def sentence(result: dict[str, Any]) -> str:
    """The result in one line, for the log."""
    base = result.get("base") or {}
    parts = [
        f"{METRICS[name].in_text} {value:.0%}" + (f" (base model {base[name]:.0%})" if name in base else "")
        for name, value in result["tuned"].items()
    ]
    number = result["answers"]
    return f"{number:,} held-out {'answer' if number == 1 else 'answers'}: {', '.join(parts)}"


def _some(examples: Examples, number: int) -> Examples:
    return examples.take(_evenly(len(examples), number)) if len(examples) > number else examples


def _evenly(available: int, number: int) -> list[int]:
    """`number` indices, evenly spaced; all of them if there are no more."""
    number = min(available, number)
    return [i * available // number for i in range(number)]


def _ignore(sequence: TextSequence, token: Any) -> None:
    pass
