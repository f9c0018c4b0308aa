"""From a row to the tokens that a model sees: chat template, loss mask, truncation. The report and the
trainer both use it, so what the report counts is what the trainer trains on, token for token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from training.data.bad_row import LeftOut
from training.data.formats import BadRow, ByteRange, Format, OnBad, Row, rows
from training.text.tokenizer import Encoded, Message, Piece, Tokenizer, TokenizerError, ids_of

OTHER_BASE = "Choose a base model whose chat template can express it, or change the row."
BATCH_ROWS = 32  # a few megabytes of tokens, still in the CPU's cache when they are counted


class EncodingSettings(Protocol):
    """The settings that encoding needs. training.plan.config.Settings has them."""

    @property
    def sequence_length(self) -> int | None: ...
    @property
    def train_on(self) -> str | None: ...


@dataclass(frozen=True)
class EncodingOptions:
    """Just these two settings, when there is no job yet."""

    sequence_length: int | None = None
    train_on: str | None = "completion"


class Example(NamedTuple):
    """ids[i] is trained on (predicted from what precedes it) if mask[i] is 1. mask[0] is always 0."""

    ids: list[int]
    mask: list[int]
    truncated: int  # tokens cut off because they exceed the sequence length
    line: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        return self.mask.count(1)


class Tokens(NamedTuple):
    """The encoded pieces of a row, from token `start` to `stop`.

    It can be counted before the lists of an Example are made: the report counts millions of examples and
    shows five."""

    line: int
    parts: Sequence[tuple[Piece, Encoded, bool]]  # (text, its tokens, trained on)
    start: int
    stop: int
    truncated: int = 0
    unused: tuple[str, ...] = ()  # fields that hold something and are not in these tokens

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def trained(self) -> int:
        count = at = 0
        for _, encoded, trained in self.parts:
            end = at + len(encoded)
            if trained:
                # The very first token is never trained: nothing predicts it.
                count += max(0, min(end, self.stop) - max(at, self.start + 1))
            at = end
        return count

    @property
    def last_trained(self) -> str:
        """The text of the last trained piece, before truncation."""
        for piece, encoded, trained in reversed(self.parts):
            if trained and len(encoded):
                return piece.text
        return ""

    def example(self) -> Example:
        ids: list[int] = []
        mask: list[int] = []
        at = 0
        for _, encoded, trained in self.parts:
            part = ids_of(encoded)[max(0, self.start - at) : max(0, self.stop - at)]
            ids += part
            mask += [1 if trained else 0] * len(part)
            at += len(encoded)
        if mask:
            mask[0] = 0
        return Example(ids, mask, self.truncated, self.line)

    @property
    def whole(self) -> Tokens:
        """The same before truncation."""
        return self._replace(stop=self.stop + self.truncated, truncated=0)

    def cut(self, length: int | None, *, split: bool) -> list[Tokens]:
        """Fits it into `length` tokens: consecutive windows if `split`, otherwise the beginning."""
        if not length or self.length <= length:
            return [self]
        if not split:
            return [self._replace(stop=length, truncated=self.stop - length)]
        parts = [(piece, ids_of(encoded), trained) for piece, encoded, trained in self.parts]
        # Windows overlap by one token, from which the next window's first trained token is predicted.
        return [
            Tokens(self.line, parts, i, min(i + length, self.stop), unused=self.unused)
            for i in range(0, self.stop - 1, length - 1)
        ]


def examples(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    format: Format | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Example]:
    """Every example of a file, in order: what the trainer trains on and the report counts.

    A plain text longer than the sequence length becomes several examples, so nothing is lost. A chat or
    completion is truncated. Raises BadRow at the first bad row, or passes it to `on_bad` and continues."""
    for batch in encoded_batches(path, tokenizer, settings, format, on_bad):
        for _, encoded in batch:
            for tokens in encoded:
                yield tokens.example()


def encoded_batches(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    format: Format | None = None,
    on_bad: OnBad | None = None,
    part: ByteRange | None = None,
    *,
    by_order: bool = False,
) -> Iterator[list[tuple[Row, list[Tokens]]]]:
    """Batches of (row, its examples), not yet as lists. `by_order`: rows have their number, not their line."""
    read = rows(path, format, on_bad=on_bad, part=part)
    for batch in batches(numbered(read) if by_order else read):
        encoded: list[tuple[Row, list[Tokens]]] = []
        bad: BadRow | None = None
        for row, tokens in zip(batch, encode_batch(batch, tokenizer, settings), strict=True):
            if isinstance(tokens, Tokens):
                encoded.append((row, tokens.cut(settings.sequence_length, split=row.kind == "text")))
            elif on_bad is not None:
                on_bad(tokens)
            else:
                bad = tokens
                break
        yield encoded
        if bad:
            raise bad


def encode(row: Row, tokenizer: Tokenizer, settings: EncodingSettings) -> Example:
    """Encodes one row, truncated to the sequence length. Raises BadRow."""
    tokens = encode_batch([row], tokenizer, settings)[0]
    if isinstance(tokens, BadRow):
        raise tokens
    return tokens.cut(settings.sequence_length, split=False)[0].example()


def encode_batch(
    batch: Sequence[Row], tokenizer: Tokenizer, settings: EncodingSettings
) -> list[Tokens | BadRow]:
    """Encodes rows before truncation, with one call of the tokenizer. A BadRow where the template rejects
    a row."""
    everything = (settings.train_on or "completion") == "all"
    plans: list[list[Piece] | BadRow] = []
    rows: list[Row] = []
    for row in batch:
        rows.append(row)
        try:
            if row.kind == "chat" and (missing := _inexpressible(row, tokenizer)):
                rows[-1] = replace(row, unused=(*row.unused, *missing))
            plans.append(pieces(row, tokenizer))
        except TokenizerError as error:
            plans.append(LeftOut(row.line, str(error), OTHER_BASE))
    flat = [piece for plan in plans if not isinstance(plan, BadRow) for piece in plan]
    encoded = iter(tokenizer.encode_each(flat))
    return [
        plan if isinstance(plan, BadRow) else _tokens(row, plan, list(islice(encoded, len(plan))), everything)
        for row, plan in zip(rows, plans, strict=True)
    ]


def pieces(row: Row, tokenizer: Tokenizer) -> list[Piece]:
    """The row as pieces of text, in order, each trained on or not. Raises TokenizerError."""
    end = tokenizer.eos_text
    begin = [Piece(tokenizer.bos_text, False, made=True)] if tokenizer.bos_id is not None else []
    if row.kind == "text":
        return [*begin, Piece(row.text, True), Piece(end, True, made=True)]
    if row.kind == "completion":
        return [*begin, Piece(row.prompt, False), Piece(row.completion, True), Piece(end, True, made=True)]
    if row.kind == "segments":
        parts = [Piece(text, trained) for text, trained in row.segments]
        return [*begin, *parts, Piece(end, parts[-1].trained, made=True)]
    return _chat(row.messages, row.tools, tokenizer)


def numbered(read: Iterable[Row]) -> Iterator[Row]:
    """Rows with their number among the readable ones instead of their line: all elements of a JSON array may
    be on one line."""
    return (replace(row, line=number) for number, row in enumerate(read, 1))


def batches(items: Iterable[Row]) -> Iterator[list[Row]]:
    """BATCH_ROWS rows at a time, or about a megabyte. Rows before a BadFile are still yielded before it is
    raised."""
    held: list[Row] = []
    characters = 0
    ended: BadRow | None = None
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except BadRow as bad:
            ended = bad
            break
        held.append(item)
        characters += item.size
        if len(held) == BATCH_ROWS or characters > 1 << 20:
            yield held
            held, characters = [], 0
    if held:
        yield held
    if ended:
        raise ended


def _tokens(row: Row, plan: list[Piece], encoded: list[Encoded], everything: bool) -> Tokens:
    parts = [(piece, ids, everything or piece.trained) for piece, ids in zip(plan, encoded, strict=True)]
    return Tokens(row.line, parts, 0, sum(map(len, encoded)), unused=row.unused)


# What every chat template can express, if only in our form for tools. Ids of calls are for programs.
TEXT_ONLY = {"role", "content", "weight", "tool_calls", "tool_call_id"}


def _inexpressible(row: Row, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Fields of the messages that the chat template leaves out."""
    fields = {key for message in row.messages if len(message) > 2 for key in message} - TEXT_ONLY
    return tuple(f"messages[].{field}" for field in sorted(fields - tokenizer.expresses)) if fields else ()


