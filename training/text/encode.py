"""Turns a row into the tokens that a model sees: chat template, loss mask, truncation. The report and the
trainer both use it, so the report counts exactly the tokens that the trainer trains on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from training.data.bad_row import BadBase, LeftOut
from training.data.formats import BadRow, ByteRange, Format, OnBad, Row, rows
from training.text.chat_template import Message
from training.text.template_capabilities import opening_of
from training.text.tokenizer import Encoded, Piece, Tokenizer, TokenizerError, ids_of

OTHER_BASE = "Choose a base model whose chat template can express it, or change the row."
OTHER_TEMPLATE = "Choose another base model, or correct its chat template."
OnRow = Callable[[Row], None]
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
    part: int = 0  # counts the examples of a conversation that makes several, from 0

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        return self.mask.count(1)

    @property
    def targets(self) -> tuple[int, int]:
        """(tokens trained on, tokens up to the first of them: 0 if there is none)"""
        trained = self.trained
        return trained, self.mask.index(1) + 1 if trained else 0


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
    part: int = 0  # as in Example

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def targets(self) -> tuple[int, int]:
        """(tokens trained on, tokens up to the first of them, even if it is cut off: 0 if there is none)"""
        count = at = first = 0
        for _, encoded, trained in self.parts:
            end = at + len(encoded)
            if trained:
                # The very first token is never trained: nothing predicts it.
                begin = max(at, self.start + 1)
                count += max(0, min(end, self.stop) - begin)
                if not first and end > begin:
                    first = begin - self.start + 1
            at = end
        return count, first

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
        return Example(ids, mask, self.truncated, self.line, self.part)

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
    on_row: OnRow | None = None,
) -> Iterator[Example]:
    """Every example of a file, in order: what the trainer trains on and the report counts.

    A plain text longer than the sequence length becomes several examples, so nothing is lost. A chat or
    completion is truncated; a chat is several examples if its template rewrites earlier turns. Raises BadRow at the first bad row, or passes it to `on_bad` and continues. `on_row` gets
    every readable row, also those that the chat template rejects."""
    for batch in encoded_batches(path, tokenizer, settings, format, on_bad, on_row=on_row):
        for _, encoded in batch:
            for tokens in encoded:
                yield tokens.example()


def _passed_to(on_row: OnRow, read: Iterable[Row]) -> Iterator[Row]:
    for row in read:
        on_row(row)
        yield row


def encoded_batches(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    format: Format | None = None,
    on_bad: OnBad | None = None,
    part: ByteRange | None = None,
    *,
    by_order: bool = False,
    on_row: OnRow | None = None,
) -> Iterator[list[tuple[Row, list[Tokens]]]]:
    """Batches of (row, its examples), not yet as lists. `by_order`: rows have their number, not their line."""
    tokenizer = as_reported(tokenizer, format)
    read = rows(path, format, on_bad=on_bad, part=part)
    if on_row is not None:
        read = _passed_to(on_row, read)
    for batch in batches(numbered(read) if by_order else read):
        encoded: list[tuple[Row, list[Tokens]]] = []
        bad: BadRow | None = None
        for row, parts in zip(batch, encode_batch(batch, tokenizer, settings), strict=True):
            if not isinstance(parts, BadRow):
                length, split = settings.sequence_length, row.kind == "text"
                if length and any(tokens.stop > length for tokens in parts):
                    parts = [piece for tokens in parts for piece in tokens.cut(length, split=split)]
                encoded.append((row, parts))
            elif on_bad is not None:
                on_bad(parts)
            else:
                bad = parts
                break
        yield encoded
        if bad:
            raise bad


def as_reported(tokenizer: Tokenizer, format: Format | None) -> Tokenizer:
    """The tokenizer that encodes a file as its report did."""
    return tokenizer if format is None or format.version >= 2 else replace(tokenizer, early=True)


def encode(row: Row, tokenizer: Tokenizer, settings: EncodingSettings) -> Example:
    """Encodes a row that makes one example, truncated to the sequence length. Raises BadRow."""
    encoded = encode_batch([row], tokenizer, settings)[0]
    if isinstance(encoded, BadRow):
        raise encoded
    (tokens,) = encoded
    return tokens.cut(settings.sequence_length, split=False)[0].example()


def encode_batch(
    batch: Sequence[Row], tokenizer: Tokenizer, settings: EncodingSettings
) -> list[list[Tokens] | BadRow]:
    """Encodes rows before truncation, with one call of the tokenizer: the examples of each, usually one. A
    BadRow where the template rejects a row. Raises BadBase if it can express none."""
    everything = (settings.train_on or "completion") == "all"
    plans: list[list[list[Piece]] | BadRow] = []
    rows: list[Row] = []
    for row in batch:
        rows.append(row)
        try:
            more = row.kind == "chat" and max(map(len, row.messages)) > 2  # than role and content
            if more and (missing := _inexpressible(row, tokenizer)):
                rows[-1] = row._replace(unused=(*row.unused, *missing))
            plans.append(pieces(row, tokenizer))
        except TokenizerError as error:
            if tokenizer.template_fault:
                reason = f"the base model's chat template cannot be used: {tokenizer.template_fault}"
                raise BadBase(0, reason, OTHER_TEMPLATE) from error
            plans.append(LeftOut(row.line, str(error), OTHER_BASE))
    flat = [piece for plan in plans if not isinstance(plan, BadRow) for example in plan for piece in example]
    encoded = iter(tokenizer.encode_each(flat))
    return [
        plan if isinstance(plan, BadRow) else _tokens(row, plan, encoded, everything)
        for row, plan in zip(rows, plans, strict=True)
    ]


def pieces(row: Row, tokenizer: Tokenizer) -> list[list[Piece]]:
    """The examples of the row, each as pieces of text in order, trained on or not. Raises TokenizerError."""
    end = tokenizer.eos_text
    begin = [Piece(tokenizer.bos_text, False, made=True)] if tokenizer.bos_id is not None else []
    if row.kind == "text":
        return [[*begin, Piece(row.text, True), Piece(end, True, made=True)]]
    if row.kind == "completion":
        return [[*begin, Piece(row.prompt, False), Piece(row.completion, True), Piece(end, True, made=True)]]
    if row.kind == "segments":
        parts = [Piece(text, trained) for text, trained in row.segments]
        return [[*begin, *parts, Piece(end, parts[-1].trained, made=True)]]
    return _early_chat(row, tokenizer) if tokenizer.early else _chat(row.messages, row.tools, tokenizer)


def numbered(read: Iterable[Row]) -> Iterator[Row]:
    """Rows with their number among the readable ones instead of their line: all elements of a JSON array may
    be on one line."""
    return (row._replace(line=number) for number, row in enumerate(read, 1))


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


def _tokens(row: Row, plan: list[list[Piece]], encoded: Iterator[Encoded], everything: bool) -> list[Tokens]:
    examples = []
    for part, example in enumerate(plan):
        parts = [(piece, next(encoded), everything or piece.trained) for piece in example]
        length = sum([len(ids) for _, ids, _ in parts])
        examples.append(Tokens(row.line, parts, 0, length, 0, row.unused, part))
    return examples


# What every chat template can express, if only in our form for tools. Ids of calls are for programs.
TEXT_ONLY = {"role", "content", "weight", "tool_calls", "tool_call_id"}


def _inexpressible(row: Row, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Fields of the messages that the chat template leaves out."""
    fields = {key for message in row.messages if len(message) > 2 for key in message} - TEXT_ONLY
    return tuple(f"messages[].{field}" for field in sorted(fields - tokenizer.expresses)) if fields else ()


