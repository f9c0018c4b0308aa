"""From a row to the tokens a model sees: template, mask, cut. The report and the trainer both come through here,
so what the report counts is what the trainer trains on, token for token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from training.formats import BadRow, Format, OnBad, Part, Row, rows
from training.tokenizer import Message, Piece, Tokenizer, TokenizerError

BATCH_ROWS = 512
Sized = TypeVar("Sized", Row, tuple[Row, list["Example"]])


class Wants(Protocol):
    """What encoding needs of the job's settings; training.config.Settings is one."""

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
    def trained(self) -> int:
        return self.mask.count(1)


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
    for _, parts in encoded_rows(path, tokenizer, settings, format, on_bad):
        yield from parts


def encoded_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: Wants,
    format: Format | None = None,
    on_bad: OnBad | None = None,
    part: Part | None = None,
) -> Iterator[tuple[Row, list[Example]]]:
    """`examples`, each with the row it comes from."""
    for batch in batches(rows(path, format, on_bad=on_bad, part=part), BATCH_ROWS):
        for row, example in zip(batch, encode_batch(batch, tokenizer, settings), strict=True):
            if isinstance(example, Example):
                yield row, cut(example, settings.sequence_length, split=row.kind == "text")
            elif on_bad is not None:
                on_bad(example)
            else:
                raise example


def encode(row: Row, tokenizer: Tokenizer, settings: Wants) -> Example:
    """One row; what does not fit in the sequence length is cut off. Raises BadRow."""
    example = encode_batch([row], tokenizer, settings)[0]
    if isinstance(example, BadRow):
        raise example
    return cut(example, settings.sequence_length, split=False)[0]


def encode_batch(batch: Sequence[Row], tokenizer: Tokenizer, settings: Wants) -> list[Example | BadRow]:
    """Every row whole, before any cut, through one call of the tokenizer; a BadRow where the template refuses."""
    everything = (settings.train_on or "completion") == "all"
    plans: list[list[Piece] | BadRow] = []
    for row in batch:
        try:
            plans.append(pieces(row, tokenizer))
        except TokenizerError as error:
            plans.append(BadRow(row.line, str(error)))
    flat = [piece for plan in plans if not isinstance(plan, BadRow) for piece in plan]
    ids = iter(tokenizer.encode_pieces_batch(flat))
    return [
        plan if isinstance(plan, BadRow) else _join(row, plan, list(islice(ids, len(plan))), everything)
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


def cut(example: Example, length: int | None, *, split: bool) -> list[Example]:
    """Fit an example into `length` tokens: windows one after the other (`split`), or its beginning."""
    ids, mask, _, line = example
    if not length or len(ids) <= length:
        return [example]
    if not split:
        return [Example(ids[:length], mask[:length], len(ids) - length, line)]
    # Windows overlap by the one token that the next window's first prediction stands on.
    return [
        Example(ids[i : i + length], [0, *mask[i + 1 : i + length]], 0, line)
        for i in range(0, len(ids) - 1, length - 1)
    ]


def batches(items: Iterable[Sized], size: int) -> Iterator[list[Sized]]:
    """So many at a time, or about a megabyte of them. What came before a BadFile still comes before it."""
    held: list[Sized] = []
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
        characters += (item if isinstance(item, Row) else item[0]).size
        if len(held) == size or characters > 1 << 20:
            yield held
            held, characters = [], 0
    if held:
        yield held
    if ended:
        raise ended


def _join(row: Row, plan: list[Piece], encoded: list[list[int]], everything: bool) -> Example:
    ids: list[int] = []
    mask: list[int] = []
    for piece, part in zip(plan, encoded, strict=True):
        ids += part
        mask += [1 if everything or piece.trained else 0] * len(part)
    if mask:
        mask[0] = 0  # nothing stands before the first token to predict it from
    return Example(ids, mask, 0, row.line)


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
            "the model's chat template writes answers in a way whose beginning cannot be found"
        )
    trained = messages[last].get("weight", 1) != 0
    return [Piece(before, False, True, hidden), *_answer(after[len(before) :], trained, hidden, tokenizer)]