def _chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> list[Piece]:
    """Trains on what follows each generation prompt, so the mask begins where generation would begin."""
    guarded, hidden, tools = tokenizer.guard(messages, tools)
    answers = [i for i, m in enumerate(guarded) if m["role"] == "assistant"]
    plan: list[Piece] = []
    done = ""
    for i in answers:
        before = tokenizer.render_chat(guarded[:i], True, tools)
        after = tokenizer.render_chat(guarded[: i + 1], False, tools)
        if not (before.startswith(done) and after.startswith(before)):
            return _last_answer(guarded, tools, answers[-1], hidden, tokenizer)
        plan.append(Piece(before[len(done) :], False, True, hidden))
        plan += _answer(after[len(before) :], guarded[i].get("weight", 1) != 0, hidden, tokenizer)
        done = after
    while len(plan) > 1 and not plan[-1].trained:  # what follows the last trained answer has no effect
        plan.pop()
    if not plan:
        return [Piece(tokenizer.render_chat(guarded, False, tools), False, True, hidden)]
    return [*plan, *_missing_end(plan[-1], tokenizer)]


def _answer(text: str, trained: bool, hidden: dict[str, str], tokenizer: Tokenizer) -> list[Piece]:
    """The answer up to where the turn ends is trained on; line breaks that the template writes after that
    are not."""
    ends = list(tokenizer.control_pattern.finditer(text)) if tokenizer.control_pattern else []
    after = tokenizer.ends.template
    if ends and not text[ends[-1].end() :].strip():
        at = ends[-1].end()
    elif after and text.endswith(after):
        at = len(text) - len(after) + len(after.rstrip())
    else:
        at = len(text)
    answer = Piece(text[:at], trained, True, hidden)
    return [answer, Piece(text[at:], False, True, hidden)] if text[at:] else [answer]