def _chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> list[list[Piece]]:
    """Trains on what follows each generation prompt, so the mask begins where generation would begin.

    A new example begins where the conversation so far is no longer what the model would see: many templates
    write earlier answers without their reasoning. So each answer is trained once, after exactly the tokens
    that inference feeds."""
    guarded, hidden, tools = tokenizer.guard(messages, tools)
    answers = [i for i, m in enumerate(guarded) if m["role"] == "assistant" and m.get("weight", 1) != 0]
    examples: list[list[Piece]] = []
    plan: list[Piece] = []
    done = ""
    for i in answers:
        before = tokenizer.render_chat(guarded[:i], True, tools)
        if plan and not (before.startswith(done) and _same_tokens(plan, before, done, hidden, tokenizer)):
            examples.append(plan)
            plan, done = [], ""
        rest = before[len(done) :]
        if plan and not _has_end(plan[-1].text, tokenizer) and rest.startswith(tokenizer.ends.tokens):
            # The mark of the next turn is what ends this one (GLM).
            end = next(token for token in tokenizer.ends.tokens if rest.startswith(token))
            plan[-1] = plan[-1]._replace(text=plan[-1].text + end)
            rest = rest.removeprefix(end)
        plan.append(Piece(rest, False, True, hidden))
        answer = _up_to_end(_continuation(guarded, i, before, tools, tokenizer), tokenizer)
        plan.append(Piece(answer, True, True, hidden))
        done = before + answer
    if not plan:  # nothing to train on
        return [[Piece(tokenizer.render_chat(guarded, False, tools), False, True, hidden)]]
    examples.append(plan)
    return [[*example, *_missing_end(example[-1], tokenizer)] for example in examples]


def _same_tokens(
    plan: list[Piece], before: str, done: str, hidden: Mapping[str, str], tokenizer: Tokenizer
) -> bool:
    """Whether the pieces so far have the tokens of the whole text: where no end token or line break stands
    between two pieces, some tokenizers join their characters to one token."""
    parts = [*plan, Piece(before[len(done) :], False, True, hidden)]
    # the borders before the last answer were checked earlier
    if all(_is_border(a.text, b.text, tokenizer.solid_tokens) for a, b in pairwise(parts[-3:])):
        return True
    joined = [id for encoded in tokenizer.encode_each(parts) for id in ids_of(encoded)]
    return joined == tokenizer.encode_pieces(before, hidden)


