"""From a row to the tokens a model sees: template, mask, cut. The report and the trainer both come through here,
so what the report counts is what the trainer trains on, token for token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from training.data.formats import BadRow, Format, OnBad, Part, Row, rows
from training.text.tokenizer import Encoded, Message, Piece, Tokenizer, TokenizerError, ids_of

BATCH_ROWS = 32  # a few megabytes of tokens: they are still in the processor's cache when they are counted


class Wants(Protocol):
    """What encoding needs of the job's settings; training.plan.config.Settings is one."""

    @property
    def sequence_length(self) -> int | None: ...
    @property
    def train_on(self) -> str | None: ...


@dataclass(frozen=True)
class Plain:
    """Just those two, for whoever has no job yet."""

    sequence_length: int | None = None
    train_on: str | None = "completion"


class Example(NamedTuple):
    """ids[i] is trained on (predicted from what stands before it) where mask[i] is 1; mask[0] is always 0."""

    ids: list[int]
    mask: list[int]
    truncated: int  # tokens that did not fit in the sequence length and are lost
    line: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        return self.mask.count(1)


class Tokens(NamedTuple):
    """What the pieces of a row became, from token `start` to `stop`: an example that can be counted before its lists are
    made. The report counts millions and shows five."""

    line: int
    parts: Sequence[tuple[Piece, Encoded, bool]]  # (text, its tokens, trained on)
    start: int
    stop: int
    truncated: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def trained(self) -> int:
        found = at = 0
        for _, encoded, trained in self.parts:
            end = at + len(encoded)
            if trained:
                # The very first token is never trained: nothing stands before it to predict it from.
                found += max(0, min(end, self.stop) - max(at, self.start + 1))
            at = end
        return found

    @property
    def last_trained(self) -> str:
        """The text that the last trained token ends, uncut."""
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

    def cut(self, length: int | None, *, split: bool) -> list[Tokens]:
        """Fit it into `length` tokens: windows one after the other (`split`), or its beginning."""
        if not length or self.length <= length:
            return [self]
        if not split:
            return [self._replace(stop=length, truncated=self.stop - length)]
        parts = [(piece, ids_of(encoded), trained) for piece, encoded, trained in self.parts]
        # Windows overlap by the one token that the next window's first prediction stands on.
        return [
            Tokens(self.line, parts, i, min(i + length, self.stop))
            for i in range(0, self.stop - 1, length - 1)
        ]


def examples(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: Wants,
    format: Format | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Example]:
    """Every example of a file, in order: what the trainer trains on and the report counts.

    A plain text longer than the sequence length becomes several examples, one after the other; nothing is lost.
    A chat or completion loses its end. Raises BadRow at the first bad row, or hands it to `on_bad` and goes on."""
    for batch in encoded_batches(path, tokenizer, settings, format, on_bad):
        for _, found in batch:
            for tokens in found:
                yield tokens.example()


def encoded_batches(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: Wants,
    format: Format | None = None,
    on_bad: OnBad | None = None,
    part: Part | None = None,
) -> Iterator[list[tuple[Row, list[Tokens]]]]:
    """`examples`, each row with its own, some hundred rows at a time, and not yet as lists."""
    for batch in batches(rows(path, format, on_bad=on_bad, part=part)):
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


def encode(row: Row, tokenizer: Tokenizer, settings: Wants) -> Example:
    """One row; what does not fit in the sequence length is cut off. Raises BadRow."""
    tokens = encode_batch([row], tokenizer, settings)[0]
    if isinstance(tokens, BadRow):
        raise tokens
    return tokens.cut(settings.sequence_length, split=False)[0].example()


def encode_batch(batch: Sequence[Row], tokenizer: Tokenizer, settings: Wants) -> list[Tokens | BadRow]:
    """Every row whole, before any cut, through one call of the tokenizer; a BadRow where the template refuses."""
    everything = (settings.train_on or "completion") == "all"
    plans: list[list[Piece] | BadRow] = []
    for row in batch:
        try:
            plans.append(pieces(row, tokenizer))
        except TokenizerError as error:
            plans.append(BadRow(row.line, str(error)))
    flat = [piece for plan in plans if not isinstance(plan, BadRow) for piece in plan]
    encoded = iter(tokenizer.encode_each(flat))
    return [
        plan if isinstance(plan, BadRow) else _tokens(row, plan, list(islice(encoded, len(plan))), everything)
        for row, plan in zip(batch, plans, strict=True)
    ]


def pieces(row: Row, tokenizer: Tokenizer) -> list[Piece]:
    """The row as stretches of text, in order, each trained on or not."""
    end = tokenizer.eos_text
    begin = [Piece(tokenizer.bos_text, False, made=True)] if tokenizer.bos_id is not None else []
    if row.kind == "text":
        return [*begin, Piece(row.text, True), Piece(end, True, made=True)]
    if row.kind == "completion":
        return [*begin, Piece(row.prompt, False), Piece(row.completion, True), Piece(end, True, made=True)]
    return _chat(row.messages, tokenizer)


def batches(items: Iterable[Row]) -> Iterator[list[Row]]:
    """So many at a time, or about a megabyte of them. What came before a BadFile still comes before it."""
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
    return Tokens(row.line, parts, 0, sum(map(len, encoded)))


def _chat(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Piece]:
    """Assistant turns are what follows the generation prompt, so the mask begins where generating would begin."""
    guarded, hidden = tokenizer.guard(messages)
    answers = [i for i, m in enumerate(guarded) if m["role"] == "assistant"]
    plan: list[Piece] = []
    done = ""
    for i in answers:
        before = tokenizer.render_chat(guarded[:i], add_generation_prompt=True)
        after = tokenizer.render_chat(guarded[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            return _last_answer(guarded, answers[-1], hidden, tokenizer)
        plan.append(Piece(before[len(done) :], False, True, hidden))
        plan += _answer(after[len(before) :], guarded[i].get("weight", 1) != 0, hidden, tokenizer)
        done = after
    while len(plan) > 1 and not plan[-1].trained:  # what follows the last trained answer changes nothing
        plan.pop()
    return plan or [Piece(tokenizer.render_chat(guarded), False, True, hidden)]


def _answer(text: str, trained: bool, hidden: dict[str, str], tokenizer: Tokenizer) -> list[Piece]:
    """Up to the control token that ends the turn is trained; line breaks a template puts after it are not."""
    ends = list(tokenizer.special_pattern.finditer(text)) if tokenizer.special_pattern else []
    at = ends[-1].end() if ends and not text[ends[-1].end() :].strip() else len(text)
    answer = Piece(text[:at], trained, True, hidden)
    return [answer, Piece(text[at:], False, True, hidden)] if text[at:] else [answer]


def _last_answer(
    messages: Sequence[Message], last: int, hidden: dict[str, str], tokenizer: Tokenizer
) -> list[Piece]:
    """For templates that rewrite earlier turns (some drop old reasoning): only the last answer can be trained on."""
    before = tokenizer.render_chat(messages[:last], add_generation_prompt=True)
    after = tokenizer.render_chat(messages[: last + 1])
    if not after.startswith(before):
        before = tokenizer.render_chat(messages[:last])
    if not after.startswith(before):
        raise TokenizerError(
            "the start of an answer cannot be found in the output of the model's chat template"
        )
    trained = messages[last].get("weight", 1) != 0
    return [Piece(before, False, True, hidden), *_answer(after[len(before) :], trained, hidden, tokenizer)]