def _missing_end(answer: Piece, tokenizer: Tokenizer) -> list[Piece]:
    """The end token, after the last answer of a template that writes no control token there: without one
    the model could never learn to stop."""
    ends = list(tokenizer.control_pattern.finditer(answer.text)) if tokenizer.control_pattern else []
    ended = ends and ends[-1].end() == len(answer.text)
    return [] if ended or not answer.trained else [Piece(tokenizer.eos_text, True, made=True)]


def _last_answer(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    last: int,
    hidden: dict[str, str],
    tokenizer: Tokenizer,
) -> list[Piece]:
    """For templates that rewrite earlier turns (some drop old reasoning): trains on the last answer only."""
    before = tokenizer.render_chat(messages[:last], True, tools)
    after = tokenizer.render_chat(messages[: last + 1], False, tools)
    if not after.startswith(before):
        before = tokenizer.render_chat(messages[:last], False, tools)
    if not after.startswith(before):
        raise TokenizerError(
            "the start of an answer cannot be found in the output of the model's chat template"
        )
    trained = messages[last].get("weight", 1) != 0
    plan = [Piece(before, False, True, hidden), *_answer(after[len(before) :], trained, hidden, tokenizer)]
    while len(plan) > 1 and not plan[-1].trained:
        plan.pop()
    return [*plan, *_missing_end(plan[-1], tokenizer)]