def _is_border(left: str, right: str, solid: tuple[str, ...]) -> bool:
    """Whether every tokenizer splits here."""
    return left.endswith(solid) or right.startswith(solid) or (left[-1:] == "\n" and not right[:1].isspace())


def _continuation(
    messages: Sequence[Message],
    at: int,
    prompt: str,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
) -> str:
    """What the model should write after this generation prompt: message `at` as the template writes it. Some
    prompts open the reasoning, which the template leaves out of the answer: then it is put back."""
    whole = tokenizer.render_chat(messages[: at + 1], False, tools)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    before = tokenizer.render_chat(messages[:at], False, tools)
    text = str(messages[at].get("content") or "")
    tag = opening_of(before, prompt, whole)
    if tag is None and at == 0:
        raise TokenizerError(
            "it begins with an answer, but the model's chat template needs a message before one "
            '(add one, or give this answer "weight": 0)'
        )
    if tag is None:
        raise TokenizerError(
            "the start of an answer cannot be found in the output of the model's chat template"
        )
    answer = whole[tag.start() :].lstrip("\n")
    begin, close = f"<{tag[1]}>", f"</{tag[1]}>"
    inside, closed, _ = text.partition(close)
    reasoning = str(messages[at].get("reasoning_content") or (inside if closed else ""))
    reasoning = reasoning.replace(begin, "", 1).strip("\n")
    if not tag[2]:
        return f"{reasoning}\n{close}\n\n{answer}"
    if reasoning:
        raise TokenizerError("the model's chat template asks for answers without reasoning")
    return answer


def _early_chat(row: Row, tokenizer: Tokenizer) -> list[list[Piece]]:
    """A conversation as the first release trained it: if the template rewrites earlier turns, only the last
    answer."""
    guarded, hidden, tools = tokenizer.guard(row.messages, row.tools)
    answers = [i for i, m in enumerate(guarded) if m["role"] == "assistant"]
    plan: list[Piece] = []
    done = ""
    for i in answers:
        before = tokenizer.render_chat(guarded[:i], True, tools)
        after = tokenizer.render_chat(guarded[: i + 1], False, tools)
        if not (before.startswith(done) and after.startswith(before)):
            return [_last_answer(guarded, tools, answers[-1], hidden, tokenizer)]
        plan.append(Piece(before[len(done) :], False, True, hidden))
        plan += _answer(after[len(before) :], guarded[i].get("weight", 1) != 0, hidden, tokenizer)
        done = after
    while len(plan) > 1 and not plan[-1].trained:  # what follows the last trained answer has no effect
        plan.pop()
    if not plan:
        return [[Piece(tokenizer.render_chat(guarded, False, tools), False, True, hidden)]]
    return [[*plan, *_missing_end(plan[-1], tokenizer)]]


def _up_to_end(text: str, tokenizer: Tokenizer) -> str:
    """The answer up to the token at which generation stops. What the template writes after that (line breaks,
    Phi-4's second end token after the last turn) is never generated."""
    at, rest = 0, len(text)
    controls = _controls(text, tokenizer)
    if len(controls) == 1 and text.endswith(controls[0][0]):  # most answers
        return text
    for control in reversed(controls):
        if text[control.end() : rest].strip():
            break
        rest = control.start()
        if not at or control[0] in tokenizer.ends.tokens:
            at = control.end()
    return text[: at or _plain_end(text, tokenizer)]


def _plain_end(text: str, tokenizer: Tokenizer) -> int:
    """Where an answer ends that the template ends without a control token: before its last line breaks."""
    after = tokenizer.ends.template
    return len(text) - len(after) + len(after.rstrip()) if after and text.endswith(after) else len(text)


def _controls(text: str, tokenizer: Tokenizer) -> list[re.Match[str]]:
    return list(tokenizer.control_pattern.finditer(text)) if tokenizer.control_pattern else []


def _answer(text: str, trained: bool, hidden: dict[str, str], tokenizer: Tokenizer) -> list[Piece]:
    """The answer up to where the turn ends is trained on; line breaks that the template writes after that
    are not."""
    ends = _controls(text, tokenizer)
    ended = ends and not text[ends[-1].end() :].strip()
    at = ends[-1].end() if ended else _plain_end(text, tokenizer)
    answer = Piece(text[:at], trained, True, hidden)
    return [answer, Piece(text[at:], False, True, hidden)] if text[at:] else [answer]


def _missing_end(answer: Piece, tokenizer: Tokenizer) -> list[Piece]:
    """The end token, after the last answer of a template that writes no control token there: without one
    the model could never learn to stop."""
    ended = _has_end(answer.text, tokenizer) or not answer.trained
    return [] if ended else [Piece(tokenizer.eos_text, True, made=True)]


def _has_end(text: str, tokenizer: Tokenizer) -> bool:
    """Whether an answer ends with a control token."""
    return text.endswith(tokenizer.added_tokens)


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
